"""Longhorn's diagonal form. (Law 6 solves the proximal problem of the whole one.)"""

from __future__ import annotations

import pytest
import torch

from tests.laws.presets import CHUNK, inputs, largest_difference, mixer, outcome, part
from tests.laws.test_objectives import call_of

T = 2 * CHUNK + 11
DIAGONAL = {"regressor__diagonal": True}


def test_the_diagonal_form_is_its_recurrence():
    """S <- (1 - d k^2) * S + d k^T v, and not the whole step's."""
    x, q, k, v, o = (call := call_of("longhorn", **DIAGONAL)).x, call.q, call.k, call.v, call.o
    b = call.regressor.step_size(x).sigmoid()
    d = b / (1 + b * k.square().sum(-1))
    S = torch.zeros(*k.shape[2:], v.shape[-1], dtype=k.dtype)
    for t in range(x.shape[1]):
        write = (d[0, t].unsqueeze(-1) * k[0, t]).unsqueeze(-1)
        S = (1 - write * k[0, t].unsqueeze(-1)) * S + write * v[0, t].unsqueeze(1)
        assert torch.allclose(o[0, t], (q[0, t].unsqueeze(1) @ S).squeeze(1), atol=1e-10)
    assert (call_of("longhorn").o - o).abs().max() > 1e-3


@pytest.mark.parametrize("decay", ["none", "scalar", "channel", "signed"])
def test_the_diagonal_form_is_one_map_in_every_form(decay):
    settings = {"decay": part("decay", decay), **DIAGONAL}
    documents = (torch.arange(T) // 9).expand(2, -1)
    for segments in (None, documents):
        truth = outcome(mixer("longhorn", "recurrent", **settings), inputs(2, T), segments=segments)
        for splits in ((), (5, CHUNK)):
            found = outcome(mixer("longhorn", **settings), inputs(2, T), splits, segments)
            assert largest_difference(found, truth) < 1e-10


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e4])
def test_the_diagonal_form_is_finite(scale):
    found = outcome(mixer("longhorn", dtype=torch.float32, **DIAGONAL), scale * inputs(2, T, torch.float32))
    assert all(t.isfinite().all() for t in found)
