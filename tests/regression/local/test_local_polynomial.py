"""Local polynomial regression: what it reproduces, its limits, its precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.regression.local.constant import recurrent_local_constant
from models.regression.local.pairs import Pairs, View
from models.regression.local.polynomial import blocked_local_polynomial, monomials, recurrent_local_polynomial
from tests.laws.presets import inputs, largest_difference, mixer, outcome


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def heads(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("order, num_features", [(1, 4), (2, 14)])
@pytest.mark.parametrize("form", ["recurrent", "blocked"])
def test_polynomials_of_its_order_are_reproduced_exactly(order, num_features, form):
    """Values that are a polynomial of the keys, from as many pairs as it has coefficients on; the order below is not
    exact."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, 60, 1, 4, dtype=torch.float64) for _ in range(2))
    coefficients = torch.randn(num_features, 3, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return 0.7 + monomials(x, order, True) @ coefficients

    def largest_error(order: int) -> float:
        arguments = (q, Pairs(k, f(k)), heads(0.5), heads(1e-11), View(), order, True)
        o = recurrent_local_polynomial(*arguments) if form == "recurrent" else blocked_local_polynomial(*arguments, 16)
        return (o - f(q))[:, 2 * num_features :].abs().max().item()

    assert largest_error(order) < 1e-6
    assert order == 1 or largest_error(1) > 0.1


def test_a_large_ridge_is_softmax():
    torch.manual_seed(0)
    q, k, v, beta = unit(1, 30, 2, 5), unit(1, 30, 2, 5), torch.randn(1, 30, 2, 3, dtype=torch.float64), heads(3, 6)
    softmax = recurrent_local_constant(q, Pairs(k, v), beta)
    for order in (1, 2):
        o = blocked_local_polynomial(q, Pairs(k, v), beta, heads(1e9, 1e9), View(), order, True, 8)
        assert torch.allclose(o, softmax, atol=1e-8)


def test_a_wide_kernel_is_ridge_regression_with_an_intercept():
    torch.manual_seed(0)
    q, k, v = unit(1, 40, 1, 5), unit(1, 40, 1, 5), torch.randn(1, 40, 1, 3, dtype=torch.float64)
    o = blocked_local_polynomial(q, Pairs(k, v), heads(1e-12), heads(0.01), View(), 1, True, 64)[0, -1, 0]
    keys, values = k[0, :, 0] - k[0, :, 0].mean(0), v[0, :, 0] - v[0, :, 0].mean(0)
    slope = torch.linalg.solve(keys.T @ keys + 0.01 * 40 * torch.eye(5).to(keys), keys.T @ values)
    assert torch.allclose(o, v[0, :, 0].mean(0) + (q[0, -1, 0] - k[0, :, 0].mean(0)) @ slope, atol=1e-9)


def test_it_is_the_estimator_written_about_the_query():
    """sum_i w_i (1 - z_i . rho) / (1 - mu . rho) v_i with z = k - q, mu = sum w z, rho = (sum w z z^T + lambda I)^-1 mu
    (Zuo et al. 2026)."""
    torch.manual_seed(0)
    q, k, v = unit(1, 40, 1, 5), unit(1, 40, 1, 5), torch.randn(1, 40, 1, 3, dtype=torch.float64)
    o = blocked_local_polynomial(q, Pairs(k, v), heads(4), heads(1e-3), View(), 1, True, 64)[0, :, 0]
    q, k, v = q[0, :, 0], k[0, :, 0], v[0, :, 0]
    w = (4 * q @ k.T).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(-1)
    z = k - q.unsqueeze(1)
    mu = torch.einsum("ti,tik->tk", w, z)
    moments = torch.einsum("ti,tia,tib->tab", w, z, z) + 1e-3 * torch.eye(5).to(z)
    rho = torch.linalg.solve(moments, mu)
    weights = w * (1 - torch.einsum("tik,tk->ti", z, rho)) / (1 - (mu * rho).sum(-1, keepdim=True))
    assert torch.allclose(o, weights @ v, atol=1e-9)


@pytest.mark.parametrize("cross_terms", [False, True])
def test_blocks_and_both_solvers_are_the_definition(cross_terms):
    """32 features by Cholesky, 152 by conjugate gradients; with documents and calls, gradients included."""
    x = inputs(1, 14)
    settings = {"regressor__cross_terms": cross_terms, "num_kv_heads": 1}
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor([4, 1, 9])).unsqueeze(0)
    truth = outcome(mixer("local_quadratic", "recurrent", **settings), x, segments=segments, memory=False)
    found = outcome(mixer("local_quadratic", regressor__block=4, **settings), x, (6,), segments, memory=False)
    assert largest_difference(found, truth) < 1e-9


def test_windows():
    x = inputs(1, 20)
    truth = outcome(mixer("local_linear", "recurrent", regressor__window=6), x, memory=False)
    found = outcome(mixer("local_linear", regressor__window=6, regressor__block=4), x, (9,), memory=False)
    assert largest_difference(found, truth) < 1e-10


@pytest.mark.parametrize("ridge, tolerance", [(0.1, 2e-6), (1e-3, 1e-4)])
def test_float32(ridge, tolerance):
    """Keys that share a mean, as learned ones do: the moments' rounding against the ridge."""
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(1, 200, 1, 16, dtype=torch.float64) * 0.3 + 1, dim=-1) for _ in range(2))
    v = torch.randn(1, 200, 1, 8, dtype=torch.float64)

    def reads(dtype: torch.dtype) -> Tensor:
        parts = [x.to(dtype) for x in (k, v, heads(8), heads(ridge))]
        return blocked_local_polynomial(q.to(dtype), Pairs(*parts[:2]), *parts[2:], View(), 1, True, 64)

    exact = reads(torch.float64)
    assert (reads(torch.float32) - exact).abs().max() < tolerance * exact.abs().max()


def test_a_probe_of_zero_is_softmax():
    m, softmax = mixer("parallax"), mixer("softmax")
    softmax.load_state_dict(m.state_dict(), strict=False)
    torch.nn.init.zeros_(m.regressor.probe.weight)
    x = inputs(2, 20)
    assert largest_difference([m(x)[0]], [softmax(x)[0]]) < 1e-13


@pytest.mark.parametrize("setting, value", [("order", 3), ("ridge", 0)])
def test_bad_settings(setting, value):
    with pytest.raises(ValueError, match=f"regressor.{setting}={value}"):
        mixer("local_linear", **{f"regressor__{setting}": value})
