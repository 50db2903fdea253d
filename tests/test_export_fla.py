"""Models exported as fla's own compute the same there, in a process that has none of this project. fla's layers are
kernels: here Triton's interpreter runs them, all in one process."""

from __future__ import annotations

import copy
import importlib.util
import re

import pytest
import torch

from models.language_model import LanguageModel
from models.training import origin
from scripts.export import choose, export
from scripts.exporting import fla_models
from tests.conftest import ROOT
from tests.kernels.interpreter import run_alone
from tests.laws.presets import change, part, recipe
from tests.test_export import model, source

IDS = torch.arange(6).remainder(5).view(1, 6)
PRESETS = ("linear", "retnet", "gla", "deltanet", "gated_delta", "kda")
OPENER = """
import sys
for name in ("models", "conf", "data", "scripts", "train", "hydra", "omegaconf", "lightning"):
    sys.modules[name] = None  # not to be imported
import fla, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from transformers.utils import logging

torch.set_num_threads(1)
logging.disable_progress_bar()
folder = Path({folder!r})
ids, found = torch.load(folder / "ids.pt"), {{}}
for path in sorted((folder / "folders").iterdir()):
    model = AutoModelForCausalLM.from_pretrained(path)
    assert type(model).__module__.startswith("fla.models.")
    with torch.no_grad():
        logits = model(ids).logits
        tokens = model.generate(ids[:, :4], max_new_tokens=2, do_sample=False, pad_token_id=0)
    found[path.name] = logits, tokens
torch.save(found, folder / "found.pt")
"""


def small(preset: str, layers: int = 1, eps: float = 1e-6, **settings) -> LanguageModel:
    """Two heads of 8, as fla's kernels want them not smaller; other settings as `change` takes them."""
    node = change(copy.deepcopy(recipe(preset)), **{"key_dim": 8, "value_dim": 8} | settings)
    return model({"main": node}, layers, norm_eps=eps, hidden_size=16)


def wanted(m: LanguageModel) -> dict[str, str]:
    """The overrides of which the refusal says that a model with them would be the same."""
    reason = fla_models.refusal(m)
    return dict(re.findall(r"model\.mixers\.main\.([\w.]+)=(\S+)", reason.partition("; with ")[2])) if reason else {}


def mended(preset: str, **settings) -> LanguageModel:
    """The preset with the overrides that its refusal names."""
    said = {key.replace(".", "__"): _value(word) for key, word in wanted(small(preset)).items()}
    return small(preset, **said | settings)


def _value(word: str):
    named = {"none": "none", "null": None, "true": True, "false": False}
    return named[word] if word in named else float(word) if "." in word else int(word)


