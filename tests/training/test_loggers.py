"""Runs in wandb, TensorBoard and MLflow: what they are given, and one curve after an interruption.

A curve that goes back after it was resumed: https://github.com/wandb/wandb/issues/4482,
https://github.com/wandb/wandb/issues/2234, https://github.com/allenai/tango/issues/152. Offline, where the second file
counts its rows from 0: https://github.com/wandb/wandb/issues/2423, https://github.com/wandb/wandb/issues/5865.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from matplotlib.figure import Figure

from conf.folders import label, sweep_of
from models.training.checkpoint import newest_whole, step_of
from models.training.logger import Tolerant, logged
from models.training.loggers import identity, offline
from models.training.loggers.about import choice
from models.training.loggers.mlflow import MLflow
from models.training.loggers.seen import news
from models.training.loggers.tensorboard import TensorBoard
from models.training.loggers.wandb import Wandb
from models.training.speed import Throughput
from tests.test_config import composed
from tests.test_mistakes import said_of
from tests.training.test_interruptions import NUM_STEPS, Fit, one_thread  # noqa: F401
from tests.training.test_sweep import curves, records

SAMPLE = ("def f(", "x):\n    return x")


def available(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def loggers(folder: Path) -> list[Tolerant]:
    found = [Wandb(id="run", save_dir=str(folder), project="p", name="n", tags=["a", None, "b" * 99])]
    if available("tensorboard"):
        found.append(TensorBoard(save_dir=str(folder)))
    if available("mlflow"):
        found.append(MLflow(save_dir=str(folder), tracking_uri=f"sqlite:///{folder}/mlflow.db", experiment_name="e"))
    return [Tolerant(logger) for logger in found]


def going(folder: Path, at=lambda step: None) -> Fit:
    """As models/training/job.py does it."""
    path, _ = newest_whole(folder / "checkpoints")
    fit = Fit(folder, at, loggers(folder))
    fit.callbacks.insert(1, Throughput())
    for logger in fit.loggers[1:]:
        logger.resume(step_of(path) if path else 0, logged(folder))
        logger.log_hyperparams({"model": {"width": 16}, "going_on": path is not None})
    try:
        fit.run()
        picture = folder / "picture.png"
        Figure(figsize=(1, 1)).savefig(picture)
        for logger in fit.loggers:
            logger.log_image("picture", picture, NUM_STEPS - 1)
            logger.log_image("look", picture, NUM_STEPS - 2)  # of the last look, drawn after the last step
            logger.log_sample(*SAMPLE, NUM_STEPS - 1)
    finally:
        for logger in fit.loggers:
            logger.close(failed=False)
    assert not any(logger.failed for logger in fit.loggers)
    return fit


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """The folder of a run that was killed in its eighth step, and went on from the sixth."""

    def at(step: int) -> None:
        if step == 8:
            raise OSError("as if killed")

    folder = tmp_path_factory.mktemp("resumed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        with pytest.raises(OSError, match="as if killed"):
            going(folder, at)
        going(folder)
    wandb.teardown()
    return folder


@pytest.mark.slow
def test_wandb_goes_on_in_the_same_curve(resumed):
    files = sorted(resumed.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    rows, runs, keys = [], [], []
    for path in files:
        found = records(path)
        keys += [item.key or "/".join(item.nested_key) for r in found for item in r.history.item]
        runs += [r.run for r in found if r.HasField("run")]
        rows += curves([r.history for r in found if r.HasField("history")])
    (name,) = {run.run_id for run in runs}
    assert name == identity.known(resumed, "wandb") and name.startswith("run-") and len(name) == len("run-") + 8
    assert {tuple(run.tags) for run in runs} == {("a", "b" * 64)}
    assert [row["trainer/global_step"] for row in rows] == list(range(NUM_STEPS))
    assert [row["_step"] for row in rows] == list(range(NUM_STEPS))
    assert {"picture", "look"} <= {key.partition("/")[0] for key in keys}
    seconds = [row["speed/seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[7] > seconds[6]
    (table,) = resumed.glob("wandb/offline-run-*/files/media/table/sample*.json")
    assert json.loads(table.read_text())["data"] == [list(SAMPLE)]
    assert len(list(resumed.glob("wandb/offline-run-*/files/media/images/picture*.png"))) == 1


@pytest.mark.slow
def test_tensorboard_goes_on_in_the_same_curve(resumed):
    """What comes after the step that is gone on from is purged:
    https://github.com/Lightning-AI/pytorch-lightning/issues/12991."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(resumed / "tensorboard"))
    seen.Reload()
    assert [event.step for event in seen.Scalars("train/loss")] == list(range(NUM_STEPS))
    assert len(seen.Images("picture")) == 1
    text = {name: seen.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0] for name in ("config", "sample")}
    assert b'"width": 16' in text["config"] and b"        return x" in text["sample"]


@pytest.mark.slow
def test_mlflow_goes_on_in_the_same_run(resumed):
    """https://github.com/Lightning-AI/pytorch-lightning/issues/6205: a second run. A parameter that changes is an
    error of MLflow: https://github.com/Lightning-AI/pytorch-lightning/issues/17830."""
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{resumed}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert run.info.run_id == identity.known(resumed, "mlflow") and run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == list(range(NUM_STEPS))
    assert run.data.params == {"model.width": "16", "going_on": "False"}
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert kept == {"config.json", "picture", "sample.txt"}


