"""The table of all presets at size=tiny, and its figure: conf/experiment/tiny_table.yaml, and the claim of that name in
claims.py."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from scripts.figures.results import COLOURS, DIVERGED, Row, grouped, known_first, mean, settings
from scripts.recipes import CONF
from scripts.reports.presets import all_classes

# beside the branches of the family: baselines, models whose feed-forward layers learn, and mixers of other packages
BASELINE, FEED_FORWARD, OWN = "no regression", "feed-forward", "other"


def bits(row: Row) -> float:
    """Of the validation text, per byte."""
    found: float = row["validation/bits_per_byte"]
    return found


def branch(model: str) -> str:
    """The folder of models/regression that its memory is in."""
    classes = all_classes().get(model)
    if classes is None:
        return FEED_FORWARD if (CONF / "model" / f"{model}.yaml").exists() else OWN
    memory = classes.get("regressor._target_", classes.get("memory.regressor._target_"))
    return BASELINE if memory is None else memory.split(".")[2]


def table(rows: list[Row]) -> list[Row]:
    """The best first. Numbers as text, with the digits that they are worth."""
    found = []
    of = grouped(rows, lambda row: settings(row)["model"])
    for model in sorted(of, key=lambda model: known_first(round(mean(map(bits, of[model])), 3))):
        runs, each = of[model], list(map(bits, of[model]))
        row = {"mixer": model, "branch": branch(model), "bits per byte": digits(mean(each))}
        row |= {"between seeds": digits(max(each) - min(each)) if len(each) > 1 else "", "seeds": len(runs)}
        found.append(row | {"state": runs[0]["state_size"], "parameters": runs[0]["parameters"]})
    return found


def digits(x: float) -> str:
    return f"{x:.3f}" if math.isfinite(x) else DIVERGED


def figure(rows: list[Row], figure: Figure) -> None:
    """A line for each mixer, a point for each seed."""
    ordered = [row["mixer"] for row in table(rows)]
    figure.set_size_inches(7, 1.2 + 0.19 * len(ordered))
    axes = figure.subplots()
    for i, (name, group) in enumerate(sorted(grouped(rows, lambda row: branch(settings(row)["model"])).items())):
        at = [ordered.index(settings(row)["model"]) for row in group]
        axes.plot([bits(row) for row in group], at, "o", color=COLOURS[i], markersize=4.5, label=name)
    axes.set_yticks(range(len(ordered)), ordered, fontsize=8)
    axes.set(xlabel="bits per byte of the validation text", ylim=(len(ordered) - 0.4, -0.6))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
