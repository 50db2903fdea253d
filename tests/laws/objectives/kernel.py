"""Regression in a reproducing-kernel space."""

from __future__ import annotations

import torch

from tests.laws.objectives import Call, states


@states("intention")
def separate_solves(call: Call) -> None:
    """Each query's own kernel ridge regression: the coefficients of its pairs by a general solver."""
    beta, ridge = call.regressor.beta(call.q), call.regressor.ridge(call.q)
    for t in range(call.q.shape[1]):
        for h in range(call.q.shape[2]):
            k, q = call.k[0, : t + 1, h], call.q[0, t, h]
            kernel = (-beta[h] * torch.cdist(k, k).square() / 2).exp() + ridge[h] * torch.eye(t + 1).to(k)
            kappa = (-beta[h] * (q - k).square().sum(-1) / 2).exp()
            assert torch.allclose(
                call.o[0, t, h], kappa @ torch.linalg.solve(kernel, call.v[0, : t + 1, h]), atol=1e-10
            )
