"""Measures and checks training on the GPUs of one host, all in one command: how fast it is on one, two, four and eight
of them under each strategy, what they hold, that the losses are the same, that a run that is killed goes on under
another number of them, and one sequence of 262,144 tokens that they share.

    python scripts/scaling.py --json scaling.json                # all of it
    python scripts/scaling.py --only one ddp checks              # some, in this order
    python scripts/scaling.py --toy                              # every item at toy size, two processes on a CPU

Each row is printed when it is known and JSON is written after it. `linear`: tokens/s beside those of as many single
GPUs, each as fast as the row that it is compared with ("one", or "one, no graph"). What is timed runs by itself, but
for the rows of one GPU, which run side by side. Of checks few run at once: processes that share a GPU take turns on it,
and each waits for its like on another GPU. --warm compiles first, for all rows at once, what each would compile alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import conf.checks  # noqa: F401  # with the next line, what train.py imports late
import models.training.job  # noqa: F401
from scripts.scaled.faults import Checks
from scripts.scaled.launch import Scratch, side_by_side
from scripts.scaled.speed import HEAD, HELD_OUT, Case, Timed, cases, gpus_here, measured, prepare, warm, warming

ITEMS = ("one", "ddp", "fsdp", "hsdp", "1300m", "card", "kills", "checks", "context", "more", "bf16")
CHECKS_AT_ONCE = 3


class Told:
    """What is known so far, printed and written as it comes."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.path, self.found = path, {**about, "rows": [], "checks": []}
        self.began = time.monotonic()

    def say(self, line: Any) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {line}", flush=True)

    def add(self, kind: str, row: dict[str, Any]) -> None:
        self.found[kind].append(row)
        if self.path:
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")


Rows = dict[str, Iterator[Timed | None]]


def begun(group: list[Case], scratch: Scratch, given: argparse.Namespace) -> Rows:
    settings = given.toy, given.steps, not given.apart
    return {case.name: measured(case, i, scratch, *settings) for i, case in enumerate(group)}


def timed(group: list[Case], own: Rows, ahead: Rows, told: Told, limit: float) -> None:
    """The rows of a group; meanwhile the models of the next one are built."""
    rows: dict[str, Timed] = {}

    def keep(name: str) -> Iterator[None]:
        with closing(own[name]) as found:  # type: ignore[type-var]  # a generator, whose `finally` ends its run
            for row in found:
                if row is not None:
                    rows[name] = row
                yield

    def build(name: str) -> Iterator[None]:
        while next(ahead[name]) is None:
            yield

    tasks = {name: keep(name) for name in own} | {f"{name}, ahead": build(name) for name in ahead}
    failed = side_by_side(tasks, limit)
    speeds = {row["name"]: row["tokens_per_second"] for row in told.found["rows"]}
    for case in group:
        row = rows.get(case.name) or Timed(case.name, case.devices, case.words)
        row.reason = failed.get(case.name, row.reason)
        if (alone := speeds.get(case.beside)) and row.tokens_per_second:
            row.of_linear = row.tokens_per_second / alone / case.devices
        told.say(row)
        told.add("rows", asdict(row))


def checked(item: str, told: Told, scratch: Scratch, given: argparse.Namespace, limit: float) -> None:
    checks = Checks(given.devices, scratch, given.toy, not given.apart)
    failed = side_by_side(checks.kills() if item == "kills" else checks.runs(), limit, CHECKS_AT_ONCE)
    for row in checks.told(failed):
        found = row["reason"] or f"differs by {row['difference']:.1e} of {row['most']:.0e}"
        told.say(f"{row['name']:<42} like {row['like']:<22} {found}")
        told.add("checks", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ITEMS, default=list(ITEMS))
    parser.add_argument("--devices", type=int, help="default: all GPUs; with --toy 2")
    parser.add_argument("--steps", type=int, default=3, help="that are timed, after one other")
    parser.add_argument("--limit", type=float, default=120, help="seconds of one row, or of each kind of checks")
    parser.add_argument("--warm", type=float, default=0, help="seconds in which what the rows need may be compiled")
    parser.add_argument("--total", type=float, help="seconds of all; what comes later is left out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--toy", action="store_true", help="on a CPU by gloo, models of two narrow layers")
    parser.add_argument("--apart", action="store_true", help="start each process by itself, and not by a fork")
    parser.add_argument("--scratch", help="a folder for the runs, to be kept")
    given = parser.parse_args()
    gpus = [] if given.toy else gpus_here()
    given.devices = given.devices or (2 if given.toy else len(gpus))
    if not given.toy and not 1 <= given.devices <= len(gpus):
        sys.exit(f"error: --devices={given.devices}, and there are {len(gpus)} GPUs; --toy runs on a CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM: what runs is ended"))  # `timeout` sends it
    assert not torch.cuda.is_initialized()  # a fork could not use it
    torch.set_num_threads(1)
    if given.toy:
        os.environ["OMP_NUM_THREADS"] = "1"
    about: dict[str, Any] = {
        "machine": f"{given.devices} x {gpus[0] if gpus else 'CPU'}",
        "date": time.strftime("%Y-%m-%d"),
    }
    about |= {"devices": given.devices, "torch": torch.__version__, "python": platform.python_version()}
    told = Told(given.json, about | {"toy": given.toy, "steps": given.steps, "warm": given.warm > 0})
    scratch = Scratch(given.scratch)
    print(f"{'':10}{HEAD}")
    todo = {item: [group for group in cases(given.devices, given.toy) if group[0].item == item] for item in given.only}
    groups = [group for of_item in todo.values() for group in of_item]
    if groups and not given.toy:
        for more in sorted({HELD_OUT in case.words for group in groups for case in group}):
            prepare(*([HELD_OUT] if more else []))
        told.say("data are prepared")
    if given.warm and not given.toy:
        tasks = {case.name: warm(case, 0, scratch, not given.apart) for case in warming(groups)}
        told.say(f"compiling for {', '.join(tasks)}")
        failed = side_by_side(tasks, given.warm)
        told.say(f"compiled; {', '.join(failed) or 'nothing'} was not in time")

    def left(name: str) -> float:
        left = given.limit if given.total is None else min(given.limit, given.total - (time.monotonic() - told.began))
        if left < 5:
            told.say(f"left out, for the time was over: {name}")
        return left if left >= 5 else 0

    works: list[tuple[str, list[Case]]] = []
    for item in given.only:
        works += [(item, group) for group in todo[item]]
        works += [(item, [])] if item in ("kills", "checks") and given.devices > 1 else []
    ahead: Rows = {}
    try:
        for (item, group), (_, after) in zip(works, [*works[1:], ("", [])], strict=True):
            if not (limit := left(group[0].name if group else f"the {item}")):
                continue
            if not group:
                checked(item, told, scratch, given, limit)
                continue
            own, ahead = ahead or begun(group, scratch, given), begun(after, scratch, given)
            timed(group, own, ahead, told, limit)
    finally:
        for rows in ahead.values():
            rows.close()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
