"""A model trained twice from the same weights on the same tokens: as train.py trains it, by kernels, compiled blocks
and one CUDA graph, and by PyTorch's operators alone. Two seeds of weights say how far apart runs are by chance.

Tokens are the bytes of Python's own library, a document a file, which every machine has.
"""

from __future__ import annotations

import random
import sysconfig
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from models.kernels import backend
from models.parts import linear
from scripts.benchmarks.contenders import Sizes, ours
from scripts.benchmarks.steps import pass_of, step_of

PATHS = ("kernels", "plain")
WARM_UP = 20  # steps in which the rate rises
LAST = 20  # steps whose mean is a run's end

HEAD = f"{'model':24} {'path':8} {'seed':>4} {'steps':>6} {f'loss of the last {LAST}':>24} {'seconds':>8}"


@dataclass
class Losses:
    """One run. losses: the mean over the tokens of each step; note: how it ran; reason: why there is no run."""

    name: str
    path: str
    seed: int
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    note: str = ""
    reason: str = ""

    @property
    def end(self) -> float:
        last = self.losses[-LAST:]
        return sum(last) / len(last)

    def __str__(self) -> str:
        begin = f"{self.name:24} {self.path:8} {self.seed:4}"
        if self.reason:
            return f"{begin} left out: {self.reason}"
        return f"{begin} {len(self.losses):6} {self.end:24.5f} {self.seconds:8.1f}  {self.note}"


def train(sizes: list[Any], **given: Any) -> Iterator[dict[str, Any]]:
    """What the process of one run does."""
    known = Sizes(*sizes)
    yield asdict(trained(sizes=known._replace(vocabulary=max(256, known.vocabulary)), **given))


def trained(name: str, sizes: Sizes, device: str, path: str, seed: int, steps: int) -> Losses:
    plain = path == "plain"
    begin, row = time.perf_counter(), Losses(name, path, seed)
    with without_kernels() if plain else nullcontext():
        model = ours(name, sizes, device, seed=seed, compiled=not plain)
        taken = pass_of(model, device)
        if plain:
            taken.records = False
        step, rates = step_of(model, taken), [group["lr"] for group in model.optimizer.param_groups]
        batches = batches_of(sizes, device)
        row.note = model.begin(first := next(batches))
        for i, batch in enumerate(islice((x for some in ([first], batches) for x in some), steps)):
            for group, rate in zip(model.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, (i + 1) / WARM_UP)
            row.losses.append(round(step(batch), 6))
    row.note += ", one CUDA graph" if taken.recorded else ""
    row.seconds = round(time.perf_counter() - begin, 1)
    return row


def without_kernels() -> AbstractContextManager[Any]:
    """No kernel of ours or of fla's can run, and gradients of weights are rounded as autocast rounds them."""
    stack = ExitStack()
    stack.enter_context(patch.object(backend, "refusal", lambda *_: "switched off, to compare with"))
    stack.enter_context(patch.object(linear, "widens", lambda *_: False))
    return stack


def batches_of(sizes: Sizes, device: str) -> Iterator[dict[str, Tensor | Any]]:
    """Rows of T tokens of one long text, as data/text.py packs them; the text again from its beginning at its end."""
    tokens, number = library()
    B, T = sizes.B, sizes.T
    places = torch.arange(B * (T + 1)).view(B, T + 1)
    while True:
        found, documents = tokens[places % len(tokens)].long(), number[places % len(tokens)]
        labels = found[:, 1:].clone()
        labels[documents[:, 1:] != documents[:, :-1]] = -100
        segments = (documents - documents[:, :1])[:, :-1] % len(tokens)
        ids = found[:, :-1].contiguous().to(device)
        yield {"input_ids": ids, "labels": labels.to(device), "segments": segments.contiguous().to(device)}
        places = places + places.numel()


@cache
def library(most: int = 2**23) -> tuple[Tensor, Tensor]:
    """The bytes of the files in Python's own library, in an order of one seed, and which file each is of."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)
    random.Random(0).shuffle(files)
    texts: list[bytes] = []
    for path in files:
        if sum(map(len, texts)) >= most:
            break
        texts.append(path.read_bytes())
    texts = [text for text in texts if text]
    tokens = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
    return tokens, torch.repeat_interleave(torch.arange(len(texts)), torch.tensor([len(text) for text in texts]))


def compared(rows: list[Losses]) -> Iterator[str]:
    """Of each model: how far apart its losses are at the end, between the paths at most, and between the seeds."""
    for name in dict.fromkeys(row.name for row in rows):
        ends = {(row.path, row.seed): row.end for row in rows if row.name == name and row.losses}
        seeds = sorted({seed for _, seed in ends})
        paths = [
            abs(ends["kernels", s] - ends["plain", s]) for s in seeds if {("kernels", s), ("plain", s)} <= set(ends)
        ]
        apart = [abs(ends[path, s] - ends[path, seeds[0]]) for path in PATHS for s in seeds[1:] if (path, s) in ends]
        if paths and apart:
            yield f"{name}: the paths' ends differ by {max(paths):.1e} at most, the seeds' by {max(apart):.1e}"
