"""Golden counts: what a training step asks of the machine, kept as text, so that a change that makes it ask for more
shows it, on a busy machine too.

    python -m tests.golden.test_operations            # what changed since operations.txt was written
    python -m tests.golden.test_operations --write    # writes it anew, after a change that is meant to ask for more

A line is a preset and, of one step of two layers on a CPU (loss, gradients, clipping, AdamW): how many operators of
PyTorch are called, the operations of its products in millions, and the megabytes that operators write, views left out.
Time is in none of them, but each of them is time: a launch, arithmetic, memory traffic. Kernels of a GPU are not seen;
what stands around them is. A count may fall without a word; the test fails where it rises by more than 3 %. Another
release of torch calls other operators, so there the test is skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks import steps
from scripts.benchmarks.contenders import Sizes, batch_of, contender

FILE = Path(__file__).with_name("operations.txt")
SIZES = Sizes("tiny", vocabulary=257, D=96, H=3, layers=2, B=2, T=96)
PRESETS = ("gated_delta", "kda", "mesa", "softmax", "titans", "titans_mac", "titans_mlp")
MORE = 1.03


class Counts(NamedTuple):
    calls: float
    megaflops: float
    megabytes: float


class Counter(TorchDispatchMode):
    """Calls of operators that compute, and the bytes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if not func.is_view:
            self.calls += 1
            self.bytes += sum(x.numel() * x.element_size() for x in tree_leaves(result) if isinstance(x, Tensor))
        return result


def counts(preset: str) -> Counts:
    """Of the second step: the first makes the optimizer's state."""
    model = contender(preset, SIZES, "cpu")
    step, batch = steps.step_of(model, steps.pass_of(model, "cpu")), batch_of(SIZES, "cpu")
    step(batch)
    with FlopCounterMode(display=False) as flops, Counter() as counter:
        step(batch)
    return Counts(counter.calls, round(flops.get_total_flops() / 1e6, 3), round(counter.bytes / 1e6, 3))


def kept() -> dict[str, Counts]:
    """operations.txt."""
    lines = (line.split() for line in FILE.read_text().splitlines() if not line.startswith("#"))
    return {name: Counts(*map(float, numbers)) for name, *numbers in lines}


@pytest.mark.slow
@pytest.mark.skipif(f"torch {torch.__version__}" not in FILE.read_text(), reason="kept of another release of torch")
@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_asks_for_no_more_than_before(preset):
    for name, now, before in zip(Counts._fields, counts(preset), kept()[preset], strict=True):
        assert now <= MORE * before, f"{preset}: {name} {before:g} -> {now:g}; python -m tests.golden.test_operations"


def test_what_is_counted():
    x = torch.ones(10, 10)
    with Counter() as counter:
        (x.view(100) * 2).add_(1).view(10, 10)
    assert (counter.calls, counter.bytes) == (2, 800)


def main() -> None:
    found = {preset: counts(preset) for preset in PRESETS}
    if "--write" in sys.argv:
        head = (
            f"# calls, MFLOPs, MB of a step; torch {torch.__version__}; python -m tests.golden.test_operations --write"
        )
        lines = (f"{name} {now.calls} {now.megaflops:g} {now.megabytes:g}" for name, now in found.items())
        FILE.write_text("\n".join([head, *lines]) + "\n")
        return
    for preset, now in found.items():
        pairs = zip(Counts._fields, kept()[preset], now, strict=True)
        said = ", ".join(f"{name} {before:g} -> {after:g} ({after / before - 1:+.1%})" for name, before, after in pairs)
        print(f"{preset:16} {said}")


if __name__ == "__main__":
    main()
