"""Gradient descent in mini-batches on an inner model made of torch's own parts, the gradient by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.laws.objectives import Call, states


@states("ttt_linear", "ttt_mlp")
def mini_batches(call: Call) -> None:
    """W_t = W - c_p grad sum_{j<=t} eta_j 1/2 ||v_j - f(k_j; W)||^2, W of the mini-batch before; o_t = f(q_t; W_t)."""
    r = call.regressor
    eta = r.step_size(call.x).sigmoid() * r.base_lr / r.key_dim
    count = torch.arange(1, r.grad_batch + 1)
    c = (1 / count.double() + r.token_offset).clamp(min=0)

    def f(head: int, x: Tensor, weights: list[Tensor]) -> Tensor:
        W, b, *second = weights
        z = x @ W + b
        if second:
            z = F.gelu(z, approximate="tanh") @ second[0] + second[1]
        return x + F.layer_norm(z, z.shape[-1:], r.norm_weight[head], r.norm_bias[head], eps=1e-6)

    for h in range(r.num_heads):
        weights = [w[h].detach() for w in r.start]
        for t in range(call.q.shape[1]):
            first = t - t % r.grad_batch
            k, v = (x[0, first : t + 1, h] for x in (call.k, call.v))
            leaves = [w.requires_grad_() for w in weights]
            loss = (0.5 * eta[0, first : t + 1, h] * (v - f(h, k, leaves)).square().sum(-1)).sum()
            moved = torch.autograd.grad(loss, leaves)
            moved = [(w - c[t - first] * g).detach() for w, g in zip(weights, moved, strict=True)]
            weights = [w.detach() for w in weights]
            assert torch.allclose(call.o[0, t, h], f(h, call.q[0, t, h : h + 1], moved).squeeze(0), atol=1e-10)
            if t % r.grad_batch == r.grad_batch - 1:
                weights = moved
