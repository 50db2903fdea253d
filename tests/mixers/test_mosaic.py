"""Memory Mosaics, against the paper's own form: a look ahead and a strict mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.mixers.mosaic import LeakyAverage
from tests.laws import test_laws as laws
from tests.laws.presets import inputs, mixer


def test_it_is_the_layer_as_published():
    """Every read from the keys, the values of i and i + 1, and a mask that leaves out the token itself."""
    m, x = mixer("memory_mosaic", norm_eps=1e-30), inputs(1, 13)
    torch.nn.init.normal_(m.peek)
    k, v = (m.projection(x)[0].unflatten(-1, (2, 2, -1))).unbind(1)  # [T, H, K], [T, H, V]
    fade, c, beta = (-m.average.log_rate.exp()).exp().view(2, -1), m.peek.sigmoid(), m.regressor.log_beta.exp()
    averages = [torch.zeros_like(k[0])]
    for t in range(13):
        averages.append(k[t] + fade * averages[-1])
    keys = F.normalize(torch.stack(averages[1:]), dim=-1)
    values = F.normalize((1 - c.unsqueeze(1)) * v[1:] + c.unsqueeze(1) * v[:-1], dim=-1)  # of pairs 0 .. T - 2
    o = torch.zeros_like(v)
    for t in range(1, 13):
        weights = (beta * (keys[:t] * keys[t]).sum(-1)).softmax(0)
        o[t] = (weights.unsqueeze(-1) * values[:t]).sum(0)
    assert torch.allclose(m(x)[0][0], m.output(o.flatten(1)), atol=1e-12)


def test_the_average_is_the_loop():
    """Any length, documents, and a sequence that goes on."""
    average = LeakyAverage(1, 6).double()
    fade = (-average.log_rate.exp()).exp()
    x, last = torch.randn(2, 21, 6, dtype=torch.float64), torch.randn(2, 1, 6, dtype=torch.float64)
    segments = torch.tensor([0] * 5 + [1] + [0] * 11 + [1] * 4).expand(2, -1)  # numbers may come back
    a, expected = last[:, 0], []
    for t in range(21):
        begins = t > 0 and segments[0, t] != segments[0, t - 1]
        a = x[:, t] + (0 if begins else fade * a)
        expected.append(a)
    found, end = average(x, last, segments)
    assert torch.allclose(found, torch.stack(expected, dim=1), atol=1e-12)
    assert torch.equal(end, found[:, -1:])


@pytest.mark.parametrize(
    "settings",
    [{"regressor__window": 3}, {"regressor__kernel": "laplace"}, {"conv_size": 3, "conv_on": "k", "rotary": 10000.0}],
    ids=str,
)
def test_it_keeps_the_laws_with_other_settings(settings, monkeypatch):
    """Any split into calls, documents, the counts: where a window, too, must forget that a first pair was none."""
    monkeypatch.setattr(laws, "mixer", lambda name, *args, **more: mixer(name, *args, **settings, **more))
    laws.test_1_causal("memory_mosaic", "torch")
    laws.test_3_one_map_in_every_form("memory_mosaic")
    laws.test_3_decoding_token_by_token("memory_mosaic")
    laws.test_4_packed_documents_are_separate_sequences("memory_mosaic", "torch")
    laws.test_9_counts("memory_mosaic")


def test_queries_that_are_keys_have_no_groups():
    with pytest.raises(ValueError, match="num_kv_heads=1: queries are the keys"):
        mixer("memory_mosaic", num_kv_heads=1)
