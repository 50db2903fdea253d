"""`benchmark.py decode`: texts that go on, greedily, through each model's own `generate`.

prefill: `generate` of one token after a prompt of random tokens. A token: what `generate` of more tokens takes beyond
that, divided by their number. Both are medians; the first calls, which compile and tune, are not counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from scripts.benchmarks.contenders import PRESETS, Sizes, half, model_of, peer_model
from scripts.benchmarks.timing import seconds
from scripts.recipes import composed


@dataclass
class Decoded:
    """One model at one batch of one context. GB: the peak of allocated memory of each, the weights included; None on a
    CPU. reason: why there is no row.
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
        where = f"{self.name:32} {f'{self.batch} x {self.context:,}':>12}"
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
    if name in PRESETS:
        cfg = composed(name, f"size={sizes.size}", f"model.num_layers={sizes.layers}")
        model: nn.Module = model_of(cfg, sizes.vocabulary)
    else:
        model = peer_model(name, sizes)
    return model.to(device, getattr(torch, dtype) if dtype != "autocast" else None).eval()


def timed(row: Decoded, model: Any, vocabulary: int, tokens: int, repeats: int, device: str, dtype: str) -> None:
    """Fills the row."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (row.batch, row.context), generator=draw).to(device)

    def write(count: int) -> None:
        settings = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
        with half(device) if dtype == "autocast" else torch.no_grad():
            written = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
        assert written.shape == (row.batch, row.context + count)

    def peak() -> float | None:
        return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None

    def median(count: int) -> float:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return statistics.median(seconds(lambda: write(count), device) for _ in range(repeats)) * 1e3

    for count in (1, 4):
        write(count)
    prefill = median(1)
    row.prefill_ms, row.prefill_gb = round(prefill, 3), peak()
    row.token_ms = round((median(1 + tokens) - prefill) / tokens, 4)
    row.peak_gb = peak()


def shapes_of(batches: list[int], contexts: list[int], most: int) -> list[tuple[int, int]]:
    """Every batch at every context with at most so many tokens in all prompts."""
    return [(batch, context) for batch in batches for context in contexts if batch * context <= most]
