"""The typed skeleton of the config: what keys there are, and of what type.

Hydra merges every group into it, so that a misspelt key or a word where a number belongs is refused wherever it stands:
on the command line, behind a `+`, in an experiment's file. Nodes that describe one object (`data`, `optimizer`, a
mixer, ...) are open here, because the signature of the class that they name is their schema: models/build.py checks it
before anything is built.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from conf.folders import job_folder, label, run_id, runs, sweep_of
from conf.help import help_text

Whole = Any  # a whole number: also 1e6, which YAML and Hydra read as a float (conf/settings.py: whole_numbers)


@dataclass
class Model:
    """A language model (models/language_model.py)."""

    hidden_size: Whole = MISSING
    num_layers: Whole = MISSING
    num_heads: Whole = MISSING
    mixers: dict[str, Any] = field(default_factory=dict)
    pattern: list[str] = field(default_factory=list)
    feed_forward: str = "swiglu"
    feed_forward_size: Whole = None
    feed_forward_grad_batch: Whole = None
    feed_forward_step_size: float | None = None
    tie_embeddings: bool = True
    norm_eps: float = 1e-6


@dataclass
class Guard:
    """What is done about steps that go wrong and runs that hang (models/training/guards.py, watchdog.py)."""

    max_skipped: Whole = 10
    spike_score: float | None = 6.0
    timeout: float | None = 600.0


@dataclass
class Keep:
    """Which checkpoints stay (models/training/keep.py)."""

    newest: Whole = 2
    every: float | None = None
    at: list[float] = field(default_factory=list)
    doubling: bool = False


@dataclass
class Config:
    """A run."""

    name: str = MISSING
    run_dir: str = MISSING
    overwrite: bool = False
    dry_run: bool = False  # says what the run would take, and makes none
    mirror: str | None = None  # where copies of runs are (models/training/mirror.py)
    init_from: str | None = None  # a run or an exported model whose weights are the first ones
    seed: Whole = 0

    model: Model = field(default_factory=Model)
    data: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)

    seq_len: Whole = MISSING  # tokens
    batch_tokens: Whole = MISSING  # tokens in one optimizer step, all devices together
    micro_batch: Any = MISSING  # sequences that one device holds at a time; or auto (models/training/fitting.py)
    context_parallel: Whole = 1  # devices that share each sequence
    tokens: Whole = MISSING  # tokens to train on
    validation_tokens: Whole = MISSING
    validate_every: float = MISSING  # below 1 a fraction of all steps, else steps
    checkpoint_every: float = MISSING
    log_every: Whole = MISSING  # steps
    clip_norm: float = MISSING
    num_workers: Whole = MISSING
    compile: bool = False
    recompute: Any = "none"  # auto, none, all, or how many blocks (models/training/recompute.py)
    cuda_graph: bool = True
    overfit: bool = False
    keep: Keep = field(default_factory=Keep)
    guard: Guard = field(default_factory=Guard)


@dataclass
class Preparation(Config):
    """What scripts/prepare_data.py has besides: which part of the text it prepares (data/divided.py)."""

    part: Whole = None
    parts: Whole = None


def register(config: type[Config] = Config) -> None:
    """Makes the schema and the resolvers known to Hydra; called before composing."""
    ConfigStore.instance().store(name="schema", node=config)
    OmegaConf.register_new_resolver("mul", lambda a, b: int(a) * int(b), replace=True)
    OmegaConf.register_new_resolver("width", width, replace=True)
    OmegaConf.register_new_resolver("quarter", lambda most, of: max(1, min(int(most), int(of) // 4)), replace=True)
    OmegaConf.register_new_resolver("narrow", narrow, replace=True)
    OmegaConf.register_new_resolver("precision", default_precision, replace=True)
    OmegaConf.register_new_resolver("can_compile", can_compile, replace=True)
    OmegaConf.register_new_resolver("runs", runs, replace=True)
    OmegaConf.register_new_resolver("run_id", run_id, replace=True)
    OmegaConf.register_new_resolver("label", label, replace=True)
    OmegaConf.register_new_resolver("sweep_of", sweep_of, replace=True)
    OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
    OmegaConf.register_new_resolver("help_text", help_text, replace=True)
    OmegaConf.register_new_resolver("world_size", world_size, replace=True)
    OmegaConf.register_new_resolver("devices", lambda: of_torchrun()[0] or "auto", replace=True)
    OmegaConf.register_new_resolver("num_nodes", lambda: of_torchrun()[1] or 1, replace=True)


def width(times: float, hidden_size: int, parts: int) -> int:
    """times * hidden_size / parts, for recipes whose widths follow from the model's."""
    found = times * hidden_size / parts
    if found != int(found):
        raise ValueError(f"model.hidden_size={hidden_size}: {times} * {hidden_size} / {parts} is no whole number")
    return int(found)


def narrow(most: int, num_heads: int, hidden_size: int) -> int:
    """num_heads, doubled until none is wider than `most`, as far as they divide hidden_size."""
    heads = int(num_heads)
    while hidden_size > most * heads and hidden_size % (2 * heads) == 0:
        heads *= 2
    return heads


# torch takes seconds to import, and is asked only where a config's values are worked out: not to find a misspelling.
def default_precision() -> str:
    """bf16-mixed where the GPU has bfloat16, else float32."""
    import torch

    return "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "32-true"


def can_compile() -> bool:
    """Whether torch.compile pays: on a GPU, with Triton."""
    import torch

    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def at_first(micro_batch: int | str) -> int:
    """What stands for micro_batch=auto until it is settled."""
    return 1 if micro_batch == "auto" else int(micro_batch)


def of_torchrun() -> tuple[int, int]:
    """How many processes torchrun has started on each node, and on how many nodes; zeros where it has not. After a node
    has died, or has come, it starts all of them anew, as many as there are then."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 0
    each, all_of_them = (os.environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if not (each.isdecimal() and all_of_them.isdecimal() and int(each)):
        raise ValueError(f"LOCAL_WORLD_SIZE={each} and WORLD_SIZE={all_of_them} are not what torchrun sets")
    return int(each), int(all_of_them) // int(each)


def world_size(devices: int | str | list[int], num_nodes: int = 1) -> int:
    """How many processes will train: `devices` as Lightning reads it, on each of num_nodes nodes."""
    if isinstance(devices, list):
        count = len(devices)
    elif str(devices) in ("auto", "-1"):
        import torch

        count = max(1, torch.cuda.device_count())
    else:
        count = int(devices)
    return count * int(num_nodes)
