"""Which checkpoints stay. What any of these settings names stays:

    newest     so many of the last ones: what a run goes on from after an interruption
    every      one in so many steps; below 1 a fraction of the run
    at         a list of steps; below 1 fractions of the run
    doubling   steps 1, 2, 4, 8, ..., for who studies how a model learns at first

A run saves at the steps of the last three whatever checkpoint_every is. The checkpoint of the step at which the rate
begins to fall (schedule.py: end_of_plateau) stays whatever `keep` says.
"""

from __future__ import annotations

from typing import Any

from data.batch import every


def steps_to_keep(keep: dict[str, Any], num_steps: int) -> frozenset[int]:
    """The steps whose checkpoints stay, before the last one. Raises ValueError for one that the run doesn't reach."""
    found: set[int] = set()
    if keep["every"] is not None:
        found |= set(range(gap := every(keep["every"], num_steps, "keep.every"), num_steps, gap))
    for place in keep["at"]:
        step = max(1, round(place * num_steps)) if place < 1 else int(place)
        if step > num_steps:
            raise ValueError(f"keep.at names step {step:,}, and the run has {num_steps:,}")
        found.add(step)
    if keep["doubling"]:
        found |= {1 << i for i in range(num_steps.bit_length())}
    return frozenset(step for step in found if step < num_steps)
