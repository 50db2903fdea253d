"""A sweep: each of its jobs is what it would be by itself, one that fails is told, and the others run.

Where such faults were reported of other trainers stands beside each test.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import train as entry
from conf.folders import LONGEST, job_folder, run_id
from models.training import origin
from models.training.finish import ending
from models.training.logger import Tolerant
from models.training.loggers import offline
from models.training.run import Run
from models.training.watchdog import Watchdog
from tests.started import Started
from tests.training.test_run import rows

JOB = [
    "data=mqar",
    "data.vocab_size=64",
    "data.num_pairs=4",
    "model.hidden_size=32",
    "model.num_layers=1",
    "seq_len=32",
    "batch_tokens=128",
    "tokens=1280",
    "validation_tokens=256",
    "validate_every=5",
    "log_every=1",
    "~callbacks.plot",
]
SWEEP = ["-m", "name=s", "model.num_heads=1,5,2,4", "logger=wandb", "trainer.devices=1", *JOB]


def records(path: Path) -> list[Any]:
    return list(offline.records(path))


def curves(history) -> list[dict[str, Any]]:
    """The rows that wandb was given."""
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item} for row in history]


@pytest.fixture(scope="module")
def swept(tmp_path_factory, cache) -> tuple[Path, Started]:
    runs = tmp_path_factory.mktemp("sweep")
    started = Started(runs, SWEEP, environment(runs, cache))
    started.end()
    return runs / "s", started


def environment(runs: Path, cache: Path) -> dict[str, str]:
    return os.environ | {"RUNS": str(runs), "TTR_CACHE": str(cache), "WANDB_MODE": "offline"}


@pytest.mark.slow
def test_each_job_is_a_wandb_run_of_its_own(swept):
    """https://github.com/wandb/wandb/issues/1314, https://github.com/Lightning-AI/pytorch-lightning/issues/5212,
    https://github.com/ashleve/lightning-hydra-template/issues/289: one run took the numbers of all."""
    folder, _ = swept
    found = {}
    for path in folder.glob("*/wandb/offline-run-*/*.wandb"):
        kinds: dict[str, list] = {}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            kinds.setdefault(kind, []).append(getattr(record, kind))
        (run,) = {
            (run.run_id, run.display_name, run.run_group, run.job_type, *run.tags, run.git.commit)
            for run in kinds["run"]
        }
        changed = {item.key: json.loads(item.value_json) for config in kinds["config"] for item in config.update}
        result = json.loads((path.parents[2] / "result.json").read_text())
        assert all(changed[name] == result[name] for name in ("parameters", "state_size", "versions", "commit"))
        assert changed["flops_per_token"] * result["tokens"] == result["flops"]
        assert changed["mixer"] == changed["choice"]["model"] == "gated_delta"
        assert changed["choice"]["mixers"] == {"main": "gated_delta"}
        steps = [row["trainer/global_step"] for row in curves(kinds["history"])]
        assert steps == list(range(10)) and kinds["exit"][-1].exit_code == 0
        axes = {metric.name or metric.glob_name: metric.step_metric for metric in kinds["metric"]}
        assert axes["*"] == "progress/tokens" and axes.keys() >= {"progress/flops", "speed/seconds"}
        for row in curves(kinds["history"]):
            assert row.keys() >= {"train/loss", "progress/tokens", "progress/flops", "speed/seconds"}
            assert row["progress/tokens"] == 128 * (row["trainer/global_step"] + 1)
        seconds = [row["speed/seconds"] for row in curves(kinds["history"])]
        assert seconds == sorted(seconds) and seconds[0] > 0
        assert {"validation/nats", "regression/after/layer_0"} <= row.keys()
        found[run] = changed["model"]["num_heads"]
    assert len(found) == 3 and sorted(found.values()) == [1, 2, 4]
    for (run, name, *rest), heads in found.items():
        assert f"num_heads={heads}" in name and "logger" not in name and f"num_heads-{heads}" in run
        assert rest == ["s", "train", "gated_delta", "tiny", "mqar", origin.commit()["commit"] or ""]


@pytest.mark.slow
def test_a_job_that_fails_is_named_at_the_end_and_the_others_run(swept):
    """https://github.com/hydra-ecosystem/hydra/issues/1306 (an exit ends the sweep),
    https://github.com/hydra-ecosystem/hydra/issues/2284 (of several failures one is told, without its job)."""
    folder, started = swept
    assert started.returncode == 1
    table, failures = started.said.split("\nsweep     ")[1].split("\nfailed;")
    assert table.startswith("4 jobs, 1 failed")
    assert [line.split()[:2] for line in table.splitlines()[1:5]] == [
        ["model.num_heads=1", "validation"],
        ["model.num_heads=5", "FAILED"],
        ["model.num_heads=2", "validation"],
        ["model.num_heads=4", "validation"],
    ]
    assert "model.num_heads=5" in failures and "num_heads=5 does not divide hidden_size=32" in failures
    assert len(list(folder.glob("*/result.json"))) == 3
    assert "Traceback" not in started.said
    assert f"page      {folder / 'report.html'}" in table and (folder / "report.html").exists()


