"""Weights & Biases: a run of its own for every run, which goes on in the same curve.

Lightning's WandbLogger counts its rows by itself. After an interruption it begins at a checkpoint, and so logs again
what the process before has logged since: the curve goes back and forth, and offline the rows are numbered from 0 once
more. Here the number of a row, wandb's step, is the step of the optimizer, and what has been logged is not logged
again. What a killed process has logged offline and wandb has not written (offline.py) is logged once more.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from models.training.logger import CsvLogger, read_metrics
from models.training.loggers import identity, offline
from models.training.loggers.seen import Seen, news

STEP = "trainer/global_step"  # Lightning's name for the step of the optimizer
TOKENS = "progress/tokens"  # the axis of every curve
OTHER_AXES = ("progress/flops", "speed/seconds")
LONGEST_TAG = 64  # characters


class Wandb(WandbLogger):
    """id: of a run that has none in its folder's loggers.json. A run that begins gets one, with random digits behind.
    settings: of WandbLogger and wandb.init.
    """

    def __init__(self, id: str, save_dir: str, tags: list[str | None] | None = None, **settings: Any) -> None:
        shown = [str(tag)[:LONGEST_TAG] for tag in tags or [] if tag]
        super().__init__(id=id, save_dir=save_dir, tags=list(dict.fromkeys(shown)), resume="allow", **settings)
        self._call(identity.known(Path(save_dir), "wandb") or id)
        self.seen: Seen | None = None  # None: this is no training
        self.first = 0  # the first row that wandb takes
        self.lost: list[dict[str, float]] = []  # rows that a process before has logged, and wandb has not written

    def _call(self, name: str) -> None:
        self._id = self._wandb_init["id"] = name

    @rank_zero_only
    def resume(self, step: int, seen: Seen) -> None:
        folder = Path(self._wandb_init["dir"])
        kept = offline.last_value(folder / "wandb", STEP) if self._is_offline() else None
        if kept is not None:
            seen = {each: names for each, names in seen.items() if each <= kept}
            self.lost = [row for row in read_metrics(folder / CsvLogger.FILE) if kept < row["step"] < step]
        self.seen, self.first = seen, max(seen, default=-1) + 1
        began = (folder / "wandb").is_dir()  # with the id alone, when there was no loggers.json yet
        if identity.known(folder, "wandb") is None and (step == 0 or not began):
            self._call(identity.unique(self._wandb_init["id"]))
            identity.keep(folder, "wandb", self._wandb_init["id"])

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            import wandb

            self._experiment = wandb.init(**self._wandb_init)
            for axis in (STEP, TOKENS, *OTHER_AXES):
                self._experiment.define_metric(axis)
            self._experiment.define_metric("*", step_metric=TOKENS, step_sync=True)
            self.first = max(self.first, self._experiment.step)  # after an evaluation there are rows behind the end
            for row in self.lost:
                numbers = {name: x for name, x in row.items() if name != "step"}
                self._experiment.log({**numbers, STEP: int(row["step"])}, step=max(int(row["step"]), self.first))
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers of one step are one row. wandb takes no row before its last: what comes late, as an evaluation does,
        is in the next row."""
        run = self.experiment
        if step is None:
            run.log(dict(metrics))
        elif found := news(metrics, int(step), self.seen or {}):
            late = self.seen is not None and int(step) < run.step  # a picture of the last look, after the last step
            first = run.step if self.seen is None or late else self.first
            run.log(found if late else {**found, STEP: int(step)}, step=max(int(step), first))

    def _is_offline(self) -> bool:
        return self._offline or os.environ.get("WANDB_MODE") == "offline"

    def log_sample(self, prompt: str, text: str, step: int) -> None:
        self.log_text("sample", columns=["prompt", "goes on"], data=[[prompt, text]], step=step)
