"""Golden losses: what every preset's first steps cost, kept as text, so that a change of the code that should change no
number shows that it changed none.

    python -m tests.golden.test_losses            # which lines of losses.txt are still the same, bit for bit
    python -m tests.golden.test_losses --write    # writes it anew, after a change that is meant to change numbers
    python -m tests.golden.test_losses --write kda mesa    # these lines alone
    python -m tests.golden.test_losses --also kda mesa     # a second line each, by this processor

A line is a preset and the nats per token of each of 20 steps at size=tiny, float32 on one thread of a CPU, with nine
digits, which tell a float32 from its neighbours. The text is made here, so that no other Python or corpus changes it.
Another processor, or another release of torch, sums in another order, and training makes a rounding grow: at step 20 of
omega to 3e-3, which is what the first command prints since a product of it is rounded in another order. The test allows
for that. Where a preset's rounding grows further, as of yaad on a second AMD EPYC (1e-10 at the first step, 2e-2 at the
fourth), it has a line for each of the processors, and one of them must be met.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from models.language_model import LanguageModel, LanguageModelConfig
from models.training.optimizer import adamw
from scripts.recipes import PRESETS, composed

FILE = Path(__file__).with_name("losses.txt")
STEPS, BATCH, VOCABULARY = 20, 4, 64
KEPT = [*PRESETS, "in_place"]  # a model of the latter has a memory in its feed-forward layers
TOLERANCES = [1e-3] * 10 + [1e-2] * 10  # relative, of each step


def batch(generator: torch.Generator, seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes that a model can learn, their successors, and the documents of a row: each walks through the vocabulary by
    steps that are mostly its own."""
    documents = (torch.arange(seq_len + 1) // 50).expand(BATCH, -1)
    stride = torch.randint(1, 8, (BATCH, 1 + seq_len // 50), generator=generator).gather(1, documents)
    stride = torch.where(torch.rand(stride.shape, generator=generator) < 0.1, 11, stride)
    ids = stride.cumsum(1) % VOCABULARY
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), documents[:, :-1].contiguous()


def losses(preset: str) -> list[float]:
    """Nats per token of every step."""
    torch.manual_seed(0)
    cfg = composed(preset, "size=tiny")
    sizes = OmegaConf.to_container(cfg.model, resolve=True)
    model = LanguageModel(LanguageModelConfig(vocab_size=VOCABULARY, **sizes))
    optimizer, generator, found = adamw(model, lr=2.5e-3), torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        ids, targets, segments = batch(generator, cfg.seq_len)
        loss = model.sum_nats(ids, targets, segments) / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def kept() -> dict[str, list[list[float]]]:
    """losses.txt: a preset's lines."""
    found: dict[str, list[list[float]]] = {}
    for name, *numbers in (line.split() for line in FILE.read_text().splitlines() if not line.startswith("#")):
        found.setdefault(name, []).append([float(x) for x in numbers])
    return found


def largest(now: list[float], before: list[float]) -> float:
    """The relative difference, of the step where it is largest beside what the test allows."""
    parts = [abs(a - b) / b for a, b in zip(now, before, strict=True)]
    return max(zip(parts, TOLERANCES, strict=True), key=lambda pair: pair[0] / pair[1])[0]


@pytest.mark.slow
@pytest.mark.parametrize("preset", KEPT)
def test_losses_are_those_that_were_kept(preset):
    found = losses(preset)

    def like(before: list[float]) -> bool:
        compared = zip(found, before, TOLERANCES, strict=True)
        return all(abs(now - then) < tolerance * then for now, then, tolerance in compared)

    assert any(map(like, kept()[preset])), [largest(found, before) for before in kept()[preset]]
    assert found[-1] < found[0] - 0.3, "twenty steps hardly lower the loss"


def line(preset: str, found: list[float]) -> str:
    return " ".join([preset, *(f"{x:.9g}" for x in found)])


def write(chosen: list[str], also: bool) -> None:
    """Their lines, instead of those that are kept, or as well."""
    head = f"# nats per token of {STEPS} steps; torch {torch.__version__}; python -m tests.golden.test_losses --write"
    found = kept()
    for preset in chosen:
        found[preset] = [*(found.get(preset, []) if also else []), losses(preset)]
    FILE.write_text("\n".join([head, *(line(preset, each) for preset in KEPT for each in found[preset])]) + "\n")


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:]:
        flag, *names = sys.argv[1:]
        if flag not in ("--write", "--also"):
            sys.exit(f"error: {flag} is neither --write nor --also")
        if unknown := [name for name in names if name not in KEPT]:
            sys.exit(f"error: {unknown[0]} is no preset; there are {', '.join(KEPT)}")
        write(names or KEPT, flag == "--also")
        return
    same = 0
    for preset, lines in kept().items():
        now = losses(preset)
        equal = line(preset, now) in [line(preset, before) for before in lines]
        same += equal
        difference = min(largest(now, before) for before in lines)
        print(f"{preset:22} {'the same bits' if equal else f'relative difference up to {difference:.1e}'}", flush=True)
    print(f"{same} of {len(kept())} are the same, bit for bit")


if __name__ == "__main__":
    main()
