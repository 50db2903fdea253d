"""Jobs as processes, some at a time, on the GPUs of one machine, until a time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any, NamedTuple

from scripts.array_job import CONF
from scripts.benchmarks.apart import reason
from scripts.sweeps.jobs import Job
from scripts.sweeps.results import Results, Shared, summary

UNFINISHED = 75  # the exit code of a run that saved (models/training/preemption.py)
GRACE = 120.0  # seconds that a run has to save

Slot = dict[str, str]  # what is another in a process's environment: the GPU that it sees


class Running(NamedTuple):
    """A job's process, when it began, in seconds of time.time(), where, and how long its log was then."""

    job: Job
    process: subprocess.Popen[bytes]
    began: float
    slot: Slot
    logged: int


def slots(at_once: int) -> list[Slot]:
    """For as many processes: each sees one of the GPUs, in turn. One alone sees them all."""
    if at_once == 1:
        return [{}]
    import torch  # two seconds that --jobs need not pay

    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = [{"CUDA_VISIBLE_DEVICES": each} for each in seen.split(",")] if seen else [{}]
    return [gpus[i % len(gpus)] for i in range(at_once)]


def run(todo: list[Job], results: Results | Shared, at_once: int, until: float) -> list[Job]:
    """Runs them, in order, so many at a time, until then. Returns those that failed, not those that only ran out of
    time."""
    waiting, failed, free = list(todo), [], slots(at_once)
    running: list[Running] = []
    threads = str(max(1, (os.cpu_count() or 1) // at_once))
    # torch.compile, which deep memories use, would start as many processes as there are cores, for each job
    few = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    try:
        while waiting or running:
            while waiting and free and time.time() < until:
                running.append(start(waiting.pop(0), free.pop(0), few | os.environ))
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                free.append(one.slot)
                failed += [one.job] if ended(one, results) else []
            if time.time() >= until:
                break
            time.sleep(0.2)
    finally:
        failed += [one.job for one in stop(running) if ended(one, results)]
    return failed


def start(job: Job, slot: Slot, environment: dict[str, str]) -> Running:
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        logged = log.tell()
        out: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(job.command, cwd=CONF.parent, env=environment | slot, start_new_session=True, **out)
    return Running(job, process, time.time(), slot, logged)


def ended(one: Running, results: Results | Shared) -> bool:
    """Says how. Whether it failed."""
    seconds = f"{time.time() - one.began:6.0f} s"
    if (one.job.folder / "result.json").exists():
        row = results.add(one.job)
        print(f"{seconds}  {one.job.label}   {summary(row)}", flush=True)
        return False
    if one.process.returncode in (UNFINISHED, -signal.SIGTERM):  # the latter before it had anything to save
        print(f"{seconds}  {one.job.label}   goes on next time", flush=True)
        return False
    why = why_of(one)
    results.fail(one.job, why)
    print(f"{seconds}  {one.job.label}   FAILED: {why}", flush=True)
    print(f"          {one.job.log}", flush=True)
    return True


def why_of(one: Running) -> str:
    """By what it has said itself; by the signal that has ended it, which no program says of itself."""
    code = one.process.returncode
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    return reason(code, one.job.log.read_bytes()[one.logged :].decode(errors="replace"))


def stop(running: list[Running]) -> list[Running]:
    """Asks all to save, and waits."""
    for one in running:
        one.process.send_signal(signal.SIGTERM)
    until = time.time() + GRACE
    for one in running:
        try:
            one.process.wait(max(0.1, until - time.time()))
        except subprocess.TimeoutExpired:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
    return running
