"""`dry_run=true`: what a run would be and take, before anybody pays for it. Nothing is trained, prepared or written.

The model is built without numbers (memory.py), so that a laptop tells of the largest one in seconds. What is told of
this machine is what a run on it would have: backends, precision, compilation, the time.
"""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig

from conf.checks import device, dtype
from conf.folders import leave_none, refuse
from data.batch import Batch
from data.mixture import Mixture
from data.module import misfits
from data.text import Text
from data.tokenizer import Trainable
from models.build import build
from models.language_model import LanguageModel, LanguageModelConfig
from models.training import published, weights
from models.training.branch import branch
from models.training.checkpoint import step_of
from models.training.job import checked
from models.training.keep import steps_to_keep
from models.training.run import DRY_RUN, Run
from models.training.schedule import end_of_plateau
from models.training.speed import PEAK_FLOPS, peak_flops
from models.training.summary import quiet, say, summary
from models.training.sweep import Result
from scripts.planning.memory import Memory, Planned

SHARE = 0.4  # of a GPU's peak, for a time that nobody has measured
WORTH = 4  # times that a text is read
OFTEN = ("A100", "H100", "B200")  # named where this machine has no GPU whose peak is known


def dry_run(cfg: DictConfig) -> Result:
    """Prints it. Ends the process, as the run would, where a setting is wrong."""
    quiet()
    try:
        plain, batch = checked(cfg)
        lines, said = plan(plain, batch)
    except ValueError as error:
        leave_none(cfg.run_dir)
        refuse(cfg.run_dir, [str(error)])
    say("\n".join(lines))
    leave_none(cfg.run_dir)
    return {DRY_RUN: said}


def plan(config: dict[str, Any], batch: Batch) -> tuple[list[str], str]:
    """The lines, and one line for the end of a sweep. Raises ValueError for what the run would be refused for."""
    vocab_size, data = vocabulary(config, batch)
    source = config["init_from"]
    named = bool(source) and published.is_name(source)  # on the hub, from which nothing is downloaded
    first = weights.find(source) if source and not named else None
    trainer = config["trainer"]
    planned = Planned(LanguageModelConfig(vocab_size=vocab_size, **config["model"]), trainer["precision"])
    model, where = planned.model, device(trainer)
    if first is not None:
        weights.refuse_another(model.state_dict(), weights.read(first), source, any_vocabulary=True)
    sharded = "Sharded" in str(trainer["strategy"])
    shards = batch.world_size // trainer["strategy"].get("replicas", 1) if sharded else 1
    memory = planned.memory(config["optimizer"], batch, shards)
    on_disk = shards * (memory.weights + memory.optimizer)
    if sharded:
        memory = gathered(memory, shards, trainer["strategy"].get("whole_for", "block"))
    tokens = batch.num_steps * batch.tokens
    total, six = 3 * model.flops_per_token(batch.seq_len) * tokens, six_n(model)
    took = times(total, batch.world_size, where)
    lines = [
        f"run       {standing(config)}",
        *(f"data      {line}" for line in data),
        *([f"weights   of {first or source + ' on the hub, which was not looked at'}"] if source else []),
        f"batch     {batch}",
        summary(model, batch.seq_len, where, dtype(trainer["precision"])),
        f"parts     {parts(model)}",
        *memory_lines(memory, batch, trainer["precision"], sharded),
        f"disk      {disk(config, batch, on_disk)}",
        f"compute   {total:.3g} FLOPs in all; by 6 N, {six:,} a token, {six * tokens:.3g}",
        f"compile   {compiled(config, model)}",
        f"time      {took}",
    ]
    size = sum(p.numel() for p in model.parameters())
    state = model.state_size(batch.seq_len)
    held = f"{least(memory)}{gib(memory.total)} a device"
    return lines, f"{size:,} parameters, state {state:,}, {total:.3g} FLOPs, {held}"


def standing(config: dict[str, Any]) -> str:
    """What the command would do with the run's folder."""
    run = Run(config["run_dir"], config)
    begun = (run.folder / "config.yaml").exists()
    if config["overwrite"] or not begun:
        return f"{run.folder} would begin{' anew' if begun else ''}"
    run.enter(False, branch)
    if run.result is not None:
        return f"{run.folder} is finished"
    saved = max(map(step_of, run.checkpoints.glob("step-[0-9]*.ckpt")), default=0)
    return f"{run.folder} would go on from step {saved if run.branch is None else run.branch:,}"


