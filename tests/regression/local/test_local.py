"""Softmax attention: it is the weighted mean it claims, and the attention of others given the same weights."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from models.regression.local.constant import parallel_softmax, recurrent_local_constant
from models.regression.local.pairs import Pairs
from scripts.benchmarks.operators import mixer_of_qwen3
from tests.laws.presets import inputs, largest_difference, mixer, outcome


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_it_minimises_the_weighted_squares():
    """The stated objective, sum_i w_i ||v_i - m||^2, minimised over m by least squares."""
    torch.manual_seed(0)
    q, k, v = unit(1, 9, 1, 4), unit(1, 9, 1, 4), torch.randn(1, 9, 1, 3, dtype=torch.float64)
    beta = 2.0
    o = recurrent_local_constant(q, Pairs(k, v), torch.full((1,), beta, dtype=q.dtype))
    for t in range(9):
        root = (beta * k[0, : t + 1, 0] @ q[0, t, 0]).exp().sqrt().unsqueeze(1)
        m = torch.linalg.lstsq(root, root * v[0, : t + 1, 0]).solution[0]
        assert torch.allclose(o[0, t, 0], m, atol=1e-12)


def test_with_unit_vectors_the_kernel_is_gaussian():
    """Nadaraya-Watson with exp(-beta |q - k|^2 / 2); without unit vectors it is not."""
    torch.manual_seed(0)
    beta = 3.0
    for norm, same in ((unit, True), (lambda *s: torch.randn(*s, dtype=torch.float64), False)):
        q, k, v = norm(1, 9, 1, 4), norm(1, 9, 1, 4), torch.randn(1, 9, 1, 3, dtype=torch.float64)
        distance = (q[0, :, 0].unsqueeze(1) - k[0, :, 0]).square().sum(-1)
        w = (-beta * distance / 2).exp().tril()
        gaussian = (w / w.sum(1, keepdim=True)) @ v[0, :, 0]
        o = parallel_softmax(q, Pairs(k, v), torch.full((1,), beta, dtype=q.dtype))
        assert torch.allclose(o[0, :, 0], gaussian, atol=1e-12) is same


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_equals_qwen3_attention_given_the_same_weights(groups):
    torch.manual_seed(0)
    D, H, K = 64, 4, 16
    config = Qwen3Config(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=groups, head_dim=K, attn_implementation="sdpa"
    )
    theirs = Qwen3Attention(config, layer_idx=0).double()
    for norm in (theirs.q_norm, theirs.k_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    ours = mixer_of_qwen3(theirs)
    x = torch.randn(2, 33, D, dtype=torch.float64)
    rotary = Qwen3RotaryEmbedding(config)(x, torch.arange(33).unsqueeze(0))
    # its inverse frequencies are float32, ours follow the input: 1e-6 is their rounding
    assert largest_difference([ours(x)[0]], [theirs(x, rotary, attention_mask=None)[0]]) < 2e-6


@pytest.mark.parametrize("window", [1, 5, 64, 200])
def test_window(window):
    """Only the last W pairs count, in both forms and across calls, and the cache holds no more than it needs."""
    x = inputs(2, 90)
    m = mixer("softmax", regressor__window=window)
    truth = outcome(mixer("softmax", "recurrent", regressor__window=window), x, memory=False)
    for splits in ((), (1,), (30, 31, 60)):
        assert largest_difference(outcome(m, x, splits, memory=False), truth) < 1e-10
    assert m(x)[1].memory.k.shape[1] == min(window - 1, 90)
    changed = x.clone()
    changed[:, 0] += 1
    y, z = m(x)[0], m(changed)[0]
    assert torch.equal(y[:, window:], z[:, window:])


def test_grouped_heads_are_repeated_heads():
    x = inputs(2, 20)
    grouped = mixer("softmax", num_kv_heads=1)
    assert (
        largest_difference(
            outcome(grouped, x, memory=False), outcome(mixer("softmax", "recurrent", num_kv_heads=1), x, memory=False)
        )
        < 1e-10
    )
    assert grouped.state_size(20) * 2 == mixer("softmax").state_size(20)


@pytest.mark.parametrize(
    "setting, message", [("regressor__window", "window"), ("regressor__inverse_temperature", "inverse")]
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        mixer("softmax", **{setting: -1})
