"""A mixer in somebody's own package: allowed by one environment variable, and by nothing that a config says."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from models.build import build
from models.parts.sizes import Sizes
from models.training.logger import CsvLogger, read_metrics
from tests.conftest import ROOT

SIZES = Sizes(12, 2, 2, 6, 6)
NODE = {"_target_": "own_mixer.regressor.Kaczmarz", "_partial_": True}
CODE = '''"""Normalised LMS: the delta rule whose step is divided by |k|^2, so that the length of a key is nothing."""

from models.regression.linear import Delta
from models.regression.regressor import Tokens


class Kaczmarz(Delta):
    def forward(self, tokens: Tokens, state=None):
        x, q, k, v, log_decay, segments = tokens
        k = (k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()).to(v.dtype)
        return super().forward(Tokens(x, q, k, v, log_decay, segments), state)
'''
MIXER = """# Normalised LMS
defaults: [gated_delta, _self_]
regressor: {_target_: own_mixer.regressor.Kaczmarz, _partial_: true, backend: auto}
qk_norm: none
"""
MODEL = "# Normalised LMS in every layer.\ndefaults: [base, /mixer@mixers.main: kaczmarz, _self_]\n"


@pytest.fixture
def package(tmp_path):
    """A folder with the package, and with the YAML beside it."""
    files = {"own_mixer/__init__.py": "", "own_mixer/regressor.py": CODE}
    files |= {"conf/mixer/kaczmarz.yaml": MIXER, "conf/model/kaczmarz.yaml": MODEL}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_class_of_an_allowed_package_is_built_and_of_another_refused(package, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "own_mixer"]:  # another test's, of that name
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(package))
    with pytest.raises(ValueError, match=r"may name only models\.\*, .*TTR_PACKAGES=own_mixer allows a package"):
        build(NODE)
    monkeypatch.setenv("TTR_PACKAGES", "own_mixer")
    assert type(build(NODE)(SIZES)).__name__ == "Kaczmarz"
    with pytest.raises(ValueError, match=r"it is not a class of own_mixer\.regressor"):  # not what it imports
        build({"_target_": "own_mixer.regressor.Delta"})
    monkeypatch.setenv("TTR_PACKAGES", "own_mixr")
    with pytest.raises(ValueError, match=r"TTR_PACKAGES=own_mixr: 'own_mixr' is not a package that Python finds"):
        build(NODE)


@pytest.mark.slow
def test_train_py_trains_it(package, train):
    sizes = ("model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "seq_len=32", "batch_tokens=256")
    budget = ("tokens=2560", "validation_tokens=1024", "log_every=1", "callbacks.sample.num_tokens=2")
    given = (f"hydra.searchpath=[file://{package}/conf]", "model=kaczmarz", "name=own", *sizes, *budget)

    def typed(**environment: str) -> subprocess.CompletedProcess[str]:
        environment = train.environment | {"PYTHONPATH": str(package)} | environment
        command = [sys.executable, "train.py", *given]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    refused = typed()
    assert refused.returncode == 1 and "TTR_PACKAGES=own_mixer allows" in refused.stderr, refused.stderr[-2000:]
    assert "Traceback" not in refused.stderr
    done = typed(TTR_PACKAGES="own_mixer")
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [row["train/loss"] for row in read_metrics(train.runs / "own" / CsvLogger.FILE) if "train/loss" in row]
    assert len(losses) == 10 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
