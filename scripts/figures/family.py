"""The family at a glance: every mixer of conf/mixer, under its branch, with its decay and its solver.

    python scripts/figures/family.py [--folder docs] [--png]

Everything in it is read from the configs by scripts/recipes.py, but for a line on each branch. Writes family.svg, with
--png also family.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.recipes import PRESETS, Recipe, recipe

BRANCHES = {  # folder of models/regression: (title, what its members have in common, colour)
    "linear": ("linear: first order", "a matrix, and one step for every pair", "#2b6cb0"),
    "least_squares": ("least_squares: second order", "the best matrix for all pairs, at every token", "#b7791f"),
    "local": ("local: non-parametric", "fitted anew for every query, from the pairs near it", "#2f855a"),
    "deep": ("deep: networks", "a network that learns within the sequence", "#9b2c2c"),
}
COLUMNS = (("linear", "least_squares"), ("local", "deep"))
DECAYS = {
    "none": "#edf2f7",
    "fixed": "#fefcbf",
    "scalar": "#bee3f8",
    "channel": "#d6bcfa",
    "slow_channel": "#d6bcfa",
    "channel_rate": "#e9d8fd",
    "signed": "#fed7d7",
}
HEAD, ROW, GAP = 1.9, 1.0, 0.7  # heights, in rows
NAME, DECAY, SOLVER = 0.02, 0.355, 0.53  # where the three columns of a box begin, of its width
TEXT: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "family",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
}  # text stays text


def height(branches: tuple[str, ...], members: dict[str, list[Recipe]]) -> float:
    """Of a column of boxes, in rows."""
    return sum(HEAD + ROW * (1 + len(members[branch])) for branch in branches) + GAP * (len(branches) - 1)


def box(ax: Axes, left: float, top: float, width: float, branch: str, rows: list[Recipe]) -> float:
    """One branch, its upper left corner given; returns where it ends."""
    title, common, colour = BRANCHES[branch]
    bottom = top + HEAD + ROW * (1 + len(rows))
    ax.add_patch(Rectangle((left, top), width, bottom - top, facecolor="white", edgecolor=colour, linewidth=1.2))
    ax.add_patch(Rectangle((left, top), width, HEAD, facecolor=colour, edgecolor=colour))
    inside: dict[str, Any] = {"va": "center", "fontsize": 9.5}
    ax.text(left + NAME * width, top + 0.6, title, color="white", weight="bold", va="center", fontsize=11)
    ax.text(left + NAME * width, top + 1.4, common, color="white", **inside)
    y = top + HEAD + ROW / 2
    for x, label in ((NAME, "mixer"), (DECAY, "decay"), (SOLVER, "solver")):
        ax.text(left + x * width, y, label, color="0.45", style="italic", **inside)
    for row in rows:
        y += ROW
        ax.text(
            left + NAME * width, y, row.preset + (" +" if row.composite else ""), color=colour, weight="bold", **inside
        )
        chip = (left + (DECAY - 0.005) * width, y - 0.34)
        style = "round,pad=0,rounding_size=0.006"
        ax.add_patch(
            FancyBboxPatch(
                chip, 0.155 * width, 0.68, boxstyle=style, mutation_aspect=40, facecolor=DECAYS[row.decay], linewidth=0
            )
        )
        ax.text(left + (DECAY + 0.0725) * width, y, row.decay, ha="center", color="0.15", **inside)
        ax.text(left + SOLVER * width, y, row.solver, color="0.15", **inside)
    return bottom


def draw(recipes: list[Recipe]) -> Figure:
    members = {branch: [row for row in recipes if row.branch == branch] for branch in BRANCHES}
    rows = max(height(branches, members) for branches in COLUMNS) + 1.6
    figure = Figure(figsize=(12, 0.27 * rows), facecolor="white")
    ax = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    ax.set(xlim=(0, 1), ylim=(rows, 0))
    ax.set_axis_off()
    for i, branches in enumerate(COLUMNS):
        top = 0.0
        for branch in branches:
            top = box(ax, 0.001 + 0.505 * i, top, 0.493, branch, members[branch]) + GAP
    legend = "decay: how fast old pairs fade.   solver: how the memory is fitted.   +: a memory with parts around it."
    ax.text(0.001, rows - 0.5, legend, color="0.3", va="center", fontsize=9.5)
    return figure


def write(recipes: list[Recipe], folder: Path, png: bool = False) -> Path:
    """Draws family.svg into the folder, the same bytes by the same matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(TEXT):
        figure = draw(recipes)
        figure.savefig(folder / "family.svg", metadata={"Date": None})
        if png:
            figure.savefig(folder / "family.png", dpi=110)
    return folder / "family.svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where to write")
    parser.add_argument("--png", action="store_true", help="also family.png")
    arguments = parser.parse_args()
    print(write([recipe(preset, "tiny") for preset in PRESETS], arguments.folder, arguments.png))


if __name__ == "__main__":
    main()
