"""Results of jobs, a line of JSON each: docs/evidence/EXPERIMENT/results.jsonl, and failures.jsonl beside it."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from models.training import origin
from scripts.array_job import CONF
from scripts.sweeps.jobs import Job


def results_of(experiment: str) -> Path:
    return CONF.parent / "docs" / "evidence" / experiment / "results.jsonl"


class Results:
    """A file with a line for each job that has a result. commit: of this repository, where no git says it."""

    def __init__(self, path: Path, commit: str | None = None) -> None:
        self.path, self.commit = path, commit

    def read(self) -> list[dict[str, Any]]:
        return lines(self.path)

    def have(self) -> set[str]:
        return {row["job"] for row in self.read()}

    def add(self, job: Job) -> dict[str, Any]:
        result = json.loads((job.folder / "result.json").read_text())
        row = {"job": job.key, "words": list(job.words), "date": datetime.now(UTC).date().isoformat(), **result}
        row["command"] = shlex.join(["python", "train.py", "-m", *job.words])
        row["commit"] = row.get("commit") or self.commit
        change(self.path, lambda rows: [*without(job, rows), row])
        if self.failures():
            change(self._failed, lambda rows: without(job, rows))
        return row

    @property
    def _failed(self) -> Path:
        return self.path.with_name("failures.jsonl")

    def failures(self) -> list[dict[str, Any]]:
        """Of jobs that ended in an error the last time, and why."""
        return lines(self._failed)

    def fail(self, job: Job, reason: str) -> None:
        row = {"job": job.key, "words": list(job.words), "date": datetime.now(UTC).date().isoformat()}
        row |= {"commit": self.commit or origin.commit()["commit"], "reason": reason[:300]}
        change(self._failed, lambda rows: [*without(job, rows), row])


class Shared:
    """Those of several experiments, each with a file of its own."""

    def __init__(self, of: dict[str, Results]) -> None:
        self.of = of

    def have(self) -> set[str]:
        return {key for each in self.of.values() for key in each.have()}

    def add(self, job: Job) -> dict[str, Any]:
        return self.of[job.experiment].add(job)

    def fail(self, job: Job, reason: str) -> None:
        self.of[job.experiment].fail(job, reason)


def left(every: Iterable[Job], results: Results | Shared) -> Iterator[Job]:
    """Jobs without a result. One that ended when nobody was there to write it down gets its line now."""
    done = results.have()
    for job in every:
        if job.key in done:
            continue
        if (job.folder / "result.json").exists():
            results.add(job)
        else:
            yield job


def without(job: Job, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["job"] != job.key]


def lines(path: Path) -> list[dict[str, Any]]:
    """A line that a kill has cut off is left out. Raises ValueError for one that is no job's, for a folder, and for
    what is no text."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and not a file of results")
    try:
        text = path.read_text() if path.exists() else ""
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text, and not a file of results") from None
    found = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not the line of a result ({error.msg})") from None
        if not is_of_a_job(found[-1]):
            raise ValueError(f"{path}, line {number}, is not the line of a result (it has no job and words)")
    return found


def is_of_a_job(row: Any) -> bool:
    words = row.get("words") if isinstance(row, dict) else None
    return isinstance(words, list) and all(isinstance(x, str) for x in [row.get("job"), *words])


def change(path: Path, how: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Reads the rows, and writes what `how` makes of them; another process that changes a file there waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        write(path, how(lines(path)))
    finally:
        os.close(folder)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft.replace(path)


def summary(row: dict[str, Any]) -> str:
    points = [x for name, x in row.items() if name.startswith("validation/accuracy_on/") and name.count("/") == 2]
    parts = [f"accuracy {row['validation/accuracy']:.3f}"] if "validation/accuracy" in row else []
    parts += [f"at test points {' '.join(f'{x:.2f}' for x in points)}"] if points else []
    parts += [f"{row['validation/bits_per_byte']:.4f} bits per byte"] if "validation/bits_per_byte" in row else []
    return ", ".join(parts or [f"{row['validation/nats']:.4f} nats per token"])
