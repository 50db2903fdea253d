"""Learning-rate schedules: the factor on the peak rate at step t of n. The first step is t = 0."""

from __future__ import annotations

import math
from collections.abc import Callable


def warmup_stable_decay(num_steps: int, warmup: float = 0.02, decay: float = 0.3) -> Callable[[int], float]:
    """Linear from 0 over the first `warmup` of all steps, constant, linear to 0 over the last `decay` (Hu et al. 2024,
    section 4). A warmup of 1 and more is a number of steps.
    """
    rising, falling = _rising(num_steps, warmup), _steps(num_steps, decay=decay)
    if rising + falling > num_steps:
        raise ValueError(f"schedule.warmup={warmup} and schedule.decay={decay} are together more than the whole run")

    def factor(t: int) -> float:
        return min((t + 1) / (rising + 1), 1.0, max(0.0, (num_steps - t) / (falling + 1)))

    return factor


def warmup_cosine(num_steps: int, warmup: float = 0.02, final: float = 0.1) -> Callable[[int], float]:
    """Linear from 0 over the first `warmup` of all steps, then half a cosine from 1 to `final` (Loshchilov and Hutter
    2017). A warmup of 1 and more is a number of steps.
    """
    rising = _rising(num_steps, warmup)
    if not 0 <= final <= 1:
        raise ValueError(f"schedule.final={final} must be between 0 and 1")

    def factor(t: int) -> float:
        if t < rising:
            return (t + 1) / (rising + 1)
        progress = min(1.0, (t - rising) / max(1, num_steps - rising))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def end_of_plateau(factor: Callable[[int], float], num_steps: int) -> int | None:
    """After how many steps a rate that has been constant begins to fall: where a longer run would be the same until
    then. None for a schedule that has no such time."""
    rates = [factor(t) for t in range(num_steps)]
    highest = max(rates)
    flat = [t for t, rate in enumerate(rates) if rate == highest]
    return flat[-1] + 1 if len(flat) > 1 and flat[-1] + 1 < num_steps else None


def _rising(num_steps: int, warmup: float) -> int:
    if warmup < 1:
        return _steps(num_steps, warmup=warmup)
    if warmup != int(warmup) or warmup > num_steps:
        raise ValueError(
            f"schedule.warmup={warmup} must be below 1, a fraction of the run, or a whole number of its {num_steps:,} "
            "steps"
        )
    return int(warmup)


def _steps(num_steps: int, **fraction: float) -> int:
    ((name, value),) = fraction.items()
    if not 0 <= value <= 1:
        raise ValueError(f"schedule.{name}={value} is a fraction of the run and must be between 0 and 1")
    return round(value * num_steps)
