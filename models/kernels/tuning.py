"""The first call of fla's kernels. They are autotuned: of each, Triton compiles all candidates of launch, and keeps the
fastest for this GPU and this version in its cache. That takes minutes, so

* launches that `python scripts/tune.py` has found are kept in tuned/, a table for each kind of GPU and releases of
  Triton and fla. A kernel and key that the table of this machine has are not tuned: every run has the same launches;
* the candidates of others are compiled side by side before they are timed, by a thread for each core that this process
  may use, where Triton compiles them one after another.

Whoever sets FLA_CACHE_MODE or FLA_CONFIG_DIR, fla's own way to such tables, gets what fla does of it, and not ours.
Our own kernels have one launch each, and need none of this.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, wraps
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "tuned"
# How many programs there are, sequences and heads, is part of some of fla's keys. Candidates differ in what a program
# does, and the one that is fastest for 8 heads is taken for 6.
COUNTS = ("B", "H", "HV")

_unknown: list[tuple[Any, Any]] | None = None  # kernels and keys that were met in `untimed`; None outside of it


class Table(NamedTuple):
    """A file of tuned/. gpu: on which it was found, which has this compute capability; triton, fla: the releases;
    launches: by kernel and `described` key, the arguments of the fastest candidate."""

    gpu: str
    capability: tuple[int, int]
    triton: str
    fla: str
    launches: dict[str, dict[str, dict[str, Any]]]

    @property
    def fits(self) -> tuple[tuple[int, int], str, str]:
        """Where it holds: GPUs of one compute capability have the same multiprocessors."""
        return self.capability, self.triton, self.fla


def read(path: Path) -> Table:
    """Raises ValueError, naming the file, for one that is no table."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        table = Table(**found | {"capability": tuple(found["capability"])})
        if not all(isinstance(keys, dict) for keys in table.launches.values()):
            raise ValueError("a kernel's launches are by key")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no table of launches: {error!r}; python scripts/tune.py makes one") from error
    return table


def here() -> tuple[tuple[int, int], str, str]:
    """What a table has to fit."""
    import torch
    import triton

    major, minor = torch.cuda.get_device_capability()
    return (major, minor), triton.__version__, metadata.version("flash-linear-attention")


@cache
def kept() -> dict[str, dict[str, dict[str, Any]]]:
    """The launches of the table that fits this machine, by kernel and key; none where there is no such table."""
    if "FLA_CACHE_MODE" in os.environ or "FLA_CONFIG_DIR" in os.environ:
        return {}
    tables, place = [read(path) for path in sorted(FOLDER.glob("*.json"))], here()
    for table in tables:
        if table.fits == place:
            log.info(f"fla's kernels are launched as was fastest on {table.gpu}, with Triton {table.triton}")
            return table.launches
    (major, minor), *releases = place
    log.info(
        f"models/kernels/tuned has nothing for compute capability {major}.{minor}, Triton {releases[0]} and fla "
        f"{releases[1]}: fla's kernels are tuned here, and python scripts/tune.py keeps what is found"
    )
    return {}


def name_of(kernel: Any) -> str:
    return f"{kernel.base_fn.__module__}.{kernel.base_fn.__name__}"


def described(kernel: Any, key: tuple[Any, ...]) -> str | None:
    """Triton's key of a tuned kernel, the values that it is tuned for and the dtypes of its tensors, without COUNTS:
    `BT=64 K=128 V=128, bfloat16 float32`. None where some of the values were not given."""
    dtypes = [x.removeprefix("torch.") for x in key if isinstance(x, str) and x.startswith("torch.")]
    values = key[: len(key) - len(dtypes)]
    if len(values) != len(kernel.keys):
        return None
    named = [f"{name}={x}" for name, x in zip(kernel.keys, values, strict=True) if name not in COUNTS]
    return f"{' '.join(named)}, {' '.join(dtypes)}"


def known(kernel: Any, key: tuple[Any, ...], candidates: list[Any]) -> Any | None:
    """The candidate that the table has, or None. One that fla does not offer here, or no longer, is not taken."""
    launch = kept().get(name_of(kernel), {}).get(described(kernel, key) or "")
    return next((candidate for candidate in candidates if candidate.all_kwargs() == launch), None)


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
    def table_first(self: Any, key: Any, candidates: list[Any], time_them: Callable[[], None]) -> bool:
        if not of_fla(self):
            return check(self, key, candidates, time_them)
        if (launch := known(self, key, candidates)) is not None:
            self.cache[key] = launch
            return True

        def both() -> None:
            if _unknown is not None:
                ask_for_all(self, candidates)
                raise UntimedError
            compile_all(self, candidates, asynchronous)
            time_them()

        try:
            return check(self, key, candidates, both)
        except UntimedError:
            assert _unknown is not None
            _unknown.append((self, key))
            self.cache[key] = candidates[0]  # for a call of which nothing is wanted
            return True

    kind.run, kind.check_disk_cache = remembered, table_first


class UntimedError(Exception):
    """Nothing was timed, so that there is nothing to remember."""


@contextmanager
def untimed() -> Iterator[list[tuple[Any, Any]]]:
    """Of a kernel that is not known all candidates are asked for here, and it is timed at its first call after this.
    The list has these kernels, and their keys. For ahead.py, which compiles what is asked for."""
    global _unknown
    _unknown = []
    try:
        yield _unknown
    finally:
        for kernel, key in _unknown:
            del kernel.cache[key]
        _unknown = None


def of_fla(kernel: Any) -> bool:
    """Compiled kernels alone: Triton's interpreter has nothing to tune."""
    return kernel.base_fn.__module__.startswith("fla.") and not os.environ.get("TRITON_INTERPRET")


def compile_all(kernel: Any, candidates: list[Any], asynchronous: ModuleType | Any) -> None:
    """Those that can't be compiled are left to the timing, which leaves them out."""
    threads = min(len(candidates), len(os.sched_getaffinity(0)))
    log.info(
        f"fla's {kernel.base_fn.__name__} is tuned once for this GPU: {len(candidates)} candidates, {threads} threads"
    )
    with ThreadPoolExecutor(threads) as pool, asynchronous.AsyncCompileMode(pool, ignore_errors=True):
        ask_for_all(kernel, candidates)


def ask_for_all(kernel: Any, candidates: list[Any]) -> None:
    """Has them compiled for the arguments of this call, or found in the cache, and launches none."""
    args, kwargs = kernel.given
    given = {name: value for name, value in kwargs.items() if name != "warmup"}
    for candidate in candidates:
        kernel.fn.warmup(*args, **given, **candidate.all_kwargs())
