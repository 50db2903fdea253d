"""The launcher of sweeps: which jobs there are, that each is run once, and that the next call goes on."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from conf.folders import job_folder
from scripts import evidence
from scripts.array_job import CONF
from scripts.sweeps import processes
from scripts.sweeps.jobs import Job, sweep
from scripts.sweeps.rates import fewer, with_rates
from scripts.sweeps.results import Results, Shared, change, left, summary
from tests.conftest import ROOT

HALF_LIVES = "model.mixers.main.decay.half_lives"

# A run in miniature: seed 1 finishes, seed 2 fails, seed 3 saves when it is asked to and finishes the second time.
RUN = """
import json, pathlib, signal, sys, time
folder, seed = pathlib.Path(sys.argv[1]), sys.argv[2]
folder.mkdir(parents=True, exist_ok=True)
if seed == "2":
    sys.exit("error: seed=2 is out of luck")
saved = folder / "saved"
if seed == "3" and not saved.exists():
    saved.touch()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(60)
result = {"validation/accuracy": 0.5, "validation/accuracy_on/longer": 0.25, "commit": "abc"}
(folder / "result.json").write_text(json.dumps(result))
"""


class Miniature(Job):
    @property
    def command(self) -> list[str]:
        seed = next(word for word in self.words if word.startswith("seed="))[5:]
        return [sys.executable, "-c", RUN, str(self.folder), seed]


def test_a_sweep_is_that_of_the_experiment_and_its_words():
    """Those of `train.py -m`, in its folders; a word of the command line takes the place of the file's."""
    every = sweep("state_tracking", [])
    assert len(every) == 3 * 3 * 3 * 2 == len({job.key for job in every})
    assert [job.words[1] for job in every[:18]] == ["seed=1"] * 18, "one seed of all comes before the next"
    more = sweep("state_tracking", ["tokens=20480", "seed=4,5"])
    assert [job.words[1] for job in more] == ["seed=4"] * 18 + ["seed=5"] * 18, "seeds that are typed, too"
    assert every[0].folder.name == job_folder("state_tracking", every[0].words)
    (one, two) = sweep("state_tracking", ["data=s3", "model=kda", "seed=4,5", every[0].words[4], "name=mine"])
    assert one.folder.parent.name == "mine" and "seed=4" in one.words and "data=s3" in two.words
    (same,) = sweep("mqar", ["model=mesa", "seed=1", "model.hidden_size=32", "compile=false"])
    assert same.key == sweep("mqar", ["model=mesa", "seed=1", "model.hidden_size=32"])[0].key
    with pytest.raises(ValueError, match="experiment=none is not there; there are ablation, "):
        sweep("none", [])
    for word in ("run_dir=x", "dry_run=true", "++dry_run=true", "experiment=mad"):
        with pytest.raises(ValueError, match=f"{re.escape(word)}: .*; leave it out"):
            sweep("mqar", [word])
    with pytest.raises(ValueError, match=r"Error parsing|mismatched|no viable"):
        sweep("mqar", ["seed=[1,"])
    with pytest.raises(ValueError, match=r"optimizer\.lrr=0\.001 is not a setting; did you mean optimizer\.lr\?"):
        sweep("mqar", ["optimizer.lrr=1e-3"])


@pytest.mark.parametrize(
    "words, said",
    [
        ("optimizer.lr=1e-3,abc seed=1,2", "optimizer.lr=abc is not a number; it must be positive"),
        ("seed=1,2,-1", "seed=-1 must be between 0 and 4294967295"),
        (f"model=kda {HALF_LIVES}=null,[0.05,9]", f"{HALF_LIVES}[0]=0.05 must be from 0.1 to 1,000,000 tokens"),
        (f"model=kda {HALF_LIVES}=[1,9],[9,2]", f"{HALF_LIVES}=[9, 2] must be two numbers, the larger one behind"),
        ("clip_norm=1,abc", "clip_norm=abc must be a number"),
        ("compile=maybe", "compile=maybe must be true or false"),
        ("model.hidden_size=32,x", "model.hidden_size=x is not a number; it must be at least 1"),
        ("model=titans,softmax model.mixers.main.regressor.grad_batch=4", "regressor.grad_batch=4 is not a setting"),
        ("tokens=1e6 batch_tokens=1000", "batch_tokens=1000 is not a multiple of seq_len=256"),
    ],
)
def test_a_value_that_no_job_can_have_is_told_before_any_begins(words, said):
    """Wherever it stands in the sweep, and as train.py says it."""
    with pytest.raises(ValueError, match=re.escape(said)):
        sweep("mqar", words.split())


