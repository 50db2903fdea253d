"""TensorBoard: event files in the run's folder. `tensorboard --logdir runs` shows all runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from models.training.loggers.seen import Seen


class TensorBoard(TensorBoardLogger):
    """save_dir: the run's folder, in which all of its processes write to tensorboard/. What the one before has logged
    of the steps that are computed again is purged. settings: of TensorBoardLogger.
    """

    def __init__(self, save_dir: str, **settings: Any) -> None:
        super().__init__(save_dir, name="", version="tensorboard", default_hp_metric=False, **settings)

    @rank_zero_only
    def resume(self, step: int, seen: Seen) -> None:
        if step:
            self._kwargs["purge_step"] = step

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As a text; the tab of hyperparameters would show a run once for every process of it."""
        self._text("config", json.dumps(params, indent=2, default=str), 0)

    @rank_zero_only
    def log_image(self, name: str, paths: Sequence[str], step: int | None = None) -> None:
        from matplotlib.image import imread  # half a second that no other command should pay

        for path in paths:
            pixels = imread(path)[..., :3]  # without the alpha
            self.experiment.add_image(name, pixels, step, dataformats="HWC")

    @rank_zero_only
    def log_sample(self, prompt: str, text: str, step: int) -> None:
        self._text("sample", f"{prompt} ... goes on:\n\n{text}", step)

    def _text(self, name: str, text: str, step: int) -> None:
        """As it is: TensorBoard reads Markdown, in which four spaces begin code."""
        code = "\n".join(f"    {line}" for line in text.splitlines())
        self.experiment.add_text(name, code, step)
