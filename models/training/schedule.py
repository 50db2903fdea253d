"""Learning-rate schedules: the factor on the peak rate at step t of n. The first step is t = 0."""

from __future__ import annotations

import math
from collections.abc import Callable


def warmup_stable_decay(num_steps: int, warmup: float = 0.02, decay: float = 0.3) -> Callable[[int], float]:
    """Linear from 0 over the first `warmup` of all steps, constant, linear to 0 over the last `decay` (Hu et al. 2024,
    section 4).
    """
    rising, falling = _steps(num_steps, warmup=warmup), _steps(num_steps, decay=decay)
    if rising + falling > num_steps:
        raise ValueError(f"schedule.warmup={warmup} and schedule.decay={decay} are together more than the whole run")

    def factor(t: int) -> float:
        return min((t + 1) / (rising + 1), 1.0, max(0.0, (num_steps - t) / (falling + 1)))

    return factor


def warmup_cosine(num_steps: int, warmup: float = 0.02, final: float = 0.1) -> Callable[[int], float]:
    """Linear from 0 over the first `warmup` of all steps, then half a cosine from 1 to `final` (Loshchilov and Hutter
    2017).
    """
    rising = _steps(num_steps, warmup=warmup)
    if not 0 <= final <= 1:
        raise ValueError(f"schedule.final={final} must be between 0 and 1")

    def factor(t: int) -> float:
        if t < rising:
            return (t + 1) / (rising + 1)
        progress = min(1.0, (t - rising) / max(1, num_steps - rising))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def _steps(num_steps: int, **fraction: float) -> int:
    ((name, value),) = fraction.items()
    if not 0 <= value <= 1:
        raise ValueError(f"schedule.{name}={value} is a fraction of the run and must be between 0 and 1")
    return round(value * num_steps)
