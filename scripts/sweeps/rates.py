"""Learning rates of a sweep that are those of another's results."""

from __future__ import annotations

import math
from typing import Any

from scripts.sweeps.jobs import Job


def with_rates(every: list[Job], found: list[dict[str, Any]], times: float) -> tuple[list[Job], list[str]]:
    """The jobs, each at the rate that was best for its mixer among these results, by the mean over seeds of the last
    validation loss, times this; and the mixers that have no result, whose jobs are left out. Raises ValueError where
    none has one, a result no rate, or a job one already.
    """
    losses: dict[str, dict[float, list[float]]] = {}
    for row in found:
        words = dict(word.split("=", 1) for word in row["words"])
        if not {"model", "optimizer.lr"} <= words.keys():
            raise ValueError(f"--rates: {row['job']} has no optimizer.lr; they are of a sweep over mixers and rates")
        of_rate = losses.setdefault(words["model"], {}).setdefault(float(words["optimizer.lr"]), [])
        of_rate.append(row["validation/nats"] if math.isfinite(row["validation/nats"]) else math.inf)

    def model_of(job: Job) -> str:
        return dict(word.split("=", 1) for word in job.words)["model"]

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
