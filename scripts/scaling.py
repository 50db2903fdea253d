"""Measures and checks training on the GPUs of one host, all in one command: how they are linked, how fast training is
on one, two, four and eight of them under each strategy, what they hold, that the losses are the same, that a run that
is killed goes on under another number of them, and one sequence of 262,144 tokens that they share.

    python scripts/scaling.py --json scaling.json                # all of it
    python scripts/scaling.py --only one ddp checks              # some, in this order
    python scripts/scaling.py --only kills --checks "fsdp, step" # of the checks, those with such a name
    python scripts/scaling.py --toy                              # every item at toy size, two processes on a CPU

Each row is printed when it is known and JSON is written after it. A file that is there is gone on with: what is
measured again replaces the row of that name, and the others stay, each with its date and commit. `linear`: tokens/s
beside those of as many single GPUs, each as fast as the row that it is compared with ("one", or "one, no graph"). What
is timed runs by itself, but for the rows of one GPU, which run side by side. Of checks few run at once: processes that
share a GPU take turns on it, and each waits for its like on another GPU. --warm compiles first, for all rows at once,
what each would compile alone; checks run meanwhile, as nothing of theirs is timed.
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
from models.training import origin
from scripts.scaled import link, sending
from scripts.scaled.faults import Checks
from scripts.scaled.launch import Scratch, in_turns, side_by_side
from scripts.scaled.speed import (
    GPU_WORDS,
    HEAD,
    HELD_OUT,
    TOY_WORDS,
    Case,
    Timed,
    cases,
    even,
    gpus_here,
    measured,
    prepare,
    warm,
    warming,
)

CHECKED = ("kills", "checks")
ITEMS = ("link", "one", "ddp", "fsdp", "hsdp", "1300m", "card", *CHECKED, "context", "block", "more", "bf16")
CHECKS_AT_ONCE = 3
LEAST = 5  # seconds: less is not worth to begin


class Told:
    """What is known so far, printed and written as it comes: rows and checks by their names, in the order in which
    they came first. stamp: where and when each row was measured."""

    def __init__(self, path: Path | None, about: dict[str, Any], stamp: dict[str, str]) -> None:
        self.path, self.stamp, self.found = path, stamp, {**about, "link": None, "rows": [], "checks": []}
        self.began = time.monotonic()
        if path and path.exists():
            before = rows_before(path)
            for key in ("machine", "toy", "steps"):
                if before[key] != about[key]:
                    raise ValueError(f"--json={path} has rows with {key}={before[key]}, and these have {about[key]}")
            self.found |= {key: before.get(key) for key in ("link", "rows", "checks")}

    def say(self, line: Any) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {line}", flush=True)

    def add(self, kind: str, row: dict[str, Any]) -> None:
        row |= self.stamp
        if kind == "link":
            self.found[kind] = row
        else:
            rows = {each["name"]: each for each in self.found[kind]}
            self.found[kind] = list((rows | {row["name"]: row}).values())
        self._compare()
        self._write()

    def _write(self) -> None:
        if self.path:
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")

    def _compare(self) -> None:
        """Each row with the one that it is to be seen beside."""
        known = [row for row in self.found["rows"] if row["tokens_per_second"]]
        speeds = {row["name"]: row["tokens_per_second"] for row in known if even(row)}
        for row in known:
            row["of_linear"] = None
            if row["beside"] in speeds and even(row):
                row["of_linear"] = row["tokens_per_second"] / speeds[row["beside"]] / row["devices"]

    def finish(self) -> None:
        """Adds to each row what it sends by the formulas. It takes seconds, so no GPU waits for it."""
        for row in self.found["rows"]:
            if row["devices"] > 1 and not row.get("sent"):
                words = [*(TOY_WORDS if self.found["toy"] else GPU_WORDS), *row["words"]]
                row["sent"] = sending.of_step(words, row["devices"], row.get("whole_for"), self.found["toy"])
        self._write()

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.found["rows"] if row["name"] == name)


def rows_before(path: Path) -> dict[str, Any]:
    """What an earlier call wrote. Raises ValueError where the file is another."""
    try:
        found = json.loads(path.read_text())
        if {"machine", "toy", "steps", "rows", "checks"} <= found.keys() and all(row["name"] for row in found["rows"]):
            return dict(found)
    except (ValueError, TypeError, AttributeError, KeyError):
        pass
    raise ValueError(f"--json={path} is there and has no rows of this script; name another file, or remove it")


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
    for case in group:
        row = rows.get(case.name) or Timed(case.name, case.devices, case.words, case.beside)
        row.reason = ": ".join(each for each in (failed.get(case.name), row.reason) if each)
        told.add("rows", asdict(row))
        told.say(Timed(**told.row(case.name)))


class Checked:
    """An item of checks, which may run while the rows' blocks are compiled."""

    def __init__(self, item: str, given: argparse.Namespace, scratch: Scratch) -> None:
        self.item, self.each = item, given.each
        self.checks = Checks(given.devices, scratch, given.toy, not given.apart)
        self.tasks = self.checks.kills() if item == "kills" else self.checks.runs()
        if given.checks:
            self.tasks = self.checks.chosen(self.tasks, given.checks)
        self.failed: dict[str, str] = {}

    def turns(self) -> Iterator[None]:
        return in_turns(self.tasks, self.failed, CHECKS_AT_ONCE, self.each)

    def tell(self, told: Told, failed: dict[str, str]) -> None:
        """failed: why what is still to be done is not, under the item's name."""
        late = dict.fromkeys(self.tasks, failed.get(self.item, ""))
        for row in self.checks.told(late | self.failed):
            found = row["reason"] or f"differs by {row['difference']:.1e} of {row['most']:.0e}"
            told.add("checks", row)
            told.say(f"{row['name']:<42} like {row['like']:<22} {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ITEMS, default=list(ITEMS))
    parser.add_argument("--devices", type=int, help="default: all GPUs; with --toy 2")
    parser.add_argument("--steps", type=int, default=3, help="that are timed, after one other")
    parser.add_argument("--limit", type=float, default=120, help="seconds of one row, or of each kind of checks")
    parser.add_argument("--checks", nargs="+", metavar="NAME", help="those with one of these in their names, alone")
    parser.add_argument("--each", type=float, default=120, help="seconds of one check")
    parser.add_argument("--warm", type=float, default=0, help="seconds in which what the rows need may be compiled")
    parser.add_argument("--total", type=float, help="seconds of all; what comes later is left out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="of these files, where they are a copy without git")
    parser.add_argument("--toy", action="store_true", help="on a CPU by gloo, models of two narrow layers")
    parser.add_argument("--apart", action="store_true", help="start each process by itself, and not by a fork")
    parser.add_argument("--scratch", help="a folder for the runs, to be kept")
    given = parser.parse_args()
    for name in ("devices", "steps", "limit", "each"):
        if (value := getattr(given, name)) is not None and value <= 0:
            sys.exit(f"error: --{name}={value} must be above 0")
    gpus = [] if given.toy else gpus_here()
    given.devices = given.devices or (2 if given.toy else len(gpus))
    if not given.toy and not 1 <= given.devices <= len(gpus):
        sys.exit(f"error: --devices={given.devices}, and there are {len(gpus)} GPUs; --toy runs on a CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM: what runs is ended"))  # `timeout` sends it
    assert not torch.cuda.is_initialized()  # a fork could not use it
    torch.set_num_threads(1)
    if given.toy:
        os.environ["OMP_NUM_THREADS"] = "1"
    about: dict[str, Any] = {"machine": f"{given.devices} x {gpus[0] if gpus else 'CPU'}", "devices": given.devices}
    about |= {"python": platform.python_version(), "toy": given.toy, "steps": given.steps, "warm": given.warm > 0}
    stamp = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": given.commit or origin.commit()["commit"] or "",
        "torch": torch.__version__,
    }
    try:
        told = Told(given.json, about, stamp)
    except ValueError as error:
        sys.exit(f"error: {error}")
    scratch = Scratch(given.scratch)
    print(f"{'':10}{HEAD}")
    found = [group for group in cases(given.devices, given.toy) if group[0].item in given.only]
    checked = {item: Checked(item, given, scratch) for item in given.only if item in CHECKED and given.devices > 1}
    if given.checks and not any(each.tasks for each in checked.values()):
        sys.exit(f"error: --checks={' '.join(given.checks)} is part of no check of --only={' '.join(given.only)}")
    if "link" in given.only and given.devices > 1:
        of_link = link.measured(given.devices, given.toy, scratch.folder("link"), min(40, given.limit))
        told.add("link", of_link)
        for line in link.told(of_link):
            told.say(line)
    if found and not given.toy:
        for more in sorted({HELD_OUT in case.words for group in found for case in group}):
            prepare(*([HELD_OUT] if more else []))
        told.say("data are prepared")
    if given.warm:
        compiled([] if given.toy else warming(found), checked, told, scratch, given)
        checked = {}
    works: list[tuple[str, list[Case]]] = []
    for item in given.only:
        works += [(item, group) for group in found if group[0].item == item]
        works += [(item, [])] if item in checked else []
    one_after_the_other(works, checked, told, scratch, given)
    told.finish()


