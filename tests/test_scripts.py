"""The scripts run from the command line as their docstrings say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def script(*command: str, **settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, **settings)


@pytest.mark.slow
def test_benchmark_prints_ours_beside_theirs(tmp_path):
    """The chunked delta rule beside transformers' fallback, the softmax layer beside Qwen3's, local linear attention by
    both of its solvers: equal, and timed."""
    done = script("scripts/benchmark.py", "ops", "--repeats", "1", "--json", str(tmp_path / "ops.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
    named = {"transformers, chunked", "ours, chunked", "transformers, Qwen3Attention", "ours, Mixer"}
    named |= {"ours, Cholesky", "ours, conjugate gradients"}
    assert named == {row["name"] for row in rows}
    assert all(row["error"] < 1e-4 for row in rows)


@pytest.mark.slow
def test_prepare_data(train):
    done = script("scripts/prepare_data.py", "data=python_source", env=train.environment)
    assert done.returncode == 0 and "documents" in done.stdout, done.stderr
    done = script("scripts/prepare_data.py", "data=text_files", "data.corpus.path=/nowhere/*", env=train.environment)
    assert done.returncode != 0 and "data.corpus.path='/nowhere/*'" in done.stderr and "Traceback" not in done.stderr
