"""Made tasks from the command line: every one trains, and is tested at its test points."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from models.training.module import Training
from models.training.points import RANGES, metrics, ranges

TOY = ("model.hidden_size=16", "model.num_layers=1", "model.num_heads=1", "validate_every=1.0", "log_every=1")


@pytest.mark.slow
def test_recall_at_its_test_points(train):
    """Two steps of the mixture, each of one kind, in micro-batches and in whole."""
    words = ["experiment=mqar", "model=deltanet", "data.train=[[32,4,64],[64,8,64]]", "data.test=[[32,4,9],[128,16,5]]"]
    words += ["data.vocab_size=64", "seq_len=64", "batch_tokens=1024", "tokens=2048", "validation_tokens=1024", *TOY]
    done = train("-m", *words, "micro_batch=16", "name=a")
    assert done.returncode == 0, done.said[-5000:]
    (path,) = (train.runs / "a").glob("*/result.json")
    result = json.loads(path.read_text())
    assert 0 <= result["validation/accuracy_on/32x4"] <= 1 and result["validation/chance"] == 1 / 32
    assert len([name for name in result if "accuracy_on" in name]) == 2


@pytest.mark.slow
def test_state_tracking_by_position(train):
    words = ["experiment=state_tracking_others", "data=parity,modular_arithmetic,modular_brackets,s3", "model=linear"]
    words += ["seed=1", "batch_tokens=320", "micro_batch=8", "tokens=640", "data.test_size=24", *TOY]
    done = train("-m", *words, "validation_tokens=640", "name=states")
    assert done.returncode == 0 and "4 jobs, 0 failed" in done.said, done.said[-5000:]
    for path in (train.runs / "states").glob("*/result.json"):
        result = json.loads(path.read_text())
        at = {name: x for name, x in result.items() if name.startswith("validation/accuracy_on/longer/")}
        assert all(0 <= x <= 1 for x in at.values()) and 0 <= result["validation/accuracy_on/longer"] <= 1
        assert len(at) == 16 if "data=s3" in str(path) else 5 < len(at) <= 14, at


def test_a_loss_by_the_number_of_targets_does_not_hang_on_the_split():
    """targets_per_token=None: each sequence has as many, and so has each micro-batch."""
    nats, labels = torch.rand(4, 12), torch.arange(48).view(4, 12) % 12
    labels = labels.masked_fill(labels < 9, -100)
    model = SimpleNamespace(sum_nats=lambda ids, labels, segments: nats[ids][labels != -100].sum())
    module = SimpleNamespace(model=model, targets_per_token=None)

    def loss(rows: list[int]) -> float:
        batch = {"input_ids": torch.tensor(rows), "labels": labels[rows], "segments": None}
        found, sums = Training._loss(module, batch)
        assert sums[1] == 3 * len(rows) and found.item() == pytest.approx(sums[0].item() / sums[1].item())
        return found.item()

    assert loss([0, 1, 2, 3]) == pytest.approx((loss([0, 1]) + loss([2, 3])) / 2)


def test_accuracy_of_a_point_by_hand():
    sums = torch.zeros(3, 40, dtype=torch.float64)
    sums[1, [4, 5, 39]], sums[2, [5, 39]] = torch.tensor([2.0, 2, 4]).double(), torch.tensor([1.0, 4]).double()
    found = metrics({"longer": sums}, by_position=True)
    assert found == {
        "validation/accuracy_on/longer": 5 / 8,
        "validation/accuracy_on/longer/3-5": 1 / 4,
        "validation/accuracy_on/longer/39-39": 1.0,
    }
    assert metrics({"longer": sums}, by_position=False).keys() == {"validation/accuracy_on/longer"}
    assert len(ranges(512)) == RANGES and ranges(20)[-1] == (18, 20)
