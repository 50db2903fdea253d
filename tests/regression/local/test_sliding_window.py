"""Softmax over a sliding window and persistent pairs: what a query sees, and the laws with a window that is short."""

from __future__ import annotations

import pytest
import torch

from tests.laws import test_laws as laws
from tests.laws.presets import inputs, largest_difference, mixer
from tests.laws.test_objectives import call_of


@pytest.mark.parametrize(
    "settings",
    [
        {"regressor__window": 5},
        {"regressor__window": 1, "regressor__persistent": 1},
        {"regressor__window": 3, "regressor__persistent": 0, "num_kv_heads": 1, "conv_size": 3},
        {"regressor__window": 200, "pairs": "shift"},
    ],
    ids=str,
)
def test_it_keeps_the_laws_with_other_settings(settings, monkeypatch):
    monkeypatch.setattr(laws, "mixer", lambda name, *args, **more: mixer(name, *args, **settings, **more))
    for form in ("torch", "recurrent"):
        laws.test_1_causal("sliding_window", form)
        laws.test_4_packed_documents_are_separate_sequences("sliding_window", form)
    laws.test_3_one_map_in_every_form("sliding_window")
    laws.test_3_decoding_token_by_token("sliding_window")
    laws.test_9_counts("sliding_window")


def test_a_query_sees_its_window_and_the_persistent_pairs():
    """One softmax over both, pair by pair."""
    call = call_of("sliding_window", regressor__window=4)
    r = call.regressor
    assert len(r.persistent_keys) == 4
    for t in range(call.q.shape[1]):
        k, v = (
            torch.cat([learned, x[0, max(0, t - 3) : t + 1]])
            for learned, x in ((r.persistent_keys, call.k), (r.persistent_values, call.v))
        )
        weights = (r.log_beta.exp() * (k * call.q[0, t]).sum(-1)).softmax(0)
        assert torch.allclose(call.o[0, t], (weights.unsqueeze(-1) * v).sum(0), atol=1e-12)


def test_without_persistent_pairs_it_is_softmax_with_a_window():
    x = inputs(2, 30)
    theirs = mixer("softmax", regressor__window=7)
    ours = mixer("sliding_window", regressor__window=7, regressor__persistent=0)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    assert largest_difference([ours(x)[0]], [theirs(x)[0]]) < 1e-12


def test_the_state_never_grows():
    m = mixer("sliding_window", regressor__window=7)
    sizes = {m(inputs(1, T))[1].memory.k.shape for T in (1, 6, 40)}
    assert sizes == {(1, 6, 2, 16)}


@pytest.mark.parametrize("setting, message", [("window", "window=null"), ("persistent", "persistent=-1")])
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        mixer("sliding_window", **{f"regressor__{setting}": None if setting == "window" else -1})
