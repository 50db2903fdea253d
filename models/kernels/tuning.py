"""The first call of fla's kernels. They are autotuned: of each, Triton compiles all candidates of launch, and keeps the
fastest for this GPU and this version in its cache. That takes minutes, so

* launches that `python scripts/tune.py` has found are kept in tuned/, a table for each kind of GPU and releases of
  Triton and fla. A kernel and key that the table of this machine has are not tuned: every run has the same launches;
* a key that neither the table nor Triton's cache has, of a kernel that the table has, is launched as the nearest key of
  that kernel: heads 64 wide as heads 128 wide. Where the GPU refuses that launch, the key is tuned;
* the candidates of others are compiled side by side before they are timed, by a thread for each core that this process
  may use, where Triton compiles them one after another.

Whoever sets FLA_CACHE_MODE or FLA_CONFIG_DIR, fla's own way to such tables, gets what fla does of it, and not ours:
FLA_CACHE_MODE=disabled has every kernel tuned.
Our own kernels have one launch each, and need none of this.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
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
# A launch is not taken from a key of which a number is more than so many times as large or as small: its blocks, of 64
# mostly, would be all but empty, or far too many.
FARTHEST = 4
GOLDEN = 0.618  # multiples of it, modulo 1, are well spread, however many there are

_lent = True  # whether launches are taken from the nearest key
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
    `BT=64 K=128 V=128, bfloat16 float32`. A name that the candidates give a value is in no key, though some kernels
    list it. None where some of the other values were not given."""
    dtypes = [x.removeprefix("torch.") for x in key if isinstance(x, str) and x.startswith("torch.")]
    values = key[: len(key) - len(dtypes)]
    names = [name for name in kernel.keys if name not in kernel.configs[0].kwargs]
    if len(values) != len(names):
        return None
    named = [f"{name}={x}" for name, x in zip(names, values, strict=True) if name not in COUNTS]
    return f"{' '.join(named)}, {' '.join(dtypes)}"


def known(kernel: Any, key: tuple[Any, ...], candidates: list[Any]) -> Any | None:
    """The candidate that the table has, or None. One that fla does not offer here, or no longer, is not taken."""
    return offered(kept().get(name_of(kernel), {}).get(described(kernel, key) or ""), candidates)


def offered(launch: dict[str, Any] | None, candidates: list[Any]) -> Any | None:
    return next((candidate for candidate in candidates if candidate.all_kwargs() == launch), None)


def nearest(kernel: Any, key: tuple[Any, ...], candidates: list[Any]) -> Any | None:
    """The candidate that the table has for the key nearest to this one, or None. A launch that fla does not offer here
    is passed over: which it offers may depend on the key."""
    if (wanted := described(kernel, key)) is None:
        return None
    launches = kept().get(name_of(kernel), {})
    away = sorted((distance(wanted, other), other) for other in launches)
    found = (offered(launches[other], candidates) for apart, other in away if apart < math.inf)
    return next((candidate for candidate in found if candidate is not None), None)


def distance(one: str, other: str) -> float:
    """Of two `described` keys: sum |log2(x / y)| over their numbers x and y. Infinite where they differ in anything
    else, such as a flag, a dtype, or which tensors there are, and where two numbers are more than FARTHEST apart."""
    parts, others = one.split(), other.split()
    if len(parts) != len(others):
        return math.inf
    return sum(_apart(*pair) for pair in zip(parts, others, strict=True))


def _apart(part: str, other: str) -> float:
    (name, _, x), (other_name, _, y) = (p.rstrip(",").partition("=") for p in (part, other))
    if (name, x) == (other_name, y):
        return 0.0
    if name != other_name or not (x.isdigit() and y.isdigit() and int(x) and int(y)):
        return math.inf
    octaves = abs(math.log2(int(x) / int(y)))
    return octaves if octaves <= math.log2(FARTHEST) else math.inf


@cache
def say_nearest() -> None:
    """Once, not for each kernel."""
    log.info(
        "fla's kernels that were not tuned for these sizes are launched as was fastest for the nearest sizes; "
        "FLA_CACHE_MODE=disabled has them tuned here instead"
    )


@cache
def side_by_side() -> None:
    """From here on, for all autotuned kernels of fla."""
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime import _async_compile, autotuner
    from triton.runtime.errors import OutOfResources, PTXASError

    # with which Triton leaves a candidate out when it times them
    tuned(autotuner.Autotuner, _async_compile, (OutOfResources, PTXASError, CompileTimeAssertionFailure))


def without_loans() -> None:
    """From here on keys that the table lacks are tuned, side by side: who is compared with is to be at its best."""
    global _lent
    _lent = False
    side_by_side()


def tuned(kind: Any, asynchronous: ModuleType | Any, refusals: tuple[type[Exception], ...]) -> None:
    """Replaces two methods of Triton's class `kind`: `run`, which hands a launch's arguments on, and
    `check_disk_cache`, whose last argument times all candidates where the cache has no result. refusals: what `run`
    raises, before anything is launched, for a launch that is too large for the GPU."""
    run, check = kind.run, kind.check_disk_cache

    @wraps(run)
    def remembered(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not of_fla(self):
            return run(self, *args, **kwargs)
        self.cache_results, self.given = True, (args, kwargs)
        try:
            return run(self, *args, **kwargs)
        except refusals as error:
            if not given_up(self, error):
                raise
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

        def search() -> None:
            if (launch := borrowed(self, key, candidates)) is not None:
                self.cache[key] = launch
            elif _unknown is not None:
                ask_for_all(self, candidates)
                _unknown.append((self, key))
                self.cache[key] = candidates[0]  # for a call of which nothing is wanted
            else:
                compile_all(self, candidates, asynchronous)
                time_them()
                return
            raise UntimedError

        try:
            return check(self, key, candidates, search)
        except UntimedError:
            return True

    kind.run, kind.check_disk_cache = remembered, table_first


class UntimedError(Exception):
    """Nothing was timed, so that there is nothing to remember."""


def borrowed(kernel: Any, key: tuple[Any, ...], candidates: list[Any]) -> Any | None:
    """A copy of the `nearest` launch, by which this key is found where the launch is refused; None from then on, and
    after `without_loans`."""
    loans = vars(kernel).setdefault("loans", {})
    if not _lent or key in loans or (launch := nearest(kernel, key, candidates)) is None:
        return None
    say_nearest()
    loans[key] = copy(launch)
    return loans[key]


def given_up(kernel: Any, error: Exception) -> bool:
    """Whether the launch that was refused just now is a `borrowed` one. Then its key is forgotten, and tuned next."""
    keys = [key for key, launch in vars(kernel).get("loans", {}).items() if launch is kernel.best_config]
    for key in keys:
        log.info(f"fla's {kernel.base_fn.__name__} can't be launched as for the nearest sizes, and is tuned: {error}")
        del kernel.cache[key]
    return bool(keys)


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
    """Has them compiled for the arguments of this call, or found in the cache, and launches none. Processes of one
    computer, which share the cache, begin at different places: each finds there what others have compiled."""
    args, kwargs = kernel.given
    given = {name: value for name, value in kwargs.items() if name != "warmup"}
    first = int(len(candidates) * (GOLDEN * int(os.environ.get("LOCAL_RANK", 0)) % 1))
    for candidate in candidates[first:] + candidates[:first]:
        kernel.fn.warmup(*args, **given, **candidate.all_kwargs())
