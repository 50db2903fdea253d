"""train.py and the scripts in processes of their own that need not wait for imports.

Python takes four seconds of a core to import torch, Lightning and transformers, longer than most of the runs in these
tests compute. So their processes are forked from a server that has imported everything, and call `main` with the words
of the command line. Signals, exit codes and memory are a process's own. So are the other ranks where there are several
devices, which Lightning would start as commands. What a test must type as a user does, it gives to subprocess.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

from tests.parsed import parse_once

ROOT = Path(__file__).parents[1]
SERVER, FORK = multiprocessing.get_context("forkserver"), multiprocessing.get_context("fork")
IMPORTED = ["train", "scripts.prepare_data", "matplotlib.figure", "matplotlib.backends.backend_agg", "tests.started"]
IMPORTED += ["models.training.job"]  # which train imports late


class Started:
    """`module`'s main, begun with these words and variables of the environment; its output goes to a file in folder.
    fork_ranks: false leaves it to Lightning to start the other ranks, as commands."""

    def __init__(
        self,
        folder: Path,
        words: list[str],
        environment: dict[str, str],
        module: str = "train",
        fork_ranks: bool = True,
    ) -> None:
        SERVER.set_forkserver_preload(IMPORTED)
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"said-{len(list(folder.glob('said-*.log')))}.log"
        self.log.touch()
        self.process = SERVER.Process(target=main, args=(str(self.log), words, environment, module, fork_ranks))
        self.process.start()
        self.pid = self.process.pid

    @property
    def said(self) -> str:
        """All that was printed so far, errors included."""
        return self.log.read_text()

    @property
    def returncode(self) -> int | None:
        """None while it runs; a signal that ended it is a negative number."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def end(self, timeout: float = 300) -> str:
        """Waits for the end. Returns what was said."""
        self.process.join(timeout)
        if self.returncode is None:
            self.send_signal(signal.SIGKILL)
            raise TimeoutError(f"not ended after {timeout:.0f} s; this was said:\n{self.said}")
        return self.said


class Rank:
    """What Lightning takes for a command that it has started: a process that was forked before anything had begun, and
    has waited since for its words and its environment. It ends if there are none."""

    def __init__(self, module: str) -> None:
        theirs, self.ours = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self._begin, args=(theirs, module))
        self.process.start()
        theirs.close()
        self.pid = self.process.pid

    def _begin(self, theirs: Connection, module: str) -> None:
        self.ours.close()
        try:
            words, environment = theirs.recv()
        except EOFError:
            return
        os.environ.clear()
        begin(words, environment, module)

    def command(self, command: list[str], env: dict[str, str], cwd: str) -> Rank:
        """As subprocess.Popen(command, env, cwd)."""
        assert Path(cwd) == ROOT
        self.ours.send((command[2:], env))  # without python and train.py
        return self

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if (code := self.returncode) is None:
            raise subprocess.TimeoutExpired("a rank", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def main(log: str, words: list[str], environment: dict[str, str], module: str, fork_ranks: bool) -> None:
    """In the process itself."""
    parse_once()  # the jobs of a sweep read the same files
    gc.freeze()  # what was imported is no garbage: Lightning looks for some again and again
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    devices = re.search(r"trainer\.devices=(\d+)", " ".join(words))
    if fork_ranks and devices and int(devices[1]) > 1:
        from lightning.pytorch.strategies.launchers import subprocess_script as launcher  # is there: see IMPORTED

        ranks = iter([Rank(module) for _ in range(int(devices[1]) - 1)])
        launcher.subprocess = SimpleNamespace(Popen=lambda *given, **named: next(ranks).command(*given, **named))
    begin(words, environment, module)


def begin(words: list[str], environment: dict[str, str], module: str) -> None:
    os.environ.update(environment)
    os.chdir(ROOT)
    script = import_module(module)
    sys.argv = [script.__file__, *words]
    sys.modules["__main__"].__spec__ = None  # so that Lightning starts other ranks by sys.argv
    script.main()
