"""fla's candidates of launch are compiled side by side before they are timed, and only where no result is known."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager
from types import SimpleNamespace

from models.kernels import tuning


def kernel_of(module: str) -> type:
    """In place of Triton's Autotuner: what it compiles, one after another, when it times a candidate."""

    class Kernel:
        def __init__(self) -> None:
            self.cache_results, self.known, self.compiled = False, set(), []
            self.base_fn = SimpleNamespace(__module__=module, __name__="chunk_fwd_kernel_h")
            self.fn = SimpleNamespace(warmup=self.warmup)

        def warmup(self, *args: int, grid: tuple[int, ...], width: int, num_warps: int) -> None:
            assert args == (1, 2) and grid == (3,) and width == 64
            self.compiled.append(num_warps)

        def run(self, *args: int, **kwargs: object) -> str:
            candidates = [SimpleNamespace(all_kwargs=lambda n=n: {"num_warps": n}) for n in (4, 8)]
            assert self.cache_results == module.startswith("fla.")
            self.check_disk_cache("key", candidates, lambda: self.compiled.append("timed"))
            return "ran"

        def check_disk_cache(self, key: str, candidates: list[object], time_them) -> bool:
            if key in self.known:
                return True
            self.known.add(key)
            time_them()
            return False

    return Kernel


class Asynchronous:
    """In place of triton.runtime._async_compile."""

    class AsyncCompileMode(AbstractContextManager):
        def __init__(self, pool, ignore_errors: bool) -> None:
            assert ignore_errors and pool.submit(threading.get_ident).result() != threading.get_ident()

        def __exit__(self, *_: object) -> None:
            time.sleep(0)


def test_candidates_are_compiled_before_they_are_timed_and_once():
    kind = kernel_of("fla.ops.common.chunk_h")
    tuning.tuned(kind, Asynchronous)
    kernel = kind()
    for _ in range(2):
        assert kernel.run(1, 2, grid=(3,), warmup=False, width=64) == "ran"
    assert kernel.compiled == [4, 8, "timed"] and not hasattr(kernel, "given")


def test_kernels_of_others_are_left_alone():
    kind = kernel_of("models.kernels.delta.scans")
    tuning.tuned(kind, Asynchronous)
    kernel = kind()
    assert kernel.run(1, 2, grid=(3,), warmup=False, width=64) == "ran" and kernel.compiled == ["timed"]
