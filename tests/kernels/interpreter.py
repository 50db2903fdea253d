"""Triton's kernels on a CPU: fla's operators under TRITON_INTERPRET=1, for comparing them with ours where there is no
GPU.

The interpreter runs plain kernels. Two things stand between it and fla's:
  * fla's kernels are autotuned, and to time candidates Triton wants a driver. One candidate needs no timing, so one is
    all it gets.
  * Kernels convert loop counters, `i.to(tl.int64)`, and an interpreted loop counts in Python integers. So fla's kernel
    modules get a `range` whose integers have a `to` that returns them.
Two things make it slow. It replaces what is in `triton.language` anew at every call of a device function, 40,000 times
in 70 tokens of a deep memory: once is enough where nothing but kernels runs. And for every value of a kernel it finds
anew what its type is in numpy and what its shape is, of which a kernel has a few dozen, and computes every sum of
integers a second time, to look for an overflow that is told in debug mode alone: without both, it takes less than half
of the time again.
TRITON_INTERPRET must be set before Triton is imported, hence child processes. They are forked from one that has
imported PyTorch and Triton and has composed the presets, seven seconds of a core that each would take otherwise.
"""

from __future__ import annotations

import atexit
import builtins
import dataclasses
import gc
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_interpreted(code: str, timeout: float = 300, fla: bool = True) -> str:
    """Runs Python code in a child process where kernels are interpreted, fla's too or only ours; returns what it
    printed."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        asked = {"code": code, "timeout": int(timeout), "fla": fla, "folder": folder}
        print(json.dumps(asked), file=server.stdin, flush=True)
        ended = server.stdout.readline()
        assert ended, "the process that children are forked from has ended; its last words are on stderr"
        printed, errors = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    assert int(ended) != -signal.SIGALRM, f"not ended after {timeout} s: {errors[-4000:]}"
    assert int(ended) == 0, f"exit code {int(ended)}: {errors[-4000:]}"
    return printed


def run_alone(code: str, timeout: float = 300) -> str:
    """The same, fla's kernels included, in a process that has imported nothing of this repository but this file."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"from tests.kernels import interpreter as i; i.prepare(True)\n{code}"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@cache
def _server() -> subprocess.Popen[str]:
    """On one thread: an array is small, and a second only waits."""
    code = "from tests.kernels.interpreter import serve; serve()"
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # which closes its input, its sign to end
    return server


def serve() -> None:
    """Forks a child for every line of the input, and prints its exit code."""
    from tests.laws import presets

    presets.recipes()
    prepare(fla=False)
    gc.freeze()  # what was imported is no garbage
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        prepare(asked["fla"])  # fla's for all that come after too: none of our kernels is autotuned
        child = os.fork()
        if not child:
            _run(asked["code"], asked["timeout"], Path(asked["folder"]))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
    gc.unfreeze()  # or nanobind, at the end of Python, would take it all for leaks


def _run(code: str, timeout: int, folder: Path) -> None:
    """In the child, which ends here."""
    for number, name in ((0, os.devnull), (1, folder / "stdout"), (2, folder / "stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    signal.alarm(timeout)  # ends it
    status = 1
    try:
        exec(code, {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


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
    """Applies the changes, once, before any kernel runs."""
    _patch_the_language_once()
    _know_types_by_their_names()
    if fla:
        _prepare_fla()


@cache
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


@cache
def _know_types_by_their_names() -> None:
    """A name has the kind and the shape: `fp32`, `pointer<fp32>`, `<['16', '32'], fp32>`. Shapes are never changed."""
    import triton.language.core as tl
    from triton.runtime import interpreter

    in_numpy, new_block = interpreter._get_np_dtype, tl.block_type.__init__
    known: dict[str, Any] = {}
    blocks: dict[Any, Any] = {}
    shapes: dict[str, Any] = {}

    def dtype_of(type: Any) -> Any:
        if type.name not in known:
            known[type.name] = in_numpy(type)
        return known[type.name]

    def make_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *[getattr(size, "value", size) for size in shape])
        if key not in blocks:
            new_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in shapes:
            sizes = type.shape if type.is_block() else ()
            shapes[type.name] = tl.constexpr(math.prod(sizes)), tl.tuple([tl.constexpr(size) for size in sizes])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shapes[type.name]

    interpreter._get_np_dtype, tl.block_type.__init__, tl.tensor.__init__ = dtype_of, make_block, make_tensor
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


@cache
def side_by_side(split: int, *kernels: str) -> None:
    """Programs of these kernels run in threads, `split` neighbours of the grid at a time, so that they can wait for one
    another. For all that comes after in this process."""
    from triton.runtime import interpreter

    here, launch = threading.local(), interpreter.GridExecutor.__call__
    index = property(lambda _: here.index, lambda _, index: setattr(here, "index", index))
    interpreter.InterpreterBuilder.grid_idx = index
    vars(interpreter.interpreter_builder).pop("grid_idx", None)

    def launch_threads(self: Any, *args: Any, **kwargs: Any) -> Any:
        program, threads, failed = self.fn, [], []
        if program.__name__ not in kernels:
            return launch(self, *args, **kwargs)

        def run(index: Any, given: dict[str, Any]) -> None:
            here.index = index
            try:
                program(**given)
            except Exception as error:
                failed.append(error)

        def begin(**given: Any) -> None:
            threads.append(threading.Thread(target=run, args=(here.index, given), daemon=True))
            threads[-1].start()
            if len(threads) % split == 0:
                for thread in threads[-split:]:
                    thread.join()
            if failed:
                raise failed[0]

        begin.__signature__ = inspect.signature(program)  # type: ignore[attr-defined]
        interpreter._patch_lang(program)
        self.fn = begin
        return launch(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_threads
    sys.setswitchinterval(1e-4)  # who waits has nothing to do


@cache
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
