"""Triton's kernels on a CPU: fla's operators under TRITON_INTERPRET=1, for comparing them with ours where there is no
GPU.

The interpreter runs plain kernels. Two things stand between it and fla's:
  * fla's kernels are autotuned, and to time candidates Triton wants a driver. One candidate needs no timing, so one is
    all it gets.
  * Kernels convert loop counters, `i.to(tl.int64)`, and an interpreted loop counts in Python integers. So fla's kernel
    modules get a `range` whose integers have a `to` that returns them.
TRITON_INTERPRET must be set before Triton is imported, hence a child process.
"""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_interpreted(code: str, timeout: float = 300, fla: bool = True) -> str:
    """Runs Python code in a child process where kernels are interpreted, fla's too or only ours, which need no
    preparation; returns what it printed."""
    program = ("from tests.kernels.interpreter import prepare\nprepare()\n" if fla else "") + code
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "2"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


class _Counter(int):
    def to(self, *_: object) -> _Counter:
        return self


def _range(*bounds: object) -> Iterator[_Counter]:
    for i in builtins.range(*map(_integer, bounds)):
        yield _Counter(i)


def _integer(bound: object) -> int:
    """The bound of a loop: a Python integer, or one in a Triton tensor, which the interpreter keeps as an array of one
    number."""
    data = getattr(getattr(bound, "handle", None), "data", bound)
    return int(data if isinstance(data, int) else data.item())


def prepare() -> None:
    """Applies both changes; call it in the child before any kernel runs."""
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs
    Autotuner.prune_configs = lambda self, arguments: prune(self, arguments)[:1]

    import fla.ops.comba
    import fla.ops.delta_rule
    import fla.ops.gated_delta_rule
    import fla.ops.gla
    import fla.ops.kda
    import fla.ops.simple_gla  # noqa: F401

    for name, module in list(sys.modules.items()):
        if name.startswith(("fla.ops.", "fla.modules.")):
            module.range = _range