@pytest.mark.slow
def test_a_job_is_the_run_that_it_would_be_alone_and_is_left_out_once_it_is_finished(swept, tmp_path, cache):
    folder, _ = swept
    assert "finished" in Started(tmp_path, ["name=a", "model.num_heads=4", *JOB], environment(tmp_path, cache)).end()
    (job,) = folder.glob("*num_heads=4*")
    assert rows(job) == rows(tmp_path / "a")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/checkpoints/*")}
    words = [word.replace("1,5,2,4", "5,2") for word in SWEEP]
    again = Started(tmp_path, words, environment(folder.parent, cache))
    assert again.end().count("is finished: validation") == 1 and again.returncode == 1
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/checkpoints/*")} == before


def started_here(words: list[str], assemble, monkeypatch, tmp_path, capsys) -> tuple[object, str]:
    """The exit code and what is said, of train.py's main with another way to build a run."""
    monkeypatch.setenv("RUNS", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    monkeypatch.setattr("models.training.job.assemble", assemble)
    GlobalHydra.instance().clear()
    try:
        with pytest.raises(SystemExit) as stop:
            entry.main()
    finally:
        GlobalHydra.instance().clear()
    return stop.value.code, capsys.readouterr().out


@pytest.mark.slow
def test_any_failure_is_told_with_its_job_and_leaves_nothing_behind(monkeypatch, tmp_path, capsys):
    """Out of memory, an exception, a mistake; two jobs that would be one run
    (https://github.com/hydra-ecosystem/hydra/issues/2398); and the command line that Lightning gives to other ranks,
    which was the whole sweep's (https://github.com/Lightning-AI/pytorch-lightning/pull/11617)."""
    words: list[list[str]] = []
    commands: list[str] = []
    alive: list[object] = []

    def assemble(cfg, preemption):
        words.append([*sys.argv, f"hydra.run.dir={HydraConfig.get().run.dir}"])
        commands.append(origin.command())
        alive.append(torch.nn.Linear(1, 1))
        os.environ["LOCAL_RANK"] = "0"
        errors = [torch.OutOfMemoryError("CUDA out of memory.\nand how"), KeyError("gone"), ValueError("seed=3 is bad")]
        raise errors[cfg.seed - 1]

    code, said = started_here(["-m", "name=s", "seed=1,2,3,3"], assemble, monkeypatch, tmp_path, capsys)
    assert code == 1
    end = said.split("failed; the same command")[1]
    for seed, reason in ((1, "OutOfMemoryError: CUDA out of memory."), (2, "KeyError: 'gone'"), (3, "seed=3 is bad")):
        assert f"  seed={seed}   {reason}\n      {tmp_path}/s/seed={seed}\n" in end
    assert end.count(f"{tmp_path}/s/seed=3\n") == 2 and "another job of this sweep has the same folder" in end
    assert words == [["train.py", "name=s", f"seed={i}", f"hydra.run.dir={tmp_path}/s/seed={i}"] for i in (1, 2, 3)]
    assert commands == [f"python train.py -m name=s seed={i}" for i in (1, 2, 3)]
    assert "LOCAL_RANK" not in os.environ and sys.argv == ["train.py", "-m", "name=s", "seed=1,2,3,3"]


def test_a_page_that_fails_is_a_warning(monkeypatch, tmp_path, capsys):
    def assemble(cfg, preemption):
        raise ValueError("first")

    monkeypatch.setattr(entry.sweep, "page", lambda outcomes: 1 / 0)
    code, said = started_here(["-m", "name=s", "seed=1"], assemble, monkeypatch, tmp_path, capsys)
    assert code == 1 and "warning: there is no page of this sweep: ZeroDivisionError" in said and "failed;" in said


def test_to_be_asked_to_stop_ends_the_sweep(monkeypatch, tmp_path, capsys):
    def assemble(cfg, preemption):
        assert cfg.seed == 1
        raise SystemExit(75)

    code, _ = started_here(["-m", "name=s", "seed=1,2"], assemble, monkeypatch, tmp_path, capsys)
    assert code == 75


def test_folders_of_jobs(monkeypatch, tmp_path):
    monkeypatch.setenv("RUNS", str(tmp_path))
    assert job_folder("s", ["seed=1", "model=softmax", "name=s"]) == "model=softmax,seed=1"
    free = ["trainer.devices=2", "strategy=ddp", "logger=wandb", "~callbacks.plot", "+guard.timeout=3", "micro_batch=2"]
    assert job_folder("s", ["seed=1", *free]) == "seed=1"
    assert job_folder("s", ["model.pattern=[a,b]", "+x=1"]) == "+x=1,model.pattern=[a,b]"
    # https://github.com/hydra-ecosystem/hydra/issues/3018: a folder in a folder, as deep as the path
    paths = [job_folder("s", [f"data.corpus.path={path}"]) for path in ("/a/b", "/a-b", "a b", "/a/b/*.txt")]
    assert len(set(paths)) == 4 and all("/" not in path and path.startswith("data.corpus.path=") for path in paths)
    many = [f"model.mixers.main.regressor.setting_{i}=0.5" for i in range(12)]
    names = [job_folder("s", [*many, f"seed={seed}"]) for seed in (1, 2)]
    assert names[0] != names[1] and all(len(name) <= LONGEST for name in names)
    assert names[0].startswith("setting_0=0.5,setting_10=0.5,setting_11=0.5,setting_1=0.5,setting_2=0.5,setting_3=0.5")
    # a sweep of before goes on where it is
    old = "logger=wandb,seed=1"
    (tmp_path / "s" / old).mkdir(parents=True)
    (tmp_path / "s" / old / "config.yaml").touch()
    assert job_folder("s", ["seed=1", "logger=wandb", "name=s"]) == old


def test_names_of_wandb_runs_are_as_long_as_it_takes(monkeypatch, tmp_path):
    """At most 128 characters: https://github.com/NVIDIA-NeMo/Skills/issues/842."""
    monkeypatch.setenv("RUNS", str(tmp_path))
    assert run_id(str(tmp_path / "s" / "seed=1")) == "s-seed-1"
    long = [run_id(str(tmp_path / "s" / f"{'x' * 128},seed={i}")) for i in (1, 2)]
    assert long[0] != long[1] and {len(name) for name in long} <= set(range(100, 129))


@pytest.mark.parametrize("failed", [False, True])
def test_a_run_leaves_nothing_to_the_next_in_its_process(failed, tmp_path):
    """Loggers: https://github.com/Lightning-AI/pytorch-lightning/pull/8617. The watchdog of a run that has ended would
    end the process while the next one trains."""
    closed = []
    experiment = SimpleNamespace(finish=lambda exit_code: closed.append(exit_code))
    watchdog, run = Watchdog(100), Run(tmp_path / "run", {"name": "run", "overwrite": False})
    run.enter()
    trainer = SimpleNamespace(
        loggers=[Tolerant(SimpleNamespace(_experiment=experiment)), Tolerant(SimpleNamespace())],
        callbacks=[watchdog],
        global_rank=0,
        world_size=1,
        default_root_dir=tmp_path,
        strategy=SimpleNamespace(launcher=None, root_device=torch.device("cpu")),
    )
    try:
        with ending(trainer, run):
            watchdog.setup(trainer, None, "fit")
            if failed:
                raise RuntimeError
    except RuntimeError:
        pass
    watchdog._thread.join(10)
    assert closed == [int(failed)] and "watchdog" not in {thread.name for thread in threading.enumerate()}
    Run(tmp_path / "run", {"name": "run", "overwrite": False}).enter()


def test_to_overwrite_a_run_leaves_the_jobs_of_a_sweep_of_its_name(tmp_path):
    job, run = tmp_path / "s" / "seed=1", tmp_path / "s"
    job.mkdir(parents=True)
    for folder in (job, run):
        (folder / "config.yaml").write_text("name: s\n")
    (run / "old.txt").touch()
    Run(run, {"name": "s", "overwrite": True}).enter()
    assert (job / "config.yaml").exists() and not (run / "old.txt").exists()


def test_to_be_asked_at_the_end_of_a_job_ends_the_sweep_after_it(monkeypatch, tmp_path, capsys):
    """The job is finished in any case, and the next one is not begun."""

    def assemble(cfg, preemption):
        assert cfg.seed == 1
        preemption.signal = signal.SIGINT
        raise ValueError("as if finished")

    code, said = started_here(["-m", "name=s", "seed=1,2"], assemble, monkeypatch, tmp_path, capsys)
    assert code == 130 and "SIGINT: the job was finished; the sweep stops" in said
