"""What is wrong with a config: all of it at once, one sentence each, before anything is read, trained or begun."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import schema, settings
from data.batch import batch_arithmetic
from data.tokenizer import Bytes
from models.block import feed_forward, own_settings
from models.build import build, problems
from models.language_model import LanguageModelConfig
from models.regression.regressor import Regressor

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true", "32", "bf16", "16", "64")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


def mistakes(cfg: DictConfig) -> list[str]:
    """A sentence for each. A part that depends on a setting that is wrong already is not tried."""
    try:
        config = cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        return [f"{error.full_key}: {str(error).splitlines()[0]}"]
    if leaks := list(settings.secrets(config)):
        return leaks  # and nothing else, which might repeat it
    found = settings.mistakes(OmegaConf.to_container(cfg), config)
    told = {sentence.partition("=")[0] for sentence in found}  # a number without a bound is told by its class alone
    found += [sentence for sentence in problems(config) if sentence.partition("=")[0] not in told]
    found += machine(config["trainer"])

    def clear(*settings: str) -> bool:
        return not any(re.match(rf"(to be set: )?({'|'.join(settings)})\b", sentence) for sentence in found)

    num_steps = 100
    parts = "batch_tokens", "seq_len", "micro_batch", "tokens", "context_parallel"
    if clear(*parts, "trainer.devices", "trainer.num_nodes"):
        world = schema.world_size(config["trainer"]["devices"], config["trainer"]["num_nodes"])
        sizes = config["batch_tokens"], config["seq_len"], schema.at_first(config["micro_batch"])
        try:
            num_steps = batch_arithmetic(*sizes, world, config["tokens"], config["context_parallel"]).num_steps
        except ValueError as error:
            found += [sentence for sentence in str(error).splitlines() if sentence not in found]
        found += replicas(config["trainer"], world)
    if clear("trainer.strategy") and isinstance(config["trainer"]["strategy"], dict):
        found += refused(lambda: build(config["trainer"]["strategy"]))
    if clear("context_parallel", "micro_batch"):
        found += sharing(config)
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


def sharing(config: dict[str, Any]) -> Iterator[str]:
    """What can't be where devices share their sequences."""
    if config["micro_batch"] == "auto" and "Sharded" in str(config["trainer"]["strategy"]):
        yield "micro_batch=auto needs strategy=single or ddp: it is tried on one device, with all the parameters"
    strategy = config["trainer"]["strategy"]
    for name in settings.NEEDS if isinstance(strategy, dict) and "Sharded" not in str(strategy) else ():
        if name in strategy:
            yield f"trainer.strategy.{name}={strategy[name]} needs strategy={settings.NEEDS[name]}"
    if (size := config["context_parallel"]) > 1 and "DDP" not in str(config["trainer"]["strategy"]):
        yield f"context_parallel={size} needs strategy=ddp, in which each device has all the parameters"


def replicas(trainer: dict[str, Any], devices: int) -> Iterator[str]:
    """Of strategy=hsdp."""
    strategy: Any = trainer.get("strategy")
    count = strategy.get("replicas", 1) if isinstance(strategy, dict) else 1
    if not isinstance(count, int) or count < 1 or devices % count:
        allowed = [n for n in range(1, devices + 1) if devices % n == 0]
        yield (
            f"trainer.strategy.replicas={count} does not divide the {devices} device(s); "
            f"allowed: {', '.join(map(str, allowed))}"
        )


def machine(trainer: dict[str, Any]) -> Iterator[str]:
    """What this machine, or Lightning, has not."""
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
        yield f"trainer.strategy={strategy} is not a strategy; strategy= takes single, ddp, fsdp or hsdp"
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


def dtype(precision: Any) -> torch.dtype:
    """Of the products."""
    return torch.bfloat16 if "bf16" in str(precision) else torch.float32


def model_mistakes(config: dict[str, Any]) -> list[str]:
    """Of the pattern, and of each mixer in it, built by itself."""
    model = LanguageModelConfig(**config["model"])
    if found := refused(lambda: model.layers):
        return found
    own = (model.feed_forward, model.feed_forward_grad_batch, model.feed_forward_step_size)
    if found := refused(lambda: own_settings(*own)):
        return found
    where, products = device(config["trainer"]), dtype(config["trainer"]["precision"])

    def construct(name: str) -> None:
        recipe = model.mixers[name]
        if not isinstance(recipe, dict):
            raise ValueError(f"{recipe} is not a mixer; mixer@model.mixers.{name}={recipe} chooses one")
        # as models/language_model.py does, but without the other layers
        mixer = build(recipe, targets=("models.",), hidden_size=model.hidden_size, layer_index=0)
        feed_forward(model.feed_forward, model.hidden_size, mixer, model.feed_forward_size)
        for part in mixer.modules():
            if isinstance(part, Regressor):
                part.choose(where, products)

    names = dict.fromkeys(model.pattern)
    return [s for name in names for s in refused(partial(construct, name), f"model.mixers.{name}: ")]
