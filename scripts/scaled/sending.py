"""What a run of several devices sends in a step, by the formulas, from the words that it is started with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from conf import schema
from data.batch import batch_arithmetic
from models.language_model import LanguageModelConfig
from scripts.planning.memory import Planned
from scripts.planning.scaling import Parameters, Placing, Sent, sent
from scripts.recipes import composed
from scripts.renting import VOCABULARY, parameters

BYTES = {"float32": 4, "bfloat16": 2}


def of_step(words: Sequence[str], devices: int, whole_for: str | None, toy: bool) -> dict[str, float]:
    """Bytes that a device sends, by kind (link.py). words: of a model, a size and a
    strategy. whole_for: what `auto` was."""
    own = [word for word in words if not word.startswith("data.corpus")]
    config: Any = composed(*_model(own), f"trainer.devices={devices}")
    strategy = next(word.split("=")[1] for word in own if word.startswith("strategy="))
    given: Any = OmegaConf.to_container(config.trainer.strategy, resolve=True)
    kept = whole_for if given.get("whole_for") == "auto" else given.get("whole_for")
    place = Placing(strategy, devices, given.get("replicas", 1), kept or "block", BYTES[given["reduction"]])
    sizes = config.batch_tokens, config.seq_len, schema.at_first(config.micro_batch), devices, config.tokens
    batch = batch_arithmetic(*sizes, config.context_parallel)
    n = _parameters(tuple(word for word in own if word.startswith(("model", "size="))), 64 if toy else VOCABULARY)
    found: Sent = sent(n, place, batch.accumulation)
    return {"gather": found.gathered, "divide": found.divided, "sum": found.among}


def _model(words: Sequence[str]) -> tuple[str, ...]:
    """The preset, then all else."""
    preset = next(word.split("=")[1] for word in words if word.startswith("model="))
    return preset, *(word for word in words if not word.startswith("model="))


@cache
def _parameters(words: tuple[str, ...], vocabulary: int) -> Parameters:
    config: Any = OmegaConf.to_container(composed(*_model(words)), resolve=True)
    return parameters(Planned(LanguageModelConfig(vocab_size=vocabulary, **config["model"]), "bf16-mixed"))
