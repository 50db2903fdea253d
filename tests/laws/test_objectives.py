"""Law 6: it is the regression it claims. Each preset's reads equal its stated objective, minimised or stepped by other
means: torch.linalg.lstsq, autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from models.regression.regressor import Regressor
from tests.laws.presets import PRESETS, inputs, mixer


class Call(NamedTuple):
    """What a regressor was given and what it gave back, for a batch of one."""

    regressor: Regressor
    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    o: Tensor


def call_of(preset: str, T: int = 12) -> Call:
    """The regressor's arguments inside its own mixer."""
    m, seen = mixer(preset), []
    m.regressor.register_forward_hook(lambda module, args, result: seen.append(Call(module, *args[:5], result[0])))
    with torch.no_grad():
        m(inputs(1, T))
    return seen[0]


def weighted_mean(call: Call) -> None:
    """softmax: argmin_m sum_i exp(beta q.k_i) ||v_i - m||^2, by least squares."""
    beta = call.regressor.log_beta.exp()
    for t in range(call.q.shape[1]):
        for h in range(call.q.shape[2]):
            root = (beta[h] * call.k[0, : t + 1, h] @ call.q[0, t, h] / 2).exp().unsqueeze(1)
            m = torch.linalg.lstsq(root, root * call.v[0, : t + 1, h]).solution[0]
            assert torch.allclose(call.o[0, t, h], m, atol=1e-10)


def gradient_steps(call: Call) -> None:
    """gated_delta: S = S' - b grad 1/2 ||v - k S'||^2 at S' = a S, the gradient by autograd."""
    steps = call.regressor.step_size(call.x).sigmoid()
    S = torch.zeros(*call.k.shape[2:], call.v.shape[-1], dtype=call.k.dtype)
    for t in range(call.q.shape[1]):
        S = (call.log_decay[0, t].exp().view(-1, 1, 1) * S).requires_grad_()
        error = call.v[0, t] - (call.k[0, t].unsqueeze(1) @ S).squeeze(1)
        (gradient,) = torch.autograd.grad(0.5 * error.square().sum(), S)
        S = (S - steps[0, t].view(-1, 1, 1) * gradient).detach()
        assert torch.allclose(call.o[0, t], (call.q[0, t].unsqueeze(1) @ S).squeeze(1), atol=1e-10)


OBJECTIVES: dict[str, Callable[[Call], None]] = {"softmax": weighted_mean, "gated_delta": gradient_steps}


@pytest.mark.parametrize("preset", PRESETS)
def test_6_it_is_the_regression_it_claims(preset):
    OBJECTIVES[preset](call_of(preset))
