"""A matplotlib figure as SVG inside a page: its colours and its font are the page's, so that one picture serves light
and dark, and its text is text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colours that are drawn with and then replaced by the page's variables.
INK, FAINT = "#010101", "#020202"
SERIES = [f"#03030{i}" for i in range(8)]
DASHES = ["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5))]
VARIABLES = {INK: "var(--ink)", FAINT: "var(--line)"} | {c: f"var(--series-{i})" for i, c in enumerate(SERIES)}
SIZE = (4.3, 3.1)  # inches of 72 points: about as wide as a phone, so that text keeps its size on one


def drawn(name: str, describes: str, draw: Callable[[Axes], None]) -> str:
    """<svg>. name: unique on the page. describes: for readers who don't see it."""
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "axes.labelsize": 10}
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with rc_context(
        settings | colours | {"axes.edgecolor": FAINT, "grid.color": FAINT, "lines.solid_capstyle": "round"}
    ):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        draw(axes)
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _of_page(out.getvalue(), name, describes)


def _of_page(svg: str, name: str, describes: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)  # ids are unique on a page, not in a picture
    svg = re.sub(r"font: ([^'\";]*?)([\d.]+px)[^;\"]*", r"font: \1\2 var(--font)", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    label = describes.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', svg, count=1)
