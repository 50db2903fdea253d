"""Runs the tests that need a GPU, spread over processes and over the GPUs there are.

    python scripts/gpu_tests.py [--workers 16] [--limit 460] [PYTEST ARGUMENT ...]

Most of their time is Triton's, which compiles a kernel on one core: so many processes take a few tests at a time, and
what would try many launches of a kernel has one. The tests that take longest by the table SECONDS are begun first, each
alone. Process i has GPU i modulo their number as its own, and sees all. Printed are each failure as it comes, every ten
seconds how many tests are done, and at the end how long each file and the longest tests took, and what was left after
`--limit` seconds. A process that ended in the middle of a test, or whose GPU went wrong, is replaced: a broken CUDA
context would fail every test after it.

Without arguments it runs all tests that are marked `gpu`. The exit code is 0 where there is a GPU, and all
have passed or were skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter, defaultdict, deque
from contextlib import suppress
from functools import wraps
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

FORK: Any = multiprocessing.get_context("fork")  # a child has what is imported here
OURS = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
CHUNK = 6  # tests of one file that a process takes at a time, at most
ENOUGH = 30.0  # seconds that they take together by the table, about
LONGEST = 12  # tests whose times are printed at the end
ALIVE = 10.0  # seconds between two lines on how many are done

# Seconds that a test takes on one H200 with 16 cores and empty caches, about, by the first of these words that are all
# in its name. They decide the order, and what is begun together.
SECONDS = {
    "test_recompute.py titans_mac": 170.0,
    "test_backends.py titans_mac": 100.0,
    "test_backends.py compiled": 90.0,
    "test_stability.py titans_ma": 90.0,  # titans_mac, titans_mag and titans_mal
    "test_stability.py": 60.0,
    "test_pieces.py": 60.0,
    "test_attention.py": 34.0,
    "test_deep.py": 32.0,
    "test_ttt.py": 27.0,
    "test_backends.py mesa": 40.0,
    "test_backends.py nystrom": 40.0,
    "test_least_squares.py 64-64": 30.0,  # what is around the solve is compiled
    "test_recompute.py": 25.0,
    "test_fitting.py": 22.0,
    "test_captured.py": 22.0,
    "test_benchmark.py": 15.0,
    "test_probe.py": 15.0,
    "test_fla.py": 13.0,
    "test_pairs.py": 12.0,
    "test_least_squares.py": 8.0,
    "test_backends.py": 11.0,
    "test_decoding.py": 10.0,
    "test_local_linear.py": 7.0,
    "test_momentum": 6.0,
    "test_channel_delta.py": 6.0,
}
OTHERS = 3.0


def seconds_of(name: str) -> float:
    """By the table."""
    return next((seconds for words, seconds in SECONDS.items() if all(x in name for x in words.split())), OTHERS)


def chunks_of(names: list[str]) -> list[list[str]]:
    """What processes take, in the order in which they are begun: tests of one file in their order, of which those that
    stand together often have the same kernels; the longest first, so that none is begun when nothing else is left."""
    chunks: list[list[str]] = []
    for name in names:
        last = chunks[-1] if chunks else []
        same = bool(last) and last[0].split("::")[0] == name.split("::")[0]
        if same and len(last) < CHUNK and sum(map(seconds_of, [*last, name])) <= ENOUGH:
            last.append(name)
        else:
            chunks.append([name])
    return sorted(chunks, key=lambda chunk: -sum(map(seconds_of, chunk)))


class Worker:
    """pytest's plugin, in a process: it says which tests there are, and runs those it is sent."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.failed = connection, False

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        self.connection.send(("tests", list(items), float(torch.cuda.device_count())))
        while names := self.connection.recv():
            for name, following in zip(names, [*names[1:], None], strict=True):
                begin, self.failed = time.monotonic(), False
                after = None if following is None else items[following]
                items[name].config.hook.pytest_runtest_protocol(item=items[name], nextitem=after)
                if self.failed and torch.cuda.is_initialized():
                    torch.cuda.synchronize()  # raises where the context is broken, which ends this process
                self.connection.send(("done", name, time.monotonic() - begin))
            self.connection.send(("more", "", 0.0))
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = True
            self.connection.send(("failed", f"{report.nodeid} ({report.when})\n{report.longreprtext}", 0.0))


def one_launch() -> None:
    """Kernels that would be timed have one launch from here on, of two stages and four warps if they have such a one: a
    test is about what they compute, and most of its time would be that of compiling all the others."""
    from triton.runtime.autotuner import Autotuner

    init: Any = Autotuner.__init__

    @wraps(init)
    def few(self: Any, fn: Any, arg_names: Any, configs: list[Any], *others: Any, **settings: Any) -> None:
        nearest = sorted(configs, key=lambda x: (abs(x.num_stages - 2), abs(x.num_warps - 4)))
        init(self, fn, arg_names, nearest[:1], *others, **settings)

    Autotuner.__init__ = few


