"""A run of train.py in several processes, watched from outside: forked from this one, which has imported everything,
or each started as Python starts (`fork=False`), where what was imported can't be forked.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from models.training.logger import read_metrics
from scripts.scaled.forked import ROOT, forked

PAUSE = 0.005  # seconds between two looks
ASKED = signal.SIGQUIT  # where a process is; nothing else uses it


class Run:
    """folder: in which the run's is made, under the name `run`. gpus: the place of each process, and so how many there
    are; on a CPU only their number counts. environment: what is another in it. memory_gb: 1e9 bytes that torch may
    take of each GPU.
    """

    def __init__(
        self,
        folder: Path,
        words: Sequence[str],
        gpus: Sequence[int],
        fork: bool = True,
        memory_gb: float | None = None,
        **environment: str,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.log = folder / "run", folder / "log.txt"
        self.words = ["name=run", *words]
        common = {"RUNS": str(folder), "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), **environment}
        if len(gpus) > 1:  # what torchrun sets
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "scaling"}
            common |= {"WORLD_SIZE": str(len(gpus)), "LOCAL_WORLD_SIZE": str(len(gpus)), "GROUP_RANK": "0"}
            self.words.append(f"trainer.devices={len(gpus)}")
        self.codes: list[int | None] = [None] * len(gpus)
        self._rows: list[dict[str, float]] = []
        self._stamp: Any = None  # of the file that they are from
        self.fork, self.first = fork, partial(_first, folder, memory_gb)
        assert fork or not memory_gb
        start = self._fork if fork else self._start
        own = [{"RANK": str(r), "LOCAL_RANK": str(r)} if len(gpus) > 1 else {} for r in range(len(gpus))]
        self.pids = [start(common | each) for each in own]

    def _start(self, environment: dict[str, str]) -> int:
        with self.log.open("ab") as log:
            command = [sys.executable, str(ROOT / "train.py"), *self.words]
            out: dict[str, Any] = {"stdout": log, "stderr": log, "start_new_session": True}
            return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **out).pid

    def _fork(self, environment: dict[str, str]) -> int:
        with self.log.open("ab") as log:
            return forked(self.words, environment, log, self.first)

    def rows(self) -> list[dict[str, float]]:
        """Of metrics.csv, so far: those of training."""
        path = self.folder / "metrics.csv"
        if path.exists() and (stamp := (path.stat().st_mtime_ns, path.stat().st_size)) != self._stamp:
            self._stamp, self._rows = stamp, [row for row in read_metrics(path) if "train/loss" in row]
        return self._rows

    def ended(self) -> bool:
        """Whether all processes have. Their exit codes are then known, a signal's as a negative number."""
        for i, pid in enumerate(self.pids):
            if self.codes[i] is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[i] = os.waitstatus_to_exitcode(status)
        return None not in self.codes

    def send(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """To the processes, or those of these ranks."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if self.codes[rank] is None:
                os.kill(self.pids[rank], number)

    def until(self, rows: int) -> Iterator[None]:
        """Gives way until metrics.csv has as many rows, or the run has ended."""
        while not self.ended() and len(self.rows()) < rows:
            yield

    def end(self) -> None:
        """Kills what is left, the processes that these have started included."""
        for pid, code in zip(self.pids, self.codes, strict=True):
            if code is None:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        self.codes = [-signal.SIGKILL if code is None else code for code in self.codes]

    def where(self) -> str:
        """For a run that does not go on: where in models/ the threads of each process are, by its own word."""
        if not self.fork or self.ended():
            return ""
        self.send(ASKED)
        time.sleep(1)
        return "; ".join(f"process {rank} {self._word(rank)}" for rank in range(len(self.pids)))

    def _word(self, rank: int) -> str:
        if (code := self.codes[rank]) is not None:
            return f"has ended with {code} ({self.said()})" if code else "has ended"
        path = self.log.with_name(f"stacks-{rank}.txt")
        places = innermost(path.read_text(errors="replace")) if path.exists() else []
        return f"is in {', '.join(places) or 'no line of models/'}"

    def line(self, begin: str) -> str:
        """The first of what it printed that begins so."""
        lines = self.log.read_text(errors="replace").splitlines()
        return next((line for line in lines if line.startswith(begin)), "")

    def said(self) -> str:
        """The last line that names an error, else the last one."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return ([line for line in lines if "Error" in line or line.startswith("error:")] or lines or [""])[-1][:300]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def innermost(stacks: str) -> list[str]:
    """Of each thread that faulthandler has told of, the line of models/ that it is in; but the one that watches."""
    threads = re.split(r"(?m)^(?:Current thread|Thread) .*$", stacks)
    found = (re.search(r'File ".*?/(models/[^"]+)", line (\d+) in (\S+)', thread) for thread in threads)
    return list(dict.fromkeys(f"{each[1]}:{each[2]} {each[3]}" for each in found if each and "watchdog" not in each[1]))


def _first(folder: Path, memory_gb: float | None) -> None:
    """What a forked process does before all else: asked where it is, it writes it into a file of its own."""
    stacks = (folder / f"stacks-{os.environ.get('RANK', 0)}.txt").open("w")
    faulthandler.register(ASKED, stacks, all_threads=True)
    if memory_gb:
        as_on_a_card_of(memory_gb)


def as_on_a_card_of(memory_gb: float) -> None:
    """torch takes no more of this process's GPU, where it has more."""
    own = int(os.environ.get("LOCAL_RANK", 0))
    part = memory_gb * 1e9 / torch.cuda.get_device_properties(own).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, part), own)


