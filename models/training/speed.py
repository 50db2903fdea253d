"""How fast a run is, and how much memory it takes."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from models.training.logger import CsvLogger, read_metrics
from models.training.module import Training

# Dense bf16 tensor-core peaks in FLOP/s, from the makers' data sheets (which headline twice as much, for 2:4 sparsity),
# by what torch calls the device. The first name that occurs in the device's is taken.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device, None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def mfu(module: Training, tokens_per_second: float) -> float | None:
    """Model FLOPs utilisation, None where the device's peak is not known: FLOPs per token * tokens/s / (devices * dense
    peak), with the FLOPs to train counted from the model (Training.flops_per_token).
    """
    peak = peak_flops(module.device)
    return None if peak is None else tokens_per_second * module.flops_per_token / (peak * module.trainer.world_size)


def memory_gb(device: torch.device) -> float:
    """The most that torch has held on the GPU so far, or that the process has held, in 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e9 if sys.platform == "darwin" else most * 1024 / 1e9


class Throughput(Callback):
    """Tokens per second, MFU and memory, over the steps since the last report (validation and checkpoints left out).
    And speed/seconds: of training since the run began, those before an interruption too, without validations.
    """

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.tokens_per_step = trainer.datamodule.batch.tokens
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)  # what was before, an earlier job of a sweep, has its own
        self.steps = 0
        self.started: float | None = None
        self.counted: float | None = None  # until when time is in self.seconds
        self.seconds = _seconds_before(Path(trainer.default_root_dir) / CsvLogger.FILE)
        self.rates: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        now = time.perf_counter()
        self.started = now if self.started is None else self.started
        self.counted = now if self.counted is None else self.counted

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        self.steps += 1
        assert self.started is not None and self.counted is not None
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self._report(trainer, module, self.started)
        now = time.perf_counter()
        self.seconds, self.counted = self.seconds + now - self.counted, now
        if trainer.global_step % trainer.log_every_n_steps == 0:
            module.log("speed/seconds", self.seconds, rank_zero_only=True)

    def _report(self, trainer: L.Trainer, module: L.LightningModule, started: float) -> None:
        """Waits for the GPU, so that what was timed is what was done."""
        assert isinstance(module, Training)
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        rate = self.steps * self.tokens_per_step / (time.perf_counter() - started)
        self.rates.append(rate)
        metrics = {"speed/tokens_per_second": rate}
        if (share := mfu(module, rate)) is not None:
            metrics["speed/mfu"] = share
        if module.device.type == "cuda":
            metrics["speed/peak_memory_gb"] = memory_gb(module.device)
        module.log_dict(metrics, rank_zero_only=True)
        self.steps, self.started = 0, None

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.steps, self.started = 0, None  # a window that validation interrupts is not reported
        self.counted = None

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            module.log("speed/seconds", self.seconds, rank_zero_only=True)

    @property
    def tokens_per_second(self) -> float | None:
        """The median of the reports, None where the run was too short for one."""
        return sorted(self.rates)[len(self.rates) // 2] if self.rates else None

    def summary(self, module: Training) -> str:
        """One line for the end of the run."""
        if (rate := self.tokens_per_second) is None:
            return "too short a run to measure its speed"
        share = mfu(module, rate)
        return f"{rate:,.0f} tokens/s" + ("" if share is None else f", MFU {share:.1%}")


def _seconds_before(path: Path) -> float:
    """Of training, as metrics.csv has them when a run goes on; 0 where it has none."""
    rows = read_metrics(path) if path.exists() else []
    return max((row["speed/seconds"] for row in rows if "speed/seconds" in row), default=0.0)
