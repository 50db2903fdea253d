"""An exported model computes the same elsewhere: in a process that has transformers and none of this project, every
preset opens with its code, and what is a Qwen3 or a Qwen3-Next opens as that. The first such process is shared."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from data.tokenizer import Bytes
from models.language_model import LanguageModel, LanguageModelConfig
from models.training import origin, weights
from scripts import import_model
from scripts.export import arguments, choose, export, main
from scripts.exporting.code import code
from scripts.exporting.source import Source
from tests.conftest import ROOT
from tests.laws.presets import HEADS, HIDDEN, PRESETS, change, recipe

IDS = torch.arange(32).remainder(37).view(2, 16)
OPENER = """
import os, sys, warnings
for name in ("models", "conf", "data", "scripts", "train", "hydra", "omegaconf", "lightning", "fla"):
    sys.modules[name] = None  # not to be imported, wherever it may be installed
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from transformers.utils import logging

torch.set_num_threads(1)
warnings.simplefilter("ignore")
logging.disable_progress_bar()
ids, found = torch.load("ids.pt"), {}
def outcome(folder, trust):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    with torch.no_grad():
        logits = model(ids).logits
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return model, logits, model.generate(ids[:, :9], **settings)
for folder in sorted(Path("folders").iterdir()):
    is_theirs = folder.name.startswith("qwen")
    model, *found[folder.name] = outcome(folder, not is_theirs)
    assert type(model).__module__.split(".")[0] == ("transformers" if is_theirs else "transformers_modules")
    if folder.name in ("titans", "hybrid"):
        model.save_pretrained(f"saved/{folder.name}")
        _, *found[f"{folder.name} saved"] = outcome(f"saved/{folder.name}", True)
torch.save(found, "found.pt")
os.chdir("folders/mesa")
for _ in range(2):
    assert torch.equal(outcome(".", True)[1], found["mesa"][0])
"""


class Found(NamedTuple):
    """logits [B, T, V] of IDS; tokens that follow their first nine."""

    logits: Tensor
    tokens: Tensor


def model(mixers: dict[str, dict[str, Any]], layers: int = 1, **settings: Any) -> LanguageModel:
    """With weights that training might have left behind: no norm is one, no bias as it began."""
    torch.manual_seed(0)
    config = {"vocab_size": 37, "hidden_size": HIDDEN, "feed_forward_size": 48, "pattern": list(mixers)} | settings
    m = LanguageModel(LanguageModelConfig(num_layers=layers, mixers=mixers, **config)).eval()
    with torch.no_grad():
        for parameter in m.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return m


def attention(**settings: Any) -> dict[str, Any]:
    """softmax with one temperature for all heads."""
    return change(copy.deepcopy(recipe("softmax")), regressor__inverse_temperature=0.3, **settings)


def delta(**settings: Any) -> dict[str, Any]:
    return change(copy.deepcopy(recipe("gated_delta")), regressor__bias=False, **settings)


def as_they_train() -> dict[str, LanguageModel]:
    """With code; one of them with a mixer of somebody's own package."""
    models = {preset: model({"main": copy.deepcopy(recipe(preset))}) for preset in PRESETS}
    hybrid = {"recurrent": copy.deepcopy(recipe("mesa")), "attention": copy.deepcopy(recipe("softmax"))}
    own = change(copy.deepcopy(recipe("gated_delta")), qk_norm="none", feature_norm="none")
    own |= {"regressor": {"_target_": "own_mixer.kaczmarz.Kaczmarz", "_partial_": True}}
    models["own"] = model({"main": own | {"decay": recipe("deltanet")["decay"]}})
    return models | {"hybrid": model(hybrid, 2, feed_forward="persistent_memory", feed_forward_size=None)}


