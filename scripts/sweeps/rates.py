"""Learning rates of a sweep that are those of another's results."""

from __future__ import annotations

import math
from typing import Any

from conf.folders import FREE_TO_CHANGE, setting
from scripts.sweeps.jobs import Job, settings_of

OVER = ("model", "optimizer.lr", "seed")  # what a sweep for rates may be over
IGNORED = ("hydra", "strategy", *FREE_TO_CHANGE)  # what changes no result


def with_rates(every: list[Job], found: list[dict[str, Any]], times: float) -> tuple[list[Job], list[str]]:
    """The jobs, each at the rate that was best for its mixer among these results, by the mean over seeds of the last
    validation loss, times this; and the mixers that have no result, whose jobs are left out. Raises ValueError where
    none has one, a result no rate or no loss, a job a rate already, or results are of different settings.
    """
    losses: dict[str, dict[float, list[float]]] = {}
    others: dict[str, str] = {}  # settings that are not of the sweep, and a job that has them
    for row in found:
        words = settings_of(row["words"])
        if not {"model", "optimizer.lr"} <= words.keys():
            raise ValueError(f"--rates: {row['job']} has no optimizer.lr; they are of a sweep over mixers and rates")
        if not isinstance(row.get("validation/nats"), float | int):
            raise ValueError(f"--rates: {row['job']} has no validation/nats, by which the best rate is told")
        kept = [word for word in row["words"] if word.partition("=")[0] not in OVER and setting(word) not in IGNORED]
        others.setdefault(" ".join(kept), " ".join(row["words"]))
        of_rate = losses.setdefault(words["model"], {}).setdefault(float(words["optimizer.lr"]), [])
        of_rate.append(row["validation/nats"] if math.isfinite(row["validation/nats"]) else math.inf)

    if len(others) > 1:
        raise ValueError(f"--rates: runs of different settings can't be compared: {' and '.join(others.values())}")

    def model_of(job: Job) -> str:
        return settings_of(job.words)["model"]

    def rated(job: Job) -> Job:
        model = model_of(job)
        if any(word.startswith("optimizer.lr=") for word in job.words):
            raise ValueError(f"--rates: {job.label} has a rate already; leave optimizer.lr out, or --rates")
        best = min(losses[model], key=lambda rate: sum(losses[model][rate]) / len(losses[model][rate]))
        if math.isinf(sum(losses[model][best])):
            raise ValueError(f"--rates: model={model} has diverged at each of its rates; try a lower one")
        return Job(job.name, (*job.words, f"optimizer.lr={best * times:.4g}"))

    unknown = [model for model in dict.fromkeys(map(model_of, every)) if model not in losses]
    if len(unknown) == len(set(map(model_of, every))):
        raise ValueError(
            f"--rates has no result of model={','.join(unknown)}; it has {', '.join(sorted(losses)) or 'no results'}"
        )
    return [rated(job) for job in every if model_of(job) in losses], unknown


def fewer(found: list[dict[str, Any]]) -> dict[str, int]:
    """Of mixers that were run at fewer rates than another, how many: their best may be one that is still to be run."""
    rates: dict[str, set[str]] = {}
    for row in found:
        words = settings_of(row["words"])
        rates.setdefault(words["model"], set()).add(words["optimizer.lr"])
    most = max(map(len, rates.values()))
    return {model: len(each) for model, each in rates.items() if len(each) < most}
