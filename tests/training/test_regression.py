"""The look into the inner regression while a model trains: what it leaves, and that it leaves the training alone."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers.logger import Logger

from models.training import probe
from models.training.logger import Tolerant
from models.training.preemption import Stopped
from models.training.regression import InnerRegression, ages_of, read_rows, row_of, texts
from models.training.regression_plot import facts
from tests.test_language_model import model
from tests.training.test_interruptions import Fit


class Pictures(Logger):
    """A logger that takes pictures, as wandb's does, and nothing else."""

    name = version = experiment = None

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[str, str, int]] = []

    def log_image(self, key: str, images: list[str], step: int) -> None:
        self.taken += [(key, image, step) for image in images]

    def log_metrics(self, metrics, step=None) -> None:
        """Nothing."""

    def log_hyperparams(self, *args) -> None:
        """Nothing."""


def looking(folder, at=lambda step: None, picture_share=None, **settings) -> Fit:
    fit = Fit(folder, at, **settings)
    fit.callbacks.insert(1, InnerRegression(picture_share=picture_share))
    return fit


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Fit:
    fit = looking(tmp_path_factory.mktemp("looked"), picture_share=0.0, loggers=[Tolerant(Pictures())]).run()
    fit.random, fit.path = torch.get_rng_state(), fit.folder / "regression.jsonl"
    return fit


@pytest.mark.slow
def test_a_run_is_the_same_with_it_and_without(undisturbed, tmp_path):
    """Weights, all that is logged but for what it adds, and the random numbers that would come next."""
    without = Fit(tmp_path).run()
    assert torch.equal(torch.get_rng_state(), undisturbed.random)
    pairs = zip(without.module.state_dict().items(), undisturbed.module.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)
    added = {name for row in undisturbed.rows for name in row if name.startswith("regression/")}
    kept = [{name: x for name, x in row.items() if name not in added} for row in undisturbed.rows]
    assert kept == without.rows and added


def test_what_it_leaves(undisturbed):
    """A line for each layer at both validations, means in their rows of metrics.csv, one picture, which loggers get."""
    rows = read_rows(undisturbed.path)
    layers = len(undisturbed.module.model.blocks)
    assert [(row["step"], row["layer"]) for row in rows] == [(step, i) for step in (5, 11) for i in range(layers)]
    validated = [row for row in undisturbed.rows if "validation/nats" in row]
    assert [row["step"] for row in validated] == [5, 11]
    of_head = [x[0] for x in rows[-1]["loss"]]
    told = validated[-1][f"regression/after/layer_{layers - 1}"]
    assert told == pytest.approx(sum(of_head) / len(of_head)) and rows[-1]["tokens"] == 12 * 64
    assert rows[-1]["ages"] == [0, 1, 2, 4, 8] and f"regression/recall_at_8/layer_{layers - 1}" in validated[-1]
    assert {"half_life", "step_size", "norm_memory", "rank_memory", "reach"} <= rows[-1]["quantities"].keys()
    assert (undisturbed.folder / "regression.png").stat().st_size > 10_000
    taken = undisturbed.loggers[1].logger.taken
    assert taken[-1] == ("regression/picture", str(undisturbed.folder / "regression.png"), 11)


def test_a_heading_is_no_wider_than_its_panel():
    """Ranges over heads, two to a line, four at most."""
    quantities = {
        "half_life": [2.23, None, 9.4],
        "step_size": [0.003, 0.005],
        "momentum": [0.5],
        "bandwidth": [0.001, 33],
    }
    said = facts({"quantities": quantities | {"reach": [3.0]}})
    assert said == "half-life 2.2 to 9.4, step 0.003 to 0.005,\nmomentum 0.5, bandwidth 0.001 to 33"


def test_interrupted_it_leaves_the_same(undisturbed, tmp_path):
    """Also where the line of a later step is there."""
    path = tmp_path / "regression.jsonl"
    with pytest.raises(Stopped):
        looking(tmp_path, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 8 else None).run()
    path.write_text(path.read_text() + json.dumps(read_rows(path)[0] | {"step": 9}) + "\n")
    looking(tmp_path).run()
    assert path.read_text() == undisturbed.path.read_text()


def test_a_run_that_began_without_goes_on_with_it(tmp_path, undisturbed):
    with pytest.raises(Stopped):
        Fit(tmp_path, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 8 else None).run()
    looking(tmp_path).run()
    rows = read_rows(undisturbed.path)
    assert read_rows(tmp_path / "regression.jsonl") == [row for row in rows if row["step"] == 11]


@pytest.mark.slow
def test_compiled_blocks_stay_as_they_were_compiled():
    m = model("gated_delta").float()
    for block in m.blocks:
        block.compile(backend="eager")
    ids = torch.arange(32).view(2, 16) % 23
    graphs = torch._dynamo.utils.counters["stats"]

    def steps() -> int:
        m(ids, labels=ids).loss.backward()
        with torch.no_grad():
            m(ids)
        return graphs["unique_graphs"]

    before = steps()
    rows: list[dict] = []
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        probe.watching(m.blocks, lambda seen: rows.append(row_of(seen))),
    ):
        m(ids[:1], logits_to_keep=1)
    assert len(rows) == len(m.blocks) and before > 0
    assert steps() == before


def test_the_text_is_spread_over_the_validation_set():
    samples = [{"input_ids": torch.full((16,), i)} for i in range(10)]
    assert texts(samples, 64, 16)[:, 0].tolist() == [0, 2, 5, 7] and texts(samples, 64, 16).shape == (4, 16)
    assert texts(samples, 12, 16).shape == (1, 12) and texts(samples, 999, 16).shape == (10, 16)
    assert [ages_of(T) for T in (1, 2, 5, 8)] == [[-1, 0], [-1, 0, 1], [-1, 0, 1, 2], [-1, 0, 1, 2, 4]]


def test_a_full_disk_costs_a_warning(undisturbed, tmp_path, capsys):
    callback = InnerRegression()
    callback.path, callback.rows = tmp_path / "gone" / "regression.jsonl", [read_rows(undisturbed.path)[0]]
    callback._write()
    callback._draw(SimpleNamespace(global_rank=0, loggers=[]))
    said = capsys.readouterr().out
    assert all(
        f"regression.{kind} could not be written (No such file or directory)" in said for kind in ("jsonl", "png")
    )
