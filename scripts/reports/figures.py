"""The pictures of a page: what the runs of a comparison measured, one panel a question."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, MaxNLocator, NullLocator

from scripts.reports.svg import DASHES, FAINT, INK, SERIES, drawn
from scripts.reports.variants import Comparison, Variant

UNITS = {"hours": 3600, "minutes": 60, "seconds": 1}
MOST = 8  # variants with a colour of their own; of more, the best
SHORT = EngFormatter(sep="")  # 20k, 3M
POSITION = re.compile(r"validation/nats_at/(\d+)-(\d+)")


class Look(NamedTuple):
    """A variant's line: matplotlib's colour and dash, and its width in points."""

    colour: str
    dash: object
    width: float


class Picture(NamedTuple):
    """A figure of the page: its heading, its SVG, and the words below it."""

    title: str
    svg: str
    says: str


def looks(comparison: Comparison) -> dict[str, Look]:
    """By label. The baseline is drawn in the ink of the text; what has no colour of its own is faint."""
    found, free = {}, iter(SERIES[:MOST])
    for variant in comparison.variants:
        if variant.baseline is variant:
            found[variant.label] = Look(INK, DASHES[1], 1.6)
        elif colour := next(free, None):
            found[variant.label] = Look(colour, DASHES[0], 1.8)
        else:
            found[variant.label] = Look(FAINT, DASHES[0], 1.2)
    return found


def curves(comparison: Comparison) -> list[Picture]:
    """Validation against tokens, FLOPs and time: a line of the mean over the seeds, a faint line a seed."""
    longest = max([row["seconds"] for v in comparison.variants for run in v.runs for row in run.validations], default=0)
    unit, seconds = next((u, n) for u, n in UNITS.items() if longest >= 3 * n or n == 1)
    axes = {
        "tokens": ("progress/tokens", 1, "tokens", ""),
        "FLOPs": ("progress/flops", 1, "FLOPs to train", ""),
        "time": ("seconds", seconds, f"{unit} of training", "Without validations and checkpoints."),
    }
    pictures = []
    for name, (key, of_one, label, says) in axes.items():

        def draw(to: Axes, key: str = key, of_one: int = of_one, label: str = label) -> None:
            for variant, look in _from_behind(comparison):
                lines = [_curve(run.validations, key, comparison.metric, of_one) for run in variant.runs]
                for line in lines if len(lines) > 1 else ():
                    to.plot(*_xy(line), color=look.colour, linewidth=0.7, alpha=0.45)
                mean = _xy(_mean(lines))
                to.plot(*mean, color=look.colour, linestyle=look.dash, linewidth=look.width, marker="o", markersize=2.5)
            to.set(xlabel=label, ylabel=comparison.unit)
            to.xaxis.set_major_locator(MaxNLocator(5))  # in the unit of the axis, so that ticks are round in it
            to.xaxis.set_major_formatter(SHORT)
            _leave_out_the_start(to, comparison)

        svg = drawn(f"curve-{name}", f"{comparison.unit} against {name}", draw)
        pictures.append(Picture(f"Validation against {name}", svg, says))
    return pictures


def positions(comparison: Comparison) -> list[Picture]:
    """Loss by position at the end of training, and that of the baseline taken from it, seed by seed."""
    losses = {
        variant.label: [_by_position(run.result or {}) for run in variant.runs] for variant in comparison.variants
    }
    ranges = sorted({key for of in losses.values() for one in of for key in one})
    if not ranges:
        return []

    def draw(to: Axes) -> None:
        for variant, look in _from_behind(comparison):
            _line(to, look, {r: [one[r] for one in losses[variant.label] if r in one] for r in ranges})
        to.set(xlabel="position in the sequence", ylabel="nats per token")
        position_axis(to, ranges)

    pictures = [Picture("Loss by position", drawn("position", "validation loss by position", draw), "")]
    compared = [variant for variant in comparison.variants if variant.baseline not in (None, variant)]
    if not compared:
        return pictures

    def draw_difference(to: Axes) -> None:
        to.axhline(0, color=INK, linewidth=1.6, linestyle=DASHES[1])
        look = looks(comparison)
        for variant in reversed(compared):
            assert variant.baseline is not None
            theirs = variant.baseline.by_seed
            pairs = [
                (_by_position(run.result or {}), _by_position(theirs[seed].result or {}))
                for seed, run in variant.by_seed.items()
                if seed in theirs
            ]
            _line(to, look[variant.label], {r: [a[r] - b[r] for a, b in pairs if r in a and r in b] for r in ranges})
        to.set(xlabel="position in the sequence", ylabel="nats per token, minus softmax")
        position_axis(to, ranges)

    says = "Below the dashed line a mixer predicts better than softmax attention with the same seed. Bars: all seeds."
    svg = drawn("difference", "validation loss by position, minus that of softmax", draw_difference)
    return [*pictures, Picture("Loss by position, minus softmax", svg, says)]


def states(comparison: Comparison) -> list[Picture]:
    """What a layer's memory costs against what it is worth."""
    points = {v.label: (v.number("state_size").mean, v.number(comparison.metric).mean) for v in comparison.variants}
    shown = {label: point for label, point in points.items() if all(map(math.isfinite, point)) and point[0] > 0}
    if not shown:
        return []

    def draw(to: Axes) -> None:
        for variant, look in _from_behind(comparison):
            if variant.label not in shown:
                continue
            x, y = shown[variant.label]
            seeds = [(run.result or {})[comparison.metric] for run in variant.runs]
            to.plot([x] * len(seeds), seeds, color=look.colour, marker="o", markersize=3, linewidth=1, alpha=0.5)
            to.plot([x], [y], color=look.colour, marker="o", markersize=7)
            if look.colour != FAINT:
                to.annotate(
                    _short(variant.label),
                    (x, y),
                    (6, 4),
                    textcoords="offset points",
                    fontsize=8,
                    color=INK,
                    parse_math=False,
                )
        to.set(xscale="log", xlabel="state: numbers a sequence holds, all layers", ylabel=comparison.unit)
        to.margins(x=0.25, y=0.15)
        to.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        to.xaxis.set_minor_locator(NullLocator())
        to.xaxis.set_major_formatter(SHORT)

    missing = [label for label in points if label not in shown]
    says = "At the end of a sequence of the training length. Small dots: seeds."
    says += f" Not known of {', '.join(missing)}." if missing else ""
    return [Picture("State size against loss", drawn("state", f"state size against {comparison.unit}", draw), says)]


