"""Weighted least squares around every query."""

from __future__ import annotations

import torch
from torch import Tensor

from models.parts.rotary import rotate
from tests.laws.objectives import Call, states


@states("local_linear", "local_quadratic")
def ridge_regression(call: Call) -> None:
    """The intercept of argmin sum_i w_i |v_i - b - (phi(k_i) - phi(q)) W|^2 + lambda |W|^2, by lstsq on the rows of the
    pairs and, for the ridge, one row for each coefficient."""
    regressor = call.regressor
    beta, ridge = regressor.beta(call.q), regressor.ridge(call.q)

    def phi(x: Tensor) -> Tensor:
        return x if regressor.order == 1 else torch.cat([x, x**2], dim=-1)

    for t in range(call.q.shape[1]):
        for h in range(call.q.shape[2]):
            k, q = call.k[0, : t + 1, h], call.q[0, t, h]
            root = (beta[h] * k @ q).softmax(0).sqrt().unsqueeze(1)
            z = phi(k) - phi(q)
            F = z.shape[-1]
            left = torch.cat(
                [root * torch.cat([torch.ones_like(root), z], 1), torch.eye(F + 1).to(z)[1:] * ridge[h].sqrt()]
            )
            right = torch.cat([root * call.v[0, : t + 1, h], z.new_zeros(F, call.v.shape[-1])])
            assert torch.allclose(call.o[0, t, h], torch.linalg.lstsq(left, right).solution[0], atol=1e-9)


@states("parallax")
def given_slope(call: Call) -> None:
    """The mean of the values, moved along u by the weighted covariance of keys and values, o = mean + u Cov(k, v).
    Local linear attention has u = (C + lambda I)^-1 (q - mean key)."""
    regressor = call.regressor
    u = regressor.probe(call.x).unflatten(-1, call.q.shape[2:])
    u = rotate(u, torch.arange(u.shape[1]), regressor.rotary)
    beta = regressor.beta(call.q)
    for t in range(call.q.shape[1]):
        for h in range(call.q.shape[2]):
            k, v = call.k[0, : t + 1, h], call.v[0, : t + 1, h]
            w = (beta[h] * k @ call.q[0, t, h]).softmax(0)
            slope = torch.einsum("i,ik,iv->kv", w, k - w @ k, v - w @ v)
            assert torch.allclose(call.o[0, t, h], w @ v + u[0, t, h] @ slope, atol=1e-10)