def test_jobs_run_once_and_the_next_call_goes_on(tmp_path, monkeypatch, capsys):
    """What users ask of sweeps elsewhere: https://github.com/hydra-ecosystem/hydra/issues/1407 and 3328, and
    https://github.com/ashleve/lightning-hydra-template/issues/535. So many at a time: issue 2255 of hydra."""
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    jobs = [Miniature("toy", ("experiment=mqar", f"seed={seed}")) for seed in (1, 2, 3)]
    results = Results(tmp_path / "results.jsonl")
    began = time.time()
    failed = processes.run(list(left(jobs, results)), results, 3, time.time() + 1.5)
    said = capsys.readouterr().out
    assert failed == [jobs[1]] and "seed=2   FAILED: error: seed=2 is out of luck" in said
    assert "seed=1   accuracy 0.500, at test points 0.25" in said and "seed=3   goes on next time" in said
    assert str(jobs[1].log) in said and "out of luck" in jobs[1].log.read_text()
    assert time.time() - began < 20, "a run that is asked to save is not waited for in vain"
    (failure,) = results.failures()
    assert failure["job"] == jobs[1].key and failure["reason"] == "error: seed=2 is out of luck"
    shutil.rmtree(jobs[0].folder)  # another machine has the results alone
    todo = list(left(jobs, results))
    assert todo == jobs[1:]
    processes.run(todo, results, 1, float("inf"))
    rows = results.read()
    assert [row["job"] for row in rows] == [jobs[0].key, jobs[2].key]
    assert rows[0]["command"] == "python train.py -m experiment=mqar seed=1" and rows[0]["commit"] == "abc"
    with results.path.open("a") as file:
        file.write('{"job": "to')  # cut off by a kill
    assert results.read() == rows and list(left(jobs, results)) == [jobs[1]]


def test_several_jobs_share_the_gpus_that_are_seen(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in processes.slots(3)] == ["2", "5", "2"]
    assert processes.slots(1) == [{}], "which may take several"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert processes.slots(2) == [{}, {}]


def test_the_launcher_that_is_asked_to_stop_leaves_no_run_behind(tmp_path, monkeypatch):
    """A time limit of the machine, say: what runs saves."""
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(evidence, "sweep", lambda *_: [Miniature("toy", ("experiment=mqar", "seed=3"))])
    monkeypatch.setattr("sys.argv", ["evidence.py", "mqar", "--results", str(tmp_path / "results.jsonl")])
    started: list[processes.Running] = []
    start = processes.start
    monkeypatch.setattr(processes, "start", lambda *words: started.append(start(*words)) or started[-1])

    def limit() -> None:
        while not started or not (started[0].job.folder / "saved").exists():
            time.sleep(0.01)
        time.sleep(0.3)  # its handler
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=limit, daemon=True).start()
    try:
        with pytest.raises(SystemExit) as stop:
            evidence.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == started[0].process.returncode == processes.UNFINISHED


def test_a_result_that_nobody_wrote_down_is_found(tmp_path, monkeypatch):
    """The launcher was killed, and the run ended after it."""
    monkeypatch.setenv("RUNS", str(tmp_path))
    job = Job("toy", ("experiment=mqar", "seed=1"))
    results = Results(tmp_path / "results.jsonl", commit="abc")
    job.folder.mkdir(parents=True)
    (job.folder / "result.json").write_text(json.dumps({"validation/nats": 1.0}))
    results.fail(job, "error: out of luck")
    assert list(left([job], results)) == [] and results.have() == {job.key}
    assert results.failures() == [], "it has a result now"
    assert summary(results.read()[0]) == "1.0000 nats per token" and results.read()[0]["commit"] == "abc"
    assert job.command[1] == "train.py" and Path(job.command[-1].partition("=")[2].strip("'")).is_absolute()


def test_the_pages_commands_are_understood():
    pages = "".join((ROOT / "docs" / page).read_text() for page in ("evidence.md", "data.md"))
    lines = [line for line in pages.splitlines() if line.startswith("python scripts/evidence.py")]
    for line in lines:
        given = evidence.arguments(shlex.split(line)[2:])
        assert all((CONF / "experiment" / f"{name}.yaml").exists() for name in given.experiments), line
    assert len(lines) >= 4


def test_the_command_line(capsys):
    given = evidence.arguments(["mqar", "--at-once", "2", "seed=1,2", "--minutes", "0.5"])
    assert (given.experiments, given.words, given.at_once, given.minutes) == (["mqar"], ["seed=1,2"], 2, 0.5)
    given = evidence.arguments(["mqar", "seed=1", "~logger", "mad", "mqar"])
    assert (given.experiments, given.words) == (["mqar", "mad"], ["seed=1", "~logger"])
    for words, why in (
        (["mqar", "--at-once", "0"], "--at-once 0 must be at least 1"),
        (["seed=1"], "no EXPERIMENT is named"),
        (
            ["mqar", "mad", "--results", "one.jsonl"],
            "--results one.jsonl is a file for one experiment, not for mqar",
        ),
    ):
        with pytest.raises(SystemExit):
            evidence.arguments(words)
        assert why in capsys.readouterr().err