def vocabulary(config: dict[str, Any], batch: Batch) -> tuple[int, list[str]]:
    """How many ids there are, and lines about the data, of which none are prepared."""
    task = build(config["data"], tokenizer=build(config["tokenizer"]), seq_len=batch.seq_len)
    texts = task.parts if isinstance(task, Mixture) else {"": task} if isinstance(task, Text) else {}
    missing = {name: text for name, text in texts.items() if not (text.folder / "meta.json").exists()}
    if missing:
        learnt: Any = task.tokenizer if isinstance(task.tokenizer, Trainable) else None
        size = task.tokenizer.vocab_size if learnt is None else learnt.max_vocab_size
        most = "" if learnt is None else "at most "
        ids = f"{most}{size:,} ids"
        return size, [
            *(
                f"{f'{part}: ' if part else ''}{text.name}: to be prepared, into {text.folder}; {ids}"
                for part, text in missing.items()
            ),
            *(task.passes(batch) if isinstance(task, Mixture) else []),
        ]
    task.prepare()
    if found := misfits(task, batch):
        raise ValueError("\n       ".join(found))
    times = task.passes(batch) if isinstance(task, Mixture) else repeated(task, batch) if isinstance(task, Text) else []
    return task.vocab_size, [*task.describe(), *times]


def repeated(text: Text, batch: Batch) -> list[str]:
    """A line where a text is read so often that it is worth less each time (Muennighoff et al. 2023)."""
    tokens = len(text.train_samples()) * batch.seq_len
    times = batch.num_steps * batch.tokens / tokens
    if times <= WORTH:
        return []
    return [
        f"tokens={batch.num_steps * batch.tokens:,} reads the text {times:,.1f} times; up to {WORTH} times it is worth "
        f"about as much as new text: take more text, or tokens={WORTH * tokens}"
    ]


def parts(model: LanguageModel) -> str:
    """Parameters by part; together all of them."""
    mixers = sum(block.mixer.num_params for block in model.blocks)
    forward = sum(p.numel() for block in model.blocks for p in block.feed_forward.parameters())
    counts = {"embedding": model.embedding.weight.numel(), "mixers": mixers, "feed-forward": forward}
    if not model.config.tie_embeddings:
        counts["head"] = model.head.weight.numel()
    counts["norms"] = sum(p.numel() for p in model.parameters()) - sum(counts.values())
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def six_n(model: LanguageModel) -> int:
    """6 FLOPs a parameter and token (Kaplan et al. 2020, section 2.1), N without an embedding that is a look-up."""
    looked_up = 0 if model.config.tie_embeddings else model.embedding.weight.numel()
    return 6 * (sum(p.numel() for p in model.parameters()) - looked_up)


def memory_lines(memory: Memory, batch: Batch, precision: Any, sharded: bool) -> list[str]:
    sizes = {name: getattr(memory, name) for name in ("weights", "gradients", "optimizer", "activations")}
    told = [f"{name} {gib(size)}" for name, size in sizes.items() if size is not None]
    shared = ", weights and optimizer shared by all" if sharded else ""
    about = memory.unknown or (
        f"of micro_batch={batch.micro_batch}, {precision}, by PyTorch's own forms; kernels and torch.compile keep less"
    )
    return [
        f"memory    {least(memory)}{gib(memory.total)} on each device{shared}: {', '.join(told)}",
        f"          (activations: {about})",
    ]


def gathered(memory: Memory, shards: int, whole_for: str) -> Memory:
    """With the parameters, and gradients, that a device of strategy=fsdp holds whole for a pass or a step; with auto
    the least, for which GPU it will be is not known."""
    times = {"auto": (0, 0), "block": (0, 0), "pass": (shards, 0), "step": (shards, shards)}[whole_for]
    weights, gradients = (x * (1 + n) for x, n in zip((memory.weights, memory.gradients), times, strict=True))
    return memory._replace(weights=weights, gradients=gradients)


def least(memory: Memory) -> str:
    return "at least " if memory.activations is None else ""


def disk(config: dict[str, Any], batch: Batch, size: int) -> str:
    """size: of a checkpoint, which holds the weights and the optimizer's state."""
    plateau = end_of_plateau(build(config["schedule"])(num_steps=batch.num_steps), batch.num_steps)
    kept = steps_to_keep(config["keep"], batch.num_steps) | ({plateau} if plateau else set())
    most = config["keep"]["newest"] + len(kept)
    return f"{gib(size)} a checkpoint, of which at most {most} stay: {gib(size * most)}"


def gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.1f} MiB"


def compiled(config: dict[str, Any], model: LanguageModel) -> str:
    if not config["compile"]:
        return "nothing by torch.compile (compile=false)"
    kinds = len(set(model.config.layers))
    return f"{len(model.blocks)} blocks by torch.compile, of {kinds} kind{'s' * (kinds > 1)}, in the first step"


def times(total: float, devices: int, where: torch.device) -> str:
    """Of all steps, by a share of the peak. A CPU's speed is known once it has trained."""
    peak = peak_flops(where)
    if peak is not None:
        name = torch.cuda.get_device_name(where)
        return f"{span(total / (SHARE * peak * devices))} at {SHARE:.0%} MFU on {devices} x {name}: a guess"
    each = ", ".join(f"{name} {span(total / (SHARE * PEAK_FLOPS[name] * devices))}" for name in OFTEN)
    here = "a CPU" if where.type == "cpu" else "this GPU"
    number = f"{devices} devices" if devices > 1 else "1 device"
    return f"not known for {here}; at {SHARE:.0%} MFU, a guess, on {number}: {each}"


def span(seconds: float) -> str:
    """In the largest unit of which there is one."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1 else "under a second"
