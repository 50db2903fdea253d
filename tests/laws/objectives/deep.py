"""Steps along the gradient of an inner network's loss, by autograd, every weight held for every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.laws.objectives import Call, states


def mlp(weights: list[Tensor], x: Tensor) -> Tensor:
    """x [H, K] to [H, V] through weights [H, in, out]."""
    for W in weights[:-1]:
        x = F.silu(torch.einsum("hk,hkm->hm", x, W))
    return torch.einsum("hk,hkm->hm", x, weights[-1])


def step_limits(weights: list[Tensor], k: Tensor, v: Tensor) -> Tensor:
    """1 / max(1, how far a step of size 1 moves the prediction along its error), per head, by a directional
    derivative."""
    error = v - mlp(weights, k)
    W = [w.detach().requires_grad_() for w in weights]
    gradients = torch.autograd.grad((mlp(W, k) * error.detach()).sum(), W)  # of f . e: with the sign of a descent
    moved = torch.autograd.functional.jvp(lambda *w: mlp(list(w), k), tuple(weights), gradients)[1]
    return 1 / ((moved * error).sum(-1) / error.square().sum(-1)).clamp(min=1)


@states("titans_mlp")
def momentum(call: Call) -> None:
    """S = eta S - theta grad 1/2 ||v - f(k)||^2 at the last mini-batch's end; M = M_0 + a (M - M_0) + S."""
    start = [w.detach() for w in call.regressor.begin().weights]
    eta = call.regressor.momentum(call.x).sigmoid()[0]
    theta = (1 - eta) * call.regressor.step_size(call.x).sigmoid()[0] / call.regressor.grad_batch
    M, S = start, [torch.zeros_like(w) for w in start]
    for t in range(call.q.shape[1]):
        k, v = call.k[0, t], call.v[0, t]
        if t % call.regressor.grad_batch == 0:
            R = [w.clone().requires_grad_() for w in M]
        share = step_limits([r.detach() for r in R], k, v)
        loss = 0.5 * (share * (v - mlp(R, k)).square().sum(-1)).sum()
        gradients = torch.autograd.grad(loss, R)
        gates = (g[t].view(-1, 1, 1) for g in (eta, theta, call.log_decay[0].exp()))
        e, step, a = gates
        S = [e * s - step * g for s, g in zip(S, gradients, strict=True)]
        M = [w + a * (m - w) + s for w, m, s in zip(start, M, S, strict=True)]
        assert torch.allclose(call.o[0, t], mlp(M, call.q[0, t]), atol=1e-10)
