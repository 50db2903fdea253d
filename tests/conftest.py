"""What all tests share: no network, one thread a worker, a cache of their own, files of the config parsed once, and
train.py run as a user does."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from tests.parsed import parse_once
from tests.started import Started

ROOT = Path(__file__).parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["OMP_NUM_THREADS"] = "1"  # pytest runs as many workers as there are cores; children take it too
torch.set_num_threads(1)
parse_once()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Half a million objects of imports and of collected tests are no garbage. To look for some among them, again and
    again, would take a tenth of the time of tests that train."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first, not last as the alphabet has them: a worker that begins one of half a minute when the other has
    nothing left to do would keep all waiting."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/training/"))


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or nanobind, at the end of Python, would take it all for leaks


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """One cache of prepared data for the whole session. Of several workers one prepares, and the others wait."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    (folder / "cache").mkdir(exist_ok=True)
    return folder / "cache"


@pytest.fixture
def train(tmp_path, cache):
    """train(*overrides, timeout=...) runs train.py in a process of its own, with runs/ below tmp_path."""

    def run(*overrides: str, timeout: float = 300) -> Started:
        started = Started(tmp_path, list(overrides), run.environment)
        started.end(timeout)
        return started

    run.environment = os.environ | {"RUNS": str(tmp_path / "runs"), "TTR_CACHE": str(cache)}
    run.runs = tmp_path / "runs"
    return run
