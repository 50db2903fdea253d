"""A run and its directory: one name, one config, one place. The same command goes on where it stopped; a finished run
says so.

runs/NAME/config.yaml        what was asked for, every value resolved
          metrics.csv        a row a step
          checkpoints/       the two newest, and those that stay (keep.py)
          loss.png  sample.txt  regression.png
          regression.jsonl   what the memories hold (regression.py)
          model/             when finished: save_pretrained's folder, with the tokenizer
          result.json        when finished: the last validation, and what computed it (origin.py)
          model-N  result-N.json  checkpoints-N   of a run that was finished after N steps and went on from before
                             its decay
          evaluations/       what scripts/evaluate.py found, docs/evaluating.md
          loggers.json       under which names services know the run (models/training/loggers/identity.py)
          .lock              held by the process that trains here
          .ranks/            what each of several processes is doing (watchdog.py)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from conf.folders import FREE_TO_CHANGE
from models.build import current

DRY_RUN = "dry run"  # the key of what stands for a result where none was made


class RunError(RuntimeError):
    """Why a run can't go on, in a sentence for its user."""


class Run:
    """The directory of a run. `config` is the resolved config as plain containers."""

    LOCK = ".lock"

    def __init__(self, folder: str | Path, config: dict[str, Any]) -> None:
        self.folder, self.config = Path(folder), config
        self.origin: dict[str, Any] = {}  # versions, commit and device (origin.py)
        self._held: FileLock | None = None
        self.mirror: Any = None  # where it is copied to (mirror.py)
        self.branch: int | None = None  # the step from which the run goes on with another length (branch.py)

    @property
    def name(self) -> str:
        return self.config["name"]

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def enter(
        self, main_process: bool = True, branch: Callable[[Run, dict[str, Any], bool], int | None] | None = None
    ) -> None:
        """Takes possession: writes config.yaml, or compares with the one that is there. Raises ValueError, with the
        difference, if it is another and `branch` (branch.py) knows no way from it to this one; and if another process
        is in possession.
        """
        path = self.folder / "config.yaml"
        if main_process:
            if self.config["overwrite"] and not path.exists() and self._contents():
                raise ValueError(
                    f"overwrite=true would delete {self.folder}, which is not a run's directory: it has no config.yaml"
                )
            self._lock()
            for part in self._contents() if self.config["overwrite"] else ():
                shutil.rmtree(part) if part.is_dir() else part.unlink()
        if path.exists() and not self.config["overwrite"]:  # with which it may be about to be deleted
            before = current(OmegaConf.to_container(OmegaConf.load(path)))
            if not (found := difference(before, self.config)):
                return
            self.branch = branch(self, before, main_process) if branch else None
            if self.branch is None:
                raise ValueError(
                    f"{self.folder} holds a run of this name with another config:\n{found}\n"
                    "Choose another name=, or overwrite=true to delete it and begin anew."
                )
        if main_process:
            draft = path.with_name(".config.yaml.draft")
            OmegaConf.save(OmegaConf.create(self.config), draft)
            draft.replace(path)

    def _contents(self) -> list[Path]:
        """Of this run: the jobs of a sweep of the same name have folders of their own in it."""
        parts = [part for part in self.folder.glob("*") if part.name != self.LOCK]
        return [part for part in parts if not (part / "config.yaml").exists()]

    def _lock(self) -> None:
        """Held until this process ends, in whatever way; loaders' workers, which may outlive it, do not inherit it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held = FileLock(self.folder / self.LOCK, timeout=0)
        try:
            self._held.acquire()
        except Timeout:
            raise ValueError(
                f"another process is training in {self.folder}; wait for it, stop it, or choose another name="
            ) from None

    def leave(self) -> None:
        if self._held is not None:
            self._held.release()

    @property
    def result(self) -> dict[str, Any] | None:
        """The last validation's metrics once the run is finished, else None."""
        if self.branch is not None:
            return None
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, result: dict[str, Any]) -> None:
        draft = self.folder / ".result.json.draft"
        draft.write_text(json.dumps(result, indent=2) + "\n")
        draft.replace(self.folder / "result.json")


def difference(before: Any, now: Any, path: str = "") -> str:
    """The settings that differ, one a line, but for those that may change (conf/folders.py: FREE_TO_CHANGE)."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [k for k in dict.fromkeys([*before, *now]) if path or k not in FREE_TO_CHANGE]
        absent = "(absent)"  # which null is as good as: a setting may be younger than a run
        parts = [difference(before.get(k, absent), now.get(k, absent), f"{path}.{k}" if path else k) for k in keys]
        return "\n".join(part for part in parts if part)
    if before == now or {str(before), str(now)} == {"(absent)", "None"}:
        return ""
    return f"  {path}: {before} before, {now} now"


def describe(result: dict[str, Any]) -> str:
    """The numbers that matter of a result, in one line; of a dry run its line."""
    if DRY_RUN in result:
        return result[DRY_RUN]
    shown = {
        "validation/bits_per_byte": "bits per byte",
        "validation/accuracy": "accuracy",
        "validation/chance": "by chance",
        "validation/nats": "nats per token",
        "validation/perplexity": "perplexity",
    }
    return "validation " + ", ".join(f"{result[name]:.4g} {label}" for name, label in shown.items() if name in result)