def models() -> dict[str, LanguageModel]:
    """Each kind by the overrides that its refusal names, one of two layers and with a longer residual stream; and what
    else the kinds allow: gates, grouped heads, another width of values, no convolution or one, features with their
    sum."""
    mean = {"features": part("features", "elu"), "regressor__normalizer": True}
    grouped = {"num_key_heads": 1, "value_dim": 16, "output_gate": "sigmoid", "conv_size": 0}
    return {preset: mended(preset) for preset in PRESETS} | {
        "gated_delta": mended("gated_delta", layers=2, eps=1e-4),
        "grouped": mended("gated_delta", regressor__negative_eigenvalues=True, **grouped),
        "gated deltanet": mended("deltanet", output_gate="silu"),
        "gla convolved": mended("gla", conv_size=4, activation="silu", output_gate="none"),
        "kda as published": mended(
            "kda", _target_="models.mixers.PublishedReadOut", gate_rank=8, output_gate="sigmoid"
        ),
        "kda of one head": mended("kda", num_heads=1, output_gate="sigmoid", output_norm_eps=None),
        "linear mean": mended("linear", **mean),
    }


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_fla_computes_the_same_in_a_process_of_its_own(tmp_path, monkeypatch):
    """Their names and eps have changed (https://github.com/fla-org/flash-linear-attention/issues/136), and decays were
    spoilt where a model was opened (https://github.com/fla-org/flash-linear-attention/pull/754)."""
    monkeypatch.setattr(origin, "commit", lambda: {"commit": "0a1b2c", "changed": False})  # asks git, twice a folder
    made = models()
    for name, m in made.items():
        folder = export(source(m, tmp_path), "fla", tmp_path / "folders" / name)
        assert "import fla, transformers" in (folder / "README.md").read_text()
    torch.save(IDS, tmp_path / "ids.pt")
    run_alone(OPENER.format(folder=str(tmp_path)))
    there = torch.load(tmp_path / "found.pt")
    assert there.keys() == made.keys()
    for name, (logits, tokens) in there.items():
        with torch.no_grad():
            expected = made[name](IDS).logits
            written = made[name].generate(IDS[:, :4], max_new_tokens=2, do_sample=False, pad_token_id=0)
        error = (logits - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert error < 1e-5, (name, error)
        assert torch.equal(tokens, written), name


REFUSED = [
    ({"main": "gated_delta"}, {}, "has regressor.bias=true, which fla's Gated DeltaNet has not; with +model"),
    ({"main": "mamba2"}, {}, "mixers.main is Mamba-2's memory, and fla's Mamba-2 is another function: it has no feed-"),
    ({"main": "softmax"}, {}, "is Softmax with NoDecay with Identity: a model of fla can be linear attention, RetNet"),
    ({"main": "titans_mag"}, {}, "model.mixers.main is MemoryAsGate: a model of fla can be"),
    ({"main": "gla"}, {"feed_forward": "persistent_memory"}, "model.feed_forward=persistent_memory: fla's models have"),
    ({"a": "linear", "b": "gla"}, {}, "model.mixers.b differs from another layer's in its regressor and decay: fla"),
]  # fmt: skip


@pytest.mark.parametrize(("mixers", "settings", "message"), REFUSED)
def test_what_is_another_function_is_refused(mixers, settings, message, tmp_path):
    recipes = {name: copy.deepcopy(recipe(preset)) for name, preset in mixers.items()}
    for node in recipes.values() if len(recipes) > 1 else ():
        change(node, qk_norm="none", conv_size=0, activation="none", output_gate="none")
    m = model(recipes, len(recipes), **settings)
    with pytest.raises(ValueError, match=rf"^--to fla: .*{re.escape(message)}"):
        export(source(m, tmp_path), "fla")
    assert not list(tmp_path.iterdir())


def test_a_published_shell_is_told_in_words_that_its_user_knows(tmp_path):
    node = change(copy.deepcopy(recipe("gla")), qk_norm="none", conv_size=4)
    m = model({"main": node | {"_target_": "models.mixers.PublishedMixer"}}, 1)
    said = "is Linear with ChannelDecay with Identity with what its published layer has around it, which only KDA's"
    with pytest.raises(ValueError, match=f"^--to fla: .*main {said}"):
        export(source(m, tmp_path), "fla")


def test_fla_is_for_those_who_ask(tmp_path):
    assert choose(source(mended("gla"), tmp_path), None)[0] == "code"


def test_without_fla_one_sentence_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^--to fla: fla is not installed; pip install flash-linear-attention triton$"
    ):
        export(source(mended("gla"), tmp_path), "fla")


def test_the_table_of_the_docs_says_what_the_refusals_say():
    """Of each preset fla's model and the overrides, and of others why there is none."""
    page = (ROOT / "docs" / "exporting.md").read_text()
    rows = re.findall(r"^\| `model=(\w+)` \| ([\w -]+) \| (.*) \|$", page, flags=re.MULTILINE)
    assert [preset for preset, *_ in rows] == [*PRESETS, "mamba2"]
    for preset, theirs, overrides in rows:
        m = model({"main": copy.deepcopy(recipe(preset))})
        found = fla_models.kind(m.blocks[0].mixer)
        assert theirs == (found.name if found else "none")
        said = dict(re.findall(r"`\+?([\w.]+)=([\w.]+)`", overrides))
        assert said == wanted(m) | ({"decay.longest": "H"} if preset == "retnet" else {}), preset
