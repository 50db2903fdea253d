"""Every recipe trains from the command line: the named ones, and some that nobody has named."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from models.training.logger import CsvLogger, read_metrics
from tests.conftest import ROOT
from tests.laws.presets import PRESETS

STEPS = 15
SMALL = (
    *("model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "seq_len=64"),
    *("batch_tokens=512", "micro_batch=8", f"tokens={512 * STEPS}", "validation_tokens=1024"),
    *("validate_every=15", "checkpoint_every=15", "log_every=1", "callbacks.sample.num_tokens=2"),
)
FEATURES, DECAY = "features@model.mixers.main.features", "decay@model.mixers.main.decay"


def launch(run, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "train.py", *overrides, *SMALL],
        cwd=ROOT,
        env=run.environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def check(folder) -> None:
    losses = [row["train/loss"] for row in read_metrics(folder / CsvLogger.FILE) if "train/loss" in row]
    assert len(losses) == STEPS and all(map(math.isfinite, losses)), losses
    assert losses[-1] < losses[0] - 0.3, losses
    assert math.isfinite(json.loads((folder / "result.json").read_text())["validation/nats"])


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_every_preset_trains(half, train):
    """One process for half of them: starting it takes longer than training one. An iterative solver tells its steps."""
    presets = PRESETS[half::2]
    done = launch(train, "-m", "name=presets", f"model={','.join(presets)}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for preset in presets:
        (folder,) = (train.runs / "presets").glob(f"*,model={preset},*")
        check(folder)
        if preset in ("mesa", "gated_kalman"):
            assert all(row["solver_steps/layer_1"] >= 1 for row in read_metrics(folder / CsvLogger.FILE))


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        ("model=gated_delta", f"{FEATURES}=taylor"),
        ("model=deltanet", f"{DECAY}=channel"),
        ("model=titans", f"{FEATURES}=dpfp"),
        ("model=mesa", f"{FEATURES}=nystrom"),
    ],
    ids=" ".join,
)
def test_recipes_without_a_name_train(recipe, train):
    done = launch(train, "name=unnamed", *recipe)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    check(train.runs / "unnamed")


def test_what_cannot_be_is_refused_with_what_can(train):
    """Channels that fade apart leave no least-squares problem."""
    done = launch(train, "name=unnamed", "model=mesa", f"{DECAY}=channel")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "LeastSquares cannot have a decay of kind 'channel'" in done.stderr
    assert "possible kinds: none, head" in done.stderr
