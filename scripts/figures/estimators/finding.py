"""What a module of this package returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.figures.results import COLOURS, MARKS, Row


class Finding(NamedTuple):
    """says: the claim.  shows: what the table holds.  checks: what was to be seen, with the numbers, and whether it is
    so.  source: whose claim it is.
    """

    title: str
    says: str
    shows: str
    source: str
    table: list[Row]
    draw: Callable[[Figure], None]
    checks: list[tuple[str, bool]]


def curve(axes: Axes, i: int, x: Iterable[float], y: Iterable[float], label: str, marked: bool = True) -> None:
    look: Row = {"color": COLOURS[i % len(COLOURS)], "linewidth": 1.4, "label": label}
    if marked:
        look |= {"marker": MARKS[i % len(MARKS)], "markersize": 4}
    axes.plot(list(x), list(y), **look)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
