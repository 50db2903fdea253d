"""What each experiment is to show: its table, from the lines of results.jsonl, and its figure.

A row of results is that of a run (scripts/evidence.py). Runs that differ in their seed alone are averaged. Of several
rates the best counts, by the mean over seeds, as in the papers; the table says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.figures import published

Row = dict[str, Any]
ON = "validation/accuracy_on/"
MARKS = "os^Dvp*PX<>h"
COLOURS = ["#1f5fa8", "#d1495b", "#2a9d6f", "#e09f1f", "#7b4fa3", "#3d3d3d", "#4fb3d9", "#a0522d", "#c77dba", "#6b8e23"]
COLOURS += ["#8c1c5a", "#7a8b99"]


class Claim(NamedTuple):
    """sources: the experiments whose results it is made of.  says: the claim.  shows: what the table holds.  measure:
    of a row, what is the better the higher, by which a rate is chosen."""

    title: str
    sources: tuple[str, ...]
    says: str
    shows: str
    measure: Callable[[Row], float]
    table: Callable[[list[Row]], list[Row]]
    draw: Callable[[list[Row], Figure], None]
    published: published.Source | None = None


def settings(row: Row) -> dict[str, str]:
    """Of the words of a job; the last that names a setting counts."""
    return dict(word.split("=", 1) for word in row["words"])


def label(row: Row) -> str:
    """The mixer, with the range of its eigenvalues where a sweep has both."""
    found = settings(row)
    negative = found.get("model.mixers.main.regressor.negative_eigenvalues")
    ranges = {None: "", "false": " [0, 1]", "true": " [-1, 1]"}
    return found["model"] + ranges[None if negative is None else negative.lower()]


def points(row: Row) -> dict[str, float]:
    """Accuracy at the test points, by name."""
    return {name.removeprefix(ON): x for name, x in row.items() if name.startswith(ON) and "/" not in name[len(ON) :]}


def curve(row: Row, point: str) -> dict[float, float]:
    """Accuracy by position: in the middle of each range."""
    found = {}
    for name, accuracy in row.items():
        if name.startswith(f"{ON}{point}/"):
            first, last = map(int, name.rpartition("/")[2].split("-"))
            found[(first + last) / 2] = accuracy
    return found


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan


def grouped(rows: list[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    return {k: list(group) for k, group in groupby(sorted(rows, key=key), key)}


def best(rows: list[Row], of: Callable[[Row], Any], measure: Callable[[Row], float]) -> dict[Any, list[Row]]:
    """By `of`, the runs at the best rate and weight decay: a run for each seed."""

    def rate(row: Row) -> str:
        found = settings(row)
        return " ".join(f"{k}={found[k]}" for k in ("optimizer.lr", "optimizer.weight_decay") if k in found)

    found = {}
    for name, runs in grouped(rows, of).items():
        found[name] = max(grouped(runs, rate).values(), key=lambda same: mean(map(measure, same)))
    return found


def about(runs: list[Row]) -> Row:
    return {"rate": settings(runs[0]).get("optimizer.lr", "default"), "seeds": len(runs)}


# recall against the size of the memory


def recall_mean(row: Row) -> float:
    return mean(points(row).values())


def width(row: Row) -> int:
    return int(settings(row).get("model.hidden_size", 64))


def recall_table(rows: list[Row]) -> list[Row]:
    found = []
    for (name, size), runs in best(rows, lambda row: (label(row), width(row)), recall_mean).items():
        at = {point: mean(points(run)[point] for run in runs) for point in points(runs[0])}
        known = {"mixer": name, "width": size, "state": runs[0]["state_size"], "parameters": runs[0]["parameters"]}
        found.append(known | at | {"mean": mean(map(recall_mean, runs))} | about(runs))
    return found


def recall_figure(rows: list[Row], figure: Figure) -> None:
    axes = figure.subplots()
    for i, (name, group) in enumerate(grouped(recall_table(rows), lambda row: row["mixer"]).items()):
        ordered = sorted(group, key=lambda row: row["state"])
        line(axes, i, {row["state"]: row["mean"] for row in ordered}, name)
    axes.set(xscale="log", xlabel="state, numbers a sequence", ylabel="accuracy, mean of the test points")
    legend(figure)


# one memory, full or not


def memory_table(rows: list[Row]) -> list[Row]:
    found = []
    for name, runs in best(rows, label, recall_mean).items():
        at = {point: mean(points(run)[point] for run in runs) for point in points(runs[0])}
        spread = max(max(points(run)[p] for run in runs) - min(points(run)[p] for run in runs) for p in at)
        found.append({"mixer": name, "state": runs[0]["state_size"]} | at | {"spread": spread} | about(runs))
    return found


def memory_figure(rows: list[Row], figure: Figure) -> None:
    table = memory_table(rows)
    pairs = sorted({int(name.split("x")[1]) for row in rows for name in points(row)})
    for axes, n in zip(figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0], pairs, strict=True):
        for i, row in enumerate(table):
            at = {int(name.split("x")[0]): x for name, x in row.items() if name.endswith(f"x{n}")}
            line(axes, i, at, row["mixer"])
        axes.set(xscale="log", xlabel="tokens", ylabel="accuracy", title=f"{n} pairs")
        axes.set_xticks(list(at), [f"{length:,}" for length in at], minor=False)
        axes.minorticks_off()
        axes.label_outer()
    legend(figure)


# state tracking


def scaled(row: Row) -> float:
    """0 for a guess, 1 for no mistake."""
    chance = row["validation/chance"]
    return (points(row)["longer"] - chance) / (1 - chance)


def tracking_table(rows: list[Row]) -> list[Row]:
    """The best of the seeds, as published, and the mean."""
    tasks = list(dict.fromkeys(settings(row)["data"] for row in rows))
    chosen = best(rows, lambda row: (label(row), settings(row)["data"]), scaled)
    found = []
    for name in dict.fromkeys(name for name, _ in chosen):
        row: Row = {"mixer": name}
        for task in tasks:
            runs = chosen.get((name, task), [])
            row |= {task: max(map(scaled, runs), default=None), f"{task}, mean": mean(map(scaled, runs)) or None}
        found.append(row | {"seeds": max(len(chosen.get((name, task), [])) for task in tasks)})
    return found


def tracking_figure(rows: list[Row], figure: Figure) -> None:
    tasks = list(dict.fromkeys(settings(row)["data"] for row in rows))
    chosen = best(rows, lambda row: (label(row), settings(row)["data"]), scaled)
    names = list(dict.fromkeys(name for name, _ in chosen))
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for i, name in enumerate(names):
            if runs := chosen.get((name, task)):
                line(axes, i, curve(max(runs, key=scaled), "longer"), name)
        axes.axhline(rows[0]["validation/chance"] if len(tasks) == 1 else math.nan, color="0.7", linewidth=1)
        axes.set(xlabel="tokens", ylabel="accuracy, best seed", title=task.replace("_", " "))
        axes.label_outer()
    legend(figure)


# MAD


def mad_table(rows: list[Row]) -> list[Row]:
    """In percent."""
    chosen = best(rows, lambda row: (label(row), settings(row)["data"]), accuracy)
    found = []
    for name in dict.fromkeys(name for name, _ in chosen):
        of = {task: chosen.get((name, task)) for task in published.MAD.columns}
        row: Row = {"mixer": name} | {t: 100 * mean(map(accuracy, runs)) if runs else None for t, runs in of.items()}
        row["mean"] = mean(row[task] for task in of) if all(of.values()) else None
        found.append(row | {"seeds": max(len(runs or []) for runs in of.values())})
    return sorted(found, key=lambda row: -(row["mean"] or 0))


def accuracy(row: Row) -> float:
    return row["validation/accuracy"]


def mad_figure(rows: list[Row], figure: Figure) -> None:
    table = mad_table(rows)
    axes = figure.subplots()
    cells = [[math.nan if row[task] is None else row[task] for task in published.MAD.columns] for row in table]
    axes.imshow(cells, vmin=0, vmax=100, cmap="Blues", aspect="auto")
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if not math.isnan(value):
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="white" if value > 60 else "black")
    axes.set_xticks(range(len(cells[0])), [t.removeprefix("mad_").replace("_", " ") for t in published.MAD.columns])
    axes.set_yticks(range(len(table)), [row["mixer"] for row in table])
    axes.tick_params(length=0)


# drawing


def line(axes: Axes, i: int, at: dict[Any, float], name: str) -> None:
    look: Row = {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[i % len(MARKS)], "markersize": 5}
    axes.plot(list(at), list(at.values()), linewidth=1.4, label=name, **look)
    axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure) -> None:
    """Of all panels."""
    each = [axes.get_legend_handles_labels() for axes in figure.axes]
    named = {name: handle for handles, names in each for handle, name in zip(handles, names, strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside right center", frameon=False, fontsize=8)


CLAIMS = {
    "mqar": Claim(
        "Recall against the size of the memory",
        ("mqar",),
        "How much of what it was told a mixer finds again grows with the numbers that it holds, and at the same size "
        "the rules of writing differ.",
        "Accuracy at each test point, tokens x pairs (Zoology's mixture, 2 layers), and their mean.",
        recall_mean,
        recall_table,
        recall_figure,
    ),
    "mqar_memory": Claim(
        "One memory of 64 x 64, with 64 and with 128 pairs",
        ("mqar_memory",),
        "One layer with one short convolution recalls 64 pairs to 4,096 tokens. With more pairs than keys have "
        "channels, a linear memory forgets, and least squares holds longer.",
        "Accuracy at each test point, tokens x pairs. Spread is the largest difference between seeds.",
        recall_mean,
        memory_table,
        memory_figure,
    ),
    "state_tracking": Claim(
        "Parity and modular arithmetic",
        ("state_tracking", "state_tracking_others"),
        "Memories whose writes can turn a direction around, by eigenvalues down to -1, track states beyond the "
        "lengths of training. Those whose eigenvalues are not negative do not.",
        "Accuracy on 40 to 256 tokens after training on 3 to 40, scaled so that a guess is 0: the best of the seeds, "
        "as published, and the mean.",
        scaled,
        tracking_table,
        tracking_figure,
        published.STATE_TRACKING,
    ),
    "word_problems": Claim(
        "The word problem of S3",
        ("word_problems",),
        "One layer tracks the product of permutations of three things with two writes a token and eigenvalues down "
        "to -1, and not with one write or without negative eigenvalues.",
        "Accuracy at all positions of 512 tokens after training on 128, scaled so that a guess is 0: the best of the "
        "seeds and the mean.",
        scaled,
        tracking_table,
        tracking_figure,
    ),
    "mad": Claim(
        "MAD's six tasks",
        ("mad",),
        "A mixer's profile over six small tasks: what it recalls in context, what it learns by heart, what it selects "
        "and what it compresses.",
        "Accuracy in percent after 200 epochs, 2 layers of width 128.",
        accuracy,
        mad_table,
        mad_figure,
        published.MAD,
    ),
}
