"""Law 10: it learns. At most 200 steps on associative recall, through the project's own model, task and optimizer."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from data.synthetic import AssociativeRecall
from models.language_model import LanguageModel, LanguageModelConfig
from models.training.optimizer import adamw
from tests.laws.presets import PRESETS, change, part, recipe

STEPS, BATCH, RATE = 200, 32, 1e-2
BATCHES = dict.fromkeys(("atlas", "memora", "moneta", "tnt", "ttt_linear", "yaad"), 64)  # which learn later
NEARLY = 0.2  # nats a value, of a batch that was not seen before: it may have learnt, and then takes no more steps
CHANCE, MARGIN = 1 / 32, 0.9  # 32 values to choose from; 1 / 4 is what knowing the four of the sequence would give

# What a recipe needs to learn this in a minute. A system for every query costs the third power of the keys' width, and
# Atlas' steps that of its features'; the start of a deep memory has parameters, which a block of this size has no room
# for; mini-batches of TTT, Atlas and Memora are as long as the sequence or longer, and TTT-MLP's published step is for
# longer training; and a memory that learns from attention's output learns late: after 400 steps, in one segment, half
# of the answers are right. Some learn it in as few steps with a state of a quarter of the size, in half of the time.
SMALL = {"key_dim": 32, "value_dim": 32}
SETTINGS = {
    "atlas": {
        **{"features": part("features", "identity"), **SMALL},
        **{"regressor__grad_batch": 8, "regressor__expansion": 2},
    },
    "fast_weights": SMALL,
    "gated_kalman": SMALL,
    "gdn2": SMALL,
    "kda": SMALL,
    "local_linear": {"key_dim": 16},
    "local_quadratic": {"key_dim": 16},
    "rwkv7": SMALL,
    "titans_mlp": SMALL,
    "tnt": SMALL,
    "yaad": {"key_dim": 32},
    "memora": {**SMALL, "regressor__grad_batch": 4, "regressor__expansion": 2},
    "moneta": {"key_dim": 16, "value_dim": 32},
    "wall": {"key_dim": 32},
    "ttt_linear": {"regressor__grad_batch": 4},
    "ttt_mlp": {**SMALL, "regressor__base_lr": 1.0},
    "titans_mac": {"memory_update": "input"},
}


TASK = AssociativeRecall(seq_len=16, num_pairs=4, vocab_size=64, power_a=1.0)


@cache
def batch(step: int, size: int) -> dict[str, Tensor]:
    """The same for every preset: to draw it takes as long as some presets take to learn from it."""
    samples = TASK.train_samples()
    return default_collate([samples[step * size + i] for i in range(size)])


@cache
def held_out() -> dict[str, Tensor]:
    samples = TASK.validation_samples()
    return default_collate([samples[i] for i in range(256)])


def recalled(model: LanguageModel) -> float:
    """The share of the values that are held out."""
    ids, labels = held_out()["input_ids"], held_out()["labels"]
    _, predictions = model.score(ids, labels)
    return (predictions == labels)[labels >= 0].float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_10_it_learns_to_recall(preset):
    """One layer suffices where a short convolution lets neighbours meet, so every preset is given one."""
    torch.manual_seed(0)
    node = change(deepcopy(recipe(preset)), num_heads=1, conv_size=4, **SETTINGS.get(preset, {}))
    sizes = {"vocab_size": TASK.vocab_size, "hidden_size": 64, "num_layers": 1}
    model = LanguageModel(LanguageModelConfig(mixers={"main": node}, pattern=["main"], **sizes))
    optimizer, size = adamw(model, lr=RATE, weight_decay=0.0), BATCHES.get(preset, BATCH)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 20, 1, (STEPS - step) / 60)
        drawn = batch(step, size)
        loss = model.sum_nats(drawn["input_ids"], drawn["labels"]) / (size * TASK.num_pairs)
        if loss < NEARLY and recalled(model) > CHANCE + MARGIN:
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    accuracy = recalled(model)
    assert accuracy > CHANCE + MARGIN, f"{preset}: {accuracy:.0%} of the values are recalled after {step} steps"
