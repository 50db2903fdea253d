"""What is wrong with settings by themselves, one sentence each: what can be told without torch, and so at once.

conf/checks.py has the rest, which needs the classes that the settings are for.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import Config, Guard, Keep, Model, of_torchrun
from data.batch import batch_arithmetic
from models.build import near

MISSING = "???"


class Bound(NamedTuple):
    """Which numbers a setting takes."""

    says: str
    holds: Callable[[float], bool]
    whole: bool = False
    optional: bool = False  # null is a value too


COUNT = Bound("at least 1", lambda x: x >= 1, whole=True)
COUNT_OR_NULL = COUNT._replace(optional=True)
WHOLE = Bound("at least 0", lambda x: x >= 0, whole=True)
SEED = Bound("between 0 and 4294967295", lambda x: 0 <= x < 2**32, whole=True)
POSITIVE = Bound("positive", lambda x: x > 0)
NOT_NEGATIVE = Bound("at least 0", lambda x: x >= 0)
FRACTION = Bound("between 0 and 1", lambda x: 0 <= x <= 1)
BELOW_ONE = Bound("at least 0 and below 1", lambda x: 0 <= x < 1)
INTERVAL = Bound(
    "positive: below 1 a fraction of the run, else a whole number of steps", lambda x: x > 0 and (x < 1 or x == int(x))
)
LENGTH = Bound(
    "at least 0: below 1 a fraction of the run, else a whole number of steps",
    lambda x: 0 <= x < 1 or (x >= 1 and x == int(x)),
)

# The first pattern that matches decides. What only one class has is checked by that class where it stands here not.
NUMBERS = {
    "seed": SEED,
    "data.seed": SEED,
    "seq_len": COUNT,
    "batch_tokens": COUNT,
    "micro_batch": COUNT._replace(says=f"{COUNT.says}, or auto"),
    "context_parallel": COUNT,
    "tokens": COUNT,
    "validation_tokens": COUNT,
    "log_every": COUNT,
    "num_workers": WHOLE,
    "part": WHOLE._replace(optional=True),
    "parts": COUNT_OR_NULL,
    "validate_every": INTERVAL,
    "checkpoint_every": INTERVAL,
    "keep.newest": COUNT,
    "keep.every": INTERVAL._replace(optional=True),
    "keep.at[[]*": INTERVAL,
    "clip_norm": POSITIVE._replace(says="positive; a large one switches clipping off"),
    "guard.max_skipped": WHOLE,
    "guard.spike_score": POSITIVE._replace(optional=True),
    "guard.timeout": POSITIVE._replace(optional=True),
    "model.hidden_size": COUNT,
    "model.num_layers": COUNT,
    "model.num_heads": COUNT,
    "model.feed_forward_size": COUNT_OR_NULL,
    "model.feed_forward_grad_batch": COUNT_OR_NULL,
    "model.feed_forward_step_size": NOT_NEGATIVE._replace(optional=True),
    "model*.norm_eps": POSITIVE,
    "model*.output_norm_eps": POSITIVE._replace(optional=True),
    "model.mixers.*.num_heads": COUNT,
    "model.mixers.*.num_kv_heads": COUNT_OR_NULL,
    "model.mixers.*.num_key_heads": COUNT_OR_NULL,
    "model.mixers.*.key_dim": COUNT_OR_NULL,
    "model.mixers.*.value_dim": COUNT_OR_NULL,
    "model.mixers.*.conv_size": WHOLE,
    "model.mixers.*.rotary": POSITIVE._replace(optional=True),
    "model.mixers.*.regressor.window": COUNT_OR_NULL,
    "model.mixers.*.regressor.grad_batch": COUNT,
    "model.mixers.*.regressor.depth": COUNT,
    "model.mixers.*.regressor.expansion": POSITIVE,
    "model.mixers.*.regressor.base_lr": POSITIVE._replace(optional=True),
    "model.mixers.*.regressor.remat": WHOLE._replace(optional=True),
    "model.mixers.*.segment": COUNT,
    "model.mixers.*.state_dim": COUNT,
    "model.mixers.*.expand": COUNT,
    "model.mixers.*.step_rank": COUNT_OR_NULL,
    "model.mixers.*.piece": COUNT_OR_NULL,
    "model.mixers.*.length": COUNT,
    "model.mixers.*.decay.step_range[[]*": POSITIVE,
    "model.mixers.*.decay.half_lives[[]*": Bound("from 0.1 to 1,000,000 tokens", lambda x: 0.1 <= x <= 1_000_000),
    "optimizer.lr": POSITIVE,
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.momentum": BELOW_ONE,
    "optimizer.betas[[]*": BELOW_ONE,
    "schedule.warmup": LENGTH,
    "schedule.decay": FRACTION,
    "schedule.final": FRACTION,
    "data.weights.*": POSITIVE,
    "data.num_pairs": COUNT,
    "data.vocab_size": COUNT,
    "data.train_size": COUNT,
    "data.validation_size": COUNT,
    "data.power_a": POSITIVE,
    "data.corpus.validation_fraction": Bound("between 0 and 1, both excluded", lambda x: 0 < x < 1),
    "data.corpus.max_documents": COUNT_OR_NULL,
    "tokenizer.vocab_size": COUNT,
    "tokenizer.train_bytes": COUNT,
    "trainer.num_nodes": COUNT,
    "trainer.limit_val_batches": NOT_NEGATIVE,
    "trainer.num_sanity_val_steps": WHOLE,
    "callbacks.regression.num_tokens": Bound("at least 2", lambda x: x >= 2, whole=True),
    "callbacks.*.num_tokens": COUNT,
    "callbacks.*.picture_share": FRACTION._replace(optional=True),
    "callbacks.*.temperature": NOT_NEGATIVE,
    "callbacks.*.seconds": NOT_NEGATIVE._replace(optional=True),
}

PAIRS = ("optimizer.betas", "model.mixers.*.decay.step_range", "model.mixers.*.decay.half_lives")
OPTIONAL_PAIRS, RISING_PAIRS = PAIRS[2:], PAIRS[1:]

# Settings of trainer.strategy that only these strategies have.
NEEDS = {"checkpoint": "fsdp or hsdp", "whole_for": "fsdp or hsdp", "replicas": "hsdp"}

# What train.py derives, or does itself: set here, it would be overridden without a word.
DERIVED = {
    "max_steps": "tokens",
    "max_epochs": "tokens",
    "min_steps": "tokens",
    "min_epochs": "tokens",
    "limit_train_batches": "tokens",
    "accumulate_grad_batches": "batch_tokens and micro_batch",
    "val_check_interval": "validate_every",
    "check_val_every_n_epoch": "validate_every",
    "log_every_n_steps": "log_every",
    "gradient_clip_val": "clip_norm",
    "gradient_clip_algorithm": "clip_norm",
    "default_root_dir": "run_dir",
    "overfit_batches": "overfit",
    "logger": "logger",
    "callbacks": "callbacks",
    "enable_checkpointing": "checkpoint_every",
}

# The library of a logger that not everybody has.
LOGGERS = {
    "models.training.loggers.tensorboard.TensorBoard": "tensorboard",
    "models.training.loggers.mlflow.MLflow": "mlflow",
}

SECRET_NAME = re.compile(r"(^|_)(token|api_?key|secret|password|passwd|credentials?)$", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16})\b"
)


def mistakes(written: Any, config: Any = None) -> list[str]:
    """A sentence for each. `written` is the config with its interpolations as they are written; `config`, if they are
    worked out already, what they come to."""
    config = config or written
    if leaks := list(secrets(config)):
        return leaks  # and nothing else, which might repeat it
    found = [f"to be set: {path}=..." for path, value in sorted(leaves(written)) if value == MISSING]
    found += keys(config)
    found += classes(config)
    found += libraries(config)
    found += numbers(config, dict(leaves(written)))
    found += run_folder(config)
    found += derived(config.get("trainer", {}))
    found += recompute(config)
    found += batch(config)
    return found


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting with its path; a list, and then its items; a node without settings."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        yield path, node
        for i, value in enumerate(node):
            yield from leaves(value, f"{path}[{i}]")
    else:
        yield path, node


def keys(config: dict[str, Any]) -> Iterator[str]:
    """Those that no dataclass of conf/schema.py has, which Hydra adds for a `+` without asking; and those that a `~`
    took away."""
    for path, known in (("", Config), ("model.", Model), ("guard.", Guard), ("keep.", Keep)):
        node = config.get(path[:-1], {}) if path else config
        names = [f.name for f in fields(known)]
        for key in node.keys() - set(names):
            meant = near(key, names)
            hint = f"did you mean {path}{meant}?" if meant else f"there are {', '.join(names)}"
            yield f"{path}{key}={node[key]} is not a setting; {hint}"
        for key in names:
            if key not in node:
                yield f"{path}{key} is missing: every run needs it"


def classes(config: dict[str, Any]) -> Iterator[str]:
    """Nodes without the class that they are of: what a `+` adds to a misspelt one, or a `~` takes away."""
    for name in ("data", "tokenizer", "optimizer", "schedule", "trainer"):
        if "_target_" not in config.get(name, {}):
            yield f"{name} is missing: every run needs one"
    for path, parts in {
        "logger": config.get("logger"),
        "callbacks": config.get("callbacks"),
        "model.mixers": config.get("model", {}).get("mixers"),
    }.items():
        whole = {name for name, node in (parts or {}).items() if not isinstance(node, dict) or "_target_" in node}
        for name in (parts or {}).keys() - whole:
            meant = near(name, whole)
            hint = f"did you mean {path}.{meant}?" if meant else f"there are {', '.join(sorted(whole)) or 'none'}"
            yield f"{path}.{name} has no class, _target_=...; {hint}"


def bound_of(path: str) -> Bound | None:
    path = re.sub(r"^data\.parts\.[^.]+\.", "data.", path)  # a part of a mixture is data as any
    return next((bound for pattern, bound in NUMBERS.items() if fnmatchcase(path, pattern)), None)


def whole_numbers(cfg: DictConfig) -> None:
    """Makes 1e6, which YAML and Hydra read as a float, and a number out of an environment variable, which is text,
    whole where a whole number belongs."""
    for path, value in leaves(OmegaConf.to_container(cfg)):
        bound = bound_of(path)
        if bound is None or not bound.whole or isinstance(value, int):
            continue
        with suppress(ValueError, OmegaConfBaseException):  # which `mistakes` tells
            value = OmegaConf.select(cfg, path, throw_on_missing=True)
            if isinstance(value, str) or (isinstance(value, float) and value.is_integer()):
                OmegaConf.update(cfg, path, int(value))


def libraries(config: dict[str, Any]) -> Iterator[str]:
    """Extras that a logger needs and that are not installed."""
    for node in (config.get("logger") or {}).values():
        library = LOGGERS.get(str(node.get("_target_"))) if isinstance(node, dict) else None
        if library and importlib.util.find_spec(library) is None:
            yield f"logger={library} needs {library}, which is not installed: pip install -e '.[{library}]'"


def numbers(config: dict[str, Any], written: dict[str, Any]) -> Iterator[str]:
    for path, value in leaves(config):
        if str(written.get(path)).startswith("${"):
            continue  # said where it comes from
        if (path, value) == ("micro_batch", "auto"):
            continue
        bound = bound_of(path)
        shown = f"{path}={'null' if value is None else value}"
        if any(fnmatchcase(path, pattern) for pattern in PAIRS):
            optional = any(fnmatchcase(path, pattern) for pattern in OPTIONAL_PAIRS)
            if not (value is None and optional) and (not isinstance(value, list) or len(value) != 2):
                yield f"{shown} must be two numbers{' or null' * optional}"
            elif value and any(fnmatchcase(path, pattern) for pattern in RISING_PAIRS) and falls(*value):
                yield f"{shown} must be two numbers, the larger one behind the smaller"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{shown} is not a finite number"
        elif bound is None or value == MISSING or (value is None and bound.optional):
            continue
        elif isinstance(value, bool) or not isinstance(value, int | float):
            must = figures(value) or f"it must be {bound.says}"
            yield f"{shown} is not a number{' or null' * bound.optional}; {must}"
        elif bound.whole and value != int(value):
            yield f"{shown} must be a whole number"
        elif not bound.holds(value):
            yield f"{shown} must be {bound.says}"


def falls(first: Any, last: Any) -> bool:
    """Whether the first is the larger one; false where they are no numbers, which is told of each."""
    return all(isinstance(x, int | float) for x in (first, last)) and first > last


def figures(value: Any) -> str | None:
    """2M may be two million tokens or 2 * 2^20: it is refused, and the first is shown."""
    suffixed = re.fullmatch(r"([0-9.]+)([kmgbKMGBT])", str(value))
    powers = {"k": 3, "m": 6, "g": 9, "b": 9, "t": 12}
    return f"write {suffixed[1]}e{powers[suffixed[2].lower()]}" if suffixed else None


def batch(config: dict[str, Any]) -> list[str]:
    """Whether the sizes divide, where all are numbers. Devices that are "auto" conf/checks.py counts, with torch."""
    sizes = [config.get(name) for name in ("batch_tokens", "seq_len", "micro_batch", "tokens", "context_parallel")]
    sizes = [1 if size == "auto" else size for size in sizes]  # of micro_batch, which any number may be
    try:
        each, on = of_torchrun()
    except ValueError as error:
        return [str(error)]
    written: dict[Any, Any] = {"${devices:}": each or "auto", "${num_nodes:}": on or 1}
    devices, nodes = (config.get("trainer", {}).get(name) for name in ("devices", "num_nodes"))
    if each * on > 1 and devices == 1:
        return [f"torchrun has started {each * on} processes, but strategy=single trains with one; take strategy=ddp"]
    asked = [len(devices) if isinstance(devices, list) else devices, nodes]
    counts: list[Any] = [*sizes, *(written.get(n, n) for n in asked)]
    if any(not isinstance(n, int | float) or not math.isfinite(n) or n < 1 or n != int(n) for n in counts):
        return []  # told already, or worked out later
    batch_tokens, seq_len, micro_batch, tokens, context, *devices = map(int, counts)
    try:
        batch_arithmetic(batch_tokens, seq_len, micro_batch, math.prod(devices), tokens, context)
    except ValueError as error:
        return str(error).splitlines()
    return []


def run_folder(config: dict[str, Any]) -> Iterator[str]:
    name = config.get("name", MISSING)
    if name != MISSING and (not name.strip() or name.startswith("/") or ".." in name.split("/")):
        yield f"name={name!r} names a folder below runs/: it must not be empty, begin with '/' or hold '..'"
    folder = Path(config.get("run_dir", ""))
    source = config.get("init_from")
    if config.get("overwrite") and source and Path(source).expanduser().resolve().is_relative_to(folder.resolve()):
        yield f"overwrite=true would delete init_from={source}; choose another name="
    for path in (folder, *folder.parents):
        if os.path.isfile(path):
            yield f"run_dir={folder}: {path} is a file, not a folder"


def derived(trainer: dict[str, Any]) -> Iterator[str]:
    for key, instead in DERIVED.items():
        if key in trainer:
            yield f"trainer.{key}={trainer[key]} would have no effect: set {instead}"


def recompute(config: dict[str, Any]) -> Iterator[str]:
    value, layers = config.get("recompute"), config.get("model", {}).get("num_layers")
    most = layers if isinstance(layers, int) else math.inf
    if isinstance(value, bool) or not (value in ("auto", "none", "all") or (isinstance(value, int) and value >= 0)):
        shown = "null" if value is None else value
        yield f"recompute={shown} is not one of auto, none, all, or how many of the blocks (0 to {layers})"
    elif isinstance(value, int) and value > most:
        there = f"the {layers} blocks of model.num_layers={layers}"
        yield f"recompute={value} is more than {there}; recompute=all takes them all"


def secrets(config: dict[str, Any]) -> Iterator[str]:
    """Settings that hold a secret, which config.yaml and a logger would publish. The secret itself is not repeated."""
    known = {
        value: name
        for name, value in os.environ.items()
        if len(value) >= 12
        and re.search(r"TOKEN|API_?KEY|SECRET|PASSWORD|CREDENTIAL", name)
        and not os.path.exists(value)
    }
    for path, value in leaves(config):
        if not isinstance(value, str):
            continue
        source = next((f"that of the environment variable {name}" for v, name in known.items() if v in value), None)
        if source is None and SECRET_VALUE.search(value):
            source = "by its looks"
        if source is None and SECRET_NAME.search(path.rpartition(".")[2]) and value not in ("", MISSING):
            source = "by its name"
        if source is not None:
            yield (
                f"{path} holds a secret, {source}: it would be written to config.yaml and to loggers; programs read it "
                "from the environment (HF_TOKEN, WANDB_API_KEY)"
            )
