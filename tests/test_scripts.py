"""The scripts run from the command line as their docstrings say."""

from __future__ import annotations

import csv
import json
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict

import pytest
import torch.nn.functional as F

from scripts.benchmarks.data import write_text
from scripts.figures import feature_kernels
from tests.conftest import ROOT
from tests.started import Started


def script(*command: str, **settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, **settings)


@pytest.mark.slow
def test_benchmark_prints_ours_beside_theirs(tmp_path):
    """The chunked delta rule beside transformers' fallback, the softmax layer beside Qwen3's, local linear attention by
    both of its solvers, one factor beside a solve for every token, the loss beside torch's: equal, and timed. And the
    feed-forward layer and every memory."""
    words = ["ops", "--repeats", "1", "--json", str(tmp_path / "ops.json")]
    done = Started(tmp_path, words, {}, "scripts.benchmark")
    assert done.end() and done.returncode == 0, done.said
    rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
    alike = {row["name"]: row["error"] for row in rows if row["error"] is not None}
    named = {"transformers, chunked", "ours, chunked", "transformers, Qwen3Attention", "ours, Mixer"}
    named |= {"ours, Cholesky", "ours, conjugate gradients", "ours, one Cholesky", "T separate solves"}
    named |= {"torch, all logits", "ours, PyTorch"}
    if hasattr(F, "linear_cross_entropy"):
        named.add("torch, linear_cross_entropy")
    assert alike.keys() == named and all(error < 1e-4 for error in alike.values()), alike
    assert {"gated_delta", "titans", "mesa", "titans_mlp"} < {row["name"] for row in rows if row["error"] is None}


@pytest.mark.slow
def test_the_benchmark_says_what_it_does_not_have(monkeypatch):
    from scripts import benchmark

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments, message in (("--only tttt", "--only=tttt is part of no size here"), ("--kernels", "needs a GPU")):
        monkeypatch.setattr("sys.argv", ["benchmark.py", "ops", *arguments.split()])
        with pytest.raises(SystemExit, match=message):
            benchmark.main()


@pytest.mark.slow
def test_prepare_data(train, tmp_path):
    done = script("scripts/prepare_data.py", "data=python_source", env=train.environment)
    assert done.returncode == 0 and "documents" in done.stdout, done.stderr
    words = ["data=text_files", "data.corpus.path=/nowhere/*"]
    refused = Started(tmp_path, words, train.environment, "scripts.prepare_data")
    assert "data.corpus.path='/nowhere/*'" in refused.end() and "Traceback" not in refused.said
    assert refused.returncode != 0


@pytest.mark.slow
def test_figure_of_feature_kernels(tmp_path, monkeypatch):
    """More features and higher orders err less, in what it writes."""
    sizes = ["--key-dim", "32", "--pairs", "50", "--draws", "15", "--most", "256", "--order", "6"]
    monkeypatch.setattr("sys.argv", ["feature_kernels.py", "--folder", str(tmp_path), *sizes])
    feature_kernels.main()
    assert (tmp_path / "feature_kernels.png").stat().st_size > 10_000
    errors = defaultdict(list)
    for row in csv.DictReader((tmp_path / "feature_kernels.csv").open()):
        errors[row["features"], row["inverse_temperature"]].append(float(row["error"]))
    assert len(errors) == 4 * 2 + 4
    assert all(line[-1] < line[0] / 2 for (_, beta), line in errors.items() if beta == "1.0"), errors


@pytest.mark.slow
def test_momentum_accuracy(tmp_path):
    """Ours keeps its digits in float32 at every momentum; fla's formula is what it is."""
    words = ["--tokens", "64", "--json", str(tmp_path / "rows.json")]
    done = Started(tmp_path, words, {}, "scripts.momentum_accuracy")
    assert done.end() and done.returncode == 0, done.said
    assert all(max(row["ours"]) < 2e-6 for row in json.loads((tmp_path / "rows.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_preparation_goes_on_to_the_same_bytes(train, tmp_path, num_workers):
    """SIGKILL at moments that differ, the same command again and again, at last beside itself: one set of bytes."""
    write_text(tmp_path / "text.jsonl", 70)
    settings = [f"data.corpus.path={tmp_path}/text.jsonl", "data.drop_duplicates=true", f"num_workers={num_workers}"]

    def start(cache):
        environment = train.environment | {"TTR_CACHE": str(tmp_path / cache)}
        return Started(tmp_path, ["data=text_files", *settings], environment, "scripts.prepare_data")

    def end_well(*processes):
        for process in processes:
            said = process.end()
            assert process.returncode == 0, said

    end_well(start("whole"))
    kept = []
    for kill in range(5):
        before = progress(tmp_path / "killed")
        process = start("killed")
        while process.returncode is None and progress(tmp_path / "killed") < before + kill % 2:
            time.sleep(0.01)
        time.sleep(random.Random(kill).uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.end()
        kept.append(progress(tmp_path / "killed"))
    end_well(start("killed"), start("killed"))
    assert kept == sorted(kept) and kept[-1] > 1, "what was done is kept"
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def progress(cache) -> int:
    """Lines of the journal; many once there is none any more."""
    journals = list(cache.glob("*.partial/journal.jsonl"))
    return journals[0].read_text().count("\n") if journals else 99 * bool(list(cache.glob("*/meta.json")))


def contents(cache) -> dict[str, bytes]:
    """All that must not depend on how it came to be: not the times of change, nor the lock."""
    kept = (path for path in sorted(cache.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(cache)): path.read_bytes() for path in kept if path.name != "stamps.json"}
