"""Made tasks from the command line: every one trains, and is tested at its test points."""

from __future__ import annotations

import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from models.continuous import Continuous
from models.language_model import LanguageModel, LanguageModelConfig
from models.reconstruction import Reconstruction, sinusoids
from models.training.module import Training
from models.training.points import RANGES, metrics, ranges
from models.training.weights import open_trained
from tests.test_config import composed

TOY = (
    "num_workers=0",
    "model.hidden_size=16",
    "model.num_layers=1",
    "model.num_heads=1",
    "validate_every=1.0",
    "log_every=1",
)


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
    words = ["experiment=state_tracking_others", "data=parity,s3", "model=linear"]
    words += ["seed=1", "batch_tokens=320", "micro_batch=8", "tokens=640", "data.test_size=24", *TOY]
    done = train("-m", *words, "validation_tokens=640", "name=states")
    assert done.returncode == 0 and "2 jobs, 0 failed" in done.said, done.said[-5000:]
    for path in (train.runs / "states").glob("*/result.json"):
        result = json.loads(path.read_text())
        at = {name: x for name, x in result.items() if name.startswith("validation/accuracy_on/longer/")}
        assert all(0 <= x <= 1 for x in at.values()) and 0 <= result["validation/accuracy_on/longer"] <= 1
        assert len(at) == 16 if "data=s3" in str(path) else 5 < len(at) <= 14, at
        assert 0 <= result["validation/accuracy_at/16-31"] <= 1, "of the validation set"


@pytest.mark.slow
def test_mad(train):
    """Two steps; compression by the model that it needs."""
    words = ["experiment=mad", "data=mad_noisy_recall,mad_compression", "model=linear", "data.train_size=128"]
    words += ["data.validation_size=16", "tokens='${mul:${batch_tokens},2}'", *TOY]
    done = train("-m", *words, "name=mad")
    assert done.returncode == 0 and "2 jobs, 0 failed" in done.said, done.said[-5000:]
    (path,) = (train.runs / "mad").glob("*mad_compression*/result.json")
    result = json.loads(path.read_text())
    assert 0 <= result["validation/accuracy"] <= 1 and result["validation/chance"] == pytest.approx(1 / 15)
    weights = load_file(path.parent / "model" / "model.safetensors")
    assert "decoder.1.weight" in weights and "decoder.4.weight" in weights
    for where, what in ((path.parent, "holds a Reconstruction"), (path.parent / "checkpoints", "has decoder.")):
        place = where if where == path.parent else next(where.glob("*.ckpt"))
        with pytest.raises(ValueError, match=f"{what}.*, the model of a made task and no language model"):
            open_trained(place)


@pytest.mark.slow
def test_regression_of_numbers(train):
    """Two steps; no accuracy, but a loss at the test point."""
    words = ["experiment=regression", "model=mesa", "data=regression_parabola", "data.size=4", "data.test_length=32"]
    words += [
        "data.validation_size=16",
        "seq_len=16",
        "batch_tokens=128",
        "micro_batch=8",
        "tokens=256",
        "name=numbers",
    ]
    done = train(*words, "micro_batch=8", "validation_tokens=256", *TOY)
    assert done.returncode == 0, done.said[-5000:]
    result = json.loads((train.runs / "numbers" / "result.json").read_text())
    assert 0.1 < result["validation/nats_on/longer"] < 5 and 0.1 < result["validation/nats_on/longer/0-1"] < 5
    assert not any("accuracy" in name for name in result)


def test_a_model_of_numbers_reads_by_its_embedding_and_is_wrong_by_the_square():
    torch.manual_seed(0)
    recipe = composed("model=linear", "model.hidden_size=16", "model.num_layers=1", "model.num_heads=1").model
    model = Continuous(LanguageModelConfig(vocab_size=5, **OmegaConf.to_container(recipe, resolve=True)))
    ids = torch.randint(5, (2, 6))
    said = LanguageModel.hidden(model, ids)[0] @ model.head.weight[0]
    tokens, answers = torch.nn.functional.one_hot(ids, 5).float(), torch.full((2, 6), -100.0)
    answers[:, ::2] = torch.randn(2, 3)
    nats, found = model.score(tokens, answers)
    assert torch.allclose(found, said, atol=1e-6) and not nats[:, 1::2].any()
    assert nats[:, ::2].sum().item() == pytest.approx(((said - answers)[:, ::2] ** 2 / 2).sum().item(), rel=1e-5)
    loss = model.sum_nats(tokens, answers)
    assert loss.item() == pytest.approx(nats.sum().item(), rel=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_needles(train):
    words = ["experiment=needles", "model=linear", "seq_len=256", "batch_tokens=1024", "micro_batch=4", "tokens=2048"]
    words += ["data=needle_s3", "data.test_size=2", "data.test_lengths=[256,512]", *TOY]
    done = train("-m", *words, "validation_tokens=1024", "name=needles")
    assert done.returncode == 0, done.said[-5000:]
    for path in (train.runs / "needles").glob("*/result.json"):
        result = json.loads(path.read_text())
        assert {name for name in result if "_on/" in name} == {f"validation/accuracy_on/{n}" for n in (256, 512)}


def test_what_is_said_again_hangs_on_the_last_position_alone():
    """And on its own place: the same state, other places. (models/reconstruction.py)"""
    torch.manual_seed(0)
    recipe = composed("model=linear", "model.hidden_size=16", "model.num_layers=1", "model.num_heads=1").model
    config = LanguageModelConfig(vocab_size=8, **OmegaConf.to_container(recipe, resolve=True))
    model, ids = Reconstruction(config).double(), torch.randint(8, (2, 10))
    whole, _ = model.hidden(ids)
    last = LanguageModel.hidden(model, ids)[0][:, -1:]
    again = model.decoder(last + sinusoids(10, 16, torch.device("cpu")).double())
    assert whole.shape == (2, 10, 16) and torch.equal(whole, again) and not torch.allclose(whole[:, 0], whole[:, 1])
    places = sinusoids(10, 16, torch.device("cpu"))
    assert places[0].tolist() == [0.0] * 8 + [1.0] * 8
    assert places[3, 7].item() == pytest.approx(math.sin(3e-4)) and sinusoids(4, 5, torch.device("cpu")).shape == (4, 5)
    assert model.flops_per_token(10) == LanguageModel.flops_per_token(model, 10) + 4 * 16**2
    model.sum_nats(ids, ids).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_loss_by_the_number_of_targets_does_not_hang_on_the_split():
    """targets_per_token=None: each sequence has as many, and so has each micro-batch."""
    nats, labels = torch.rand(4, 12), torch.arange(48).view(4, 12) % 12
    labels = labels.masked_fill(labels < 9, -100)
    model = SimpleNamespace(sum_nats=lambda ids, labels, segments: nats[ids][labels != -100].sum())
    module = SimpleNamespace(model=model, targets_per_token=None, context=None)
    module._of_tokens = partial(Training._of_tokens, module)

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
