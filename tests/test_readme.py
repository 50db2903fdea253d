"""README and docs say what is so: its commands compose, its files exist, its length stays readable."""

from __future__ import annotations

import re
import shlex

import pytest
from omegaconf import OmegaConf

from models.build import problems
from scripts.recipes import PRESETS, recipe, table
from tests.conftest import ROOT
from tests.test_config import CONF, composed

README = (ROOT / "README.md").read_text()
PAGES = README + "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
COMMANDS = [line.strip() for line in PAGES.splitlines() if "train.py " in line and line.startswith("    ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command):
    """Every override names something that exists; sweeps are tried at each of their points' first values."""
    words = shlex.split(command.split(" # ")[0], comments=True)
    overrides = [word for word in words[words.index("train.py") + 1 :] if "=" in word]
    if "-m" in words:
        overrides = [re.sub(r"=([^,\[]+),.*", r"=\1", word) for word in overrides]
    cfg = composed(*overrides)
    assert list(problems(OmegaConf.to_container(cfg, resolve=True))) == []


def test_there_are_commands():
    assert len(COMMANDS) > 8


def test_named_files_exist():
    for path in re.findall(r"\b(?:models|conf|tests|scripts|data)/[\w/]+\.\w+\b", PAGES):
        if "NAME" not in path:
            assert (ROOT / path).exists(), path


def test_every_model_and_corpus_is_named():
    for group in ("model", "data", "tokenizer", "size"):
        for path in (CONF / group).glob("*.yaml"):
            assert path.stem == "base" or path.stem in README, f"{group}={path.stem} is not in README.md"


@pytest.mark.slow
def test_the_table_of_mixers_is_what_the_script_prints():
    assert table([recipe(preset, "340m") for preset in PRESETS], markdown=True) in README
