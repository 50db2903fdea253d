"""What is wrong with a config: all of it at once, one sentence each, before anything is read, trained or begun."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import schema
from data.batch import batch_arithmetic
from data.tokenizer import Bytes
from models.block import feed_forward
from models.build import build, problems
from models.language_model import LanguageModelConfig
from models.regression.regressor import Regressor

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
    "micro_batch": COUNT,
    "tokens": COUNT,
    "validation_tokens": COUNT,
    "log_every": COUNT,
    "num_workers": WHOLE,
    "validate_every": INTERVAL,
    "checkpoint_every": INTERVAL,
    "clip_norm": POSITIVE._replace(says="positive; a large one switches clipping off"),
    "guard.max_skipped": WHOLE,
    "guard.spike_score": POSITIVE._replace(optional=True),
    "guard.timeout": POSITIVE._replace(optional=True),
    "model.hidden_size": COUNT,
    "model.num_layers": COUNT,
    "model.num_heads": COUNT,
    "model.feed_forward_size": COUNT_OR_NULL,
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
    "model.mixers.*.decay.step_range[[]*": POSITIVE,
    "optimizer.lr": POSITIVE,
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.momentum": BELOW_ONE,
    "optimizer.betas[[]*": BELOW_ONE,
    "schedule.warmup": LENGTH,
    "schedule.decay": FRACTION,
    "schedule.final": FRACTION,
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
    "callbacks.*.num_tokens": COUNT,
    "callbacks.*.temperature": NOT_NEGATIVE,
    "callbacks.*.seconds": NOT_NEGATIVE._replace(optional=True),
}

PAIRS = ("optimizer.betas", "model.mixers.*.decay.step_range")

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

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true", "32", "bf16", "16", "64")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
SECRET_NAME = re.compile(r"(^|_)(token|api_?key|secret|password|passwd|credentials?)$", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16})\b"
)


def mistakes(cfg: DictConfig) -> list[str]:
    """A sentence for each. A part that depends on a setting that is wrong already is not tried."""
    try:
        found = [f"to be set: {key}=..." for key in sorted(OmegaConf.missing_keys(cfg))]
        config = cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        return [f"{error.full_key}: {str(error).splitlines()[0]}"]
    if leaks := list(secrets(config)):
        return leaks  # and nothing else, which might repeat it
    found += schema.unknown_keys(config)
    found += problems(config)
    found += numbers(config, dict(leaves(OmegaConf.to_container(cfg))))
    found += run_folder(config)
    found += machine(config["trainer"])

    def clear(*settings: str) -> bool:
        return not any(re.match(rf"(to be set: )?({'|'.join(settings)})\b", sentence) for sentence in found)

    num_steps = 100
    if clear("batch_tokens", "seq_len", "micro_batch", "tokens", "trainer.devices", "trainer.num_nodes"):
        world = schema.world_size(config["trainer"]["devices"], config["trainer"]["num_nodes"])
        sizes = config["batch_tokens"], config["seq_len"], config["micro_batch"]
        try:
            num_steps = batch_arithmetic(*sizes, world, config["tokens"]).num_steps
        except ValueError as error:
            found += str(error).splitlines()
    if clear("model", "trainer.precision", "trainer.accelerator"):
        found += model_mistakes(config)
    if clear("schedule"):
        found += refused(lambda: build(config["schedule"])(num_steps=num_steps))
    if clear("tokenizer"):
        found += refused(lambda: build(config["tokenizer"]))
    if clear("data", "seq_len"):
        found += refused(lambda: build(config["data"], tokenizer=Bytes(), seq_len=config["seq_len"]))
    return found


def refused(construct: Callable[[], Any], where: str = "") -> list[str]:
    """What the ValueError says, if there is one."""
    try:
        construct()
    except ValueError as error:
        return [f"{where}{error}"]
    return []


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting with its path; a list, and then its items."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        yield path, node
        for i, value in enumerate(node):
            yield from leaves(value, f"{path}[{i}]")
    else:
        yield path, node


def numbers(config: dict[str, Any], written: dict[str, Any]) -> Iterator[str]:
    for path, value in leaves(config):
        if str(written.get(path)).startswith("${"):
            continue  # said where it comes from
        bound = next((bound for pattern, bound in NUMBERS.items() if fnmatchcase(path, pattern)), None)
        shown = f"{path}={'null' if value is None else value}"
        if any(fnmatchcase(path, pattern) for pattern in PAIRS):
            if not isinstance(value, list) or len(value) != 2:
                yield f"{shown} must be two numbers"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{shown} is not a finite number"
        elif bound is None or value == MISSING or (value is None and bound.optional):
            continue
        elif isinstance(value, bool) or not isinstance(value, int | float):
            yield f"{shown} is not a number{' or null' * bound.optional}; it must be {bound.says}"
        elif bound.whole and not isinstance(value, int):
            yield f"{shown} must be a whole number"
        elif not bound.holds(value):
            yield f"{shown} must be {bound.says}"


def run_folder(config: dict[str, Any]) -> Iterator[str]:
    name = config["name"]
    if name != MISSING and (not name.strip() or name.startswith("/") or ".." in name.split("/")):
        yield f"name={name!r} names a folder below runs/: it must not be empty, begin with '/' or hold '..'"
    folder = Path(config["run_dir"])
    source = config["init_from"]
    if config["overwrite"] and source and Path(source).resolve().is_relative_to(folder.resolve()):
        yield f"overwrite=true would delete init_from={source}; choose another name="
    for path in (folder, *folder.parents):
        if os.path.isfile(path):
            yield f"run_dir={config['run_dir']}: {path} is a file, not a folder"


def machine(trainer: dict[str, Any]) -> Iterator[str]:
    """What this machine, or Lightning, has not."""
    for key, instead in DERIVED.items():
        if key in trainer:
            yield f"trainer.{key}={trainer[key]} would have no effect: set {instead}"
    if trainer.get("use_distributed_sampler"):
        yield "trainer.use_distributed_sampler=true would shuffle what data/order.py has ordered; it must be false"
    accelerator, precision, strategy = (trainer.get(key) for key in ("accelerator", "precision", "strategy"))
    if accelerator not in ACCELERATORS:
        yield f"trainer.accelerator={accelerator} is not one of {', '.join(ACCELERATORS)}"
    if accelerator == "cuda" and not torch.cuda.is_available():
        yield "trainer.accelerator=cuda is not there: torch sees no CUDA device"
    if accelerator in ("gpu", "mps") and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        yield f"trainer.accelerator={accelerator} is not there: torch sees no GPU"
    if str(precision) not in PRECISIONS:
        yield f"trainer.precision={precision} is not one of {', '.join(PRECISIONS)}"
    elif str(precision) in ("16", "16-mixed") and device(trainer).type == "cpu":
        yield f"trainer.precision={precision} can't run on a CPU; bf16-mixed can"
    if isinstance(strategy, str) and strategy != "auto" and strategy not in StrategyRegistry.available_strategies():
        yield f"trainer.strategy={strategy} is not a strategy; strategy=single, ddp and fsdp are those of conf/strategy"
    yield from devices(trainer)


def devices(trainer: dict[str, Any]) -> Iterator[str]:
    asked: Any = trainer.get("devices")
    ids = asked if isinstance(asked, list) else []
    whole = all(isinstance(i, int) and not isinstance(i, bool) for i in ids or [asked])
    if str(asked) in ("auto", "-1"):
        return
    if not whole or (not isinstance(asked, list) and asked < 1) or asked == [] or any(i < 0 for i in ids):
        yield f"trainer.devices={asked} is not a number of devices, a list of their ids, or auto"
    elif len(set(ids)) < len(ids):
        yield f"trainer.devices={asked} names a device twice"
    elif device(trainer).type == "cuda":
        count = torch.cuda.device_count()
        if (max(ids) + 1 if ids else asked) > count:
            yield f"trainer.devices={asked} are more than the {count} that this machine has"


def device(trainer: dict[str, Any]) -> torch.device:
    """Where the products are computed."""
    uses_cuda = trainer.get("accelerator") in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if uses_cuda else "cpu")


def model_mistakes(config: dict[str, Any]) -> list[str]:
    """Of the pattern, and of each mixer in it, built by itself."""
    model = LanguageModelConfig(**config["model"])
    if found := refused(lambda: model.layers):
        return found
    dtype = torch.bfloat16 if "bf16" in str(config["trainer"]["precision"]) else torch.float32
    where = device(config["trainer"])

    def construct(name: str) -> None:
        recipe = model.mixers[name]
        if not isinstance(recipe, dict):
            raise ValueError(f"{recipe} is not a mixer; mixer@model.mixers.{name}={recipe} chooses one")
        # as models/language_model.py does, but without the other layers
        mixer = build(recipe, targets=("models.",), hidden_size=model.hidden_size, layer_index=0)
        feed_forward(model.feed_forward, model.hidden_size, mixer, model.feed_forward_size)
        for part in mixer.modules():
            if isinstance(part, Regressor):
                part.choose(where, dtype)

    names = dict.fromkeys(model.pattern)
    return [s for name in names for s in refused(partial(construct, name), f"model.mixers.{name}: ")]


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
