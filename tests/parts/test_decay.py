"""Decays have the digits of what they are given, and begin with the half-lives that their sources say."""

from __future__ import annotations

import math

import pytest
import torch

from models.parts.decay import FixedDecay
from models.parts.sizes import Sizes
from tests.laws.presets import PRESETS, mixer

SIZES = Sizes(32, 4, 4, 8, 8)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-14), (torch.float32, 6e-8), (torch.bfloat16, 6e-8)])
def test_a_fixed_decay_is_not_rounded_by_a_cast_of_the_model(dtype, digits):
    """Rotary frequencies lost their digits so: https://github.com/huggingface/transformers/issues/25681,
    https://github.com/NVIDIA-NeMo/Automodel/pull/2549."""
    decay = FixedDecay(SIZES).to(dtype)
    found = decay(torch.zeros(1, 1, 32, dtype=dtype))[0]
    expected = [math.log1p(-(2 ** -(5 + 7 * n / 3))) for n in range(4)]
    assert found.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert all(abs(a - b) < -digits * b for a, b in zip(found[0, 0].tolist(), expected, strict=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_no_other_constant_is_rounded(preset):
    """What a mixer holds beside its parameters is exact in bfloat16, or was drawn at random."""
    buffers = dict(mixer(preset, dtype=torch.float32).named_buffers())
    for name, constant in buffers.items():
        own = name.rpartition(".")[2]
        exact = not constant.is_floating_point() or torch.equal(constant, constant.bfloat16().float())
        assert exact or own in ("directions", "phases") or name.endswith("decay.log_decay"), name
