"""What the shell does along the tokens: the short convolution on keys alone, and keys of the token before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.mixers.mixer import Mixer
from models.parts.convolution import Shift, ShortConvolution
from models.parts.linear import Products, one_product
from tests.laws import test_laws as laws
from tests.laws.presets import PRESETS, inputs, mixer

SETTINGS = {
    "convolved keys": {"conv_size": 3, "conv_on": "k"},
    "shift": {"pairs": "shift"},
    "both": {"pairs": "shift", "conv_size": 3, "conv_on": "k"},
    "two convolutions": {"pairs": "shift", "conv_size": 3, "conv_on": "qkv"},
}


@pytest.mark.parametrize("preset", ["linear", "gated_delta", "softmax", "delta_product"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_laws_hold_with_every_setting(preset, settings, monkeypatch):
    """Causal, one map in every form and any split into calls, documents, and the counts."""
    monkeypatch.setattr(laws, "mixer", lambda name, *args, **more: mixer(name, *args, **SETTINGS[settings], **more))
    laws.test_1_causal(preset, "torch")
    laws.test_3_one_map_in_every_form(preset)
    laws.test_3_decoding_token_by_token(preset)
    laws.test_4_packed_documents_are_separate_sequences(preset, "torch")
    laws.test_9_counts(preset)


def test_a_shift_is_a_convolution_that_knows_its_weights():
    x, convolution = inputs(1, 5), ShortConvolution(32, 2).double()
    convolution.weight.data.copy_(torch.tensor([1.0, 0.0]))
    (y, tail), (z, other) = Shift(32).double()(x), convolution(x)
    assert torch.equal(y, z) and torch.equal(tail, other) and torch.equal(y[:, 1:], x[:, :-1])
    assert not y[:, 0].any()


def test_shifted_pairs_are_bigrams():
    """A query equal to the key of token a reads the value of what came after a: 1-hot tokens, all weights given."""
    sizes = {"num_heads": 1, "key_dim": 32, "value_dim": 32, "conv_size": 0}
    m = mixer("linear", pairs="shift", activation="none", output_gate="none", **sizes)
    m.projection.weight.data.copy_(torch.eye(32).repeat(3, 1))
    seen = []
    m.regressor.register_forward_hook(lambda module, args, result: seen.append(result[0][0, -1, 0]))
    a, b, c = torch.eye(32, dtype=torch.float64)[:3]
    m(torch.stack([a, b, c, a]).unsqueeze(0))
    assert seen[0].argmax() == 1
    assert seen[0].count_nonzero() == 1


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="conv_on=v is not one of qkv, k"):
        mixer("linear", conv_on="v")
    with pytest.raises(ValueError, match="pairs=past is not one of same, shift"):
        mixer("linear", pairs="past")


def hand_on_products(m: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on all that a regressor and a decay get of the input is its products, as from Mixer._accelerated."""
    shells = [each for each in m.modules() if isinstance(each, Mixer)]
    for each in [each for each in shells if len(each.layers_of_input()) > 1]:

        def pairs(x, *others, shell=each, own=each._pairs):
            layers = shell.layers_of_input()
            products = one_product(x, layers)[..., layers[0].out_features :]
            return *own(x, *others)[:-1], Products(layers[1:], products)

        monkeypatch.setattr(each, "_pairs", pairs)


@pytest.mark.parametrize("preset", PRESETS)
def test_one_product_of_the_input_serves_all_who_read_it(preset, monkeypatch):
    """A module that names its layers in `reads` takes no more of x."""
    m, x = mixer(preset), inputs(2, 11)
    expected = m(x)[0]
    hand_on_products(m, monkeypatch)
    assert torch.allclose(m(x)[0], expected, rtol=0, atol=1e-12)