def test_a_row_of_wandb_is_never_behind_its_last(tmp_path, monkeypatch):
    """What is logged at a step that is over is lost: https://github.com/wandb/wandb/issues/5632. A run was evaluated,
    and so has rows behind its end, and then is prolonged from a step before that."""
    given = []
    run = SimpleNamespace(step=14, define_metric=lambda *a, **k: None, log=lambda row, **at: given.append((row, at)))
    monkeypatch.setattr(wandb, "init", lambda **settings: run)
    evaluation = Wandb(id="run", save_dir=str(tmp_path), project="p")
    evaluation.log_metrics({"x": 1.0}, 12)
    assert given == [({"x": 1.0, "trainer/global_step": 12}, {"step": 14})]
    prolonged = Wandb(id="run", save_dir=str(tmp_path), project="p")
    prolonged.resume(9, {step: {"x"} for step in range(12)})
    for step in range(9, 16):
        prolonged.log_metrics({"x": float(step)}, step)
    assert [(row["x"], at["step"]) for row, at in given[1:]] == [(12, 14), (13, 14), (14, 14), (15, 15)]


def test_what_is_new_at_a_step_that_was_logged():
    """A run that was killed while it validated."""
    row = {"train/loss": 1.0, "validation/nats": 2.0, "progress/tokens": 64.0, "epoch": 0, "picture": [object()]}
    seen = {5: {"train/loss", "progress/tokens"}, 4: set(row)}
    assert news(row, 5, seen) == {"validation/nats": 2.0, "progress/tokens": 64.0, "epoch": 0}
    assert news(row, 4, seen) == {} and news(row, 6, seen) == row


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_library_that_is_missing_is_named_with_the_way_to_get_it(name, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda library: None if library == name else found(library))
    said = said_of(f"logger={name}", tmp_path)
    assert said == f"logger={name} needs {name}, which is not installed: pip install -e '.[{name}]'"


def test_names_say_the_overrides_and_groups_the_sweep(monkeypatch):
    """https://github.com/ashleve/lightning-hydra-template/issues/289, https://github.com/wandb/wandb/issues/1314."""
    monkeypatch.setenv("RUNS", "/r")
    job, alone = "/r/ablation/model=mesa,seed=1", "/r/ablation"
    assert (label(job, "ablation"), sweep_of(job, "ablation")) == ("model=mesa,seed=1", "ablation")
    assert (label(alone, "ablation"), sweep_of(alone, "ablation")) == ("ablation", None)
    assert (label("/elsewhere/x", "x"), sweep_of("/elsewhere/x", "x")) == ("x", None)


def test_the_choice_names_the_presets():
    composed("model=hybrid", "mixer@model.mixers.attention=mesa", "size=20m")
    found = choice()
    assert found["mixers"] == {"attention": "mesa", "recurrent": "gated_delta"}
    assert (found["model"], found["size"], found["data"]) == ("hybrid", "20m", "python_source")


def test_who_a_run_is(tmp_path):
    """A logger that comes when a run goes on has an id of its own too; a run from before loggers.json keeps its bare
    one; and a file that can't be read is named."""
    ids = []
    for name in ("a", "b"):
        logger = Wandb(id="gated", save_dir=str(tmp_path / name))
        (tmp_path / name).mkdir()
        logger.resume(10, {})
        ids.append(logger._id)
    assert len(set(ids)) == 2 and all(each.startswith("gated-") for each in ids)
    (tmp_path / "old" / "wandb").mkdir(parents=True)
    old = Wandb(id="gated", save_dir=str(tmp_path / "old"))
    old.resume(10, {})
    assert old._id == "gated"
    (tmp_path / "a" / identity.FILE).write_text('{"wandb": "lg-')
    with pytest.raises(ValueError, match=r"loggers\.json can't be read"):
        identity.known(tmp_path / "a", "wandb")


@pytest.mark.slow
def test_rows_that_a_killed_wandb_has_not_written_are_logged_again(resumed, tmp_path):
    """Its last block is lost with its process. The file is cut off behind some rows, as a kill leaves it."""
    folder = tmp_path / "run"
    (path,) = sorted(resumed.glob("wandb/offline-run-*/*.wandb"))[:1]
    cut = folder / path.relative_to(resumed)
    cut.parent.mkdir(parents=True)
    whole = path.read_bytes()
    shutil.copy(resumed / "metrics.csv", folder)
    steps = [row["trainer/global_step"] for row in offline.rows(path)]
    assert steps == list(range(len(steps))) and len(steps) > 5
    cut.write_bytes(whole[:7])  # as a run that is soon killed leaves it
    assert offline.last_value(folder / "wandb", "trainer/global_step") == -1
    assert offline.last_value(folder, "trainer/global_step") is None
    size = next(n for n in range(len(whole), 0, -64) if cut.write_bytes(whole[:n]) and len(list(offline.rows(cut))) < 4)
    kept = offline.last_value(folder / "wandb", "trainer/global_step")
    assert size and kept is not None and 0 < kept < 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        logger = Wandb(id="run", save_dir=str(folder), project="p")
        logger.resume(6, {step: {"train/loss"} for step in range(8)})
        logger.log_metrics({"train/loss": 1.0}, 6)
        logger.experiment.finish()
    wandb.teardown()
    newest = max(folder.glob("wandb/offline-run-*/*.wandb"))
    assert newest != cut and [row["trainer/global_step"] for row in offline.rows(newest)] == list(range(kept + 1, 7))