def _from_behind(comparison: Comparison) -> Iterable[tuple[Variant, Look]]:
    """The best are drawn last, over the others."""
    look = looks(comparison)
    return [(variant, look[variant.label]) for variant in reversed(comparison.variants)]


def _curve(rows: list[dict[str, float]], x: str, y: str, of_one: int = 1) -> dict[float, tuple[float, float]]:
    """By step; x in units of so many."""
    return {row["step"]: (row[x] / of_one, row[y]) for row in rows if x in row and y in row}


def _xy(line: dict[float, tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in line.values()], [y for _, y in line.values()]


def _mean(lines: list[dict[float, tuple[float, float]]]) -> dict[float, tuple[float, float]]:
    """At the steps at which all have been validated."""
    steps = sorted(set.intersection(*(set(line) for line in lines)))
    found = {step: np.mean([line[step] for line in lines], axis=0) for step in steps}
    return {step: (float(x), float(y)) for step, (x, y) in found.items()}


def _leave_out_the_start(to: Axes, comparison: Comparison) -> None:
    """A picture that begins at an untrained model's loss shows nothing else: from four validations on, it begins with
    the second."""
    runs = [run for variant in comparison.variants for run in variant.runs]
    curves = [_xy(_curve(run.validations, "step", comparison.metric))[1] for run in runs]
    later = [y for curve in curves for y in (curve[1:] if len(curve) > 3 else curve) if math.isfinite(y)]
    if later and max(later) > min(later):
        margin = 0.06 * (max(later) - min(later))
        to.set_ylim(min(later) - margin, max(later) + margin)


def _by_position(result: dict[str, float]) -> dict[tuple[int, int], float]:
    found = ((POSITION.fullmatch(name), value) for name, value in result.items())
    return {(int(match[1]), int(match[2])): value for match, value in found if match}


def range_middle(ends: tuple[int, int]) -> float:
    """On a logarithmic axis."""
    return math.sqrt((ends[0] + 1) * (ends[1] + 1))


def _line(to: Axes, look: Look, values: dict[tuple[int, int], list[float]]) -> None:
    """Means with bars from the least to the greatest."""
    kept = {ends: of for ends, of in values.items() if of}
    x, y = [range_middle(ends) for ends in kept], [sum(of) / len(of) for of in kept.values()]
    for at, of in zip(x, kept.values(), strict=True):
        to.plot([at, at], [min(of), max(of)], color=look.colour, linewidth=0.8, alpha=0.6)
    to.plot(x, y, color=look.colour, linestyle=look.dash, linewidth=look.width, marker="o", markersize=3)


def position_axis(to: Axes, ranges: list[tuple[int, int]]) -> None:
    to.set_xscale("log", base=2)
    to.xaxis.set_major_locator(FixedLocator([range_middle(ends) for ends in ranges]))
    to.xaxis.set_minor_locator(NullLocator())
    to.set_xticklabels([_range(ends) for ends in ranges], fontsize=8, rotation=45 if len(ranges) > 5 else 0)


def _range(ends: tuple[int, int]) -> str:
    first, last = (f"{n / 1024:g}k" if n >= 1024 else str(n) for n in (ends[0], ends[1] + 1))
    return f"{first}–{last}"


def _short(label: str, most: int = 24) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}…"
