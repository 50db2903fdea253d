"""What a run that goes on must not log twice: services take no step back, or keep both numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AXES = {"progress/tokens", "progress/flops", "speed/seconds", "epoch"}  # in many rows, and news in none

Seen = dict[int, set[str]]  # metrics that have been logged, by step


def news(metrics: Mapping[str, Any], step: int, seen: Seen) -> dict[str, Any]:
    """Of a row, what was not logged at its step before, with its axes. A run that was killed while it validated has
    logged the training of that step, and not the validation. Pictures of a step that was seen are none."""
    if step not in seen:
        return dict(metrics)
    new = {name: x for name, x in metrics.items() if name not in seen[step] | AXES and isinstance(x, int | float)}
    return new | {name: x for name, x in metrics.items() if name in AXES} if new else {}
