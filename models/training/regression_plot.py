"""regression.png: the rows of regression.jsonl as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MOST = 6  # mixers in a picture, evenly spaced over the layers
LINEAR = 3.0  # losses up to here have a linear axis, larger ones a logarithmic
FLOOR = 1e-3  # of a loss on that
BEFORE, AFTER = "C1", "C0"
FACTS = {"half_life": "half-life", "step_size": "step", "write_weight": "write", "momentum": "momentum"}
FACTS |= {"bandwidth": "bandwidth", "reach": "reach", "rank_memory": "rank"}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A line of three panels for a mixer: the loss by position at the newest validation, before and after the write;
    what is recalled of a pair against its age; and both losses over the run. Thin lines are heads.
    """
    from matplotlib.figure import Figure  # half a second that no other command should pay

    newest = [row for row in rows if row["step"] == rows[-1]["step"]]
    count = min(MOST, len(newest))
    drawn = [newest[i * (len(newest) - 1) // max(1, count - 1)] for i in range(count)]
    figure = Figure(figsize=(12, 0.6 + 2.5 * count), layout="constrained")
    grid = figure.subplots(count, 3, squeeze=False)
    for axes, row in zip(grid, drawn, strict=True):
        _by_position(axes[0], row)
        _by_age(axes[1], row)
        _over_the_run(axes[2], [old for old in rows if place(old) == place(row)])
        for panel in axes:
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.3)
    for axes, label in zip(
        grid[-1], ("position in the text", "age of the pair, tokens", "million tokens"), strict=True
    ):
        axes.set_xlabel(label)
    grid[0, 2].set_title("over the run", loc="left", fontsize=10)
    for axes in grid[0, :2]:
        axes.legend(frameon=False, fontsize=8, loc="best")
    figure.suptitle(f"The inner regression after {rows[-1]['tokens']:,} tokens; thin lines are heads", fontsize=11)
    draft = path.with_name(f".{path.name}.draft")
    figure.savefig(draft, dpi=100, format="png")
    draft.replace(path)


def place(row: dict[str, Any]) -> tuple[int, str]:
    """Which mixer of the model it is of."""
    return row["layer"], row["part"]


def mean(values: list[float | None]) -> float:
    """Of the numbers that are known, NaN for none."""
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known else math.nan


def means(heads: list[list[float | None]]) -> list[float]:
    """Over heads."""
    return [mean(list(column)) for column in zip(*heads, strict=True)]


def facts(row: dict[str, Any]) -> str:
    """A few numbers, each the range over heads; two to a line, which a panel is wide enough for."""
    parts = []
    for name, label in FACTS.items():
        if values := [x for x in row["quantities"].get(name) or [] if x is not None]:
            low, high = f"{min(values):.2g}", f"{max(values):.2g}"
            parts.append(f"{label} {low}" + (f" to {high}" if high != low else ""))
    return ",\n".join(", ".join(parts[i : i + 2]) for i in range(0, min(4, len(parts)), 2))


def _by_position(axes: Any, row: dict[str, Any]) -> None:
    edges = [*(a for a, _ in row["positions"]), row["positions"][-1][1]]
    for name, color in (("before", BEFORE), ("after", AFTER)):
        for head in row[name]:
            axes.stairs(_known(head), edges, baseline=None, color=color, alpha=0.3, linewidth=0.8)
        axes.stairs(means(row[name]), edges, baseline=None, color=color, linewidth=1.8, label=f"{name} the write")
    _losses(axes, [x for name in ("before", "after") for head in row[name] for x in head])
    axes.set(ylabel="|v - m(k)|² / |v|²")
    _doubling(axes, edges[1], edges)
    part = f", {row['part']}" if row["part"] else ""
    axes.set_title(f"layer {row['layer']}: {row['mixer']}{part} ({row['regressor']})", loc="left", fontsize=10)


def _by_age(axes: Any, row: dict[str, Any]) -> None:
    for head in row["recall"]:
        axes.plot(row["ages"], _known(head), color=AFTER, alpha=0.3, linewidth=0.8)
    axes.plot(row["ages"], means(row["recall"]), AFTER, marker="o", markersize=3, linewidth=1.8, label="recalled")
    axes.axhline(mean(row["recall_before"]), color=BEFORE, linestyle="--", linewidth=1.2, label="before the write")
    lowest = min((x for head in row["recall"] for x in head if x is not None), default=0.0)
    axes.set(ylabel="cosine of v and m(k)", ylim=(min(0.0, lowest), 1.05))
    _doubling(axes, 1, row["ages"])
    axes.set_title(facts(row), loc="left", fontsize=8)


def _over_the_run(axes: Any, rows: list[dict[str, Any]]) -> None:
    tokens = [row["tokens"] / 1e6 for row in rows]
    before, after = ([mean(row["loss_before"]) for row in rows], [means(row["loss"])[0] for row in rows])
    for losses, color in ((before, BEFORE), (after, AFTER)):
        axes.plot(tokens, losses, color, marker="o", markersize=3)
    _losses(axes, before + after)
    axes.set(xlim=(0, None))
    axes.locator_params(axis="x", nbins=4)  # of a short run they are long numbers


def _losses(axes: Any, values: Sequence[float | None]) -> None:
    """An axis of losses, with a line at 1: what a memory that knows nothing has."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

    axes.axhline(1.0, color="0.5", linestyle=":", linewidth=1)
    known = [x for x in values if x is not None and math.isfinite(x)]
    if max(known, default=1.0) > LINEAR:
        bottom = max(FLOOR, min(known) / 1.5)
        axes.set(yscale="log")
        axes.set_ylim(bottom=bottom)
        if max(known) < 10 * bottom:  # powers of ten are too few there
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, max(1.05, 1.05 * max(known, default=1.0)))


def _doubling(axes: Any, first: int, places: list[int]) -> None:
    """An axis from 0 on that is linear up to `first` and logarithmic behind, with these places named."""
    axes.set_xscale("symlog", linthresh=max(1, first), linscale=0.4, base=2)
    axes.set_xlim(0, places[-1])
    shown = places if len(places) < 9 else [*places[:1], *places[1::2]]
    axes.set_xticks(shown, [str(x) for x in shown])


def _known(values: list[float | None]) -> list[float]:
    return [math.nan if x is None else x for x in values]
