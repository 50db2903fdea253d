"""Laws of the window of a deep memory: a matrix has Omega's, a weight on the own pair alone is none, and every form is
the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from models.parts.sizes import Sizes
from models.regression.deep import DeepMemory
from models.regression.deep.forms import Call, deep_memory
from models.regression.deep.network import Network
from models.regression.deep.rules import Gates, Online, Start
from models.regression.deep.windows import band
from models.regression.linear.omega import recurrent_omega
from tests.laws.presets import inputs, mixer, part
from tests.regression.deep.test_deep import DOCUMENTS, B, H, K, draw, largest_error, outcome

T, c = 40, 5


def windowed(network: Network, start: Start, *inputs: Any, state=None, grad_batch=8, segments=None, **settings: Any):
    """Gradient descent, with momentum if that is given; the last input is gamma."""
    q, k, v, *gates, gamma = inputs
    rule, gates = Online(network, momentum=gates[1] is not None), Gates(*gates, window=gamma)
    return deep_memory(rule, Call(start, q, k, v, gates, state, grad_batch, segments), **settings)


def weights() -> torch.Tensor:
    return torch.rand(B, T, H, c, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) / c


def test_a_row_of_the_band_has_its_own_weights():
    w = torch.arange(1.0, 7.0).view(3, 2)  # three tokens, the last two pairs of each, the newest first
    expected = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 4.0, 3.0, 0.0], [0.0, 0.0, 6.0, 5.0]])
    assert torch.equal(band(w), expected)


@pytest.mark.parametrize("chunk", [None, 8], ids=["recurrent", "chunked"])
def test_one_layer_from_zero_is_omega(chunk):
    start, inputs = draw(T, 1)
    start, segments = start._replace(weights=(torch.zeros_like(start.weights[0]),)), DOCUMENTS[:, :T]
    for b in (1, 8):
        o, _ = windowed(Network(), start, *inputs, weights(), grad_batch=b, segments=segments, chunk=chunk)
        q, k, v, *gates = inputs
        expected, _ = recurrent_omega(q, k, v, weights(), *gates, grad_batch=b, segments=segments)
        assert largest_error([o], [expected]) < 1e-10


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("documents", [True, False])
def test_chunked_is_recurrent(momentum, documents):
    """Every output, weight and gradient; mini-batches shorter than the window, chunks within them, and calls."""
    start, inputs = draw(T)
    inputs = [*inputs, weights()]
    inputs[4] = inputs[4] if momentum else None
    segments = DOCUMENTS[:, :T] if documents else None
    for b, chunk, splits in ((16, 8, (1, 3, 30)), (3, 3, ())):
        exact = outcome(windowed, Network(), start, inputs, (), segments, grad_batch=b)
        found = outcome(windowed, Network(), start, inputs, splits, segments, grad_batch=b, chunk=chunk)
        assert largest_error(found, exact) < 1e-10, (b, chunk, splits)


def test_a_weight_on_the_own_pair_alone_is_no_window():
    """Atlas of window 1 with momentum is titans_mlp."""
    start, inputs = draw(T)
    own = torch.zeros(B, T, H, c, dtype=torch.float64)
    own[..., 0] = 1.0
    plain = deep_memory(Online(Network()), Call(start, *inputs[:3], Gates(*inputs[3:]), None, 8), 8)[0]
    assert (windowed(Network(), start, *inputs, own, chunk=8)[0] - plain).abs().max() < 1e-12


PLAIN = {
    "regressor__window": 1,
    "regressor__inner_optimizer": "momentum",
    "regressor__grad_batch": 64,
    "regressor__expansion": 4,
}
SGD = {"regressor__inner_optimizer": "sgd"}


@pytest.mark.parametrize(
    ("preset", "settings", "titans"),
    [
        ("atlas", PLAIN | {"key_dim": None, "features": part("features", "identity")}, {"regressor__grad_batch": 64}),
        ("yaad", {"regressor__inner_loss": "l2"}, SGD),
        ("yaad", {"regressor__delta": 1e9}, SGD),
        ("memora", {"regressor__mass": None, "regressor__grad_batch": 16}, SGD | {"regressor__grad_batch": 16}),
    ],
    ids=["atlas", "yaad-l2", "yaad-delta", "memora"],
)
def test_with_the_settings_of_the_page_they_are_titans_mlp(preset, settings, titans):
    """docs/family.md says so."""
    m, known = mixer(preset, **settings), mixer("titans_mlp", **titans)
    known.load_state_dict(m.state_dict())
    x = inputs(1, 70)
    assert torch.equal(m(x)[0], known(x)[0])


def test_what_cannot_be():
    memory = partial(DeepMemory, Sizes(4, H, H, K, K))
    with pytest.raises(ValueError, match=r"regressor.window=0 must be a number of pairs, at least 1"):
        memory(window=0)
    for settings in ({"bias": True}, {"layer_norm": True}, {"inner_optimizer": "average"}):
        with pytest.raises(ValueError, match=r"regressor.window=2 goes with bias=false"):
            memory(window=2, **settings)
