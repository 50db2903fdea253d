"""With the same weights our mixers are the layers of published models, in float64: gated_delta is Qwen3-Next's Gated
DeltaNet, and softmax Qwen3's attention. transformers has both (models/qwen3_next and models/qwen3); its PyTorch path is
taken, and what it casts to float32 is kept in float64.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3NextConfig
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from scripts.exporting.qwen_layers import Heads, attention_from_qwen, delta_from_qwen
from tests.laws.presets import HIDDEN, inputs, mixer, outcome, tensors

K, V = 8, 16


class Wide(SimpleNamespace):
    """torch, whose float32 is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


@pytest.fixture(scope="module")
def qwen3_next() -> ModuleType:
    """Imported here, since it imports fla where that is installed, which takes three seconds of every worker."""
    from transformers.models.qwen3_next import modeling_qwen3_next

    return modeling_qwen3_next


@pytest.fixture
def in_float64(monkeypatch, qwen3_next):
    for module in (qwen3, qwen3_next):
        monkeypatch.setattr(module, "torch", Wide())
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn"):
        plain = getattr(qwen3_next, name).__wrapped__  # where fla is installed the name is its kernel
        monkeypatch.setattr(qwen3_next, name, plain)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.float64
    assert (ours - theirs).abs().max() < 1e-12 * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("each", [1, 2])
def test_gated_delta_is_the_layer_of_qwen3_next(each, in_float64, qwen3_next):
    """Output and gradients, chunked and recurrent, with one or two value heads a key head, and with biases of the time
    step that are not those of the start."""
    settings = {"linear_num_key_heads": 2, "linear_num_value_heads": 2 * each, "linear_key_head_dim": K}
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "linear_value_head_dim": V}
    config = Qwen3NextConfig(**settings, **sizes, layer_types=["linear_attention"], rms_norm_eps=1e-6)
    torch.manual_seed(0)
    theirs = qwen3_next.Qwen3NextGatedDeltaNet(config, 0).double()
    with torch.no_grad():
        for parameter in (theirs.dt_bias, theirs.norm.weight):
            parameter.normal_()
    x = inputs(2, 37).requires_grad_()
    expected = theirs(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    for backend in ("torch", "recurrent"):
        # theirs divides queries by sqrt(K) before the norm of what is read, which output_norm_eps makes up for
        eps = {"output_norm_eps": config.rms_norm_eps, "regressor__bias": False}
        ours = mixer("gated_delta", backend, num_heads=2 * each, num_key_heads=2, key_dim=K, value_dim=V, **eps)
        ours.load_state_dict(delta_from_qwen(theirs.state_dict(), Heads(2 * each, 2, K, V)))
        found, _ = ours(x)
        close(found, expected)
        close(torch.autograd.grad(found.square().sum(), x)[0], gradient)


@pytest.mark.parametrize("splits", [(1, 2, 3), (5, 6, 20)])
def test_grouped_value_heads_go_on_from_a_state(splits):
    """Any split into calls; and what can't be."""
    m = mixer("gated_delta", num_heads=4, num_key_heads=2, key_dim=K, value_dim=V)
    for whole, parts in zip(outcome(m, inputs(2, 23)), outcome(m, inputs(2, 23), splits), strict=True):
        torch.testing.assert_close(whole, parts)
    assert m.state_size(23) == sum(t.numel() for t in tensors(m(inputs(1, 23))[1][:2]))
    for preset, settings in (
        ("gated_delta", {"num_heads": 4, "num_key_heads": 3}),
        ("softmax", {"num_heads": 4, "num_key_heads": 2, "num_kv_heads": 2}),
        ("memory_mosaic", {"num_heads": 2, "num_key_heads": 1}),
    ):
        with pytest.raises(ValueError, match=r"num_key_heads=\d: it must divide num_heads=\d, and stand beside"):
            mixer(preset, **settings)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_softmax_is_the_attention_of_qwen3(kv_heads, in_float64):
    """With norms per channel of queries and keys, rotary positions and grouped heads; beta is the 1 / sqrt(K) of
    theirs."""
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": K}
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    config = Qwen3Config(**sizes, num_key_value_heads=kv_heads, rope_parameters=rope, attn_implementation="sdpa")
    torch.manual_seed(0)
    theirs = qwen3.Qwen3Attention(config, 0).double()
    beta = {"regressor__inverse_temperature": K**-0.5}
    ours = mixer("softmax", num_heads=4, num_kv_heads=kv_heads, key_dim=K, value_dim=K, qk_norm="rms", **beta)
    with torch.no_grad():
        for norm in (theirs.q_norm, theirs.k_norm):
            norm.weight.normal_()
    ours.load_state_dict(attention_from_qwen(theirs.state_dict(), Heads(4, kv_heads, K, K), gated=False))
    x = inputs(2, 37).requires_grad_()
    positions = qwen3.Qwen3RotaryEmbedding(config)(x, torch.arange(37).unsqueeze(0))
    expected, _ = theirs(x, positions, None)
    found, _ = ours(x)
    close(found, expected)
    gradients = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected))
    close(*gradients)
