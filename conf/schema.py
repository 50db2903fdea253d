"""The typed skeleton of the config: what keys there are, and of what type.

Hydra merges every group into it, so that a misspelt key or a word where a number belongs is refused wherever it stands:
on the command line, behind a `+`, in an experiment's file. Nodes that describe one object (`data`, `optimizer`, a
mixer, ...) are open here, because the signature of the class that they name is their schema: models/build.py checks it
before anything is built.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf


@dataclass
class Model:
    """A language model (models/language_model.py)."""

    hidden_size: int = MISSING
    num_layers: int = MISSING
    num_heads: int = MISSING
    mixers: dict[str, Any] = field(default_factory=dict)
    pattern: list[str] = field(default_factory=list)
    feed_forward: str = "swiglu"
    feed_forward_size: int | None = None
    tie_embeddings: bool = True
    norm_eps: float = 1e-6


@dataclass
class Guard:
    """What is done about steps that go wrong and runs that hang (models/training/guards.py, watchdog.py)."""

    max_skipped: int = 10
    spike_score: float | None = 6.0
    timeout: float | None = 600.0


@dataclass
class Config:
    """A run."""

    name: str = MISSING
    run_dir: str = MISSING
    overwrite: bool = False
    seed: int = 0

    model: Model = field(default_factory=Model)
    data: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)

    seq_len: int = MISSING  # tokens
    batch_tokens: int = MISSING  # tokens in one optimizer step, all devices together
    micro_batch: int = MISSING  # sequences that one device holds at a time
    tokens: int = MISSING  # tokens to train on
    validation_tokens: int = MISSING
    validate_every: float = MISSING  # below 1 a fraction of all steps, else steps
    checkpoint_every: float = MISSING
    log_every: int = MISSING  # steps
    clip_norm: float = MISSING
    num_workers: int = MISSING
    compile: bool = False
    overfit: bool = False
    guard: Guard = field(default_factory=Guard)


# What the same run may change when it goes on: where it runs and what it shows, not what it computes. (Losses then
# agree to rounding.)
FREE_TO_CHANGE = (
    "trainer",
    "logger",
    "callbacks",
    "micro_batch",
    "num_workers",
    "log_every",
    "overwrite",
    "run_dir",
    "compile",
    "guard",
)


def unknown_keys(config: dict[str, Any]) -> list[str]:
    """One sentence for every key that no dataclass here has. Hydra's `+key=value` adds one without asking."""
    found = []
    for path, known in (("", Config), ("model.", Model), ("guard.", Guard)):
        node = config[path[:-1]] if path else config
        names = [f.name for f in fields(known)]
        for key in node.keys() - set(names):
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {path}{near[0]}?" if near else f"there are {', '.join(names)}"
            found.append(f"{path}{key}={node[key]} is not a setting; {hint}")
    return found


def register() -> None:
    """Makes the schema and the resolvers known to Hydra; called once, before composing."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("mul", lambda a, b: int(a) * int(b), replace=True)
    OmegaConf.register_new_resolver("quarter", lambda most, of: max(1, min(int(most), int(of) // 4)), replace=True)
    OmegaConf.register_new_resolver("precision", default_precision, replace=True)
    OmegaConf.register_new_resolver("can_compile", can_compile, replace=True)
    OmegaConf.register_new_resolver("run_id", run_id, replace=True)
    OmegaConf.register_new_resolver("world_size", world_size, replace=True)


def default_precision() -> str:
    """bf16-mixed where the GPU has bfloat16, else float32."""
    return "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "32-true"


def can_compile() -> bool:
    """Whether torch.compile pays: on a GPU, with Triton."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def run_id(run_dir: str) -> str:
    """The run's directory below runs/ as a name without slashes: unique, and the same when the run goes on."""
    root = Path(os.environ.get("RUNS", "runs")).absolute()
    path = Path(run_dir).absolute()
    parts = path.relative_to(root).parts if path.is_relative_to(root) else path.parts[-2:]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(parts))


def world_size(devices: int | str | list[int], num_nodes: int = 1) -> int:
    """How many processes will train: `devices` as Lightning reads it, on each of num_nodes nodes."""
    if isinstance(devices, list):
        count = len(devices)
    elif str(devices) in ("auto", "-1"):
        count = max(1, torch.cuda.device_count())
    else:
        count = int(devices)
    return count * int(num_nodes)
