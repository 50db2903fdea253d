"""Training steps of one model, timed: what `benchmark.py train` and `length` do in a process of its own.

A step is the loss in bf16 autocast (float32 on a CPU), its gradients, clipping to norm 1, fused AdamW. Its loss and
norm are read at its end, as train.py does to know what the step is worth, and so the host does not run ahead.
"""

from __future__ import annotations

import getpass
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.training import captured
from models.training.optimizer import clip
from models.training.speed import peak_flops
from scripts.benchmarks.contenders import Contender, Sizes, batch_of, contender, half
from scripts.benchmarks.kinds import Kind, by_kind
from scripts.benchmarks.timing import by_kernel, seconds

WARM_UP = captured.WARM_UP + 1  # steps after the first, not counted: the last records a graph


@dataclass
class Trained:
    """One model's row. ms: the median step; six_n: 6 N tokens/s over the dense bf16 peak, N all parameters, and
    model_flops the operations that the model itself counts; peak_gb: allocated at most in the steps before the timed
    ones, tuning included, since what a recorded graph holds counts as allocated only while it is recorded; first_s: the
    first step, compilation and tuning included; caches: of compiled kernels, before it. On a CPU, and where the
    device's peak is not known, shares and memory are None. reason: why there is no row.
    """

    name: str
    tokens: int = 0
    seq_len: int = 0
    num_params: int = 0
    note: str = ""
    ms: float | None = None
    tokens_per_second: float | None = None
    six_n: float | None = None
    model_flops: float | None = None
    peak_gb: float | None = None
    first_s: float | None = None
    caches: str = ""
    loss: float | None = None
    steps: list[float] = field(default_factory=list)
    kinds: dict[str, Kind] = field(default_factory=dict)
    kernels: dict[str, tuple[float, int]] = field(default_factory=dict)
    reason: str = ""

    def __str__(self) -> str:
        step = f"{self.tokens // max(1, self.seq_len)} x {self.seq_len:,}"
        if self.reason:
            return f"{self.name:32} {step:>12} left out: {self.reason}"
        shares = "".join(f"{'' if x is None else f'{x:.1%}':>8}" for x in (self.six_n, self.model_flops))
        peak = "" if self.peak_gb is None else f"{self.peak_gb:.1f}"
        rate = f"{self.tokens_per_second:12,.0f}{self.ms:10.1f}{shares}{peak:>9}{self.first_s:9.1f}"
        return f"{self.name:32} {step:>12} {self.num_params / 1e6:8.1f}{rate}  {self.caches}, {self.note}"


HEAD = f"{'model':32} {'a step':>12} {'M params':>8}"
HEAD += f"{'tokens/s':>12}{'ms':>10}{'6N':>8}{'FLOPs':>8}{'peak GB':>9}{'first s':>9}  caches"


def train(sizes: list[Any], **given: Any) -> Iterator[dict[str, Any]]:
    """What the process of one model does."""
    yield asdict(time_training(sizes=Sizes(*sizes), **given))


def time_training(
    name: str,
    sizes: Sizes,
    device: str,
    steps: int = 10,
    kernels: bool = False,
    documents: bool = True,
    memory_gb: float | None = None,
    warm_up: int = WARM_UP,
    compiled: bool = True,
) -> Trained:
    """The row of one model. memory_gb: as on a card of so much, where this one has more. warm_up: how many steps
    between the first and those that are timed. compiled: false for eager blocks of ours."""
    caches = state_of_caches()
    if memory_gb is not None and device == "cuda":
        part = memory_gb * 1e9 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, part))
    model = contender(name, sizes, device, compiled)
    packed = documents and model.packs
    batch = batch_of(sizes, device, packed)
    taken = pass_of(model, device)
    step = partial(step_of(model, taken), batch)
    row = Trained(name, sizes.B * sizes.T, sizes.T, model.num_params, caches=caches)
    begin = time.perf_counter()
    note = model.begin(batch)

    def first() -> None:
        row.loss = step()
        row.first_s = round(time.perf_counter() - begin, 2)
        for _ in range(warm_up):
            row.loss = step()

    row.peak_gb = peak_gb(first, device)
    times = [seconds(step, device) for _ in range(steps)]
    row.note = f"{note}, {'packed documents' if packed else 'whole rows'}{', one CUDA graph' if taken.recorded else ''}"
    row.steps = [round(t * 1e3, 3) for t in times]
    middle = statistics.median(times)
    row.ms, row.tokens_per_second = round(middle * 1e3, 3), round(row.tokens / middle, 1)
    if (peak := peak_flops(torch.device(device))) is not None:
        row.six_n = 6 * row.num_params * row.tokens_per_second / peak
        row.model_flops = model.flops * row.tokens_per_second / peak
    if kernels:
        row.kernels = by_kernel(step)
        row.kinds = by_kind(row.kernels)
    return row


def step_of(model: Contender, taken: captured.Captured) -> Callable[[dict[str, Any]], float]:
    """One step, which returns its loss."""
    parameters = [p for p in model.model.parameters() if p.requires_grad]

    def step(batch: dict[str, Any]) -> float:
        loss = taken(batch)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        value, length = torch.stack([loss.float(), norm.float()]).tolist()
        clip(parameters, 1.0, norm, length)
        model.optimizer.step()
        model.optimizer.zero_grad(set_to_none=True)
        return value

    return step


def pass_of(model: Contender, device: str) -> captured.Captured:
    """The loss and its gradients: of ours on a GPU a CUDA graph, as in training."""
    model.model.train()

    def forward(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        loss = model.loss(batch)
        return loss, loss.detach()

    taken = captured.Captured(forward, model.model.parameters(), partial(half, device))
    taken.records = device == "cuda" and model.packs
    return taken


def peak_gb(work: Callable[[], object], device: str) -> float | None:
    """Gigabytes that are allocated at most while it works."""
    if device != "cuda":
        work()
        return None
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / 1e9


def state_of_caches() -> str:
    """`cold` where neither torch.compile nor Triton has left anything compiled, else `warm`, with how many files."""
    triton = os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache")
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")
    count = sum(path.is_file() for folder in (triton, inductor) for path in Path(folder).rglob("*"))
    return f"warm ({count:,} files)" if count else "cold"
