"""The first call of fla's kernels. They are autotuned: of each, Triton compiles all candidates of launch, and keeps the
fastest for this GPU and this version in its cache. It compiles them one after another, on one core, which takes minutes
for linear attention. Here they are compiled side by side before they are timed, by a thread for each core that this
process may use.

Our own kernels have one launch each, and need none of this.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, wraps
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)


@cache
def side_by_side() -> None:
    """From here on, for all autotuned kernels of fla."""
    from triton.runtime import _async_compile, autotuner

    tuned(autotuner.Autotuner, _async_compile)


def tuned(kind: Any, asynchronous: ModuleType | Any) -> None:
    """Replaces two methods of Triton's class `kind`: `run`, which hands a launch's arguments on, and
    `check_disk_cache`, whose last argument times all candidates where the cache has no result."""
    run, check = kind.run, kind.check_disk_cache

    @wraps(run)
    def remembered(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not of_fla(self):
            return run(self, *args, **kwargs)
        self.cache_results, self.given = True, (args, kwargs)
        try:
            return run(self, *args, **kwargs)
        finally:
            del self.given

    @wraps(check)
    def compiled_first(self: Any, key: Any, candidates: list[Any], time_them: Callable[[], None]) -> bool:
        def both() -> None:
            compile_all(self, candidates, asynchronous)
            time_them()

        return check(self, key, candidates, both if of_fla(self) else time_them)

    kind.run, kind.check_disk_cache = remembered, compiled_first


def of_fla(kernel: Any) -> bool:
    """Compiled kernels alone: Triton's interpreter has nothing to tune."""
    return kernel.base_fn.__module__.startswith("fla.") and not os.environ.get("TRITON_INTERPRET")


def compile_all(kernel: Any, candidates: list[Any], asynchronous: ModuleType | Any) -> None:
    """Those that can't be compiled are left to the timing, which leaves them out."""
    args, kwargs = kernel.given
    given = {name: value for name, value in kwargs.items() if name != "warmup"}
    threads = min(len(candidates), len(os.sched_getaffinity(0)))
    log.info(
        f"fla's {kernel.base_fn.__name__} is tuned once for this GPU: {len(candidates)} candidates, {threads} threads"
    )
    with ThreadPoolExecutor(threads) as pool, asynchronous.AsyncCompileMode(pool, ignore_errors=True):
        for candidate in candidates:
            kernel.fn.warmup(*args, **given, **candidate.all_kwargs())
