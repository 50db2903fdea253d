"""Whether a preset starts at a size: what `benchmark.py starts` does in a process of its own.

Most of a first step's time is compilation, on one core, and little of it depends on how many layers there are. So a few
layers come first, at the size's width and micro-batch, beside those of other presets: that compiles. Then, in its turn,
the whole model takes two steps, alone in so much memory as the card is to have. The turn is a lock on a file.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch._dynamo.utils import counters
from torch._inductor import metrics

from models.mixers.baselines import Baseline
from models.training.memory import ran_out
from scripts.benchmarks.contenders import Contender, Sizes, batch_of, ours
from scripts.benchmarks.steps import pass_of, peak_gb, step_of

FEW = 2  # layers, if a pattern is not longer: a first block is compiled by itself, the others are alike


@dataclass
class Started:
    """One preset's row. compiled_s: the first step of few layers, with all that is compiled in it, beside others;
    first_s: that of the whole model, which finds it compiled, what recompute=auto measures included; recomputed: blocks
    that it chose; peak_gb: allocated at most in both steps and before, None on a CPU; ms: the second step, in which
    nothing is recorded. reason: why there is no row.
    """

    name: str
    num_params: int = 0
    layers: int = 0
    backend: str = ""
    compiled_s: float | None = None
    graphs: int = 0
    kernels: int = 0
    first_s: float | None = None
    ms: float | None = None
    recomputed: int = 0
    peak_gb: float | None = None
    loss: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"{self.name:26} does not start: {self.reason}"
        peak = "" if self.peak_gb is None else f"{self.peak_gb:.1f}"
        numbers = f"{self.num_params / 1e6:10.1f}{self.compiled_s:12.1f}{self.graphs:7}{self.kernels:8}"
        numbers += f"{self.first_s:9.1f}{self.ms:11.0f}{peak:>9}"
        return f"{self.name:26}{numbers}{self.recomputed:>5} of {self.layers}  {self.backend}"


HEAD = (
    f"{'preset':26}{'M params':>10}{'compiled s':>12}{'graphs':>7}{'kernels':>8}{'first s':>9}{'second ms':>11}"
    f"{'peak GB':>9} recomputed  backend"
)


def start(
    name: str, sizes: list[Any], device: str, compiled: bool, turn: str | None, share_gb: float, memory_gb: float
) -> Iterator[dict[str, Any]]:
    """turn: the file that is locked, None where nothing else runs. share_gb, memory_gb: what the few layers and the
    whole model may allocate on a GPU."""
    every = Sizes(*sizes)
    row = Started(name, layers=every.layers)
    take(device, share_gb)
    begin = time.perf_counter()
    few = ours(name, every._replace(layers=1), device, compiled=compiled)
    period = len(cast("Any", few.model).config.pattern)
    few = ours(name, every._replace(layers=max(FEW, period)), device, compiled=compiled)
    try:
        two_steps(few, every, device)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        # its share is small; what is not compiled now will be in its turn
        row.backend = "; few layers had too little memory beside others"
    row.compiled_s = round(time.perf_counter() - begin, 2)
    row.graphs, row.kernels = counters["stats"]["unique_graphs"], metrics.generated_kernel_count
    del few
    emptied(device)
    model: Contender | None = ours(name, every, device, compiled=compiled)
    assert model is not None
    row.num_params, row.backend = model.num_params, chosen(model, device) + row.backend
    with in_turn(turn):
        take(device, memory_gb)
        row.peak_gb = peak_gb(partial(fill, row, model, every, device), device)
        model = None
        emptied(device)
    yield asdict(row)


def fill(row: Started, model: Contender, sizes: Sizes, device: str) -> None:
    row.first_s, row.ms, row.loss, row.recomputed = two_steps(model, sizes, device)


def two_steps(model: Contender, sizes: Sizes, device: str) -> tuple[float, float, float, int]:
    """Seconds of the first, with what comes before it, milliseconds of the second, the first one's loss, and how many
    blocks are recomputed. The batch has packed documents."""
    begin = time.perf_counter()
    batch = batch_of(sizes, device, documents=True)
    model.begin(batch)
    step = partial(step_of(model, pass_of(model, device)), batch)
    loss = step()
    first = time.perf_counter()
    step()
    seconds, recompute = time.perf_counter() - first, cast("Any", model.model)._gradient_checkpointing_func
    return round(first - begin, 2), round(seconds * 1e3, 1), loss, len(recompute.chosen)


def chosen(model: Contender, device: str) -> str:
    """The backends of its memories, without the reasons."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    mixers = [block.mixer for block in cast("Any", model.model).blocks]
    found = [mixer if isinstance(mixer, Baseline) else mixer.regressor for mixer in mixers]
    return ", ".join(dict.fromkeys(each.choose(torch.device(device), dtype).backend for each in found))


def take(device: str, gigabytes: float) -> None:
    """No more than so much of a GPU."""
    if device == "cuda":
        part = gigabytes * 1e9 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, part))


def emptied(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@contextmanager
def in_turn(path: str | None) -> Iterator[None]:
    """Alone on a GPU, of all that lock this file. A process that is killed hands it on."""
    if path is None:
        yield
        return
    file = os.open(f"{path}-{os.environ.get('CUDA_VISIBLE_DEVICES', '')}", os.O_RDWR | os.O_CREAT)  # of each GPU
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
