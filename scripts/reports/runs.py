"""The folders of runs as a page needs them: what was asked for, what was measured, what came out, and what did not."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from omegaconf import OmegaConf

from models.build import current, near

WITHIN = ("model", "checkpoints", "wandb")  # folders of a run that hold no runs
SETTINGS = {"model", "data", "batch_tokens", "tokens"}  # that every run has
NUMBERS = {"validation/bits_per_byte": "bits per byte", "validation/accuracy": "accuracy"}  # the first that all have
NATS = "nats per token"


@dataclass(frozen=True)
class Record:
    """A run. failure: why it ended, where a sweep has said so; empty for one that is finished or only stopped."""

    folder: Path
    config: dict[str, Any]
    rows: list[dict[str, float]]  # of metrics.csv
    result: dict[str, Any] | None
    failure: str = ""
    words: list[str] = field(default_factory=list)  # of its command line, where a sweep has said so

    @property
    def seed(self) -> int:
        return self.config.get("seed", 0)

    @property
    def finished(self) -> bool:
        return self.result is not None

    @property
    def tokens(self) -> float:
        """Trained on so far."""
        return (self.rows[-1]["step"] + 1) * self.config["batch_tokens"] if self.rows else 0.0

    @cached_property
    def validations(self) -> list[dict[str, float]]:
        """The rows of validations, with `seconds`: of training alone, without validations and checkpoints. It is the
        sum of tokens / speed over all that is logged, and so counts a run that was interrupted right."""
        timed = [row for row in self.rows if row.get("speed/tokens_per_second", 0) > 0 and "progress/tokens" in row]
        tokens = np.array([0.0, *(row["progress/tokens"] for row in timed)])
        pace = 1 / np.array([row["speed/tokens_per_second"] for row in timed])
        seconds = np.array([0.0, *np.cumsum(np.diff(tokens) * pace)])

        def at(position: float) -> float:
            if len(timed) == 0:
                return float("nan")
            beyond = max(0.0, position - tokens[-1]) * pace[-1]
            return float(np.interp(position, tokens, seconds) + beyond)

        found = [row for row in self.rows if "validation/nats" in row and "progress/tokens" in row]
        return [row | {"seconds": at(row["progress/tokens"])} for row in found]

    @property
    def sample(self) -> str:
        path = self.folder / "sample.txt"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def find(folders: list[Path]) -> list[Record]:
    """All runs in these folders, themselves or below them, in alphabetical order. Raises ValueError where there is no
    such folder, no run, or none that is finished.
    """
    found: dict[Path, Record] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder{_near(folder)}")
        said = failures(folder)
        for path in _below(folder):
            failed = said.get(path.resolve(), {})
            record = read(path, failed.get("reason", ""), failed.get("words", []))
            if record.config.keys() >= SETTINGS:  # other programs have a config.yaml too
                found.setdefault(path.resolve(), record)
        for path, failed in said.items():  # those that ended before they had a folder
            if not (path / "config.yaml").exists():
                found.setdefault(path, Record(path, {}, [], None, failed["reason"], failed["words"]))
    where = ", ".join(map(str, folders))
    if not any(record.config for record in found.values()):
        raise ValueError(f"{where} holds no run: a folder with config.yaml")
    if not any(record.finished for record in found.values()):
        raise ValueError(
            f"none of the {len(found)} runs in {where} is finished: the command of a run goes on with it, and at its "
            "end there is a result.json"
        )
    return [found[path] for path in sorted(found)]


def read(folder: Path, failure: str = "", words: list[str] | None = None) -> Record:
    """One run. A row that a kill has cut off is left out. (models.training.logger reads such files too, after six
    seconds of importing Lightning.)"""
    config: Any = current(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    metrics, result = folder / "metrics.csv", folder / "result.json"
    text = metrics.read_text() if metrics.exists() else ""
    whole = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    rows = [{name: float(cell) for name, cell in row.items() if cell} for row in whole]
    came = json.loads(result.read_text()) if result.exists() else None
    return Record(folder, config, rows, came, "" if came else failure, words or [])


def _below(folder: Path) -> list[Path]:
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if name not in WITHIN and not name.startswith((".", "model-", "checkpoints-"))
        )
        if "config.yaml" in files:
            found.append(Path(path))
    return found


def _near(folder: Path) -> str:
    """A hint at what is there, up to the first part of the path that is missing."""
    parent, name = folder.parent, folder.name
    while not parent.is_dir() and parent != parent.parent:
        parent, name = parent.parent, parent.name
    names = sorted(path.name for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    if meant := near(name, names):
        return f"; did you mean {parent / meant}?"
    return f"; {parent} has {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else ""


# What a sweep knows of its jobs that failed, and their folders do not: sweep.json beside the page.


def failures(folder: Path) -> dict[Path, dict[str, Any]]:
    """By the folder of the job: words, reason."""
    path = folder / "sweep.json"
    jobs = json.loads(path.read_text()) if path.exists() else []
    return {(folder / job["folder"]).resolve(): job for job in jobs}


def keep_failures(folder: Path, jobs: dict[Path, tuple[list[str], str]]) -> None:
    """Writes what the jobs of a sweep say, by their folders: words and why they failed, empty for one that did not.
    What earlier sweeps of this name have said of other jobs stays."""
    path = folder / "sweep.json"
    if not path.exists() and not any(reason for _, reason in jobs.values()):
        return
    with FileLock(folder / ".sweep.lock"):  # jobs of an array may end at once
        known = failures(folder) | {
            path.resolve(): {"folder": os.path.relpath(path, folder), "words": words, "reason": reason}
            for path, (words, reason) in jobs.items()
        }
        kept = [job for _, job in sorted(known.items()) if job["reason"]]
        draft = folder / ".sweep.json.draft"
        draft.write_text(json.dumps(kept, indent=2) + "\n")
        draft.replace(path)
