"""Scores by halvings against the sum that they are, with L written out."""

from __future__ import annotations

import pytest
import torch

from models.regression.chunks import fades
from models.regression.halvings import Reader, scores, scores_backward
from models.regression.regressor import FORGET


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("C", [2, 5, 16, 33])
def test_scores_and_gradients_are_the_sums(C, early):
    """At any length, with gates that are nearly open, nearly closed, and one that forgets."""
    torch.manual_seed(0)
    x, y, g = (torch.randn(3, C, 4, dtype=torch.float64) for _ in range(3))
    g = -torch.exp(3 * g)
    g[:, C // 2] = FORGET
    x, y, g = (z.requires_grad_() for z in (x, y, g))
    within = fades(x, g).within
    if early:
        within = torch.cat([torch.zeros_like(within[:, :1]), within[:, :-1]], dim=1)
    expected, found = torch.einsum("mtj,mtij,mij->mti", x, within, y), scores([Reader(x, early)], y, g)[0]
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)
    d = torch.randn(3, C, C, dtype=torch.float64).tril()
    gradients = torch.autograd.grad(expected, [x, y, g], d)
    for a, b in zip(torch.autograd.grad(found, [x, y, g], d), gradients, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)
    x, y, g = (z.detach() for z in (x, y, g))
    (dx, other), dy = scores_backward([d, torch.zeros_like(d)], [Reader(x, early), Reader(y)], y, g)
    assert other.count_nonzero() == 0
    for a, b in zip((dx, dy), gradients, strict=False):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)
