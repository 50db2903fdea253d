"""A run that goes on with another length or another schedule: more tokens for a finished run, or another decay.

Batches are a function of the seed and the step, so that two runs whose configs differ in `tokens` and `schedule` alone
are the same, bit for bit, as long as their learning rates are. The newest checkpoint from that time is a checkpoint of
both. Under warmup-stable-decay it is that of the step at which the decay begins, which is always kept (checkpoint.py);
a cosine falls from its first step, at a pace that depends on the length, and shares nothing.
"""

from __future__ import annotations

from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

from models.build import build
from models.training.checkpoint import remove, step_of, what_is_wrong
from models.training.run import Run, difference
from models.training.summary import say


def branch(run: Run, before: dict[str, Any], main_process: bool) -> int | None:
    """The step from which the run, with `before` as its config until now, goes on with that which it has. None where
    more than tokens and schedule is another. Raises ValueError where no checkpoint of both is left.

    What was made after that step is set aside: later checkpoints are deleted, but for those marked to stay, which are
    moved to checkpoints-STEPS; the result, the model, evaluations and exported models of a finished run are renamed to
    result-STEPS.json, model-STEPS and so on.
    """
    now = run.config
    if difference(before | {key: now[key] for key in ("tokens", "schedule")}, now):
        return None
    if not any(run.checkpoints.glob("step-[0-9]*.ckpt")):
        return None
    common = common_steps(before, now)
    step = newest_until(run, common)
    if step is None:
        raise ValueError(
            f"tokens={now['tokens']} is another length than the {before['tokens']} of {run.folder}, with which its "
            f"learning rate has been another since step {common + 1:,}, and there is no checkpoint from before. "
            f"{_what_to_do(run, before)}"
        )
    if main_process:
        _set_aside(run, step, num_steps(before))
    return step


def num_steps(config: dict[str, Any]) -> int:
    return config["tokens"] // config["batch_tokens"]


def common_steps(one: dict[str, Any], other: dict[str, Any]) -> int:
    """How many steps both configs take at the same rates, from the first on."""
    factors = [build(config["schedule"])(num_steps=num_steps(config)) for config in (one, other)]
    steps = range(min(num_steps(one), num_steps(other)))
    return sum(1 for _ in takewhile(lambda t: factors[0](t) == factors[1](t), steps))


def newest_until(run: Run, step: int) -> int | None:
    """The newest whole checkpoint of at most this step."""
    paths = sorted(run.checkpoints.glob("step-[0-9]*.ckpt"), reverse=True)
    return next((step_of(path) for path in paths if step_of(path) <= step and not what_is_wrong(path)), None)


def _what_to_do(run: Run, before: dict[str, Any]) -> str:
    schedule, was = run.config["schedule"], before["schedule"].get("warmup", 0)
    if 0 < was < 1 and schedule.get("warmup") == was and (steps := round(was * num_steps(before))):
        same = run.config | {"schedule": schedule | {"warmup": steps}}
        if newest_until(run, common_steps(before, same)) is not None:
            return f"Its warmup, a fraction of all steps, had {steps}: with schedule.warmup={steps} it goes on"
    return f"To train on from its weights: name=ANOTHER init_from={run.folder}"


def _set_aside(run: Run, step: int, steps: int) -> None:
    """In an order in which a kill leaves a run that either config can go on with."""
    say(f"{run.folder} was to have {steps:,} steps; with another length or schedule it goes on from step {step:,}")
    marked = {step_of(path) for path in run.checkpoints.glob("step-[0-9]*.keep")}
    files = [path for path in run.checkpoints.glob("step-[0-9]*") if step_of(path) > step and step_of(path) in marked]
    draft = run.folder / ".checkpoints.draft"  # of one that was killed here, too
    if files or draft.exists():
        draft.mkdir(exist_ok=True)
        for path in sorted(files, key=lambda path: (path.suffix == ".keep", path.suffix == ".ckpt")):
            path.replace(draft / path.name)  # marks last: until then the rest is known to stay
        draft.rename(aside := _free(run.checkpoints, steps))
        say(f"the later checkpoints that were to stay are in {aside.name} now")
    remove(run.checkpoints, lambda other: other > step)
    for old in (run.folder / name for name in ("evaluations", "exported", "result.json", "model")):
        if old.exists():
            old.rename(aside := _free(old, steps))
            say(f"its {old.name} is {aside.name} now")


def _free(old: Path, steps: int) -> Path:
    """result-STEPS.json, or result-STEPS-2.json where that is of an earlier branch."""
    names = (f"{old.stem}-{steps}{number}{old.suffix}" for number in chain([""], (f"-{n}" for n in count(2))))
    return next(path for path in map(old.with_name, names) if not path.exists())