def qwens() -> dict[str, LanguageModel]:
    """By what of ours has another form there: one or more layers, eps, tied embeddings, grouped heads, QK-norms of
    length one, inner sizes, gates."""
    wide = {"num_heads": 2 * HEADS, "num_key_heads": HEADS, "key_dim": 8, "value_dim": 16}
    gated = attention(qk_norm="rms", output_gate="sigmoid", rotary_channels=4, norm_eps=1e-4)
    turning = {"key_dim": 46, "value_dim": 46, "rotary_channels": 26}  # 46 * (26 / 46) is below 26
    two = {"recurrent": delta(**wide), "attention": gated}
    plain = {"recurrent": delta(output_norm_eps=None), "attention": attention(**turning)}
    grouped = attention(qk_norm="rms", num_kv_heads=1, rotary=500.0)
    return {
        "qwen3 rms": model({"main": grouped}, 2, tie_embeddings=False, norm_eps=1e-5),
        "qwen3 l2": model({"main": attention()}),
        "qwen3_next delta": model({"main": delta()}),
        "qwen3_next gated": model(two, 2, feed_forward_size=None),
        "qwen3_next plain": model(plain, 2, tie_embeddings=False),
    }


@torch.no_grad()
def outcome(m: LanguageModel) -> Found:
    return Found(m(IDS).logits, m.generate(IDS[:, :9], max_new_tokens=6, do_sample=False, pad_token_id=0))


