"""Kernels compiled side by side, from before the first of them is launched.

A layer's kernels are compiled one after another, each when it is first called: the next one is known only then, and
Triton compiles on one core. So a layer is called once for nothing: where kernels would be launched they are handed to
threads which compile, and the call goes on at once. What they would have written is whatever the memory held: nothing
that comes of such a call may be kept for later ones. A kernel of integers alone is launched nevertheless: it writes
places, by which others read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from models.kernels import tuning


@contextmanager
def compiled() -> Iterator[None]:
    """Kernels that are called here are handed to the compiler, and not launched. What comes after this goes on at once,
    unless there are kernels to be timed, and waits where it launches one that is not ready; there a compiler's error
    comes too. Backward passes are called in this thread, in whose context kernels are handed on, not in autograd's.
    """
    from triton.runtime import _async_compile
    from triton.runtime.jit import JITFunction

    launch: Any = JITFunction.run

    @wraps(launch)
    def asked(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        given = list(tensors((args, tuple(options.values()))))
        places = bool(given) and not any(x.is_floating_point() for x in given)
        return launch(self, *args, grid=grid, warmup=warmup or not places, **options)

    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    handed_on = _async_compile.AsyncCompileMode(pool)  # which would wait for all of them, where it is left by itself
    handed_on.__enter__()
    JITFunction.run = asked
    unknown: list[Any] = []
    try:
        with tuning.untimed() as unknown, torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        JITFunction.run = launch
        _async_compile.active_mode.set(None)
        pool.shutdown(wait=bool(unknown))


def tensors(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    """Those of a kernel, which may be in tuples."""
    for x in arguments:
        if isinstance(x, tuple):
            yield from tensors(x)
        elif isinstance(x, Tensor):
            yield x