class Scratch:
    """Where runs and their logs are until all is done, each in a folder of its own."""

    def __init__(self, path: str | None = None) -> None:
        self.path, self.count = Path(path or tempfile.mkdtemp(prefix="scaling-")), 0
        if not path:
            atexit.register(_remove, self.path, os.getpid())

    def folder(self, name: str) -> Path:
        self.count += 1
        return self.path / f"{self.count:02d}-{name.replace(' ', '-')}"


def _remove(path: Path, pid: int) -> None:
    """By the process that made it, not by a fork of it."""
    if os.getpid() == pid:
        shutil.rmtree(path, ignore_errors=True)


def side_by_side(
    tasks: dict[str, Iterator[None]], limit: float, at_once: int | None = None, each: float | None = None
) -> dict[str, str]:
    """Takes turns among them until all are done, among no more than `at_once`. Why one is not, by its name: an
    AssertionError's words, or that the time of `limit` seconds was over, or for this one that of `each` since its
    first turn."""
    failed: dict[str, str] = {}
    deadline = time.monotonic() + limit
    turns = in_turns(tasks, failed, at_once, each)
    try:
        for _ in turns:
            if time.monotonic() > deadline:
                return failed | dict.fromkeys(tasks, f"not done within {limit:.0f} s")
            time.sleep(PAUSE)
        return failed
    finally:
        turns.close()  # type: ignore[attr-defined]  # a generator


def in_turns(
    tasks: dict[str, Iterator[None]], failed: dict[str, str], at_once: int | None = None, each: float | None = None
) -> Iterator[None]:
    """As a task of side_by_side itself. What is done leaves `tasks`; why another is not is written into `failed`."""
    began: dict[str, float] = {}
    try:
        while tasks:
            for name, task in list(tasks.items())[:at_once]:
                began.setdefault(name, time.monotonic())
                try:
                    next(task)
                    if each is None or time.monotonic() - began[name] < each:
                        continue
                    task.close()  # type: ignore[attr-defined]  # a generator, whose `finally` ends its run
                    failed[name] = f"not done within {each:.0f} s"
                except StopIteration:
                    pass
                except AssertionError as error:
                    failed[name] = str(error)
                del tasks[name]
            yield
    finally:  # an exception, ctrl-c or a signal: what was begun is not left to run on
        for task in tasks.values():
            task.close()  # type: ignore[attr-defined]
