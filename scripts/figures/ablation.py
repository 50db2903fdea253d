"""Three memories of an ablation, looked into: how one forgets, how long one is solved, how one moves.

    python train.py -m name=ablation model=softmax,gated_delta,titans,mesa seed=1,2 tokens=614400
    python scripts/figures/ablation.py runs/ablation [--folder docs] [--json numbers.json]

Reads regression.jsonl and metrics.csv of the finished runs, which docs/regression.md explains. Writes ablation.svg, and
prints the tables of docs/ablation.md. Numbers of a layer are means over its heads.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.reports.inner import BEFORE, mean
from scripts.reports.runs import find
from scripts.reports.variants import compare

MIXERS = ("softmax", "gated_delta", "mesa", "titans")
COLOURS = ["#440154", "#2f6c8e", "#27ad81", "#d09a00"]  # of layers, from the first to the last
DASHES: list[Any] = ["-", (0, (4, 1.5)), (0, (1.2, 1.2))]  # of seeds
EARLY = (0, 1, 8)  # ages that the table has beside the oldest
ALL = "all"  # layers
Row = dict[str, Any]
Curve = dict[int, float]


class Run(NamedTuple):
    """looks: rows of regression.jsonl; log: rows of metrics.csv."""

    looks: list[Row]
    log: list[dict[str, float]]

    @property
    def newest(self) -> list[Row]:
        """Of the last validation, a row for each layer."""
        return [row for row in self.looks if row["step"] == self.looks[-1]["step"]]

    def quantity(self, name: str, layer: int) -> Curve:
        """On average over heads, by the tokens trained on."""
        rows = [row for row in self.looks if row["layer"] == layer]
        return {row["tokens"]: mean(row["quantities"][name]) for row in rows}

    def logged(self, name: str, layer: int) -> Curve:
        """Of the batches of training, by the tokens trained on."""
        column = f"{name}/layer_{layer}"
        return {int(row["progress/tokens"]): row[column] for row in self.log if column in row}


Runs = dict[str, dict[int, Run]]  # of a mixer and a seed


def read(folder: Path) -> Runs:
    """Raises ValueError where a mixer has no finished run that looked into its memories."""
    from models.training.regression import InnerRegression, read_rows  # after seconds of imports

    found: Runs = {}
    for variant in compare(find([folder])).variants:
        seen = [(run, run.folder / InnerRegression.FILE) for run in variant.runs]
        found[variant.label] = {run.seed: Run(read_rows(path), run.rows) for run, path in seen if path.exists()}
    for mixer in MIXERS:
        if not found.get(mixer):
            raise ValueError(
                f"{folder} has no finished run of {mixer} with a {InnerRegression.FILE}, but of {[*found]}"
            )
    return found


def recall(rows: list[Row]) -> Curve:
    """By age, on average over the heads of these layers; -1 is before the write."""
    curve = {age: mean([head[i] for row in rows for head in row["recall"]]) for i, age in enumerate(rows[0]["ages"])}
    return {-1: mean([row["recall_before"] for row in rows])} | curve


# the numbers


def forgetting(runs: Runs) -> list[Row]:
    """What is recalled of a pair at the end of training: of each mixer, and of each layer of gated_delta. `lost at` is
    the age at which no more is recalled than was known before the write."""

    def row(mixer: str, seed: int, layer: int | str, rows: list[Row]) -> Row:
        curve = recall(rows)
        lost = [age for age, known in curve.items() if age >= 0 and known <= curve[-1]]
        found = {"mixer": mixer, "seed": seed, "layer": layer, "before": curve[-1]}
        found |= {f"at {age}": curve[age] for age in (*EARLY, max(curve))}
        half_life = mean([look["quantities"].get("half_life", []) for look in rows])
        return found | {"lost at": min(lost, default=None), "half-life": half_life}

    found = [row(mixer, seed, ALL, run.newest) for mixer in MIXERS for seed, run in runs[mixer].items()]
    layers = [(seed, look) for seed, run in runs["gated_delta"].items() for look in run.newest]
    return found + [row("gated_delta", seed, look["layer"], [look]) for seed, look in layers]


def solving(runs: Runs) -> list[Row]:
    """The steps of mesa's solver for the batches of training, on average over tokens and at most, and what is left."""
    found = []
    for seed, run in runs["mesa"].items():
        for layer in range(len(run.newest)):
            steps = [*run.logged("solver_steps", layer).values()]
            most = max(run.logged("solver_steps_max", layer).values())
            left = max(run.logged("solver_residual", layer).values())
            half_life = [*run.quantity("half_life", layer).values()]
            row = {"seed": seed, "layer": layer, "first steps": steps[0], "last steps": steps[-1], "most": int(most)}
            found.append(row | {"residual": left, "half-life": half_life[-1]})
    return found


def moving(runs: Runs) -> list[Row]:
    """Gates of titans at the first look and at the last, and how many heads have a lower momentum at the last."""
    found = []
    for seed, run in runs["titans"].items():
        for layer in range(len(run.newest)):
            row: Row = {"seed": seed, "layer": layer}
            for name in ("momentum", "step_size"):
                curve, words = [*run.quantity(name, layer).values()], name.replace("_", " ")
                row |= {f"first {words}": curve[0], f"last {words}": curve[-1]}
            heads = [look["quantities"]["momentum"] for look in run.looks if look["layer"] == layer]
            fell = sum(late < early for early, late in zip(heads[0], heads[-1], strict=True))
            found.append(row | {"momentum fell in": f"{fell} of {len(heads[0])} heads"})
    return found


