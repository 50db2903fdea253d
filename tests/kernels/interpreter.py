"""Triton's kernels on a CPU: fla's operators under TRITON_INTERPRET=1, for comparing them with ours where there is no
GPU.

The interpreter runs plain kernels. Two things stand between it and fla's:
  * fla's kernels are autotuned, and to time candidates Triton wants a driver. One candidate needs no timing, so one is
    all it gets.
  * Kernels convert loop counters, `i.to(tl.int64)`, and an interpreted loop counts in Python integers. So fla's kernel
    modules get a `range` whose integers have a `to` that returns them.
And one thing makes it slow: it replaces what is in `triton.language` anew at every call of a device function, 40,000
times in 70 tokens of a deep memory, which takes half of the time. Once is enough where nothing but kernels runs.
TRITON_INTERPRET must be set before Triton is imported, hence a child process.
"""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_interpreted(code: str, timeout: float = 300, fla: bool = True) -> str:
    """Runs Python code in a child process where kernels are interpreted, fla's too or only ours, which takes three
    seconds less; returns what it printed."""
    program = f"from tests.kernels.interpreter import prepare\nprepare({fla})\n{code}"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1"},  # on one thread: an array is small, and a second only waits
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


def prepare(fla: bool) -> None:
    """Applies the changes; call it in the child before any kernel runs."""
    _patch_the_language_once()
    if fla:
        _prepare_fla()


def _patch_the_language_once() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_what_is_new(function: Callable) -> object:
        modules = {x for x in function.__globals__.values() if x is tl or x is tl.core}
        if not modules <= patched:
            patched.update(modules)
            patch(function)
        return interpreter._LangPatchScope()  # that has nothing to restore after a launch

    interpreter._patch_lang = patch_what_is_new


def _prepare_fla() -> None:
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
