"""Weights that fade are those of the document alone, however long the row before it.

A sum along a long row in float32 loses the digits of what comes last:
https://github.com/tensorflow/tensorflow/issues/23312.
"""

from __future__ import annotations

import pytest
import torch

from models.parts.decay import ScalarDecay
from models.parts.sizes import Sizes
from models.regression.local import Forgetting, Intention
from models.regression.local.pairs import faded, running_sum
from models.regression.regressor import Tokens

LONG, LAST, SIZES = 8192, 64, Sizes(8, 1, 1, 8, 8)


def row(T: int, last: int) -> Tokens:
    """Unit keys, with the gates of Mamba-2's fastest heads; a long document and a short one behind it."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.nn.functional.normalize(torch.randn(1, T, 1, 8, generator=g), dim=-1) for _ in range(3))
    log_decay = -1.6 * torch.rand(1, T, 1, generator=g)
    return Tokens(q[..., 0, :], q, k, v, log_decay, (torch.arange(T) >= T - last).long().unsqueeze(0))


def relative(regressor: torch.nn.Module, packed: Tokens, last: int) -> float:
    alone = Tokens(*(x[:, -last:] for x in packed[:-1]), None)
    found, expected = regressor(packed)[0][:, -last:], regressor(alone)[0]
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
def test_the_last_document_of_a_long_row_is_that_document_alone(kernel):
    """By the fused kernel, and in blocks of queries of a window."""
    window = None if kernel == "gaussian" else LAST
    with torch.no_grad():
        regressor = Forgetting(SIZES, kernel=kernel, window=window)
        assert relative(regressor, row(LONG, LAST), LAST) < 1e-6


def test_so_it_is_for_kernel_ridge_regression():
    with torch.no_grad():
        assert relative(Intention(SIZES, ridge=0.5), row(2048, 32), 32) < 1e-6


def test_sums_are_per_document_and_have_the_digits_of_float64():
    packed = row(LONG, LAST)
    start = torch.where(torch.arange(LONG) < LONG - LAST, 0, LONG - LAST).unsqueeze(0)
    found = faded(packed.log_decay, start, 0)
    alone = packed.log_decay[:, -LAST:].double().cumsum(1)
    assert found.dtype == torch.float64 and (found[:, -LAST:] - alone).abs().max() < 1e-11
    gates = ScalarDecay(SIZES)(torch.zeros(1, LONG, 8))[0]
    assert gates.dtype == torch.float32, "what is summed is float32 still"


def test_the_running_sum_is_one_with_its_gradient():
    """An operator that torch.compile leaves alone: https://github.com/pytorch/pytorch/issues/180221."""
    x = torch.randn(2, 130, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(running_sum(x), x.cumsum(1)) and torch.autograd.gradcheck(running_sum, x[:, :5])
    torch.library.opcheck(running_sum, (x,))
