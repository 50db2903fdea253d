"""Lines of results.jsonl (scripts/evidence.py), and what tables and figures are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from scripts.figures import published
from scripts.sweeps.jobs import composed, settings_of

Row = dict[str, Any]  # of a run; or of a table
RATES = ("optimizer.lr", "optimizer.weight_decay")  # of which the best counts
ON, LOSS_ON = "validation/accuracy_on/", "validation/nats_on/"
DIVERGED = "diverged"  # in the place of a number
LOSS_AT, ACCURACY_AT = "validation/nats_at/", "validation/accuracy_at/"
MARKS = "os^Dvp*PX<>"  # one fewer than colours, so that the thirteenth is not like the first
COLOURS = ["#1f5fa8", "#d1495b", "#2a9d6f", "#e09f1f", "#7b4fa3", "#3d3d3d", "#4fb3d9", "#a0522d", "#c77dba", "#6b8e23"]
COLOURS += ["#8c1c5a", "#7a8b99"]


class Claim(NamedTuple):
    """sources: the experiments whose results it is made of.  says: the claim.  shows: what the table holds.  measure:
    of a row, what is the better the higher, by which a rate is chosen.
    options: of scripts/evidence.py, as the page has its command.  then: a command behind those.  needs: what it adds to
    a result; those without it are left out."""

    title: str
    sources: tuple[str, ...]
    says: str
    shows: str
    measure: Callable[[Row], float]
    table: Callable[[list[Row]], list[Row]]
    draw: Callable[[list[Row], Figure], None]
    published: published.Source | None = None
    options: str = "--at-once 8 --minutes 20"
    then: str = ""
    needs: str = ""


def settings(row: Row) -> dict[str, str]:
    return settings_of(row["words"])


def label(row: Row) -> str:
    """The mixer, with the range of its eigenvalues, the window, the start of its decay or what stands around it, where
    a sweep has several."""
    found = settings(row)
    negative = found.get("model.mixers.main.regressor.negative_eigenvalues")
    ranges = {None: "", "false": " [0, 1]", "true": " [-1, 1]"}
    window = found.get("model.mixers.main.regressor.window")
    name = found["model"] + ranges[None if negative is None else negative.lower()] + (f" {window}" if window else "")
    start = found.get("model.mixers.main.decay.half_lives")
    alone = ("decay@model.mixers.main.decay", "model.mixers.main.output_gate")
    around = [f" {found[setting]}" for setting in alone if found.get(setting, "none") != "none"]
    if conv := found.get("model.mixers.main.conv_size"):
        activation = found.get("model.mixers.main.activation", "none")
        around += [" convolution" * (conv != "0") + f" {activation}" * (activation != "none")]
    return name + ("" if start in (None, "null") else f" {start}") + "".join(around)


def points(row: Row) -> dict[str, float]:
    """Accuracy at the test points, by name."""
    return {name.removeprefix(ON): x for name, x in row.items() if name.startswith(ON) and "/" not in name[len(ON) :]}


def curve(row: Row, point: str) -> dict[float, float]:
    """Accuracy, or loss, by position: in the middle of each range."""
    found = {}
    for name, value in row.items():
        if name.startswith((f"{ON}{point}/", f"{LOSS_ON}{point}/")):
            first, last = map(int, name.rpartition("/")[2].split("-"))
            found[(first + last) / 2] = value
    return found


def accuracy(row: Row) -> float:
    """On the validation set."""
    found: float = row["validation/accuracy"]
    return found


def accuracy_by_range(row: Row) -> dict[str, float]:
    """The same by ranges of positions, which are named after their ends."""
    return {name.removeprefix(ACCURACY_AT): x for name, x in row.items() if name.startswith(ACCURACY_AT)}


def by_position(row: Row) -> dict[float, float]:
    """Validation loss by position, in the middle of each range."""
    at = ((name.rpartition("/")[2].split("-"), x) for name, x in row.items() if name.startswith(LOSS_AT))
    return {(int(first) + int(last)) / 2: x for (first, last), x in at}


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def mean_if_any(values: Iterable[float]) -> float | None:
    found = list(values)
    return mean(found) if found else None


def spread(values: Iterable[float]) -> float | None:
    """The largest difference between seeds, where there are several."""
    found = list(values)
    return max(found) - min(found) if len(found) > 1 else None


def known_first(x: float | None) -> float:
    """By which losses are sorted: the least first, and behind them what has diverged, or was not run."""
    return x if x is not None and math.isfinite(x) else math.inf


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """In the order in which they come first."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def best(rows: list[Row], of: Callable[[Row], Any], measure: Callable[[Row], float]) -> dict[Any, list[Row]]:
    """By `of`, the runs at the best rate and weight decay: a run for each seed."""

    def rates(row: Row) -> str:
        found = settings(row)
        return " ".join(f"{k}={found[k]}" for k in RATES if k in found)

    def height(same: list[Row]) -> float:
        found = mean(map(measure, same))
        return found if math.isfinite(found) else -math.inf  # it has diverged

    return {name: max(grouped(runs, rates).values(), key=height) for name, runs in grouped(rows, of).items()}


def learning_rate(row: Row) -> str:
    """That of its words, or of its experiment."""
    found = settings(row)
    return found.get("optimizer.lr") or str(composed(found["experiment"]).optimizer.lr)


def about(runs: list[Row]) -> Row:
    return {"rate": learning_rate(runs[0]), "seeds": len(runs)}


def look(i: int, size: float = 4) -> Row:
    """Of the i-th mixer in a figure."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[i % len(MARKS)], "markersize": size}


def line(axes: Axes, i: int, at: dict[Any, float], name: str, log: bool = False) -> None:
    """log: an axis of errors; else one of accuracies."""
    axes.plot(list(at), list(at.values()), linewidth=1.4, label=name, **look(i, 5))
    if log:
        log_axis(axes, at.values())
    else:
        axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def ticks(axes: Axes, at: Iterable[float]) -> None:
    """Of a logarithmic axis of tokens: at these alone, as numbers."""
    places = list(at)
    axes.set_xticks(places, [f"{place:,.0f}" for place in places], minor=False)
    axes.xaxis.set_minor_locator(NullLocator())


def ranges_axis(axes: Axes, last: float) -> None:
    """Of positions in ranges that double, to this one: a tick where every other one begins."""
    axes.set_xscale("log")
    ticks(axes, [16 * 4**i for i in range(10) if 16 * 4**i <= last])


def guess(axes: Axes, chance: float, name: str = "a guess") -> None:
    axes.axhline(chance, color="0.7", linewidth=1, label=name)


def log_axis(axes: Axes, values: Iterable[float]) -> None:
    """For these numbers. One with none that is finite and above 0 can't be drawn."""
    if any(0 < x < math.inf for x in values):
        axes.set_yscale("log")


def legend(figure: Figure) -> None:
    """Of all panels."""
    each = [axes.get_legend_handles_labels() for axes in figure.axes]
    named: dict[str, Any] = {}
    for handles, names in each:
        named = dict(zip(names, handles, strict=True)) | named  # the first panel's lines before a later one's points
    figure.legend(named.values(), named.keys(), loc="outside right center", frameon=False, fontsize=8)
