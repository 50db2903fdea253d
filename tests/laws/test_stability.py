"""Memories that learn as fast as they may, on text that says the same thing over and over: no loss is lost.

A step size is sigmoid(x W + c) times its upper bound, and is held there (c = 20, W = 0) through the whole training; a
row of text repeats a phrase of 1 to 64 bytes until it is full, so that a memory takes the same step hundreds of times.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from models.language_model import LanguageModel, LanguageModelConfig
from models.training.captured import Captured
from models.training.optimizer import adamw
from scripts.recipes import composed
from tests.laws import presets

FAST = ("titans", "titans_mac", "titans_mag", "titans_mal", "titans_mlp", "titans_static", "ttt_linear", "ttt_mlp")
PRESETS = [preset for preset in FAST if preset in presets.PRESETS]  # none of them with --recipe
BATCH, SEQ_LEN, RATE = 8, 512, 2.5e-3


def repetitions(generator: torch.Generator) -> Tensor:
    """Bytes [B, T + 1]: a phrase over and over, and in every second row another from its middle on."""
    rows = torch.empty(BATCH, SEQ_LEN + 1, dtype=torch.long)
    for i, row in enumerate(rows):
        for part in row.tensor_split(2 if i % 2 else 1):
            length = int(torch.randint(1, 65, (), generator=generator))
            phrase = torch.randint(32, 127, (length,), generator=generator)
            part.copy_(phrase.repeat(math.ceil(len(part) / length))[: len(part)])
    return rows


def losses(preset: str, steps: int, device: str) -> list[float]:
    """Nats per token of every step at size=tiny, with step sizes at their upper bound; bf16 on a GPU, where a pass is
    one CUDA graph as in training, and PyTorch compiles nothing: most of the time was the host's. Every gradient's norm
    must be finite."""
    torch.manual_seed(0)
    cfg = composed(preset, "size=tiny")
    model = LanguageModel(LanguageModelConfig(vocab_size=256, **cfg.model)).to(device)
    optimizer, generator = adamw(model, lr=RATE, weight_decay=0.1), torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if name.endswith("step_size"):
            assert isinstance(module, nn.Linear)
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, 20.0)
            module.requires_grad_(False)

    def forward(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss = model.sum_nats(**batch) / (BATCH * SEQ_LEN)
        return loss, loss.detach()

    call = Captured(forward, model.parameters(), lambda: torch.autocast(device, torch.bfloat16, device == "cuda"))
    call.records, found, norms = device == "cuda", [], []
    with torch.compiler.set_stance("force_eager"):
        for _ in range(steps):
            rows = repetitions(generator).to(device)
            batch = {"input_ids": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}
            found.append(call(batch).clone())
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
            optimizer.zero_grad()
    assert torch.stack(norms).isfinite().all()
    return torch.stack(found).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_the_first_steps_are_finite_and_learn(preset):
    found = losses(preset, 6, "cpu")
    assert all(map(math.isfinite, found)) and found[-1] < found[0], found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", PRESETS)
def test_2000_steps_are_finite_and_learn(preset):
    found = losses(preset, 2000, "cuda")
    print(preset, "first", found[0], "largest", max(found), "last", sum(found[-100:]) / 100)
    assert all(map(math.isfinite, found))
    assert sum(found[-100:]) / 100 < 2.0, found[-100:]
