"""Means over seeds and how far they may be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """mean +- half, of so many values; half is None for a single one, which says nothing of its error."""

    mean: float
    half: float | None
    of: int


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's: mean +- t s / sqrt(n), s the standard deviation with n - 1, t of n - 1 degrees of freedom. A value
    that is not finite makes the mean so."""
    n = len(values)
    if n == 0:
        return Interval(math.nan, None, 0)
    mean = sum(values) / n
    if n == 1 or not math.isfinite(mean):
        return Interval(mean, None, n)
    s = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return Interval(mean, t_quantile(n - 1, (1 + level) / 2) * s / math.sqrt(n), n)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval:
    """The interval of ours - theirs over the seeds that both have: what a seed does to both falls out."""
    return interval([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def t_quantile(freedom: int, p: float) -> float:
    """Where Student's distribution with a whole number of degrees of freedom reaches p, 0.5 <= p < 1. Its distribution
    function is a finite sum (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4), which is inverted by bisection."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < 2 * p - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 2 * p - 1 else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """The probability of [-t, t]."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
