"""`benchmark.py decode`: texts that go on, greedily, through each model's own `generate`.

prefill: from the call of `generate` to the first token after a prompt of random tokens. A token: what those after it
take, divided by their number. Both are medians; the first calls, which compile and tune, are not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

from scripts.benchmarks.contenders import PRESETS, Sizes, half, model_of, peer_model
from scripts.recipes import composed


@dataclass
class Decoded:
    """One model at one batch of one context. GB: the peak of memory of each, with the weights and what captured graphs
    hold; None on a CPU. reason: why there is no row; where batch is 0, why the rest of a model's rows is missing.
    """

    name: str
    batch: int = 0
    context: int = 0
    prefill_ms: float | None = None
    prefill_gb: float | None = None
    token_ms: float | None = None
    peak_gb: float | None = None
    note: str = ""
    reason: str = ""

    def __str__(self) -> str:
        where = f"{self.name:32} {f'{self.batch} x {self.context:,}' if self.batch else '':>12}"
        if self.reason:
            return f"{where} left out: {self.reason}"
        memory = ("" if x is None else f"{x:.2f}" for x in (self.prefill_gb, self.peak_gb))
        first, last = memory
        return f"{where} {self.prefill_ms:11.1f} {first:>10} {self.token_ms:10.2f} {last:>8}  {self.note}"


HEAD = f"{'model':32} {'prompts':>12} {'prefill ms':>11} {'GB':>10} {'ms a token':>10} {'GB':>8}"


def decode(
    name: str,
    sizes: list[Any],
    device: str,
    shapes: list[list[int]],
    tokens: int,
    repeats: int,
    dtype: str,
) -> Iterator[dict[str, Any]]:
    """The rows of one model; shapes: batch and context of each. dtype: of the weights, or `autocast` for float32 ones
    whose products are bf16.
    """
    of = Sizes(*sizes)
    model = opened(name, of, device, dtype)
    for batch, context in shapes:
        row = Decoded(name, batch, context, note=dtype)
        try:
            timed(row, model, of.vocabulary, tokens, repeats, device, dtype)
        except torch.OutOfMemoryError:
            row.reason = "out of memory"
        if device == "cuda":
            torch.cuda.empty_cache()
        yield asdict(row)


def opened(name: str, sizes: Sizes, device: str, dtype: str) -> Any:
    with torch.device(device):
        if name in PRESETS:
            cfg = composed(name, f"size={sizes.size}", f"model.num_layers={sizes.layers}")
            model: nn.Module = model_of(cfg, sizes.vocabulary)
        else:
            model = peer_model(name, sizes)
    return model.to(device, getattr(torch, dtype) if dtype != "autocast" else None).eval()


class Ticks(StoppingCriteria):
    """Ends nothing: notes when each token was there. On a GPU in the stream's own time."""

    def __init__(self, device: str) -> None:
        self.device, self.at = device, [now(device)]
        self.first_peak: float | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        if len(self.at) == 1:
            self.first_peak = peak(self.device)
        self.at.append(now(self.device))
        return cast("torch.BoolTensor", torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device))

    def ms(self, first: int, last: int) -> float:
        begin, end = self.at[first], self.at[last]
        return (end - begin) * 1e3 if self.device == "cpu" else begin.elapsed_time(end)


def now(device: str) -> Any:
    """Seconds, or an event of the GPU's stream."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def peak(device: str) -> float | None:
    """GB: the most that was allocated, and what graphs hold beside it for each time that they are replayed."""
    if device == "cpu":
        return None
    of_graphs = (s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0))
    free = sum(segment["total_size"] - segment["allocated_size"] for segment in of_graphs)
    return (torch.cuda.max_memory_allocated() + free) / 1e9


def timed(row: Decoded, model: Any, vocabulary: int, tokens: int, repeats: int, device: str, dtype: str) -> None:
    """Fills the row."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (row.batch, row.context), generator=draw).to(device)

    def write(count: int) -> Ticks:
        ticks = Ticks(device)
        settings: dict[str, Any] = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": 0}
        settings |= {"max_new_tokens": count, "min_new_tokens": count}
        settings |= {"stopping_criteria": StoppingCriteriaList([ticks])}
        with half(device) if dtype == "autocast" else torch.no_grad():
            written = model.generate(prompts, **settings)
        assert written.shape == (row.batch, row.context + count) and len(ticks.at) == 1 + count
        if device == "cuda":
            torch.cuda.synchronize()
        return ticks

    for count in (1, 4, 1):  # a step is captured in the second, a prompt's pieces in the third
        write(count)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = [write(1 + tokens) for _ in range(repeats)]
    row.prefill_ms = round(statistics.median(each.ms(0, 1) for each in found), 3)
    row.token_ms = round(statistics.median(each.ms(1, -1) / tokens for each in found), 4)
    row.prefill_gb, row.peak_gb = found[0].first_peak, peak(device)


def shapes_of(batches: list[int], contexts: list[int], most: int) -> list[tuple[int, int]]:
    """Every batch at every context with at most so many tokens in all prompts."""
    return [(batch, context) for batch in batches for context in contexts if batch * context <= most]
