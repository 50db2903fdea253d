"""What a run says while it runs: a bar where there is a terminal, lines where the output goes to a file."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from models.training.module import Training
from models.training.speed import memory_gb, mfu

UNIT = "nats per token"  # of every loss on a line


class Progress(Callback):
    """A bar of steps where there is a terminal; where the output goes elsewhere a line every `seconds` (null for none);
    and a line at every validation in any case.

    The speed is over the steps since the line before, without validations. The memory is the most so far (speed.py).
    """

    def __init__(self, seconds: float | None = 30.0) -> None:
        if seconds is not None and seconds < 0:
            raise ValueError(f"callbacks.progress.seconds={seconds} must be at least 0, or null for no lines")
        self.seconds = seconds

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        total, self.first = trainer.max_steps, trainer.global_step
        hidden = trainer.global_rank > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=self.first, unit="step", dynamic_ncols=True, leave=False, disable=hidden)
        self.lines = trainer.global_rank == 0 and (hidden or not sys.stdout.isatty())
        self.started = time.perf_counter()
        self._begin_window(trainer)

    def _begin_window(self, trainer: L.Trainer) -> None:
        self.window, self.since = trainer.global_step, time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        assert isinstance(module, Training)
        if trainer.global_step == self.window:  # in the middle of an accumulation window
            return
        if not self.bar.disable and trainer.global_step > self.bar.n:
            self.bar.set_postfix(self._shown(trainer, module), refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)
        if self.seconds is not None and time.perf_counter() - self.since >= self.seconds:
            if self.lines:
                self._say(self._line(trainer, module))
            self._begin_window(trainer)

    def _line(self, trainer: L.Trainer, module: Training) -> list[str]:
        rate = self._rate(trainer)
        share = mfu(module, rate)
        return [
            self._step(trainer),
            f"loss {module.loss:.3f} {UNIT}",
            f"{rate:,.0f} tokens/s",
            *([] if share is None else [f"MFU {share:.1%}"]),
            f"memory {memory_gb(module.device):.1f} GB",
            f"{self._left(trainer)} left",
        ]

    def _say(self, parts: list[str]) -> None:
        self.bar.write("   ".join(parts))
        sys.stdout.flush()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Training)
        if trainer.global_rank or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        found = trainer.callback_metrics
        losses = f"loss {module.loss:.3f}, validation {float(found['validation/nats']):.3f} {UNIT}"
        parts = [self._step(trainer), losses]
        for name, label in {"validation/bits_per_byte": "bits per byte", "validation/accuracy": "accuracy"}.items():
            if name in found:
                parts.append(f"{float(found[name]):.3f} {label}")
        if "validation/chance" in found:
            parts[-1] += f" (chance {float(found['validation/chance']):.3f})"
        gone = timedelta(seconds=round(time.perf_counter() - self.started))
        self._say([*parts, f"{gone} gone, {self._left(trainer)} left"])
        self._begin_window(trainer)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.bar.close()

    def _shown(self, trainer: L.Trainer, module: Training) -> dict[str, str]:
        """Beside the bar."""
        shown = {"loss": f"{module.loss:.3f} nats", "tokens/s": f"{self._rate(trainer):,.0f}"}
        found = trainer.callback_metrics
        if "validation/nats" in found:
            shown["validation"] = f"{float(found['validation/nats']):.3f} nats"
        if "validation/accuracy" in found:
            shown["accuracy"] = f"{float(found['validation/accuracy']):.3f}"
        return shown

    def _rate(self, trainer: L.Trainer) -> float:
        steps = trainer.global_step - self.window
        return steps * trainer.datamodule.batch.tokens / (time.perf_counter() - self.since)

    def _step(self, trainer: L.Trainer) -> str:
        total = f"{trainer.max_steps:,}"
        return f"step {trainer.global_step:>{len(total)},} of {total}"

    def _left(self, trainer: L.Trainer) -> timedelta:
        gone, step = time.perf_counter() - self.started, trainer.global_step
        return timedelta(seconds=round(gone * (trainer.max_steps - step) / max(1, step - self.first)))