def numbers(runs: Runs) -> dict[str, list[Row]]:
    """The rows of the tables, to four digits; None of what is not there."""
    found = {"forgetting": forgetting(runs), "solving": solving(runs), "moving": moving(runs)}
    return {name: [{key: _short(value) for key, value in row.items()} for row in rows] for name, rows in found.items()}


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.2f}" if value < 10 else f"{value:.1f}"
    return "–" if value is None else str(value)


# the picture


def draw(runs: Runs) -> Figure:
    """A line of two panels each for gated_delta beside softmax, mesa, and titans."""
    figure = Figure(figsize=(10, 11), layout="constrained", facecolor="white")
    grid = figure.subplots(3, 2)
    recalls, layers = grid[0]
    for mixer, colour in (("softmax", "0.25"), ("gated_delta", "#c2410c")):
        for run, dash in zip(runs[mixer].values(), DASHES, strict=False):
            _draw_recall(recalls, recall(run.newest), colour, dash)
        end = recall(run.newest)
        at: Row = {"xytext": (0, -14), "textcoords": "offset points", "ha": "right"}
        recalls.annotate(mixer, (max(end) + 1, end[max(end)]), color=colour, **at)
    for run, dash in zip(runs["gated_delta"].values(), DASHES, strict=False):
        for row in run.newest:
            _draw_recall(layers, recall([row]), COLOURS[row["layer"] % len(COLOURS)], dash)
    for axes, what in ((recalls, "recall, mean of all layers"), (layers, "gated_delta: recall, layer by layer")):
        axes.set(title=what, ylim=(0, 1.02))
    for axes, name in zip(grid[1], ("solver_steps", "solver_residual"), strict=True):
        _over_training(axes, runs["mesa"], Run.logged, name)
    grid[1, 0].set(title="mesa: steps of the solver, mean over tokens", ylabel="steps", ylim=(0, None))
    grid[1, 1].set(title="mesa: largest residual that is left", ylabel="|b - x A| / |b|", yscale="log", ylim=(1e-12, 1))
    for axes, name in zip(grid[2], ("momentum", "step_size"), strict=True):
        _over_training(axes, runs["titans"], Run.quantity, name, marker="o")
        axes.set(title=f"titans: {name.replace('_', ' ')}, mean over tokens", ylim=(0, 0.8))
    for axes in grid.flat:
        axes.title.set_fontsize(11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    _legend(figure, runs)
    return figure


def _draw_recall(axes: Axes, curve: Curve, colour: str, dash: Any) -> None:
    later = {age: known for age, known in curve.items() if age >= 0}
    axes.plot([age + 1 for age in later], [*later.values()], color=colour, linestyle=dash, linewidth=1.2)
    axes.plot([BEFORE], [curve[-1]], color=colour, marker="D", markersize=4, linestyle="none")
    axes.set(xscale="log", xlabel="age of the pair, tokens", ylabel="cosine of v and m(k)")
    axes.set_xticks([BEFORE, *(age + 1 for age in later)], ["before", *map(str, later)], fontsize=8)
    axes.minorticks_off()


def _over_training(
    axes: Axes, runs: dict[int, Run], curve: Callable[[Run, str, int], Curve], name: str, marker: str | None = None
) -> None:
    for run, dash in zip(runs.values(), DASHES, strict=False):
        for layer in range(len(run.newest)):
            of_layer = curve(run, name, layer)
            look: Row = {"color": COLOURS[layer % len(COLOURS)], "linestyle": dash, "linewidth": 1.2}
            axes.plot([*of_layer], [*of_layer.values()], marker=marker, markersize=3, **look)
    axes.set(xlabel="tokens trained on")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _legend(figure: Figure, runs: Runs) -> None:
    layers = range(max(len(run.newest) for run in runs["gated_delta"].values()))
    keys = [Line2D([], [], color=COLOURS[layer % len(COLOURS)], label=f"layer {layer}") for layer in layers]
    seeds = zip(runs["gated_delta"], DASHES, strict=False)
    keys += [Line2D([], [], color="0.4", linestyle=dash, linewidth=1.2, label=f"seed {seed}") for seed, dash in seeds]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder of the sweep")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[2] / "docs")
    parser.add_argument("--json", type=Path, help="where the numbers of the tables are written too")
    arguments = parser.parse_args()
    try:
        runs = read(arguments.runs)
    except ValueError as error:
        sys.exit(f"error: {error}")
    found = numbers(runs)
    print("\n\n".join(table(rows) for rows in found.values()))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    settings: dict[Any, Any] = {"svg.hashsalt": "ablation", "svg.fonttype": "none"}
    settings["font.sans-serif"] = ["DejaVu Sans", "Verdana", "Arial"]
    with matplotlib.rc_context(settings):
        draw(runs).savefig(arguments.folder / "ablation.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
