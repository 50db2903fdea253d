"""The inner regression of each variant, side by side, from the regression.jsonl of its runs (docs/regression.md): what
a memory gets right before and after a write, what it recalls of an old pair, and what its gates say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from scripts.reports.figures import SHORT, Look, Picture, looks, position_axis, range_middle
from scripts.reports.runs import Record
from scripts.reports.svg import INK, drawn
from scripts.reports.tables import NONE, Table
from scripts.reports.variants import Comparison

FILE = "regression.jsonl"
FLOOR = 1e-4  # of a loss on a logarithmic axis
BEFORE = 0.6  # where, on the axis of ages + 1, what was known before the write stands
MOST = 8  # layers of which what is recalled is drawn, evenly spaced
Rows = list[dict[str, Any]]


class Inner(NamedTuple):
    """The inner regression on the page: pictures and a table of means, the same by layer, and what is to be said."""

    pictures: list[Picture]
    table: Table
    layers: list[Picture]
    says: str


class Seen(NamedTuple):
    """The lines of a variant's runs, and how it is drawn."""

    label: str
    look: Look
    rows: Rows

    @property
    def newest(self) -> Rows:
        return [row for row in self.rows if row["last"]]

    @property
    def line(self) -> dict[str, Any]:
        dash = {"linestyle": self.look.dash, "linewidth": self.look.width}
        return {"color": self.look.colour, "marker": "o", "markersize": 3, **dash}


