"""What a look into the inner regression costs beside training: seconds of one core, for a model of size=tiny.

    python scripts/probe_cost.py [MODEL ...]

A step is forward and backward on batch_tokens, a look what a validation adds (models/training/regression.py). The share
is of a run as long as the size's, with a look at every validation; pictures are not in it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from omegaconf import OmegaConf

from models.language_model import LanguageModel, LanguageModelConfig
from models.training import probe
from models.training.regression import row_of
from scripts.recipes import composed

MODELS = ("gated_delta", "softmax", "mesa", "titans", "titans_mlp", "intention")


def seconds(action: Callable[[], Any], times: int) -> float:
    """Of the processor, on average, after one that is not counted."""
    action()
    began = time.process_time()
    for _ in range(times):
        action()
    return (time.process_time() - began) / times


def cost(preset: str) -> tuple[float, float, float]:
    """Seconds of a step, of a look, and the share of looks in a run."""
    cfg = composed(preset, "size=tiny")
    settings: Any = OmegaConf.to_container(cfg.model, resolve=True)
    model = LanguageModel(LanguageModelConfig(vocab_size=257, **settings))
    ids = torch.randint(0, 256, (cfg.batch_tokens // cfg.seq_len, cfg.seq_len))
    text = ids[: max(1, cfg.callbacks.regression.num_tokens // cfg.seq_len)]

    @torch.no_grad()
    def look() -> None:
        rows: list[dict[str, Any]] = []
        with probe.watching(model.blocks, lambda seen: rows.append(row_of(seen))):
            model(text, logits_to_keep=1)

    step, one = seconds(lambda: model(ids, labels=ids).loss.backward(), 3), seconds(look, 2)
    looks, steps = round(1 / cfg.validate_every), cfg.tokens // cfg.batch_tokens
    return step, one, looks * one / (steps * step + looks * one)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'model':<14}{'step':>8}{'look':>8}{'share':>8}")
    for preset in sys.argv[1:] or MODELS:
        step, look, share = cost(preset)
        print(f"{preset:<14}{step:7.2f}s{look:7.2f}s{share:8.2%}", flush=True)


if __name__ == "__main__":
    main()
