"""What all tests share: no network, one thread a worker, a cache of their own, and train.py run as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["OMP_NUM_THREADS"] = "1"  # pytest runs as many workers as there are cores; children take it too
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """One cache of prepared data for the whole session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(tmp_path, cache):
    """train(*overrides, timeout=...) runs train.py in a process of its own, with runs/ below tmp_path."""

    def run(*overrides: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "train.py", *overrides],
            cwd=ROOT,
            env=run.environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    run.environment = os.environ | {"RUNS": str(tmp_path / "runs"), "TTR_CACHE": str(cache)}
    run.runs = tmp_path / "runs"
    return run