def inner(comparison: Comparison) -> Inner | None:
    """None where no run has looked at its memories."""
    look = looks(comparison)
    of_all = [Seen(v.label, look[v.label], [row for run in v.runs for row in read(run)]) for v in comparison.variants]
    seen = [one for one in of_all if one.rows]
    if not seen:
        return None
    says = (
        "A memory m is asked for what was written: v is a value, m(k) what is read at its key. Curves are means over "
        "heads, layers and seeds, at the last validation unless they run over the training."
    )
    missing = ", ".join(one.label for one in of_all if not one.rows)
    says += f" Nothing was measured of {missing}." if missing else ""
    layers = sorted({(row["layer"], row["part"]) for one in seen for row in one.newest})
    count = min(MOST, len(layers))
    chosen = [layers[i * (len(layers) - 1) // max(1, count - 1)] for i in range(count)]
    pictures = [_recall(seen), _by_position(seen, "before"), _by_position(seen, "after"), _over_training(seen)]
    return Inner(pictures, quantities(seen), [_recall_in(seen, *place) for place in chosen], says)


def read(run: Record) -> Rows:
    """The lines of a run; `last` marks those of its newest validation. One that a kill has cut off is left out."""
    path = run.folder / FILE
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [row | {"last": row["step"] == rows[-1]["step"]} for row in rows]


def numbers(node: Any) -> list[float]:
    """All in nested lists; those that are not known are null."""
    if isinstance(node, Iterable):
        return [number for part in node for number in numbers(part)]
    return [] if node is None else [float(node)]


def mean(node: Any) -> float:
    """NaN of none."""
    known = numbers(node)
    return sum(known) / len(known) if known else math.nan


def _columns(rows: Rows, keys: str, values: str) -> dict[Any, float]:
    """Of rows with values [head][i], i by row[keys]: the mean of each."""
    found: dict[Any, list[Any]] = {}
    for row in rows:
        for i, key in enumerate(row[keys]):
            found.setdefault(tuple(key) if isinstance(key, list) else key, []).append([head[i] for head in row[values]])
    return {key: mean(found[key]) for key in sorted(found)}


def _recall(seen: list[Seen]) -> Picture:
    says = "The cosine of v and m(k) for pairs of each age. Diamonds: what was known before the pair was written."
    svg = drawn("recall", "recall of a pair against its age", lambda to: _draw_recall(to, seen))
    return Picture("What is recalled of a pair", svg, says)


def _recall_in(seen: list[Seen], layer: int, part: str) -> Picture:
    there = [one._replace(rows=[r for r in one.rows if (r["layer"], r["part"]) == (layer, part)]) for one in seen]
    title = f"Layer {layer}" + (f", {part}" if part else "")
    svg = drawn(
        f"recall-{layer}{part}", f"{title}: recall of a pair against its age", lambda to: _draw_recall(to, there)
    )
    return Picture(title, svg, "")


def _draw_recall(to: Axes, seen: list[Seen]) -> None:
    for one in reversed(seen):
        curve = _columns(one.newest, "ages", "recall")
        to.plot([age + 1 for age in curve], list(curve.values()), **one.line)
        before = mean(row["recall_before"] for row in one.newest)
        to.plot([BEFORE], [before], color=one.look.colour, marker="D", markersize=4, linestyle="none")
    ages = sorted({age for one in seen for row in one.newest for age in row["ages"]})
    to.set(xlabel="age of the pair, in tokens", ylabel="recall", xscale="log")
    to.set_xticks([BEFORE, *(age + 1 for age in ages)], ["before", *map(str, ages)], fontsize=8)
    to.minorticks_off()


def _by_position(seen: list[Seen], when: str) -> Picture:
    def draw(to: Axes) -> None:
        ranges: set[tuple[int, int]] = set()
        for one in reversed(seen):
            curve = {(a, b - 1): loss for (a, b), loss in _columns(one.newest, "positions", when).items()}
            ranges.update(curve)
            to.plot([range_middle(ends) for ends in curve], [_floored(loss) for loss in curve.values()], **one.line)
        to.set(xlabel="position in the text")
        _loss_axis(to)
        position_axis(to, sorted(ranges))

    says = "On the dotted line a memory knows as much as one that reads zero." if when == "before" else ""
    svg = drawn(f"inner-{when}", f"inner loss {when} the write, by position", draw)
    return Picture(f"Inner loss {when} the write", svg, says)


def _over_training(seen: list[Seen]) -> Picture:
    def draw(to: Axes) -> None:
        for one in reversed(seen):
            curve: dict[int, list[Any]] = {}
            for row in one.rows:
                curve.setdefault(row["tokens"], []).append(row["loss_before"])
            to.plot(sorted(curve), [_floored(mean(curve[tokens])) for tokens in sorted(curve)], **one.line)
        to.set(xlabel="tokens trained on")
        to.xaxis.set_major_formatter(SHORT)
        _loss_axis(to)

    svg = drawn("inner-run", "inner loss before the write, against the tokens trained on", draw)
    return Picture("Inner loss before the write, over the run", svg, "")


def quantities(seen: list[Seen]) -> Table:
    """What the memories tell of themselves."""
    names = list(dict.fromkeys(name for one in seen for row in one.newest for name in row["quantities"]))

    def cell(one: Seen, name: str) -> str:
        known = numbers(row["quantities"].get(name) for row in one.newest)
        if not known:
            return NONE
        middle, low, high = (f"{x:.3g}" for x in (sum(known) / len(known), min(known), max(known)))
        return middle if low == high else f"{middle} ({low} to {high})"

    rows = [[name.replace("_", " "), *(cell(one, name) for one in seen)] for name in names]
    says = "Means, and from the least to the greatest over heads, layers and seeds. Half-lives and reach are in tokens."
    return Table(["quantity", *(one.label for one in seen)], rows, says)


def _floored(loss: float) -> float:
    """A loss of nothing has no logarithm."""
    return max(loss, FLOOR) if math.isfinite(loss) else loss


def _loss_axis(to: Axes) -> None:
    to.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    to.set(ylabel="|v − m(k)|² / |v|²")
    losses = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in to.lines])
    if np.nanmax(losses) > 10 * np.nanmin(losses[losses > 0]):
        to.set_yscale("log")
        to.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))  # 1 and 0.1 alone would give no scale
        to.yaxis.set_minor_locator(NullLocator())
        to.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
