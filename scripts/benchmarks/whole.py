"""Whole models, a process for each: its rows are printed as they come, and JSON is written after each."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from importlib import metadata
from operator import itemgetter
from pathlib import Path
from queue import SimpleQueue
from shutil import which
from typing import Any, NamedTuple

from scripts.benchmarks.apart import ROOT, LeftOutError, apart, forked, interrupted, left
from scripts.benchmarks.contenders import missing
from scripts.benchmarks.decoding import Decoded
from scripts.benchmarks.losses import Losses
from scripts.benchmarks.starting import Started
from scripts.benchmarks.steps import Trained
from scripts.benchmarks.timing import machine

Row = Trained | Decoded | Losses | Started
Apart = Callable[..., Iterator[dict[str, Any]]]


class Job(NamedTuple):
    """One model's process: the function of scripts.benchmarks that it calls, and what it is given. blank: its row
    without numbers, for a reason.
    """

    function: str
    given: dict[str, Any]
    blank: Row


class Limits(NamedTuple):
    """Seconds that one model may take, all its work included, and that all may take; whether each begins with empty
    caches of compiled kernels. slots: the environments of as many processes as run at a time.
    """

    each: float
    total: float | None = None
    cold: bool = False
    slots: tuple[dict[str, str], ...] = ({},)


class Report(NamedTuple):
    """failed: the models whose processes ended in an error, or not in time. One that this machine has not, or that came
    after the time of all, is left out and has not failed.
    """

    rows: list[Row]
    failed: list[str]


def rows(jobs: Sequence[Job], device: str, limits: Limits, run: Apart) -> Iterator[tuple[int, Row]]:
    """The rows of each model, and why one is left out, or ends early, each with the number of its job. Of several at a
    time, as each is done."""
    deadline = None if limits.total is None else time.monotonic() + limits.total
    free: SimpleQueue[dict[str, str]] = SimpleQueue()
    for slot in limits.slots:
        free.put(slot)

    def of(job: Job) -> Iterator[Row]:
        if (why := missing(job.blank.name, device)) is not None:
            yield replace(job.blank, reason=why)
            return
        slot = free.get()
        try:
            if (seconds := left(deadline, limits.each)) <= 0:
                raise LeftOutError("no time is left")
            for found in run(job.function, job.given, seconds, limits.cold, slot):
                yield type(job.blank)(**found)
        except LeftOutError as error:
            ended = deadline is not None and time.monotonic() >= deadline
            yield replace(job.blank, reason=f"the {limits.total:g} s of all were over" if ended else str(error))
        finally:
            free.put(slot)

    if len(limits.slots) == 1:
        for i, job in enumerate(jobs):
            yield from ((i, row) for row in of(job))
        return
    interrupted.clear()
    with ThreadPoolExecutor(len(limits.slots)) as pool:
        try:
            number = {pool.submit(list, of(job)): i for i, job in enumerate(jobs)}
            for done in as_completed(number):
                yield from ((number[done], row) for row in done.result())
        except BaseException:  # ctrl-c, or an error: no other begins, and those that run are not waited for
            interrupted.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def report(
    jobs: list[Job],
    head: str,
    about: dict[str, Any],
    limits: Limits,
    path: Path | None,
    run: Apart | None = None,
    known: Sequence[Row] = (),
) -> Report:
    """Prints, and writes after each row, so that what is done is kept whatever comes; written are the rows in the order
    of the jobs. about: see `environment`. run: how a job gets its process, by default forked, and where caches are to
    be empty one of its own. known: rows of an earlier call, which are written before the others."""
    print(f"{about['machine']}; {about['sizes']}\n{head}", flush=True)
    done, failed = [(-1, row) for row in known], []
    run = run or (apart if limits.cold else forked)

    def noted(function: str, given: dict[str, Any], *more: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from run(function, given, *more)
        except LeftOutError:
            failed.append(given["name"])
            raise

    for number, row in rows(jobs, about["device"], limits, noted):
        print("\n".join(shown(row)), flush=True)
        done.append((number, row))
        done.sort(key=itemgetter(0))
        if path:
            path.write_text(json.dumps({**about, "rows": [asdict(row) for _, row in done]}, indent=1))
    return Report([row for _, row in done], list(dict.fromkeys(failed)))


def shown(row: Row) -> Iterator[str]:
    """A row's lines: its numbers, and its step's kernels by kind."""
    yield str(row)
    if isinstance(row, Trained) and row.kinds:
        total, count = (sum(kind[i] for kind in row.kinds.values()) for i in (0, 1))
        yield f"    {total:8.2f} ms in {count:,} launches"
        yield from (f"    {kind[0]:8.2f} ms {kind[1]:6,} x {name}" for name, kind in row.kinds.items())
        yield from (f"    {ms:12.3f} ms {n:6,} x {name[:100]}" for name, (ms, n) in list(row.kernels.items())[:12])


def environment(device: str) -> dict[str, Any]:
    """Machine, releases and commit that numbers are of."""
    names = ("torch", "triton", "flash-linear-attention", "transformers")
    found = reversed(list(metadata.distributions()))  # of two of a name the first is imported
    installed = {each.metadata["Name"]: each.version for each in found}
    versions = {name: installed[name] for name in names if name in installed}
    asked = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip() if which("git") else ""
    when = time.strftime("%Y-%m-%d", time.gmtime())
    command = shlex.join(["python", *sys.argv])
    about = {"command": command, "machine": machine(device), "device": device, "python": platform.python_version()}
    return about | versions | {"commit": commit, "date": when}