def compiled(
    cases: list[Case], checked: dict[str, Checked], told: Told, scratch: Scratch, given: argparse.Namespace
) -> None:
    """And checked meanwhile."""
    compiling = {case.name: warm(case, 0, scratch, not given.apart) for case in cases}
    told.say(f"compiling for {', '.join(compiling) or 'nothing'}")
    failed = side_by_side(compiling | {item: each.turns() for item, each in checked.items()}, given.warm)
    told.say(f"compiled; {', '.join(case.name for case in cases if case.name in failed) or 'nothing'} was not in time")
    for each in checked.values():
        each.tell(told, failed)


def one_after_the_other(
    works: list[tuple[str, list[Case]]], checked: dict[str, Checked], told: Told, scratch: Scratch, given: Any
) -> None:
    """Each of an item and the cases of a row, of which checks have none."""
    ahead: Rows = {}
    try:
        for (item, group), (_, after) in zip(works, [*works, ("", [])][1:], strict=True):
            limit = given.limit
            if given.total is not None:
                limit = min(limit, given.total - (time.monotonic() - told.began))
            if limit < LEAST:
                told.say(f"left out, for the time was over: {group[0].name if group else f'the {item}'}")
                continue
            if not group:
                checked[item].tell(told, side_by_side({item: checked[item].turns()}, limit))
                continue
            own, ahead = ahead or begun(group, scratch, given), begun(after, scratch, given)
            timed(group, own, ahead, told, limit)
    finally:
        for rows in ahead.values():
            rows.close()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
