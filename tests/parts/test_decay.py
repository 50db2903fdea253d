"""Decays have the digits of what they are given, and begin with the half-lives that their sources say."""

from __future__ import annotations

import math

import pytest
import torch

from models.build import build
from models.parts.decay import CHOICES, ChannelDecay, ChannelRateDecay, FixedDecay
from models.parts.sizes import Sizes
from tests.laws.presets import PRESETS, mixer
from tests.test_config import CONF, composed

SIZES = Sizes(32, 4, 4, 8, 8)


def test_a_refusal_names_the_decays_that_can_be_chosen():
    names = sorted(path.stem for path in (CONF / "decay").glob("*.yaml"))
    assert sorted(name for choices in CHOICES.values() for name in choices) == names
    for kind, choices in CHOICES.items():
        for name in choices:
            node = composed(f"decay@model.mixers.main.decay={name}").model.mixers.main.decay
            assert build(node)(SIZES).kind == kind


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-14), (torch.float32, 6e-8), (torch.bfloat16, 6e-8)])
def test_a_fixed_decay_is_not_rounded_by_a_cast_of_the_model(dtype, digits):
    """Rotary frequencies lost their digits so: https://github.com/huggingface/transformers/issues/25681,
    https://github.com/NVIDIA-NeMo/Automodel/pull/2549."""
    decay = FixedDecay(SIZES).to(dtype)
    found = decay(torch.zeros(1, 1, 32, dtype=dtype))[0]
    expected = [math.log1p(-(2 ** -(5 + 7 * n / 3))) for n in range(4)]
    assert found.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert all(abs(a - b) < -digits * b for a, b in zip(found[0, 0].tolist(), expected, strict=True))


@pytest.mark.parametrize(("kind", "median", "fastest"), [(ChannelRateDecay, 9.8, 0.6), (ChannelDecay, 16.0, 16.0)])
def test_half_lives_at_the_start(kind, median, fastest):
    """Of Kimi Linear's published gate and of GLA's, in tokens, for 256 heads, by what they hold beside x.
    https://github.com/fla-org/flash-linear-attention/blob/main/fla/layers/kda.py
    """
    torch.manual_seed(0)
    decay = kind(Sizes(32, 256, 256, 128, 128))
    torch.nn.init.zeros_(decay.expansion.weight)
    if decay.expansion.bias is not None:
        torch.nn.init.zeros_(decay.expansion.bias)
    half_lives = -math.log(2) / decay(torch.zeros(1, 1, 32))[0].detach().flatten()
    found = half_lives.quantile(torch.tensor([0.5, 0.01])).tolist()
    print(
        f"{kind.__name__}: half-lives of {found[0]:.2f} tokens in the median, {found[1]:.2f} for the fastest hundredth"
    )
    assert found == pytest.approx([median, fastest], rel=0.06)


def test_the_gate_of_kimi_linear():
    """g = -exp(A_log) softplus(f(x) + dt_bias), with A_log per head and dt_bias per channel."""
    torch.manual_seed(0)
    decay, x = ChannelRateDecay(SIZES).double(), torch.randn(2, 3, 32, dtype=torch.float64)
    f = x @ decay.projection.weight.T @ decay.expansion.weight.T + decay.bias
    g = -decay.log_rate.exp().view(4, 1) * f.exp().log1p().view(2, 3, 4, 8)
    assert torch.allclose(decay(x)[0], g, atol=1e-12) and decay.projection.weight.shape == (8, 32)
    with pytest.raises(ValueError, match=r"decay\.rank=0 must be at least 1, or null"):
        ChannelRateDecay(SIZES, rank=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_other_constant_is_rounded(preset):
    """What a mixer holds beside its parameters is exact in bfloat16, or was drawn at random."""
    buffers = dict(mixer(preset, dtype=torch.float32).named_buffers())
    for name, constant in buffers.items():
        own = name.rpartition(".")[2]
        exact = not constant.is_floating_point() or torch.equal(constant, constant.bfloat16().float())
        assert exact or own in ("directions", "phases") or name.endswith("decay.log_decay"), name
