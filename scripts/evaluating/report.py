"""What an evaluation found: a table to read, evaluations/NAME.json and NAME.png in the run's folder, and the metrics
for the run's other loggers. docs/evaluating.md describes the file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from models.training.module import position_ranges
from scripts.evaluating.scoring import Sums

FORMAT = 1
FOLDER = "evaluations"
METRICS = ("nats", "perplexity", "bits_per_byte", "accuracy")


def row(found: Sums, seq_len: int, bytes_per_token: float | None) -> dict[str, Any]:
    """Of one length. Losses are means over targets, in nats per token."""
    length = found.position.shape[1]
    nats, targets, right = found.position.sum(1).tolist()
    mean = nats / targets
    numbers = {"nats": mean, "perplexity": math.exp(min(mean, 700.0)), "accuracy": right / targets}
    if bytes_per_token is not None:
        numbers["bits_per_byte"] = mean / math.log(2) / bytes_per_token
    return {
        "length": length,
        "times": length / seq_len,
        "targets": int(targets),
        **numbers,
        "by_place": by_range(found.place),
        "by_position": by_range(found.position),
        "by_context": by_range(found.context),
    }


def by_range(each: Tensor) -> list[dict[str, float]]:
    """Over ranges of the index, four to a doubling; those without a target are left out. each: [3, T] as in Sums."""
    found = []
    for begin, end in position_ranges(each.shape[1]):
        step = max(1, (end - begin) // 4) if begin else end - begin
        for first in range(begin, end, step):
            nats, targets, right = each[:, first : min(first + step, end)].sum(1).tolist()
            if targets:
                last = min(first + step, end) - 1
                mean = {"nats": nats / targets, "accuracy": right / targets}
                found.append({"first": first, "last": last, "targets": int(targets), **mean})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """A line a length. Then the loss by place in the longest sequence, of the same tokens along a line; of recall, for
    which each length has tokens of its own, the accuracy by position.
    """
    names = [name for name in METRICS if name in rows[0]]
    lines = [f"{'context':>14}" + "".join(f"{name.replace('_', ' '):>16}" for name in names) + f"{'targets':>14}"]
    for found in rows:
        head = f"{found['length']:,} ({found['times']:g}x)"
        lines.append(f"{head:>14}" + "".join(f"{found[name]:>16.4f}" for name in names) + f"{found['targets']:>14,}")
    of = main_metric(rows)
    lines += ["", f"{f'{of} at':>14}" + "".join(f"{found['length']:>16,}" for found in rows)]
    for first, end in position_ranges(rows[-1]["length"]):
        means = [mean(found["by_place"], of, first, end - 1) for found in rows]
        cells = "".join(f"{'' if x is None else f'{x:.4f}':>16}" for x in means)
        lines.append(f"{f'{first:,}-{end - 1:,}':>14}{cells}")
    return "\n".join(lines)


def main_metric(rows: list[dict[str, Any]]) -> str:
    """Of text the loss, of recall, which has right answers, how often they are given."""
    return "nats" if "bits_per_byte" in rows[0] else "accuracy"


def mean(parts: list[dict[str, float]], of: str, first: int, last: int) -> float | None:
    """Over the ranges that lie within first to last, None where there are none."""
    inside = [part for part in parts if first <= part["first"] and part["last"] <= last]
    targets = sum(part["targets"] for part in inside)
    return sum(part[of] * part["targets"] for part in inside) / targets if targets else None


def refuse_other_data(path: Path, node: dict[str, Any]) -> None:
    """Raises ValueError where the file is of an evaluation on other data than these."""
    if path.exists() and (before := json.loads(path.read_text())["data"]) != node:
        raise ValueError(f"{path} is of other data, {before}; give this one another --name")


def write(path: Path, result: dict[str, Any]) -> None:
    """NAME.json, and NAME.png beside it where there is a loss to draw."""
    path.parent.mkdir(exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps({"format": FORMAT, "name": path.stem, **result}, indent=1) + "\n")
    draft.replace(path)
    if "lengths" in result:
        draw(result, path.with_suffix(".png"))


def draw(result: dict[str, Any], path: Path) -> None:
    """The loss (of recall the accuracy) by position, a line a length; and, of text at several lengths, how it differs
    from that of the same tokens in the shortest sequences, by place in the longest.
    """
    from matplotlib import colormaps  # half a second that no other command should pay
    from matplotlib.figure import Figure

    rows = result["lengths"]
    of = main_metric(rows)
    label = "nats per token" if of == "nats" else of
    paired = len(rows) > 1 and of == "nats"
    figure = Figure(figsize=(11 if paired else 6, 4), layout="constrained")
    left, *rest = figure.subplots(1, 1 + paired, squeeze=False)[0]
    for i, found in enumerate(rows):
        shade = colormaps["Blues"](0.35 + 0.65 * (i + 1) / len(rows))  # darker is longer
        line = {"color": shade, "linewidth": 1.5, "label": f"{found['length']:,} tokens ({found['times']:g}x)"}
        steps(left, found["by_position"], [part[of] for part in found["by_position"]], **line)
        if paired and i:
            same = zip(found["by_place"], rows[0]["by_place"], strict=True)
            steps(rest[0], found["by_place"], [part[of] - short[of] for part, short in same], **line)
    left.set(xlabel="position in the sequence", ylabel=label, title="By position")
    left.legend(frameon=False)
    for axes in rest:
        axes.axhline(0, color="0.5", linewidth=0.8)
        axes.set(xlabel=f"place in the sequence of {rows[-1]['length']:,} tokens", ylabel=label)
        axes.set_title(f"Minus the same tokens at {rows[0]['times']:g}x")
    for axes in (left, *rest):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.axvline(result["seq_len"], color="0.5", linestyle="--", linewidth=0.8)
        axes.annotate(
            "trained at ", (result["seq_len"], 0.02), xycoords=("data", "axes fraction"), color="0.4", ha="right"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    draft = path.with_name(f".{path.name}.draft")
    figure.savefig(draft, dpi=120, format="png")
    draft.replace(path)


def steps(axes: Any, parts: list[dict[str, float]], heights: list[float], **line: Any) -> None:
    """A level line over each range; the first position is 1, for the logarithm."""
    edges = [*(part["first"] + 1 for part in parts), parts[-1]["last"] + 2]
    axes.stairs(heights, edges, baseline=None, **line)


def metrics(result: dict[str, Any], name: str) -> dict[str, float]:
    """For a logger: evaluation/NAME/nats/1024, the loss at the length of 1,024; evaluation/NAME/TASK/acc."""
    by_length = {
        f"{metric}/{row['length']}": row[metric]
        for row in result.get("lengths", [])
        for metric in METRICS
        if metric in row
    }
    by_task = {f"{task}/{metric}": x for task, row in result.get("tasks", {}).items() for metric, x in row.items()}
    return {f"evaluation/{name}/{key}": value for key, value in (by_length | by_task).items()}
