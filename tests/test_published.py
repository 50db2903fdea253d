"""The published layers: model=NAME_published computes what the layer of that paper does, and docs/published.md says so.

People port such layers and find out late that a norm, an order or a scale was another one:
https://github.com/fla-org/flash-linear-attention/issues/63 (Mamba-2's norm before the gate),
https://github.com/ggml-org/llama.cpp/pull/15507 (of which heads its norm is),
https://github.com/huggingface/transformers/issues/34817 (a sum over the wrong chunks),
https://github.com/ml-explore/mlx-lm/issues/1798 (an eps).
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import torch

from conf.schema import width
from models.build import problems
from scripts import parity
from scripts.parity import Row
from scripts.published import lact
from tests.laws.presets import inputs, largest_difference, mixer, outcome, part, tensors
from tests.test_config import CONF

PUBLISHED = sorted(path.stem for path in (CONF / "model").glob("*_published.yaml"))
SAME = 1e-11  # relative, in float64; mesa's solver stops at 1e-13, and Newton-Schulz steps make roundings grow
LAWS = ("kda", "mamba2", "mesa", "ttt_linear", "lact", "memory_mosaic", "forgetting")  # with parts that no preset has
ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| (\d\S+) \| (\d\S+) \|$", flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="fla's layers need Triton")
def test_with_the_same_weights_they_compute_the_same_and_the_page_says_so():
    page = parity.PAGE.read_text()
    kept = {(name, theirs): (outputs, gradients) for name, theirs, outputs, gradients in ROW.findall(page)}
    found = [parity.compared(*one) for one in parity.comparisons()]
    for row in found:
        assert max(row.outputs, row.gradients) < SAME, row
        assert max(map(float, kept[row.name, row.theirs])) < SAME
    assert [row[:2] for row in found] == list(kept), "python scripts/parity.py --write"
    assert {row.name.split(",")[0] for row in found} >= set(PUBLISHED)
    assert parity.written(page, found).count("| --- |") == page.count("| --- |")


def test_the_page_says_of_each_what_differs():
    page = parity.PAGE.read_text()
    said = re.findall(r"^\| ((?:`\w+_published`(?:, )?)+) \|", page, flags=re.MULTILINE)
    assert sorted(name for cell in said for name in re.findall(r"\w+_published", cell)) == PUBLISHED
    assert page.count(parity.BEGIN) == page.count(parity.END) == 1
    table = page.partition("## What differs")[2].partition("## Compared")[0]
    others = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]+) \|", table, flags=re.MULTILINE)))
    others = [name for name in others if name not in PUBLISHED]
    assert others and not {f"{name}_published" for name in others} & set(PUBLISHED)
    assert all((CONF / "mixer" / f"{name}.yaml").exists() for name in others)


def test_the_page_of_the_family_says_which_have_such_a_preset():
    page = (parity.PAGE.parent / "family.md").read_text()
    said = re.search(r"`model=NAME_published`, which is that layer: ([^.]+)\.", page)
    assert said
    names = [name for name in re.findall(r"\w+", said[1]) if name != "and"]
    assert names == sorted(x.removesuffix("_published") for x in PUBLISHED)


def test_another_number_would_be_seen():
    row = Row("kda_published", "x", 1e-15, 1e-15)
    assert parity.difference(torch.ones(3) * 1.001, torch.ones(3)) == pytest.approx(1e-3, rel=1e-3)
    assert ROW.findall(parity.table([row])) == [("kda_published", "x", "1e-15", "1e-15")]


def test_a_comparison_is_chosen_by_its_model_or_by_the_preset(monkeypatch, capsys):
    monkeypatch.setattr(parity, "compared", lambda name, *_: Row(parity.published(name), "x", 0.0, 0.0))
    for chosen, shown in (("kda", "kda_published"), ("kda_published", "kda_published"), ("softmax", "qwen3")):
        parity.main(["--only", chosen])
        assert {line.split("|")[1].split(",")[0].strip() for line in capsys.readouterr().out.splitlines()} == {shown}
    with pytest.raises(SystemExit, match="error: --only kad is not one of delta_product_published, deltanet_published"):
        parity.main(["--only", "kad"])


@pytest.mark.parametrize("preset", LAWS)
def test_they_obey_the_laws(preset):
    """recurrent = chunked = any split into calls; packed documents = separate ones; counts are right."""
    m, x = parity.mixer_of(preset, lact.OURS if preset == "lact" else {}), inputs(2, 23)
    whole = outcome(m, x)
    assert largest_difference(outcome(m, x, splits=(1, 2, 9)), whole) < 1e-9
    held = sum(t.numel() for t in tensors(m(inputs(1, 23))[1][:2]) if t.is_floating_point())
    assert m.state_size(23) == held
    documents = torch.tensor([[0] * 7 + [1] * 16]).expand(2, -1)
    packed = m(x, segments=documents)[0]
    alone = torch.cat([m(x[:, :7])[0], m(x[:, 7:])[0]], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-9)
    m.regressor.backend = "recurrent"
    assert largest_difference(outcome(m, x), whole) < 1e-9


@pytest.mark.parametrize("name", ["gated_delta", *LAWS])
def test_a_gpu_takes_the_kernels_of_the_preset(name):
    """Where the regressor is the same: more heads of values, wider ones, and other decays change nothing for them."""
    asked = torch.device("cuda"), torch.bfloat16
    preset, published = mixer(name), parity.mixer_of(name, {})
    assert published.regressor.accelerators(*asked) == preset.regressor.accelerators(*asked)


READ_OUT, BOTH = "models.mixers.PublishedReadOut", "models.mixers.PublishedMixer"
LACT = {"_target_": "models.mixers.PublishedLaCT", "window": 8, "regressor__window": None}
MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("kda", {"_target_": READ_OUT, "gate_rank": 0}, "gate_rank=0 must be at least 1"),
    ("kda", {"_target_": READ_OUT, "output_gate": "tanh"}, "output_gate=tanh is not one of none, silu, sigmoid, gelu"),
    ("kda", {"_target_": READ_OUT, "read_norm": "rms"}, "read_norm=rms stands in the place of output_norm=true"),
    ("kda", {"_target_": READ_OUT, "read_norm": "l2", "output_norm": False}, "read_norm=l2 is not one of rms, rms_all"),
    ("kda", {"_target_": READ_OUT, "stepped": True}, "stepped=true: ChannelRateDecay has no step; decay=scalar has"),
    ("mesa", {"_target_": READ_OUT, "gate_first": True}, "gate_first=true: output_gate=none is no gate; choose"),
    ("delta_product", {"_target_": READ_OUT, "skip": True}, "DeltaProduct has several values a token"),
    ("kda", {"_target_": BOTH, "conv_on": "k"}, "conv_on=k is not one of qkv, qk"),
    ("kda", {"_target_": BOTH, "conv_bias": True, "conv_size": 0}, "conv_bias=true: conv_size=0 is no convolution"),
    ("kda", {"_target_": BOTH, "shared_qk": True}, "shared_qk=true: queries and keys must be as many and as wide"),
    ("kda", {"_target_": BOTH, "rotary_period": 4}, "rotary_period=4 must be at least 1, and stand beside a rotary"),
    ("kda", {"decay__lower_bound": 0.0}, "decay.lower_bound=0.0 must be negative, or null for none"),
    ("mamba2", {"decay__rate_range": [2.0, 1.0]}, "decay.rate_range=(2.0, 1.0) must be two rising numbers"),
    ("lact", LACT | {"attention_heads": -1}, "attention_heads=-1: hidden_size=32 over it must be even"),
    ("lact", LACT | {"attention_heads": 3}, "attention_heads=3: hidden_size=32 over it must be even"),
    ("lact", LACT | {"attention_heads": 2, "output_gate": "silu"}, "PublishedLaCT: it has positions, no gate"),
    ("lact", {"regressor__rank": 0}, "regressor.rank=0 must be at least 1, or null"),
    ("lact", {"regressor__coefficients": "fit"}, "regressor.coefficients=fit is not one of jordan, fitted"),
    ("memory_mosaic", {"rates": "layer"}, "rates=layer is not one of channel, head"),
    ("parallax", {"regressor__inverse_temperature": "none"}, "must be 'learned', 'scaled' or a number above 0"),
]


@pytest.mark.parametrize(("preset", "settings", "message"), MISTAKES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_mistake_is_one_sentence(preset, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mixer(preset, **settings)


def test_a_misspelt_setting_of_theirs_or_of_every_mixer_is_named():
    node = {"_target_": BOTH, "conv_bais": True, "num_haeds": 2}
    said = "\n".join(problems(node))
    assert "did you mean conv_bias?" in said and "did you mean num_heads?" in said


def test_a_width_that_is_no_whole_number_is_one_sentence():
    assert width(0.75, 96, 3) == 24
    with pytest.raises(ValueError, match=r"model\.hidden_size=96: 2 \* 96 / 5 is no whole number"):
        width(2, 96, 5)


def test_a_bounded_decay_stays_above_its_bound():
    decay = mixer("kda", decay=part("decay", "channel_rate") | {"lower_bound": -5.0}).decay
    log_decay, _ = decay(1e3 * inputs(1, 5))
    assert log_decay.min() >= -5 and log_decay.max() <= 0
