"""What scripts/evaluate.py has found of the runs, by its name, from the evaluations/NAME.json of their folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from scripts.reports.figures import Picture, looks
from scripts.reports.intervals import interval
from scripts.reports.runs import NUMBERS, Record
from scripts.reports.svg import drawn
from scripts.reports.tables import Table, number
from scripts.reports.variants import Comparison

METRICS = {name.removeprefix("validation/"): unit for name, unit in NUMBERS.items()}


class Evaluation(NamedTuple):
    """What evaluate.py left under one name, of all variants."""

    name: str
    pictures: list[Picture]
    table: Table


def evaluations(comparison: Comparison) -> list[Evaluation]:
    """One for each name that any run has: losses by the length of the context, or tasks."""
    found = {run.folder: read(run) for variant in comparison.variants for run in variant.runs}
    names = sorted({name for of in found.values() for name in of})
    return [_one(comparison, name, {folder: of[name] for folder, of in found.items() if name in of}, i)
            for i, name in enumerate(names)]  # fmt: skip


def read(run: Record) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(run.folder.glob("evaluations/*.json"))}


def _one(comparison: Comparison, name: str, of: Mapping[Any, dict[str, Any]], index: int) -> Evaluation:
    lengths = sorted({row["length"] for one in of.values() for row in one.get("lengths", [])})
    tasks = sorted(
        {(task, metric) for one in of.values() for task, row in one.get("tasks", {}).items() for metric in row}
    )
    metric = next(
        (key for key in METRICS if any(key in row for one in of.values() for row in one.get("lengths", []))), "nats"
    )
    unit = METRICS.get(metric, "nats per token")

    def values(variant: Any, key: Any) -> list[float]:
        ones = [of[run.folder] for run in variant.runs if run.folder in of]
        if isinstance(key, tuple):
            return [one["tasks"][key[0]][key[1]] for one in ones if key[1] in one.get("tasks", {}).get(key[0], {})]
        return [row[metric] for one in ones for row in one.get("lengths", []) if row["length"] == key and metric in row]

    keys: list[Any] = [*lengths, *tasks]
    rows = [
        [variant.label, *(number(interval(values(variant, key)), 3) for key in keys)] for variant in comparison.variants
    ]
    head = ["variant", *(f"{n:,} tokens" for n in lengths), *(f"{task}: {kind}" for task, kind in tasks)]
    says = f"{unit.capitalize()} by the length of the context; " if lengths else ""
    table = Table(head, rows, f"{says}means with 95 % intervals over seeds.")
    if len(lengths) < 2:
        return Evaluation(name, [], table)

    def draw(to: Axes) -> None:
        look = looks(comparison)
        for variant in reversed(comparison.variants):
            known = {n: of for n in lengths if (of := values(variant, n))}
            style, means = look[variant.label], [sum(of) / len(of) for of in known.values()]
            line: dict[str, Any] = {"linestyle": style.dash, "linewidth": style.width, "marker": "o", "markersize": 3}
            to.plot(list(known), means, color=style.colour, **line)
            for n, of in known.items():
                to.plot([n, n], [min(of), max(of)], color=style.colour, linewidth=0.8, alpha=0.6)
        to.set(xlabel="tokens in a sequence", ylabel=unit, xscale="log")
        to.set_xticks(lengths, [f"{n:,}" for n in lengths])
        to.minorticks_off()

    svg = drawn(f"evaluation-{index}", f"{unit} against the length of the context", draw)
    return Evaluation(name, [Picture("Against the length of the context", svg, "Bars: all seeds.")], table)
