"""A function in a process of its own, with a limit of time: what one model leaves behind, or breaks, stays with it.

python -m scripts.benchmarks.apart REQUEST ANSWER     # both JSON; the parent writes the one, and reads the other
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COLD = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


class LeftOutError(Exception):
    """Why there is no answer."""


def apart(function: str, given: dict[str, Any], limit: float, cold: bool = False) -> dict[str, Any]:
    """What `module.function` of scripts.benchmarks returns of `given`, as JSON has it. cold: with empty caches of
    compiled kernels. Raises LeftOutError where it ends in an error, or is not done after `limit` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer, errors = (Path(folder, name) for name in ("request.json", "answer.json", "errors"))
        request.write_text(json.dumps({"function": function, "given": given}))
        caches = {name: f"{folder}/{sub}" for name, sub in COLD.items()} if cold else {}
        command = [sys.executable, "-m", "scripts.benchmarks.apart", str(request), str(answer)]
        with errors.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | caches, stdout=file, stderr=file, start_new_session=True
            )
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                raise LeftOutError(f"not done within {limit:.0f} s") from None
            finally:
                end(process)
        if process.returncode:
            raise LeftOutError(reason(process.returncode, errors.read_text()))
        return json.loads(answer.read_text())


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


def main() -> None:
    request, answer = map(Path, sys.argv[1:])
    asked = json.loads(request.read_text())
    module, _, name = asked["function"].rpartition(".")
    function = getattr(importlib.import_module(f"scripts.benchmarks.{module}"), name)
    answer.write_text(json.dumps(function(**asked["given"])))


if __name__ == "__main__":
    main()
