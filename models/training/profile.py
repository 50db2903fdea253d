"""What the time of a step is spent on: a trace by torch's profiler, and a table of the longest operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile, schedule

from models.training.summary import say


class ByStep(Callback):
    """A profiler of torch that is told of each step, and not of its micro-batches. step: the one that is done."""

    profiler: profile | None = None
    step = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.profiler is not None and trainer.global_step > self.step:
            self.step = trainer.global_step
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # or the step's kernels would be counted in the next one
            self.profiler.step()

    def on_train_end(self, *_: Any) -> None:
        if self.profiler is not None:
            self.profiler.stop()

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()


class Profile(ByStep):
    """Traces `steps` steps on the first rank, after `first` others in which kernels are compiled and chosen, and fewer
    in a shorter run. Writes folder/profile.json, which chrome://tracing and ui.perfetto.dev show, and prints where
    most time went.

    (Lightning's PyTorchProfiler counts micro-batches, and takes what it traced from a profiler that may not have begun:
    https://github.com/Lightning-AI/pytorch-lightning/issues/9450.)
    """

    FILE = "profile.json"

    def __init__(self, folder: str, first: int = 10, steps: int = 5, rows: int = 15) -> None:
        if first < 0 or steps < 1 or rows < 1:
            raise ValueError(
                f"callbacks.profile: first={first} must be at least 0, steps={steps} and rows={rows} at least 1"
            )
        self.folder, self.first, self.steps, self.rows = Path(folder), first, steps, rows

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_rank:
            return
        self.step, left = trainer.global_step, trainer.max_steps - trainer.global_step
        warmup = int(left > 1)
        active = min(self.steps, left - warmup)
        gpu = [ProfilerActivity.CUDA] if module.device.type == "cuda" else []
        self.profiler = profile(
            activities=[ProfilerActivity.CPU, *gpu],
            schedule=schedule(wait=min(self.first, left - warmup - active), warmup=warmup, active=active, repeat=1),
            on_trace_ready=self._write,
        )
        self.profiler.start()

    def _write(self, traced: profile) -> None:
        key = "self_device_time_total" if torch.cuda.is_initialized() else "self_cpu_time_total"
        traced.export_chrome_trace(str(self.folder / self.FILE))
        say(traced.key_averages().table(sort_by=key, row_limit=self.rows, max_name_column_width=60))
        say(f"profile   {self.folder / self.FILE}")
