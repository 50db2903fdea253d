"""Operators timed side by side: interleaved, so that a busy neighbour slows all alike."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

SECONDS = 120.0  # an operator that is slower than this, compilation included, is not repeated


class Operator(NamedTuple):
    """What is timed: function(*inputs), a tensor or several, and its gradients by the inputs that want one and by
    parameters. kept: bytes of GPU memory that it has of its own, where no call allocates them.
    """

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Sequence[Tensor | None]
    parameters: tuple[Tensor, ...] = ()
    kept: int = 0


class Case(NamedTuple):
    """Operators by name; the first is what the others are compared with. alike: they compute the same."""

    operators: dict[str, Operator]
    alike: bool = True


def same(inputs: list[Tensor], functions: dict[str, Callable[..., Tensor]]) -> Case:
    """Functions of the same inputs."""
    return Case({name: Operator(function, inputs) for name, function in functions.items()})


def graphed(module: nn.Module, x: Tensor) -> Operator:
    """A module of x, its forward and its backward pass a CUDA graph each, which calls replay."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with torch.autocast("cuda", enabled=False, cache_enabled=False):  # the module's own autocast takes that over
        replayed: Any = torch.cuda.make_graphed_callables(module, (x,))  # after three calls, which compile and tune
    torch.cuda.empty_cache()
    return Operator(replayed, [x], tuple(module.parameters()), torch.cuda.memory_reserved() - before)


@dataclass
class Row:
    """One line of the table: medians in milliseconds, gigabytes, and ratio and error against the first of its size.

    kernels: milliseconds that each GPU kernel takes of one forward + backward pass, in all its calls, and how many.
    """

    size: str
    name: str
    forward_ms: float
    both_ms: float
    ratio: float | None = None
    peak_gb: float | None = None
    error: float | None = None
    kernels: dict[str, tuple[float, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        peak = f"{self.peak_gb:8.2f}" if self.peak_gb else " " * 8
        busy = f"{sum(ms for ms, _ in self.kernels.values()):10.2f}" if self.kernels else " " * 10
        error = "" if self.error is None else f"{self.error:8.0e}"
        line = f"{self.size:44} {self.name:28} {self.forward_ms:11.2f} {self.both_ms:11.2f} {busy} {self.ratio:6.2f}"
        return f"{line} {peak} {error}".rstrip()


HEAD = (
    f"{'size':44} {'operator':28} {'forward ms':>11} {'+ backward':>11} {'in kernels':>10} {'speed':>6} {'peak GB':>8} "
    f"{'error':>8}"
)


def machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line for line in lines if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def seconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def by_kernel(work: Callable[[], object]) -> dict[str, tuple[float, int]]:
    """Of one call, the longest first: the milliseconds of each GPU kernel or copy, and how often it ran."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        work()
        torch.cuda.synchronize()
    pairs = [(event.key, (event.self_device_time_total / 1e3, event.count)) for event in found.key_averages()]
    return dict(sorted(pairs, key=lambda pair: -pair[1][0]))


def compare(size: str, case: Case, device: str, repeats: int) -> list[Row]:
    """A row for every operator that is fast enough to repeat."""
    outputs, peaks, kernels, works = {}, {}, {}, {}
    for name, (function, inputs, parameters, kept) in case.operators.items():
        wanted = [x for x in (*inputs, *parameters) if x is not None and x.requires_grad]

        def forward(function=function, inputs=inputs) -> tuple[Tensor, ...]:
            found = function(*inputs)
            return found if isinstance(found, tuple) else (found,)

        def both(forward=forward, wanted=wanted) -> None:
            o = forward()
            torch.autograd.grad(o, wanted, _upstream(o), allow_unused=True)

        begin = time.perf_counter()
        try:
            outputs[name] = torch.cat([y.detach().float().flatten() for y in forward()])
            both()  # compiles and tunes
        except RuntimeError as error:  # a peer's, or memory's; the others go on
            print(f"{size}  {name}: {str(error).strip().splitlines()[0]}, left out", file=sys.stderr)
            continue
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            both()
            own = kept + sum(x.numel() * x.element_size() for x in (*inputs, *parameters) if x is not None)
            peaks[name] = (torch.cuda.max_memory_allocated() - held + own) / 1e9
            kernels[name] = by_kernel(both)
        if (took := time.perf_counter() - begin) > SECONDS:
            print(f"{size}  {name}: {took:.0f} s before the first repeat, left out", file=sys.stderr)
            continue
        works[name] = (forward, both)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in works}
    for _ in range(repeats):
        for name, pair in works.items():
            for work, record in zip(pair, times[name], strict=True):
                record.append(seconds(work, device) * 1e3)
    median = {name: [round(statistics.median(record), 3) for record in pair] for name, pair in times.items()}
    rows = [Row(size, name, once, twice) for name, (once, twice) in median.items()]
    for row in rows:
        row.ratio, row.peak_gb = round(rows[0].both_ms / row.both_ms, 2), peaks.get(row.name)
        row.kernels = kernels.get(row.name, {})
        if case.alike:
            first = outputs[rows[0].name]
            row.error = ((outputs[row.name] - first).abs().max() / first.abs().max()).item()
    return rows


def _upstream(o: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients that come from above: no matter which, but dense, and no cheaper than real ones."""
    return tuple(y.detach() for y in o)
