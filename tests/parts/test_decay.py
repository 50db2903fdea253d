"""Decays have the digits of what they are given, and begin with the half-lives that their sources say."""

from __future__ import annotations

import math

import pytest
import torch
from omegaconf import OmegaConf

from conf.settings import NUMBERS
from models.build import build
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.decay import (
    CHOICES,
    HALF_LIVES,
    ChannelDecay,
    ChannelRateDecay,
    Decay,
    FixedDecay,
    ScalarDecay,
    SignedDecay,
    spread,
)
from models.parts.sizes import Sizes
from tests.laws.presets import PRESETS, inputs, mixer, probe
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


def at_rest(decay: Decay) -> torch.Tensor:
    """Half-lives [H] or [H, K], by what a decay holds beside x."""
    return -math.log(2) / decay(torch.zeros(1, 1, 32))[0].detach()[0, 0]


@pytest.mark.parametrize("kind", [ScalarDecay, ChannelDecay, ChannelRateDecay])
def test_one_start_for_all_decays(kind):
    """RetNet's half-lives, of the heads, for whatever makes the gammas later."""
    lives = kind(SIZES, half_lives=(22.0, 2840.0))
    expected = torch.tensor([22 * (2840 / 22) ** (n / 3) for n in range(4)])
    found = at_rest(lives)
    assert torch.allclose(found if kind is ScalarDecay else found[:, 0], expected, rtol=1e-5)
    assert kind is ScalarDecay or torch.allclose(found, found[:, :1].expand(4, 8), rtol=1e-5)
    fixed = -math.log(2) / FixedDecay(SIZES).log_decay
    assert torch.allclose(expected, fixed, rtol=0.06)
    with pytest.raises(
        ValueError, match=r"decay\.half_lives=\[5, 2\] must be two numbers from 0.1 to 1,000,000, the shortest"
    ):
        kind(SIZES, half_lives=(5, 2))


@pytest.mark.parametrize("model", ["gated_delta", "gla", "kda"])
def test_a_model_with_a_start_is_read_again(model, tmp_path):
    """transformers builds it without numbers first."""
    cfg = composed(f"model={model}", "model.mixers.main.decay.half_lives=[22,2840]", "model.num_layers=1")
    made = LanguageModel(LanguageModelConfig(vocab_size=8, **OmegaConf.to_container(cfg.model, resolve=True)))
    made.save_pretrained(tmp_path)
    read, ids = LanguageModel.from_pretrained(tmp_path), torch.arange(8).unsqueeze(0)
    assert torch.equal(read(ids).logits, made(ids).logits)


def test_two_settings_of_one_start():
    with pytest.raises(ValueError, match=r"decay\.half_lives=\[2, 9\] sets the bias, as does decay\.bias=8; leave one"):
        ChannelDecay(SIZES, bias=8, half_lives=(2, 9))
    with pytest.raises(ValueError, match=r"decay\.half_lives=\[2, 9\] can't begin with decay\.temperature=100000"):
        ChannelDecay(SIZES, temperature=100000, half_lives=(2, 9))
    with pytest.raises(TypeError, match="half_lives"):
        SignedDecay(SIZES, half_lives=(2, 9))
    assert ChannelDecay(SIZES, half_lives=(0.1, 0.1)).expansion.bias.isfinite().all()
    with pytest.raises(ValueError, match=r"decay\.half_lives=\[2, 9\] can't stand beside decay\.lower_bound=-5"):
        ChannelRateDecay(SIZES, lower_bound=-5, half_lives=(2, 9))
    assert spread((3, 9), 1, 2)[0].tolist() == pytest.approx([math.log(2) / 3] * 2), "one head: the shortest"
    holds = NUMBERS["model.mixers.*.decay.half_lives[[]*"].holds  # which is told before torch is there
    assert [holds(x) for least, most in [HALF_LIVES] for x in (least, most, least / 2, most * 2)] == [True] * 2 + [
        False
    ] * 2


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
def test_channels_that_are_alike_are_a_head(backend):
    """KDA holds Gated DeltaNet: outputs, and the gradients of what makes the gammas, which of one number that stands in
    every channel add up."""
    kda, gated = mixer("kda", backend, output_gate="silu"), mixer("gated_delta", backend)
    (H, K), own = kda.decay.heads, dict(kda.named_parameters())
    rows = torch.randn(H, kda.decay.projection.out_features, dtype=torch.float64)
    with torch.no_grad():
        for name, p in gated.named_parameters():
            if not name.startswith("decay."):
                own[name].copy_(p)
        kda.decay.expansion.weight.copy_(rows.repeat_interleave(K, 0))
        kda.decay.bias.copy_(gated.decay.bias.repeat_interleave(K))
        kda.decay.log_rate.copy_(gated.decay.log_rate)
        gated.decay.projection.weight.copy_(rows @ kda.decay.projection.weight)
    outputs = [m(inputs(2, 40))[0] for m in (kda, gated)]
    probe(outputs[0]).backward()
    probe(outputs[1]).backward()
    weight, theirs = gated.decay.projection.weight.grad, kda.decay
    pairs = [
        (outputs[0], outputs[1]),
        (theirs.bias.grad.view(H, K).sum(1), gated.decay.bias.grad),
        (theirs.log_rate.grad, gated.decay.log_rate.grad),
        (theirs.expansion.weight.grad.view(H, K, -1).sum(1), weight @ theirs.projection.weight.T),
        (theirs.projection.weight.grad, rows.T @ weight),
        *((own[name].grad, p.grad) for name, p in gated.named_parameters() if not name.startswith("decay.")),
    ]
    assert all(torch.allclose(a, b, atol=1e-11, rtol=1e-10) for a, b in pairs)


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
