"""A run on two GPUs that is killed, told to stop, and given the same command again: as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from models.training.preemption import UNFINISHED
from scripts.faults import differences, state
from tests.conftest import ROOT
from tests.training.test_run import SMALL

# What a GPU adds up in any order (embeddings, cuBLAS) it must add up in one for two runs to be the same, bit for bit;
# and neither compilation nor a search for launch configurations should take longer than the run.
REPEATABLE = ["trainer.deterministic=warn", "compile=false", "model.mixers.main.regressor.backend=torch"]


def start(runs, cache, strategy: str) -> subprocess.Popen[str]:
    """In a process group of its own, which a signal can be given to."""
    environment = os.environ | {"RUNS": str(runs), "TTR_CACHE": str(cache), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    devices = ["micro_batch=2", f"strategy={strategy}", "trainer.devices=2"]
    command = [sys.executable, "train.py", *SMALL, *devices, *REPEATABLE]
    log = (runs / "log.txt").open("a")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def interrupt(process: subprocess.Popen[str], metrics, step: int, number: int) -> int:
    begin = time.monotonic()
    while process.poll() is None and time.monotonic() - begin < 120:
        if metrics.exists() and metrics.read_text().count("\n") > step:
            os.killpg(process.pid, number)
            break
        time.sleep(0.01)
    return process.wait(120)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_and_stopped_it_is_the_same_run(strategy, tmp_path, cache):
    """Every number of metrics.csv and of the last checkpoint (weights, optimizer, counters, random state)."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    assert start(whole, cache, strategy).wait(300) == 0, (whole / "log.txt").read_text()[-4000:]
    chance, metrics = random.Random(strategy), broken / "run" / "metrics.csv"
    for number, step, code in (
        (signal.SIGKILL, chance.randrange(7, 15), -signal.SIGKILL),
        (signal.SIGTERM, chance.randrange(20, 30), UNFINISHED),
    ):
        assert interrupt(start(broken, cache, strategy), metrics, step, number) == code, said(broken)
    assert start(broken, cache, strategy).wait(300) == 0, said(broken)
    assert not differences(state(whole / "run"), state(broken / "run"))


def said(folder) -> str:
    return (folder / "log.txt").read_text()[-4000:]