def work(number: int, arguments: list[str], connection: Connection) -> None:
    """A process, from its fork to its end."""
    if importlib.util.find_spec("triton") is not None:
        one_launch()
    os.setpgid(0, 0)  # whatever it starts is ended with it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if count := torch.cuda.device_count():
        torch.cuda.set_device(number % count)
    status = pytest.main([*OURS, *arguments], plugins=[Worker(connection)])
    connection.send(("end", str(status), 0.0))
    os._exit(0)  # whatever tests have left running


class Run:
    """All processes. chunks: what is not sent yet; held: what each process has and has not finished."""

    def __init__(self, arguments: list[str], workers: int, limit: float) -> None:
        self.arguments, self.begin, self.limit = arguments, time.monotonic(), limit
        self.total: int | None = None
        self.gpus = 0
        self.chunks: deque[list[str]] = deque()
        self.held: dict[Connection, list[str]] = {}
        self.processes: dict[Connection, Any] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by file
        self.longest: list[tuple[float, str]] = []
        self.counts: Counter[str] = Counter()
        self.done, self.failures, self.started = 0, 0, 0
        for _ in range(workers):
            self.start()

    def start(self) -> None:
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=work, args=(self.started, self.arguments, theirs), daemon=True)
        process.start()
        theirs.close()
        self.processes[ours], self.held[ours] = process, []
        self.started += 1

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begin:5.0f} s  {text}", flush=True)

    def found(self, names: list[str], gpus: int) -> None:
        if self.total is not None:
            return
        self.total, self.gpus = len(names), gpus
        self.chunks += chunks_of(names)
        self.say(f"{self.total} tests, {len(self.processes)} processes, {gpus} GPUs")

    def heard(self, connection: Connection, what: str, text: Any, seconds: float) -> None:
        if what == "tests":
            self.found(text, int(seconds))  # a process counts GPUs, since a child of one that has cannot use them
        elif what == "failed":
            self.failures += 1
            self.say(f"FAILED {text[-3000:] if len(text) < 3000 else text[:600] + ' ... ' + text[-2000:]}")
        elif what == "done":
            self.held[connection].remove(text)
            self.finished(text, seconds)
        if what in ("tests", "more") and self.chunks:
            self.held[connection] = self.chunks.popleft()
            connection.send(self.held[connection])
        elif what in ("tests", "more"):
            connection.send([])  # nothing is left for it

    def finished(self, name: str, seconds: float) -> None:
        file = name.split("::")[0]
        self.done, self.seconds[file] = self.done + 1, self.seconds[file] + seconds
        self.counts[file] += 1
        self.longest = sorted([*self.longest, (seconds, name)], reverse=True)[:LONGEST]

    def lost(self, connection: Connection) -> None:
        """A process has ended. What it was at has failed, and another one takes the rest."""
        process, held = self.processes.pop(connection), self.held.pop(connection)
        process.join(5)
        if held:
            self.failures += 1
            self.say(f"FAILED {held[0]}: its process ended there, exit code {process.exitcode}")
            self.finished(held[0], 0.0)
            if held[1:]:
                self.chunks.appendleft(held[1:])
            self.start()

    def run(self) -> int:
        try:
            self.listen()
        finally:
            for process in self.processes.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return self.ended()

    def listen(self) -> None:
        told = time.monotonic()
        while self.processes and time.monotonic() - self.begin < self.limit:
            for connection in wait(list(self.processes), timeout=1.0):
                assert isinstance(connection, Connection)
                try:
                    self.heard(connection, *connection.recv())
                except EOFError:
                    self.lost(connection)
            if time.monotonic() - told > ALIVE:
                told = time.monotonic()
                self.say(f"{self.done} of {self.total or 'all'} done, {self.failures} failed")

    def ended(self) -> int:
        for file, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            print(f"{seconds:8.1f} s  {self.counts[file]:4} tests  {file}")
        for seconds, name in self.longest:
            print(f"{seconds:8.1f} s  {name}")
        left = [name for chunk in [*self.held.values(), *self.chunks] for name in chunk]
        if left:
            self.say(f"{len(left)} were not done after {self.limit:.0f} s, of {', '.join(left[:10])} ..")
        if not self.gpus:
            print("There is no GPU here, so that the tests that need one were skipped.")
        self.say(f"{self.done} of {self.total} done, {self.failures} failed")
        return int(bool(self.failures or left or not self.total or self.done < self.total or not self.gpus))


def files() -> list[str]:
    """Those with a test that needs a GPU: to collect all others too takes longer than most of these."""
    return sorted(str(path) for path in Path("tests").rglob("test_*.py") if "mark.gpu" in path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, help="processes; default: one a core")
    parser.add_argument("--limit", type=float, default=460.0, help="seconds after which the rest is left out")
    given, rest = parser.parse_known_args()
    if given.workers < 1 or not given.limit > 0:
        parser.error(f"--workers {given.workers} and --limit {given.limit} must be above 0")
    os.chdir(Path(__file__).parents[1])
    sys.path.insert(0, os.getcwd())
    sys.exit(Run(rest or ["-m", "gpu", *files()], given.workers, given.limit).run())


if __name__ == "__main__":
    main()
