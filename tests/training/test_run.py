"""A run as a user has it: killed and gone on, finished, renamed by mistake; two processes; every kind of task."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import models.language_model  # noqa: F401, tells transformers of it
from models.training.logger import CsvLogger, read_metrics
from models.training.preemption import UNFINISHED
from scripts.faults import differences, state
from tests.conftest import ROOT
from tests.started import Started

SMALL = [
    "name=run",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "seq_len=64",
    "batch_tokens=512",
    "micro_batch=8",
    "tokens=20480",  # 40 steps
    "validation_tokens=1024",
    "validate_every=10",
    "checkpoint_every=5",
    "log_every=1",
    "callbacks.sample.num_tokens=8",
]


OVERLAYS = [
    f"{path.parent.name}={path.stem}"
    for group in ("debug", "experiment")
    for path in sorted((ROOT / "conf" / group).glob("*.yaml"))
    if "sweeper:" not in path.read_text()  # sizes for a GPU: test_tasks.py trains what they train, small
]


def rows(folder):
    """metrics.csv without what a clock decides."""
    return [
        {k: v for k, v in row.items() if not k.startswith("speed/")} for row in read_metrics(folder / "metrics.csv")
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    """By the command as it is typed, which those that are started here are compared with."""
    runs = tmp_path_factory.mktemp("undisturbed")
    done = typed(runs, cache)
    assert "finished" in done, done
    return runs / "run", done


def environment(runs, cache) -> dict[str, str]:
    return os.environ | {"RUNS": str(runs), "TTR_CACHE": str(cache)}


def typed(runs, cache, *overrides: str) -> str:
    """What the command says."""
    command = [sys.executable, "train.py", *SMALL, *overrides]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, cwd=ROOT, env=environment(runs, cache), **output, timeout=240).stdout


def start(runs, cache, *overrides: str, plot: bool = False, fork_ranks: bool = True) -> Started:
    """Without pictures, which take half of the time of so short a run."""
    without = [] if plot else ["callbacks.plot=null", "callbacks.regression.picture_share=null"]
    words = [*SMALL, *without, *overrides]
    return Started(runs, words, environment(runs, cache), fork_ranks=fork_ranks)


@pytest.mark.slow
def test_what_a_run_leaves(undisturbed, tmp_path):
    """The summary before the first step, metrics, a picture, a sample, and a model that transformers loads."""
    folder, said = undisturbed
    for part in (
        "512 tokens a step = 64 tokens x 8 sequences",
        "FLOPs a token",
        "backend",
        "torch (no GPU)",
        "goes on:",
    ):
        assert part in said
    logged = rows(folder)
    assert [row["step"] for row in logged] == list(range(40))
    assert all({"train/loss", "train/gradient_norm", "train/learning_rate"} <= row.keys() for row in logged)
    validated = [row for row in logged if "validation/nats" in row]
    assert [row["step"] for row in validated] == [9, 19, 29, 39]
    assert validated[-1]["validation/bits_per_byte"] < validated[0]["validation/bits_per_byte"] < 8
    assert "validation/nats_at/0-15" in validated[0] and "validation/nats_at/32-63" in validated[0]
    result = json.loads((folder / "result.json").read_text())
    assert result["validation/nats"] == validated[-1]["validation/nats"]
    assert (folder / "loss.png").stat().st_size > 10_000
    assert (folder / "sample.txt").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer("def f(x):", return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0]).startswith("def f(x):")
    assert ids[0].tolist() == list(b"def f(x):")
    stops = model.generation_config
    assert (stops.eos_token_id, stops.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 255)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_a_random_step_and_started_again_it_is_the_same_run(seed, undisturbed, tmp_path, cache):
    """SIGKILL, then the same command: every logged number of every step, and every weight, bit for bit."""
    target = random.Random(seed).randrange(3, 38)
    process = start(tmp_path, cache)
    metrics = tmp_path / "run" / CsvLogger.FILE
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.returncode is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) > target:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.end()
    again = start(tmp_path, cache).end()
    assert "finished" in again, again
    if target > 8:
        assert "going on from" in again
    folder = undisturbed[0]
    assert rows(tmp_path / "run") == rows(folder)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f / "model").state_dict() for f in (tmp_path / "run", folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_finished_run_says_so_and_another_config_is_refused(undisturbed, cache):
    folder, _ = undisturbed
    said = start(folder.parent, cache, plot=True).end()
    assert re.search(r"run is finished: validation .* bits per byte", said), said
    said = start(folder.parent, cache, "seed=1", "model=softmax", plot=True).end()
    assert "holds a run of this name with another config" in said
    assert "seed: 0 before, 1 now" in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "split",
    [("micro_batch=2",), ("strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "micro_batch=2")],
    ids=["accumulation", "two processes"],
)
def test_the_same_run_however_its_batches_are_split(split, undisturbed, tmp_path, cache):
    """Accumulation, and two processes (gloo), the second started by Lightning. The first steps agree to rounding, which
    training then amplifies: the norm of a gradient more than a loss."""
    said = start(tmp_path, cache, *split, fork_ranks=False).end()
    assert "finished" in said, said
    ours, theirs = rows(tmp_path / "run"), rows(undisturbed[0])
    bounds = (("train/loss", 10, 1e-5), ("train/gradient_norm", 10, 2e-3), ("train/loss", 40, 2e-3))
    for name, steps, tolerance in (*bounds, ("validation/nats", 40, 1e-3)):
        pairs = [(a[name], b[name]) for a, b in zip(ours[:steps], theirs[:steps], strict=True) if name in b]
        assert len(pairs) >= 4
        assert all(a == pytest.approx(b, rel=tolerance) for a, b in pairs), (name, steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides, says",
    [
        (("data=mqar", "data.vocab_size=64", "data.num_pairs=4"), "accuracy"),
        (
            ("model=hybrid", "tokenizer=bpe", "tokenizer.vocab_size=400", "tokenizer.train_bytes=300000"),
            "bits per byte",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_other_tasks(overrides, says, tmp_path, cache):
    said = start(tmp_path, cache, *overrides).end()
    assert "finished" in said and says in said, said


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_runs_to_its_end(overlay, tmp_path, cache):
    """An experiment as it is, but for two steps; a debug overlay on the small model, with as many as it says."""
    small = [word for word in SMALL if not word.startswith(("name=", "tokens="))]
    debug = overlay.startswith("debug=")
    words = small if debug else ["tokens='${mul:2,${batch_tokens}}'", "validation_tokens=${batch_tokens}"]
    words += {"debug=overfit": ["tokens=5120"], "debug=profile": ["callbacks.profile.steps=2"]}.get(overlay, [])
    started = Started(tmp_path, [overlay, "~callbacks.plot", *words], environment(tmp_path, cache))
    assert "finished" in started.end() and started.returncode == 0, started.said
    (result,) = tmp_path.glob("*/result.json")
    assert "validation/nats" in json.loads(result.read_text())
    if overlay == "debug=one_batch":
        assert len(rows(result.parent)) == 2
    if overlay == "debug=overfit":  # ten steps on one batch
        losses = [row["train/loss"] for row in rows(result.parent)]
        assert losses[-1] < losses[0] - 0.5, losses
    if overlay == "debug=profile":  # https://github.com/Lightning-AI/pytorch-lightning/issues/9450
        events = json.loads((result.parent / "profile.json").read_text())["traceEvents"]
        names = [event["name"] for event in events]
        assert len({name for name in names if name.startswith("ProfilerStep#")}) == 2 and "aten::mm" in names
        assert re.search(r"aten::mm .*%", started.said) and len(rows(result.parent)) == 30


@pytest.mark.slow
def test_text_files_through_train(tmp_path, cache):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "play.md").write_text("to be, or not to be: that is the question.\n" * 600)
    (tmp_path / "texts" / "scan.pdf").write_bytes(b"%PDF")
    command = ("data=text_files", f"data.corpus.path={tmp_path}/texts")
    said = start(tmp_path, cache, *command).end()
    assert "left out: 1 .pdf" in said and "the end of play.md" in said and "finished" in said, said
    # as if it had been stopped before its end, and the texts are others when it goes on
    next(tmp_path.glob("**/result.json")).unlink()
    (tmp_path / "texts" / "play.md").write_text("to be, or not to be, or both.\n" * 900)
    said = start(tmp_path, cache, *command).end()
    assert "error: the checkpoint was made on other data" in said and "Traceback" not in said, said


@pytest.mark.slow
def test_wandb_offline_needs_no_account(tmp_path, cache):
    said = start(tmp_path, cache, "logger=wandb", "debug=one_batch", plot=True).end()
    assert "finished" in said, said
    (media,) = tmp_path.glob("**/wandb/offline-run-*/files/media")
    assert list(media.glob("images/regression/picture*.png")) and list(media.glob("images/loss*.png"))
    (sample,) = media.glob("table/sample*.json")
    ((prompt, text),) = json.loads(sample.read_text())["data"]
    assert f"{prompt}{text}\n" == next(tmp_path.glob("**/sample.txt")).read_text()


@pytest.mark.slow
def test_a_suspended_rank_is_named_and_the_same_command_goes_on(tmp_path, cache):
    """One of two processes is suspended in the middle: the other says so and ends, and leaves none behind."""
    split = ("trainer.devices=2", "strategy=ddp", "micro_batch=4", "guard.timeout=10", "tokens=10240")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    said = start(whole, cache, *split).end()
    assert "finished" in said, said
    process = start(broken, cache, *split)
    metrics = broken / "run" / "metrics.csv"
    while process.returncode is None and not (metrics.exists() and metrics.read_text().count("\n") > 8):
        time.sleep(0.01)
    other, *_ = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    os.kill(other, signal.SIGSTOP)
    said = process.end(120)
    assert process.returncode == UNFINISHED, said
    assert "rank 0 of 2 has made no progress for 1" in said, said
    assert re.search(r"Rank 1 has not been heard of for \d+ s, it is suspended or gone; it was \w+", said), said
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)
    said = start(broken, cache, *split).end()
    assert "finished" in said, said
    assert not differences(state(whole / "run"), state(broken / "run"))
