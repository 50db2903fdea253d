"""Every recipe trains from the command line: the named ones, and some that nobody has named."""

from __future__ import annotations

import json
import math

import pytest

from models.training.logger import CsvLogger, read_metrics
from tests.laws.presets import PRESETS
from tests.laws.test_baselines import BASELINES
from tests.test_config import said_by_main

SMALL = (
    *("model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "seq_len=64"),
    *("batch_tokens=512", "micro_batch=8", "validation_tokens=1024", "log_every=1"),
    *("callbacks.sample.num_tokens=2", "~callbacks.plot", "callbacks.regression.picture_share=null"),
)
FEATURES, DECAY = "features@model.mixers.main.features", "decay@model.mixers.main.decay"


def steps(number: int) -> list[str]:
    """Validated after the last."""
    return [f"tokens={512 * number}", f"validate_every={number}"]


def losses(folder, number: int) -> list[float]:
    """Of so many steps, all finite, as is the validation after them."""
    found = [row["train/loss"] for row in read_metrics(folder / CsvLogger.FILE) if "train/loss" in row]
    assert len(found) == number and all(map(math.isfinite, found)), (folder.name, found)
    assert math.isfinite(json.loads((folder / "result.json").read_text())["validation/nats"]), folder.name
    return found


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_every_preset_trains(half, train):
    """Three steps, a validation, a text and an exported model each, in a sweep of half of them. That twenty steps lower
    every preset's loss is told in tests/golden. An iterative solver tells its steps."""
    presets = [*PRESETS, *BASELINES][half::2]
    done = train("-m", "name=presets", f"model={','.join(presets)}", *SMALL, *steps(3), timeout=900)
    assert done.returncode == 0, done.said[-6000:]
    for preset in presets:
        (folder,) = (train.runs / "presets").glob(f"*,model={preset},*")
        losses(folder, 3)
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
    done = train("name=unnamed", *recipe, *SMALL, *steps(15))
    assert done.returncode == 0, done.said[-6000:]
    found = losses(train.runs / "unnamed", 15)
    assert found[-1] < found[0] - 0.3, found


@pytest.mark.slow
def test_recall_is_what_its_first_line_says_and_tells_chance(train):
    """Two steps of it. Law 10 has 200 of the same task."""
    done = train("experiment=recall", "tokens=4096", "validation_tokens=2048", "~callbacks.plot")
    assert done.returncode == 0, done.said[-6000:]
    assert "4 pairs in 32 tokens" in done.said
    assert "a guess: 0.0312 among all values, 0.25 among a sequence's own" in done.said
    assert "accuracy (chance 0.031)" in done.said and "accuracy, 0.03125 by chance" in done.said
    result = json.loads((train.runs / "recall-gated_delta" / "result.json").read_text())
    assert result["validation/chance"] == 1 / 32 and 0 <= result["validation/accuracy"] <= 1


def test_what_cannot_be_is_refused_with_what_can(train, monkeypatch):
    """Channels that fade apart leave no least-squares problem."""
    for name in ("RUNS", "TTR_CACHE"):
        monkeypatch.setenv(name, train.environment[name])
    said = said_by_main(["name=unnamed", "model=mesa", f"{DECAY}=channel", *SMALL, *steps(15)], monkeypatch)
    assert "LeastSquares cannot have a ChannelDecay" in said and "Traceback" not in said
    assert "possible choices of decay: none, fixed, scalar, sigmoid" in said
