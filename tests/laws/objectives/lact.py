"""Muon steps along the gradient of -f(k) . v, by autograd, and attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.training.optimizer import orthogonal
from tests.laws.objectives import Call, states


def swiglu(W: list[Tensor], x: Tensor) -> Tensor:
    """x [t, K], weights of one head."""
    return (F.silu(x @ W[0]) * (x @ W[1])) @ W[2]


@states("lact")
def apply_then_update(call: Call) -> None:
    """f(q) with the weights of the chunks before, and softmax over the window, here all tokens."""
    r, T = call.regressor, call.q.shape[1]
    rates, momenta = F.softplus(r.rates(call.x))[0].unflatten(-1, (-1, 3)), r.momentum(call.x).sigmoid()[0]
    scale, beta = F.silu(r.scale(call.x))[0], r.attention.log_beta.exp()
    for h in range(call.q.shape[2]):
        q, k, v = (y[0, :, h] for y in (call.q, call.k, call.v))
        start = [w[h].detach() for w in r.start]
        W, average = start, [torch.zeros_like(w) for w in start]
        for chunk in torch.arange(T).split(r.grad_batch):
            read = swiglu(W, q[chunk])
            read = read * (read.square().mean(-1, keepdim=True) + r.norm.eps).rsqrt() * r.norm.weight
            logits = beta[h] * q[chunk] @ k.mT
            local = logits.masked_fill(torch.arange(T) > chunk.unsqueeze(1), -torch.inf).softmax(-1) @ v
            assert torch.allclose(call.o[0, chunk, h], scale[chunk, h, None] * read + local, atol=1e-10)
            for i, w in enumerate(W):
                w.requires_grad_()
                # each matrix has rates of its own
                loss = -(rates[chunk, h, i] * (swiglu(W, k[chunk]) * v[chunk]).sum(-1)).sum()
                average[i] = (momenta[chunk, h].mean() * average[i] - torch.autograd.grad(loss, w)[0]).detach()
            steps = [w.detach() + orthogonal(m) for w, m in zip(W, average, strict=True)]
            W = [w * first.norm(dim=0) / (w.norm(dim=0) + 1e-5) for w, first in zip(steps, start, strict=True)]
            W = [w.detach() for w in W]