def test_several_sweeps_have_their_results_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    jobs = [Miniature(name, (f"experiment={name}", "seed=1")) for name in ("mqar", "mad")]
    of = {job.name: Results(tmp_path / f"{job.name}.jsonl") for job in jobs}
    results = Shared(of)
    assert [job.label for job in jobs] == ["mqar seed=1", "mad seed=1"]
    assert not processes.run(list(left(jobs, results)), results, 2, float("inf"))
    assert [[row["job"] for row in each.read()] for each in of.values()] == [[job.key] for job in jobs]
    assert results.have() == {job.key for job in jobs} and list(left(jobs, results)) == []


def test_a_job_takes_the_rate_that_was_best_for_its_mixer():
    """By the mean over seeds, and no rate at which a run has lost all numbers."""

    def row(model: str, rate: str, nats: float, seed: int = 1) -> dict[str, Any]:
        return {
            "words": ["experiment=x", f"model={model}", f"optimizer.lr={rate}", f"seed={seed}"],
            "validation/nats": nats,
        }

    found = [
        row("mesa", "2e-3", 3.0),
        row("mesa", "2e-3", 3.4, 2),
        row("mesa", "1e-3", 3.1),
        row("mesa", "8e-3", math.nan),
    ]
    jobs = sweep("ablation", ["model=mesa", "seed=1,2"])
    rated, unknown = with_rates(jobs, found, 0.75)
    assert [job.words[-1] for job in rated] == ["optimizer.lr=0.00075"] * 2 and rated[0].key != jobs[0].key
    others = sweep("ablation", ["model=titans,mesa", "seed=1"])
    assert not unknown and with_rates(others, found, 0.75) == (rated[:1], ["titans"])
    with pytest.raises(ValueError, match="--rates has no result of model=titans; it has mesa"):
        with_rates(sweep("ablation", ["model=titans"]), found, 1.0)
    with pytest.raises(
        ValueError, match=r"--rates: ablation seed=1 model=mesa optimizer\.lr=0\.001 has a rate already"
    ):
        with_rates(sweep("ablation", ["model=mesa", "optimizer.lr=1e-3"]), found, 1.0)
    with pytest.raises(ValueError, match=r"--rates: mad/seed=1 has no optimizer\.lr; they are of a sweep over mixers"):
        with_rates(jobs, [{"job": "mad/seed=1", "words": ["model=mesa"], "validation/nats": 1.0}], 1.0)
    with pytest.raises(SystemExit):
        evidence.arguments(["ablation", "--times", "0.5"])


def test_a_job_that_is_named_twice_is_one():
    assert len(sweep("regression", ["seed=1,1", "model=softmax,softmax", "data=regression_linear"])) == 1


def add_many(path: Path, first: int) -> None:
    for number in range(first, first + 40):
        change(path, lambda rows, number=number: [*rows, {"job": str(number), "words": []}])


def test_results_of_two_calls_at_once_are_all_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    others = [multiprocessing.get_context("fork").Process(target=add_many, args=(path, 40 * i)) for i in range(3)]
    for each in others:
        each.start()
    for each in others:
        each.join()
        assert each.exitcode == 0
    assert sorted(int(row["job"]) for row in Results(path).read()) == list(range(120))


def test_rates_of_different_settings_are_refused_and_missing_ones_are_told():
    def row(*words: str) -> dict[str, Any]:
        return {"job": " ".join(words), "words": ["experiment=x", *words], "validation/nats": 3.0}

    every = [Job("ablation", ("experiment=ablation", "seed=1", "model=mesa"))]
    alike = [row("model=mesa", "optimizer.lr=2e-3", "compile=false"), row("model=mesa", "optimizer.lr=4e-3", "seed=2")]
    assert with_rates(every, alike, 1.0)[1] == []
    with pytest.raises(ValueError, match="different settings"):
        with_rates(every, [*alike, row("model=mesa", "optimizer.lr=8e-3", "tokens=9")], 1.0)
    assert fewer([*alike, row("model=softmax", "optimizer.lr=2e-3")]) == {"softmax": 1}


@pytest.mark.parametrize("line", ['{"a": 1}', "3", "null", '{"job": "a", "words": 3}', '{"job": 3, "words": []}'])
def test_a_line_that_is_no_jobs_is_named(tmp_path, line):
    (tmp_path / "results.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError, match="line 1, is not the line of a result"):
        Results(tmp_path / "results.jsonl").read()
    (tmp_path / "results.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"results.jsonl is no text, and not a file of results"):
        Results(tmp_path / "results.jsonl").read()