def source(m: LanguageModel, folder: Path) -> Source:
    return Source(m, folder, None, None, None)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> tuple[dict[str, Found], dict[str, Found]]:
    """What all models compute here and there."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(origin, "commit", lambda: {"commit": "0a1b2c", "changed": True})  # asks git, twice a folder
        patch.setenv("TTR_PACKAGES", "own_mixer")
        patch.syspath_prepend(str(ROOT / "docs" / "examples" / "own_mixer"))
        models = as_they_train() | qwens()
        for name, m in models.items():
            export(source(m, folder), name.split()[0] if "qwen" in name else "code", folder / "folders" / name)
    torch.save(IDS, folder / "ids.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", OPENER]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    there = {name: Found(*found) for name, found in torch.load(folder / "found.pt").items()}
    return {name: outcome(m) for name, m in models.items()}, there


@pytest.mark.slow
def test_what_is_exported_computes_the_same_elsewhere(elsewhere):
    """Every preset with its code, hybrids, and Qwens. Saved there once more (https://github.com/huggingface/transformers
    issue 29714), opened as "." (issue 29251), and opened twice in a process (issue 46661)."""
    here, there = elsewhere
    assert here.keys() == there.keys() - {"titans saved", "hybrid saved"} and here.keys() > {*PRESETS}
    for name, found in there.items():
        expected = here[name.removesuffix(" saved")]
        error = (found.logits - expected.logits).abs().max() / expected.logits.abs().max().clamp(min=1)
        assert error < 1e-5, (name, error)
        assert torch.equal(found.tokens, expected.tokens), name


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["titans_mag", "ttt_mlp"])
def test_the_code_asks_for_nothing_that_may_not_be_installed(preset, tmp_path):
    """From the hub, transformers wants every package that any file imports, anywhere in it, to be installed, and takes
    the files that the first one leads to (https://github.com/huggingface/transformers/issues/28459)."""
    for name, text in code({"main": recipe(preset)}).items():
        (tmp_path / f"{name}.py").write_text(text)
    for path in tmp_path.glob("*.py"):
        assert {*get_imports(path)} <= {"torch", "transformers", *sys.stdlib_module_names}, path
    found = get_relative_import_files(tmp_path / "language_model.py")
    assert {*map(Path, found), tmp_path / "language_model.py"} == {*tmp_path.glob("*.py")}
    assert len(found) < 2 * len({*found}), "each is found a few times, not once for each way to it"


REFUSED = [
    ("qwen3", {"main": "mesa"}, {}, "main is LeastSquares with ScalarDecay with Identity: Qwen3 has softmax"),
    ("qwen3", {"main": "gated_delta"}, {}, "mixers.main is Delta with ScalarDecay with Identity: Qwen3 has softmax"),
    ("qwen3_next", {"main": "gated_delta"}, {}, "main.regressor.bias=true: step sizes have none there; only false is"),
    ("qwen3", {"main": "softmax"}, {}, "main.regressor.inverse_temperature=learned: each head has its own, and"),
    ("qwen3", {"main": attention(regressor__window=4)}, {}, "main.regressor.window=4: Qwen3 has null there"),
    ("qwen3", {"main": attention(rotary=None)}, {}, "main.rotary=null: a base is needed, such as 10000.0"),
    ("qwen3", {"main": attention(output_gate="sigmoid")}, {}, "main.output_gate=sigmoid: none is possible"),
    ("qwen3_next", {"main": attention(output_gate="silu")}, {}, "output_gate=silu: none or sigmoid is possible"),
    ("qwen3_next", {"main": delta(norm_eps=1e-5)}, {}, "main.norm_eps=1e-05: Qwen3-Next has 1e-06 there"),
    ("qwen3", {"main": attention()}, {"feed_forward": "persistent_memory"}, "feed_forward=persistent_memory: Qwen3"),
    ("qwen3", {"a": attention(), "b": attention(rotary=5.0)}, {}, "mixers.b.rotary differs from another layer's"),
]  # fmt: skip


@pytest.mark.parametrize(("to", "mixers", "settings", "message"), REFUSED)
def test_what_is_another_function_is_refused(to, mixers, settings, message, tmp_path):
    recipes = {name: copy.deepcopy(recipe(r)) if isinstance(r, str) else r for name, r in mixers.items()}
    m = model(recipes, len(recipes), **settings)
    with pytest.raises(ValueError, match=rf"^--to {to}: .*{re.escape(message)}"):
        export(source(m, tmp_path), to)
    assert not list(tmp_path.iterdir())
    architecture, reasons = choose(source(m, tmp_path), None)
    assert architecture != to and message in " ".join(reasons)


@pytest.mark.slow
def test_the_card_says_what_the_model_is(tmp_path, capsys):
    """Of a run: its data, metrics, config, command and commit, and how to open it."""
    run = tmp_path / "mine"
    m = model({"main": delta()})
    m.save_pretrained(run / "model")
    Bytes().save(run / "model")
    config = {"name": "mine", "seq_len": 16, "seed": 3, "data": {"name": "a corpus"}, "tokenizer": {"name": "theirs"}}
    config["batch_tokens"] = 64
    config |= {"model": {"mixers": {}}, "run_dir": "/somewhere"}
    (run / "config.yaml").write_text(json.dumps(config))
    result = {"validation/nats": 1.25, "tokens": 4096, "flops": 10**9, "commit": "0a1b2c", "changed": True}
    result |= {"versions": {"torch": "2.13.0"}, "device": "cpu", "command": "python train.py seed=3"}
    (run / "result.json").write_text(json.dumps(result))
    main([str(run)])
    folder = run / "exported" / "qwen3_next"
    assert "not as    qwen3: " in (said := capsys.readouterr().out) and str(folder) in said
    card = (folder / "README.md").read_text()
    for part in ("# mine", "transformers' own Qwen3-Next", "main (in 1)", "a corpus", "theirs", "| nats | 1.25 |",
                 "tokens: 4,096", "python train.py seed=3", "At commit 0a1b2c with changes", "torch 2.13.0", "seed: 3",
                 f"export.py {run} --to qwen3_next"):  # fmt: skip
        assert part in card, part
    assert "/somewhere" not in card and (folder / "tokenizer.json").exists()
    for words, message in (
        ([str(run)], "qwen3_next is there already"),
        ([str(tmp_path)], "holds 1 runs; name one of them"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(words)


def test_what_is_exported_with_its_code_begins_a_run_here(tmp_path):
    m = model({"main": recipe("kda")})
    folder = export(source(m, tmp_path), "code")
    other = model({"main": recipe("kda")})
    torch.nn.init.zeros_(other.embedding.weight)
    weights.load(other, str(folder))
    assert torch.equal(other(IDS).logits, m(IDS).logits)


def test_the_commands_of_the_docs_are_understood():
    page = (ROOT / "docs" / "exporting.md").read_text()
    commands = [line.split() for line in page.splitlines() if line.startswith("    python scripts/")]
    assert len(commands) == 5
    for _, script, *words in commands:
        {"scripts/export.py": arguments, "scripts/import_model.py": import_model.arguments}[script](words)
