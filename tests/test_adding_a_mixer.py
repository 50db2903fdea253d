"""docs/adding_a_mixer.md does what it says, from a folder outside the repository; and what a beginner forgets is told
in a sentence by the law that fails."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models.training.logger import CsvLogger, read_metrics
from tests.conftest import ROOT
from tests.laws import conftest as laws
from tests.laws import presets, test_laws, test_objectives

EXAMPLE = ROOT / "docs" / "examples" / "own_mixer"
PAGE = ROOT / "docs" / "adding_a_mixer.md"

BROKEN = '''"""The example, broken in ways that a beginner would."""

from own_mixer.kaczmarz import Kaczmarz
from models.regression.memory import Memory
from models.regression.regressor import Regressor


class NotCausal(Kaczmarz):
    """Keys divided by the longest of the whole sequence."""

    def forward(self, tokens, state=None):
        longest = tokens.k.norm(dim=-1, keepdim=True).amax(1, keepdim=True)
        return super().forward(tokens._replace(k=tokens.k / longest), state)


class WithoutDocuments(Kaczmarz):
    def forward(self, tokens, state=None):
        return super().forward(tokens._replace(segments=None), state)


class WithoutState(Kaczmarz):
    def forward(self, tokens, state=None):
        return super().forward(tokens, None)


class WithoutFlops(Kaczmarz):
    flops_per_token = Memory.flops_per_token


class WithoutFit(Kaczmarz):
    fit = None


class WithoutStateSize(Kaczmarz):
    state_size = Regressor.state_size
'''
TOLD = {
    "NotCausal": (test_laws.test_1_causal, "changes the output of an earlier token: the layer is not causal"),
    "WithoutDocuments": (
        test_laws.test_4_packed_documents_are_separate_sequences,
        "a document sees the one before it in the row: the memory is not emptied where `segments` changes",
    ),
    "WithoutState": (test_laws.test_3_one_map_in_every_form, "the state does not carry on what it must"),
    "WithoutFlops": (test_laws.test_9_counts, "WithoutFlops has no flops_per_token(seq_len), which every regressor"),
    "WithoutFit": (test_laws.test_9_it_says_how_it_is_fitted, "WithoutFit has no `fit`, a few words on how it is"),
    "WithoutStateSize": (test_laws.test_9_counts, "WithoutStateSize has no state_size(seq_len), which every regressor"),
}


def unload() -> None:
    """Other tests have packages of these names."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("own_mixer", "broken_mixers")]:
        del sys.modules[name]


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """broken(NAME): from here on the laws are tried on Longhorn's shell around that regressor, whatever their preset.
    None is the example as it is."""
    (tmp_path / "broken_mixers.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TTR_PACKAGES", "own_mixer,broken_mixers")
    unload()

    def use(name: str | None) -> None:
        target = "own_mixer.kaczmarz.Kaczmarz" if name is None else f"broken_mixers.{name}"

        def mixer(preset: str, backend: str = "torch", dtype: torch.dtype = torch.float64):
            node = {"_target_": target, "_partial_": True, "backend": backend, "chunk": presets.CHUNK}
            return presets.mixer("longhorn", dtype=dtype, regressor=node)

        monkeypatch.setattr(test_laws, "mixer", mixer)

    yield use
    unload()


def tried(law, preset: str) -> None:
    """The law, in its parallel form where it is tried in both."""
    law(preset, "torch") if "backend" in law.__code__.co_varnames[: law.__code__.co_argcount] else law(preset)


@pytest.mark.parametrize("name", TOLD)
def test_what_is_forgotten_is_told_in_a_sentence(broken, name):
    law, sentence = TOLD[name]
    broken(None)
    tried(law, "mine")  # what was not broken passes
    broken(name)
    with pytest.raises((AssertionError, pytest.fail.Exception), match=rf"^mine[:,].*{re.escape(sentence)}"):
        tried(law, "mine")


@pytest.mark.parametrize("recipe, style, alone", [("mine.yaml", "auto", True), ("mine.yaml", "long", False),
                                                  (None, "auto", False)])  # fmt: skip
def test_of_an_own_recipe_the_sentence_is_all_that_a_law_shows(recipe, style, alone):
    def law():
        assert 1 + 1 == 3, "mine: the layer is not causal"

    item = SimpleNamespace(config=SimpleNamespace(getoption={"recipe": recipe, "tbstyle": style}.get))
    report = SimpleNamespace(failed=True, longrepr="pages of code")
    showing = laws.pytest_runtest_makereport(item, pytest.CallInfo.from_call(law, "call"))
    next(showing)
    with pytest.raises(StopIteration) as stop:
        showing.send(report)
    assert stop.value.value is report
    assert report.longrepr == ("mine: the layer is not causal" if alone else "pages of code")


def test_a_recipe_without_an_objective_is_told_where_to_write_it():
    with pytest.raises(
        AssertionError, match=r"^mine: nothing says what it minimises; .*@states\('mine'\).*--objective"
    ):
        test_objectives.test_6_it_is_the_regression_it_claims("mine")


@pytest.fixture
def commands(tmp_path, train):
    """commands(BEGINNING) runs the page's settings, with the example's folder copied to where no repository is, and
    then its commands that begin so."""
    shutil.copytree(EXAMPLE, tmp_path / "mine", ignore=shutil.ignore_patterns("__pycache__"))
    lines = [
        line for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL) for line in block.splitlines()
    ]

    def run(beginning: str) -> subprocess.CompletedProcess[str]:
        settings, chosen = ([line for line in lines if line.startswith(word)] for word in ("export ", beginning))
        assert settings and chosen
        script = "\n".join(["set -e", *settings, *chosen]).replace(
            f"$PWD/{EXAMPLE.relative_to(ROOT)}", f"{tmp_path}/mine"
        )
        # as it is typed: by this Python, in one process, and with what this test's own pytest has set left out
        own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = (
            own
            | {name: train.environment[name] for name in ("RUNS", "TTR_CACHE")}
            | {"PATH": path, "PYTEST_ADDOPTS": "--numprocesses=0"}
        )
        return subprocess.run(
            ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
        )

    return run


@pytest.mark.slow
def test_the_example_obeys_the_laws(commands):
    done = commands("pytest tests/laws")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 30


@pytest.mark.slow
def test_the_example_trains(commands, train):
    done = commands("python train.py")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_metrics(train.runs / "first" / CsvLogger.FILE)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 10 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
