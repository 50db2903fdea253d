"""What a GPU does in one step of a run: how long it computes, sends, and does neither."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile, schedule

from models.training.profile import ByStep
from models.training.summary import say

FILE = "traced.json"
LONGEST = 12  # kernels, of which the names are kept


class Kernel(NamedTuple):
    """begin, end: in seconds."""

    name: str
    begin: float
    end: float


class Traced(ByStep):
    """Traces the kernels of one step on the first rank, after `first` others and one in which it gets ready, and writes
    folder/traced.json. Only kernels: what the CPU does would be slower for it."""

    def __init__(self, folder: str, first: int) -> None:
        self.path, self.first = Path(folder) / FILE, first

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.step = trainer.global_step
        if trainer.global_rank:
            return
        if module.device.type != "cuda":
            say(f"traced    has no effect here: only a GPU's kernels are traced, this is {module.device.type}")
        what = ProfilerActivity.CUDA if module.device.type == "cuda" else ProfilerActivity.CPU
        when = schedule(wait=self.first, warmup=1, active=1, repeat=1)
        self.profiler = profile(activities=[what], schedule=when, on_trace_ready=self._write)
        self.profiler.start()

    def _write(self, traced: profile) -> None:
        assert traced.profiler is not None and traced.profiler.kineto_results is not None
        found = []
        for event in traced.profiler.kineto_results.events():
            if event.device_type() == torch.autograd.DeviceType.CUDA and not event.name().startswith("nccl:"):
                begin = event.start_ns() / 1e9
                found.append(Kernel(event.name(), begin, begin + event.duration_ns() / 1e9))
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(summed(found)))
        draft.replace(self.path)


def summed(kernels: list[Kernel]) -> dict[str, Any]:
    """Seconds from the first kernel to the last, in which it computes, and sends or waits for others to send; sends and
    computes nothing; does neither. And the kernels that take longest together: name, how many, seconds."""
    if not kernels:
        return {}
    sends = [kernel for kernel in kernels if kernel.name.startswith("nccl")]
    computes = [kernel for kernel in kernels if not kernel.name.startswith("nccl")]
    span = max(kernel.end for kernel in kernels) - min(kernel.begin for kernel in kernels)
    each: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        each[kernel.name].append(kernel.end - kernel.begin)
    longest = sorted(each.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    computing, busy = covered(computes), covered(kernels)
    found = {"span": span, "computing": computing, "sending": covered(sends), "sending_alone": busy - computing}
    return found | {"idle": span - busy, "longest": [[name[:80], len(x), sum(x)] for name, x in longest]}


def covered(kernels: list[Kernel]) -> float:
    """Seconds in which at least one of them runs."""
    total, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.begin):
        total += max(0.0, kernel.end - max(kernel.begin, until))
        until = max(until, kernel.end)
    return total
