"""Steps of gradient descent with momentum, the gradient by autograd."""

import torch
from torch import Tensor

from tests.laws.objectives import Call, states


@states(
    "titans", "titans_static", "titans_mac", "titans_mag", "titans_mal"
)  # whose memory is this one, of other tokens
def last_pair(call: Call) -> None:
    descend(call, torch.ones(*call.k.shape[:3], 1, dtype=call.k.dtype))


@states("omega")
def window_of_pairs(call: Call) -> None:
    weights = call.regressor.weights(call.x).sigmoid().unflatten(-1, (call.k.shape[2], -1))
    descend(call, weights / weights.sum(-1, keepdim=True).clamp(min=1))


def descend(call: Call, weights: Tensor) -> None:
    """D = a eta U and M = a (M + (1 - eta) U), with U = D - (1 - eta) theta grad 1/2 sum_r weight_r ||v_{t-r} - k_{t-r}
    M||^2 at the last memory."""
    eta = call.regressor.momentum(call.x).sigmoid()
    theta = (1 - eta) * call.regressor.step_size(call.x).sigmoid()
    M = torch.zeros(*call.k.shape[2:], call.v.shape[-1], dtype=call.k.dtype)
    D = torch.zeros_like(M)
    for t in range(call.q.shape[1]):
        M.requires_grad_()
        loss = 0
        for r in range(min(weights.shape[-1], t + 1)):
            error = call.v[0, t - r] - (call.k[0, t - r].unsqueeze(1) @ M).squeeze(1)
            loss = loss + 0.5 * weights[0, t, :, r] @ error.square().sum(-1)
        (gradient,) = torch.autograd.grad(loss, M)
        a, keep, step = (x[0, t].view(-1, 1, 1) for x in (call.log_decay.exp(), eta, theta))
        U = D - step * gradient
        M, D = (a * (M + (1 - keep) * U)).detach(), (a * keep * U).detach()
        assert torch.allclose(call.o[0, t], (call.q[0, t].unsqueeze(1) @ M).squeeze(1), atol=1e-10)
