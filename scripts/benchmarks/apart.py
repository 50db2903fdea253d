"""A function in a process of its own, with a limit of time: what one model leaves behind, or breaks, stays with it.

python -m scripts.benchmarks.apart REQUEST ANSWER     # both JSON; the parent writes the one, and reads the other
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

DEPTH = 30  # lines of the tracebacks of a process that is late
ROOT = Path(__file__).parents[2]
COLD = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
interrupted = threading.Event()  # by ctrl-c, which the main thread alone gets: what other threads wait for ends too


class LeftOutError(Exception):
    """Why there is no answer."""


def apart(
    function: str, given: dict[str, Any], limit: float, cold: bool = False, slot: dict[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """What the generator `module.function` of scripts.benchmarks yields of `given`, as soon as it does. cold: with
    empty caches of compiled kernels. slot: what is another in its environment, as the GPU that it sees. Raises
    LeftOutError where it ends in an error, or is not done after `limit` s.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer, errors = (Path(folder, name) for name in ("request.json", "answers.jsonl", "errors"))
        request.write_text(json.dumps({"function": function, "given": given}))
        caches = {name: f"{folder}/{sub}" for name, sub in COLD.items()} if cold else {}
        environment = os.environ | caches | (slot or {})
        command = [sys.executable, "-m", "scripts.benchmarks.apart", str(request), str(answer)]
        with errors.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        deadline = time.monotonic() + limit
        late = False
        try:
            yield from answers(lambda: process.poll() is None, answer, deadline)
            late = process.poll() is None and not interrupted.is_set()
        finally:
            if late:
                ask_where(process.pid, errors)
            end(process)
        if interrupted.is_set():
            raise LeftOutError("interrupted")
        if late:
            raise LeftOutError(f"not done within {limit:g} s")
        if process.returncode:
            said = errors.read_text()
            print("\n".join(said.splitlines()[-12:]), file=sys.stderr, flush=True)
            raise LeftOutError(reason(process.returncode, said))


def forked(
    function: str, given: dict[str, Any], limit: float, cold: bool = False, slot: dict[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """The same, forked from a process that has imported everything once and has not touched a GPU: many short
    functions don't wait for that. Caches are not emptied."""
    assert not cold
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([f"scripts.benchmarks.{function.partition('.')[0]}"])
    without_interrupts(multiprocessing.forkserver.ensure_running)
    with tempfile.TemporaryDirectory() as folder:
        answer, errors = Path(folder, "answers.jsonl"), Path(folder, "errors")
        process = server.Process(target=child, args=(function, given, str(answer), str(errors), slot or {}))
        process.start()
        deadline = time.monotonic() + limit
        try:
            yield from answers(process.is_alive, answer, deadline)
        finally:
            late = process.is_alive() and time.monotonic() >= deadline
            if process.is_alive():
                assert process.pid  # it has started
                if late:
                    ask_where(process.pid, errors)
                with suppress(ProcessLookupError):  # asked before it could answer, it is gone; or is no group yet
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
            process.join()
        if interrupted.is_set():
            raise LeftOutError("interrupted")
        if late:
            raise LeftOutError(f"not done within {limit:g} s")
        if process.exitcode:
            said = errors.read_text()
            print("\n".join(said.splitlines()[-12:]), file=sys.stderr, flush=True)
            raise LeftOutError(reason(process.exitcode, said))


def without_interrupts(start: Callable[[], None]) -> None:
    """Starts a server of multiprocessing that ctrl-c, which goes to all processes of a terminal, does not end in the
    middle of its imports with a traceback. It ends by itself with the process that has started it.
    """
    multiprocessing.resource_tracker.ensure_running()  # first, since to start it takes the signal out of the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ask_where(pid: int, errors: Path) -> None:
    """Prints where a process is that is late, by its own tracebacks."""
    os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5)
    lines = [line for line in errors.read_text().splitlines() if line.startswith(("Current thread", "  File "))]
    print("\n".join(lines[-DEPTH:]), file=sys.stderr, flush=True)


def child(function: str, given: dict[str, Any], answer: str, errors: str, slot: dict[str, str]) -> None:
    """What a forked process does."""
    if not Path(errors).parent.exists():  # who asked for it was interrupted before it began
        return
    os.setsid()
    os.environ |= slot
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)
    write(function, given, Path(answer))


def answers(running_now: Callable[[], bool], path: Path, deadline: float) -> Iterator[dict[str, Any]]:
    """Whole lines as they come, until the process or its time ends, or ctrl-c does."""
    done = 0
    while True:
        # asked first: what it wrote last is read
        running = running_now() and time.monotonic() < deadline and not interrupted.is_set()
        text = path.read_text() if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        yield from map(json.loads, lines[done:])
        done = len(lines)
        if not running:
            return
        time.sleep(0.1)


def end(process: subprocess.Popen[bytes]) -> None:
    """With the processes that it started itself, compilers among them."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def reason(code: int, said: str) -> str:
    """The last line that names an error, else the last line; nothing said: the signal that ended it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line.partition(" ")[0] + " " or "OutOfMemory" in line]
    return f"{(named or lines or [f'it ended with {code}'])[-1][:300]}"


def left(deadline: float | None, limit: float) -> float:
    """Seconds for what comes next: `limit`, or what is left until the deadline (time.monotonic)."""
    return limit if deadline is None else min(limit, deadline - time.monotonic())


def write(function: str, given: dict[str, Any], path: Path) -> None:
    """What the function yields, a line of JSON each."""
    module, _, name = function.rpartition(".")
    with path.open("a") as file:
        for row in getattr(importlib.import_module(f"scripts.benchmarks.{module}"), name)(**given):
            print(json.dumps(row), file=file, flush=True)


def main() -> None:
    request, answer = map(Path, sys.argv[1:])
    faulthandler.register(signal.SIGUSR1)
    write(**json.loads(request.read_text()), path=answer)


if __name__ == "__main__":
    main()
