"""`benchmark.py train` and `length`: a process for each model, a row as soon as it is there, and JSON after each."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from shutil import which
from typing import Any, NamedTuple

from scripts.benchmarks.apart import ROOT, LeftOutError, apart, left
from scripts.benchmarks.contenders import Sizes, missing
from scripts.benchmarks.steps import HEAD, Trained, time_training
from scripts.benchmarks.timing import machine

Apart = Callable[..., dict[str, Any]]


class Way(NamedTuple):
    """How every model is timed: device, steps that count, seconds that one model may take and that all may take,
    whether each begins without compiled kernels.
    """

    device: str
    steps: int = 10
    limit: float = 300.0
    total: float | None = None
    cold: bool = False
    kernels: bool = False
    documents: bool = True


def rows(asked: Iterable[tuple[str, Sizes]], way: Way, run: Apart = apart) -> Iterator[Trained]:
    """A row of each model, or why it is left out."""
    deadline = None if way.total is None else time.monotonic() + way.total
    for name, sizes in asked:
        if (why := missing(name, way.device)) is not None:
            yield Trained(name, sizes.B * sizes.T, sizes.T, reason=why)
            continue
        given = {"name": name, "sizes": list(sizes), "device": way.device, "steps": way.steps}
        given |= {"kernels": way.kernels, "documents": way.documents}
        try:
            if (seconds := left(deadline, way.limit)) <= 0:
                raise LeftOutError(f"the {way.total:.0f} s of all were over")
            yield Trained(**run("training.one", given, seconds, way.cold))
        except LeftOutError as error:
            yield Trained(name, sizes.B * sizes.T, sizes.T, reason=str(error))


def one(sizes: list[Any], **given: Any) -> dict[str, Any]:
    """What the process of one model does."""
    return asdict(time_training(sizes=Sizes(*sizes), **given))


def shown(row: Trained) -> Iterator[str]:
    """A row's lines: its numbers, and its step's kernels by kind."""
    yield str(row)
    if row.kinds:
        total, count = (sum(kind[i] for kind in row.kinds.values()) for i in (0, 1))
        yield f"    {total:8.2f} ms in {count:,} launches"
        yield from (f"    {kind[0]:8.2f} ms {kind[1]:6,} x {name}" for name, kind in row.kinds.items())
        yield from (f"    {ms:12.3f} ms {n:6,} x {name[:100]}" for name, (ms, n) in list(row.kernels.items())[:12])


def train(asked: list[tuple[str, Sizes]], way: Way, path: Path | None, run: Apart = apart) -> list[Trained]:
    """Prints, and writes after each model, so that what is done is kept whatever comes."""
    about = {**environment(way.device), "sizes": str(asked[0][1])}
    print(f"{about['machine']}; {about['sizes']}\n{HEAD}", flush=True)
    done: list[Trained] = []
    for row in rows(asked, way, run):
        print("\n".join(shown(row)), flush=True)
        done.append(row)
        if path:
            path.write_text(json.dumps({**about, "rows": [asdict(row) for row in done]}, indent=1))
    return done


def environment(device: str) -> dict[str, Any]:
    """Machine, releases and commit that numbers are of."""
    names = ("torch", "triton", "flash-linear-attention", "transformers")
    installed = {found.metadata["Name"]: found.version for found in metadata.distributions()}
    versions = {name: installed[name] for name in names if name in installed}
    asked = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip() if which("git") else ""
    when = time.strftime("%Y-%m-%d", time.gmtime())
    return {"machine": machine(device), "python": platform.python_version(), **versions, "commit": commit, "date": when}
