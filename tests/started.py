"""train.py and the scripts in processes of their own that need not wait for imports.

Python takes four seconds of a core to import torch, Lightning and transformers, longer than most of the runs in these
tests compute. So their processes are forked from a server that has imported everything, and call `main` with the words
of the command line. Signals, exit codes and memory are a process's own. What a test must type as a user does, it gives
to subprocess.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
IMPORTED = ["train", "scripts.prepare_data", "matplotlib.figure", "matplotlib.backends.backend_agg", "tests.started"]
IMPORTED += ["models.training.job"]  # which train imports late


class Started:
    """`module`'s main, begun with these words and variables of the environment; its output goes to a file in folder."""

    def __init__(self, folder: Path, words: list[str], environment: dict[str, str], module: str = "train") -> None:
        SERVER.set_forkserver_preload(IMPORTED)
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"said-{len(list(folder.glob('said-*.log')))}.log"
        self.log.touch()
        self.process = SERVER.Process(target=main, args=(str(self.log), words, environment, module))
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


def main(log: str, words: list[str], environment: dict[str, str], module: str) -> None:
    """In the process itself."""
    gc.freeze()  # what was imported is no garbage: Lightning looks for some again and again
    os.environ.update(environment)
    os.chdir(ROOT)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    script = import_module(module)
    sys.argv = [script.__file__, *words]
    sys.modules["__main__"].__spec__ = None  # so that Lightning starts other ranks by sys.argv
    script.main()
