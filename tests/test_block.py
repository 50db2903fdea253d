"""The feed-forward layers: what they compute, and that a block has 12 D^2 parameters with any of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.block import FEED_FORWARDS, Block, PersistentMemory, feed_forward
from models.language_model import LanguageModel, LanguageModelConfig
from models.training.optimizer import parameter_groups
from tests.laws.presets import HIDDEN, PRESETS, inputs, mixer, recipe
from tests.laws.test_baselines import BASELINES, baseline

every_kind = pytest.mark.parametrize("kind", FEED_FORWARDS)


@every_kind
@pytest.mark.parametrize("preset", ["softmax", "kda", "mamba2"])
def test_a_block_has_as_many_parameters_with_any(kind, preset):
    m = mixer(preset)
    layer = feed_forward(kind, HIDDEN, m)
    held = sum(p.numel() for p in layer.parameters())
    assert held == layer.num_params(HIDDEN, layer.inner_size, m.num_heads)
    assert held + m.num_params == pytest.approx(12 * HIDDEN**2, rel=0.01)


@every_kind
def test_pairs_stay_on_their_devices_only_where_no_state_is_handed_on(kind):
    """Softmax's stay; but what a layer has learned must reach the next device."""
    m = mixer("softmax")
    assert Block(HIDDEN, m, feed_forward(kind, HIDDEN, m), 1e-6).rings == (kind != "in_place")


@pytest.mark.parametrize("kind", ["swiglu", "persistent_memory"])  # in_place forms other sums than its definition
def test_flops_are_what_is_counted(kind):
    layer = feed_forward(kind, HIDDEN, mixer("softmax")).double()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        layer(inputs(1, 8))
    assert counter.get_total_flops() == 8 * layer.flops_per_token()


def test_a_persistent_memory_is_kernel_regression_on_its_pairs():
    """The mean of the values, weighted by exp(-beta |q - k|^2 / 2), which for keys of length one is softmax."""
    torch.manual_seed(0)
    layer, x = PersistentMemory(HIDDEN, 20, 2).double(), inputs(1, 5)
    q = F.normalize(layer.query(x[0]).unflatten(-1, (2, -1)), dim=-1)
    for t in range(5):
        reads = []
        for h in range(2):
            k = F.normalize(layer.keys[h], dim=-1)
            weights = (-layer.log_beta[h].exp() * (q[t, h] - k).square().sum(-1) / 2).exp()
            reads.append(weights @ layer.values[h] / weights.sum())
        assert torch.allclose(layer(x)[0, t], layer.output(torch.cat(reads)), atol=1e-5)


def test_a_model_of_two_memories_trains_and_is_saved(tmp_path):
    torch.manual_seed(0)
    mixers, sizes = {"main": recipe("memory_mosaic")}, {"vocab_size": 61, "hidden_size": HIDDEN, "num_layers": 2}
    config = LanguageModelConfig(mixers=mixers, pattern=["main"], feed_forward="persistent_memory", **sizes)
    m = LanguageModel(config)
    ids = torch.randint(61, (2, 30))
    m(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
    assert parameter_groups(m, 0.1)
    m.save_pretrained(tmp_path)
    assert torch.equal(LanguageModel.from_pretrained(tmp_path)(ids).logits, m(ids).logits)


def test_a_block_adds_what_is_still_to_be_added():
    """Before anything else; and keeps no state that nobody wants."""
    torch.manual_seed(0)
    block = Block(HIDDEN, m := mixer("gated_delta"), feed_forward("swiglu", HIDDEN, m), 1e-6).double()
    x, y = inputs(2, 9), inputs(2, 9).flip(1)
    *found, state = block(x, y)
    *expected, _ = block(x + y)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and state is not None
    *found, state = block(x, y, keep=False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and state is None


@pytest.mark.parametrize("name", [*PRESETS, *BASELINES])
def test_outputs_are_those_of_a_call_that_keeps_its_state(name):
    """In training no state is kept: of every mixer, also of those that are no Mixer."""
    m, segments = baseline(name) if name in BASELINES else mixer(name), (torch.arange(9) // 4).expand(2, -1)
    assert m.rings in (True, False)
    assert torch.allclose(m.outputs(inputs(2, 9), segments), m(inputs(2, 9), None, segments)[0], rtol=1e-12, atol=1e-12)
