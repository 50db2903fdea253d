"""Steps whose residual is measured in one place and written in another: by autograd, the residual held."""

import torch
from torch import Tensor

from models.parts.norm import unit
from models.parts.precision import NORM_EPS
from tests.laws.objectives import Call, states
from tests.laws.objectives.delta import faded, steps, walk


def against(S: Tensor, key: Tensor, residual: Tensor) -> Tensor:
    """The gradient of -(key S) . residual, which is held; key [H, K], residual [H, V]."""
    S = S.detach().requires_grad_()
    return torch.autograd.grad(-((key.unsqueeze(1) @ S).squeeze(1) * residual.detach()).sum(), S)[0]


def read(key: Tensor, S: Tensor) -> Tensor:
    return (key.unsqueeze(1) @ S).squeeze(1)


@states("gdn2")
def erased_and_written_by_channel(call: Call) -> None:
    """S = S' - grad of -(k S) . u, u = w v - (b k) S'."""
    b, w = (gate[0] for gate in call.regressor.gates(call.x))

    def update(t: int, S: Tensor) -> Tensor:
        S, k = faded(call, t, S), call.k[0, t]
        return S - against(S, k, w[t] * call.v[0, t] - read(b[t] * k, S))

    walk(call, update)


@states("comba")
def erased_before_the_decay_in_part(call: Call) -> None:
    """S = a S - b grad of -(k S) . u, u = v - d k S, read at q - D d k."""
    d, D = call.regressor.feedback.sigmoid().unsqueeze(-1), call.regressor.correction.unsqueeze(-1)

    def update(t: int, S: Tensor) -> Tensor:
        k = call.k[0, t]
        step = steps(call)[t].view(-1, 1, 1) * against(S, k, call.v[0, t] - read(d * k, S))
        return faded(call, t, S) - step

    walk(call._replace(q=call.q - D * d * call.k), update)


@states("rwkv7")
def erased_under_another_key(call: Call) -> None:
    """S = a S - grad of (e x S) . (x S held) - grad of -(y S) . v."""
    regressor = call.regressor
    rate = regressor.rates(call.x)[0]

    def update(t: int, S: Tensor) -> Tensor:
        k, e = call.k[0, t], rate[t]
        x, y = unit(k * regressor.erase_scale, NORM_EPS), k * (1 + (e - 1) * regressor.mix)
        return faded(call, t, S) - against(S, e * x, -read(x, S)) - against(S, y, call.v[0, t])

    walk(call, update)
