"""The scripts run from the command line as their docstrings say."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import defaultdict

import pytest

from scripts.figures import feature_kernels
from tests.conftest import ROOT


def script(*command: str, **settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, **settings)


@pytest.mark.slow
def test_benchmark_prints_ours_beside_theirs(tmp_path):
    """The chunked delta rule beside transformers' fallback, the softmax layer beside Qwen3's: equal, and timed."""
    done = script("scripts/benchmark.py", "ops", "--repeats", "1", "--json", str(tmp_path / "ops.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
    named = {"transformers, chunked", "ours, chunked", "transformers, Qwen3Attention", "ours, Mixer"}
    assert named == {row["name"] for row in rows}
    assert all(row["error"] < 1e-4 for row in rows)


@pytest.mark.slow
def test_prepare_data(train):
    done = script("scripts/prepare_data.py", "data=python_source", env=train.environment)
    assert done.returncode == 0 and "documents" in done.stdout, done.stderr
    done = script("scripts/prepare_data.py", "data=text_files", "data.corpus.path=/nowhere/*", env=train.environment)
    assert done.returncode != 0 and "data.corpus.path='/nowhere/*'" in done.stderr and "Traceback" not in done.stderr


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


def test_momentum_accuracy(tmp_path):
    """Ours keeps its digits in float32 at every momentum; fla's formula is what it is."""
    done = script("scripts/momentum_accuracy.py", "--tokens", "64", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    assert all(max(row["ours"]) < 2e-6 for row in json.loads((tmp_path / "rows.json").read_text()))
