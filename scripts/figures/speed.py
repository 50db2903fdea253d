"""The tables of docs/speed.md and its picture, from stored runs of the benchmark.

    python scripts/figures/speed.py [--folder docs]

Reads train.json, ops.json, starts.json, length.json, decode.json and losses.json in docs/speed, which
`python scripts/benchmark.py train --json PATH` and the like have written, and scaling.json, which scripts/scaling.py
has. One that is not there has no section. Writes the lines between the page's markers, and the pictures: speed.svg,
tokens per second over the length of a sequence, and losses.svg, losses by kernels and by PyTorch alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.benchmarks.losses import LAST, PATHS
from scripts.scaled.speed import even

DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- tables: python scripts/figures/speed.py -->", "<!-- end of tables -->"
Run = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    yield from ("| " + " | ".join(row) + " |" for row in rows)


def where(run: Run, command: str) -> str:
    """What its numbers are of."""
    names = [name for name in ("triton", "flash-linear-attention", "transformers") if name in run]
    of = [run["machine"], *(f"{name} {run[name]}" for name in names)]
    of += [f"commit {run['commit']}"] if run["commit"] else []
    sizes = f": {run['sizes']}" if "sizes" in run else ""
    return f"`{run.get('command', command)}` on {run['date']}{sizes}. {', '.join(of)}."


def number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}".replace("%", " %")


def timed(run: Run) -> list[Run]:
    return [row for row in run["rows"] if not row["reason"]]


def left_out(run: Run, name: Callable[[Run], str]) -> Iterator[str]:
    if found := [f"{name(row)} ({row['reason']})" for row in run["rows"] if row["reason"]]:
        yield ""
        yield f"Left out: {'; '.join(found)}."


def training(run: Run) -> Iterator[str]:
    yield where(run, "python scripts/benchmark.py train")
    yield ""
    head = ["model", "tokens/s", "ms", "6N", "FLOPs", "peak GB", "first step, s", ""]
    numbers = [
        [
            row["name"],
            *(number(row[key]) for key in ("tokens_per_second", "ms")),
            *(share(row[key]) for key in ("six_n", "model_flops")),
            number(row["peak_gb"], 1),
            number(row["first_s"]),
            row["note"],
        ]
        for row in timed(run)
    ]
    yield from table(head, numbers)
    yield from left_out(run, lambda row: row["name"])
    if split := [row for row in timed(run) if row["kinds"]]:
        yield ""
        yield "A step's time in GPU kernels by kind, in ms, and how many were launched:"
        yield ""
        sums = {kind: sum(row["kinds"].get(kind, [0])[0] for row in split) for row in split for kind in row["kinds"]}
        kinds = sorted(sums, key=lambda kind: -sums[kind])
        cells = [[kind, *(of_kind(row["kinds"].get(kind)) for row in split)] for kind in kinds]
        totals = [[sum(found[i] for found in row["kinds"].values()) for i in (0, 1)] for row in split]
        yield from table(["", *(row["name"] for row in split)], [*cells, ["all", *map(of_kind, totals)]])


def of_kind(found: list[float] | None) -> str:
    return "" if found is None else f"{found[0]:.1f} in {found[1]:,.0f}"


def operators(run: Run) -> Iterator[str]:
    """As they come: those of a size beside each other."""
    yield where(run, "python scripts/benchmark.py ops --kernels")
    yield ""
    rows = [
        [
            row["size"],
            row["name"],
            *(number(row[key], 2) for key in ("forward_ms", "both_ms")),
            number(sum(ms for ms, _ in row["kernels"].values()) or None, 2),
            number(row["peak_gb"], 2),
        ]
        for row in run["rows"]
    ]
    yield from table(["size", "operator", "forward, ms", "with backward, ms", "kernels, ms", "GB"], rows)


def lengths(run: Run) -> Iterator[str]:
    """A row a length, a column a model."""
    names = list(dict.fromkeys(row["name"] for row in timed(run)))
    rates = {(row["name"], row["seq_len"]): row["tokens_per_second"] for row in timed(run)}
    yield where(run, "python scripts/benchmark.py length")
    yield ""
    each = sorted({length for _, length in rates})
    yield from table(["tokens", *names], [[f"{T:,}", *(number(rates.get((name, T))) for name in names)] for T in each])
    yield from left_out(run, lambda row: f"{row['name']} at {row['seq_len']:,}")


def decoding(run: Run) -> Iterator[str]:
    yield where(run, "python scripts/benchmark.py decode")
    yield ""
    rows = [
        [
            row["name"],
            f"{row['batch']} x {row['context']:,}",
            number(row["prefill_ms"]),
            *(number(row[key], 2) for key in ("prefill_gb", "token_ms", "peak_gb")),
        ]
        for row in timed(run)
    ]
    yield from table(["model", "prompts", "prefill, ms", "GB", "ms a token", "GB"], rows)
    yield from left_out(run, lambda row: row["name"] + f", {row['batch']} x {row['context']:,}" * (row["batch"] > 0))


def starting(run: Run) -> Iterator[str]:
    """Those that need most memory first, and those that don't start by themselves."""
    yield where(run, "python scripts/benchmark.py starts")
    card = f"of {run['memory_gb']:.0f} GB of a GPU" if run["memory_gb"] else "without a limit of memory"
    yield f"Two steps of each preset, {card}, by recompute=auto. *Compiled* is the first step of few layers, with all"
    beside = f"up to {run['at_once']} such processes at a time" if run["at_once"] > 1 else "one process at a time"
    yield f"that is compiled in it, in {beside}; *first* is that of the whole model, which finds it compiled."
    yield ""
    head = ["preset", "peak GB", "blocks recomputed", "compiled, s", "first, s", "backend"]
    rows = [
        [
            row["name"],
            number(row["peak_gb"], 1),
            f"{row['recomputed']} of {row['layers']}" if row["recomputed"] else "",
            *(number(row[key], 1) for key in ("compiled_s", "first_s")),
            row["backend"],
        ]
        for row in sorted(timed(run), key=lambda row: (-(row["peak_gb"] or 0), row["name"]))
    ]
    yield from table(head, rows)
    if found := [f"* `{row['name']}`: {row['reason']}" for row in run["rows"] if row["reason"]]:
        yield ""
        yield "Without a first step:"
        yield ""
        yield from found


def several(run: Run) -> Iterator[str]:
    """Of the rows that were timed, those of as many GPUs as there were."""
    yield f"`python scripts/scaling.py` on {run['machine']}, {' and '.join(of_days(run))}."
    yield f"Training by `train.py`, {run['steps']} steps after the first. *Step* is the median of them. *Linear* is"
    yield "tokens/s beside those of as many single GPUs, each as fast as `one`, or as `one, no graph` where there is no"
    yield "CUDA graph, or for 1300m as its first row. It is `uneven` where the mean of the steps is not near their"
    yield "median: something was compiled or recorded in one of them. *Losses*: the largest relative difference to"
    yield "those of that row, where batches are the same."
    yield "GB are the peak of a GPU, and *memory* is what the run itself said before its first step."
    if run.get("warm"):
        yield "Blocks had been compiled before, so a first step of an empty cache takes longer."
    yield ""
    rows = [
        [
            row["name"],
            " ".join(f"`{word}`" for word in row["words"]),
            number(row["tokens_per_second"]),
            number(row["step"], 3),
            number(row["of_linear"], 3) if even(row) else "uneven",
            other_losses(run, row),
            *(number(row[key], digits) for key, digits in (("peak_gb", 1), ("first_s", 0))),
            row.get("memory", "").removeprefix("memory").strip(),
            row["commit"],
        ]
        for row in timed(run)
    ]
    yield from table(
        ["", "words", "tokens/s", "step, s", "linear", "losses", "GB", "first step, s", "memory", "commit"], rows
    )
    yield from left_out(run, lambda row: row["name"])
    if run["link"] and not run["link"]["reason"]:
        yield from linked(run["link"])
    yield from sending(run)
    if any(row.get("traced") for row in timed(run)):
        yield from traced(run)
    if run["checks"]:
        yield ""
        yield "The largest relative difference of a loss, of 40 steps at toy size:"
        yield ""
        found = [
            [row["name"], row["like"], row["reason"] or f"{row['difference']:.1e}", row["commit"]]
            for row in run["checks"]
        ]
        yield from table(["", "beside", "difference", "commit"], found)


def other_losses(run: Run, row: Run) -> str:
    """Beside the row that it is compared with, step by step."""
    like = next(
        (each for each in timed(run) if each["name"] == row["beside"] and each["tokens"] == row["tokens"]), None
    )
    pairs = [] if like is None else list(zip(row["losses"], like["losses"], strict=False))
    return f"{max(abs(a - b) / abs(b) for a, b in pairs):.0e}" if pairs else ""


def of_days(run: Run) -> list[str]:
    """On which days which commits were run."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in (*run["rows"], *run["checks"], *([run["link"]] if run["link"] else [])):
        commits = found.setdefault((row["date"], row["torch"]), [])
        commits += [row["commit"]] if row["commit"] not in commits else []
    return [f"{date} with torch {torch} ({', '.join(commits)})" for (date, torch), commits in found.items()]


SENT = {"gather": "all-gather", "divide": "reduce-scatter", "sum": "all-reduce"}


def linked(link: Run) -> Iterator[str]:
    """How fast the GPUs exchange."""
    sizes = sorted({row["bytes"] for row in link["rates"]})
    rates = {(row["kind"], row["bytes"]): row["gb_per_second"] for row in link["rates"]}
    yield ""
    yield f"A GPU of this host {'can' if link['peer'] else 'can not'} reach the other's memory, says"
    yield "`torch.cuda.can_device_access_peer`."
    if link["topology"]:
        yield f"`nvidia-smi topo -m` has `{'; '.join(link['topology'])}`."
    if link["transport"]:
        yield f"NCCL says that it goes by {' and '.join(f'`{way}`' for way in link['transport'])}."
    if link["copy_gb_per_second"]:
        yield f"A copy from one to the other makes {link['copy_gb_per_second']:.1f} GB/s."
    yield "What a device sends through NCCL in GB/s, by the size of what all have together:"
    yield ""
    cells = [[f"{size / 2**20:,.0f} MiB", *(number(rates[kind, size], 1) for kind in SENT)] for size in sizes]
    yield from table(["", *SENT.values()], cells)


def sending(run: Run) -> Iterator[str]:
    """What a step takes longer than if nothing was sent, beside what it sends."""
    rates, at = {}, ""
    if linked := run["link"] and not run["link"]["reason"]:
        size = sorted({row["bytes"] for row in run["link"]["rates"]})[-2]
        rates = {row["kind"]: row["gb_per_second"] for row in run["link"]["rates"] if row["bytes"] == size}
        at = f" *Expected* is the time of that at the speed of {size / 2**20:,.0f} MiB, with nothing hidden."
    rows = []
    for row in timed(run):
        if not row["of_linear"] or "context_parallel" in row["name"]:  # whose states are not in the formulas
            continue
        step = row["tokens"] / row["tokens_per_second"]
        linear = step * row["of_linear"]
        sent = {kind: row["sent"][kind] / 1e9 for kind in SENT}
        expected = [number(sum(sent[kind] / rates[kind] for kind in SENT), 3)] if linked else []
        seconds = [number(x, 3) for x in (step, step - linear)]
        rows.append([row["name"], *seconds, number(sum(sent.values()), 2), *expected])
    if not rows:
        return
    yield ""
    yield "The seconds of a step, how much longer it is than a linear one, and the GB that a device sends in it by the"
    yield f"formulas ([scaling](scaling.md)).{at}"
    yield ""
    yield from table(["", "mean step, s", "longer, s", "GB sent", *(["expected, s"] if linked else [])], rows)


def traced(run: Run) -> Iterator[str]:
    """What the first GPU did in a step."""
    yield ""
    yield "What the first GPU did in a later step, by a trace of its kernels, in seconds. *Sending* has the time in"
    yield "which a kernel of NCCL waits for the other GPU. *Only sending* is the part in which nothing is computed, and"
    yield "*idle* that in which no kernel runs:"
    yield ""
    keys = ("span", "computing", "sending", "sending_alone", "idle")
    rows = [[row["name"], *(number(row["traced"][key], 2) for key in keys)] for row in timed(run) if row.get("traced")]
    yield from table(["", "step", "computing", "sending", "only sending", "idle"], rows)


def losses(run: Run) -> Iterator[str]:
    """The mean loss of the last steps, by path and seed."""
    yield where(run, "python scripts/benchmark.py losses")
    yield f"The mean loss of the last {LAST} steps, of the same tokens, from two seeds of weights: as train.py trains,"
    yield "and by PyTorch's operators alone. *Paths* and *seeds*: the largest difference between two runs of one seed,"
    yield "and of one path. Tokens are bytes of Python's own library."
    yield ""
    rows = []
    for name in dict.fromkeys(row["name"] for row in timed(run)):
        ends = {(row["path"], row["seed"]): end(row) for row in timed(run) if row["name"] == name}
        seeds = sorted({seed for _, seed in ends})
        by_path = [[ends.get((path, seed), math.nan) for seed in seeds] for path in PATHS]
        paths = max(abs(a - b) for a, b in zip(*by_path, strict=True))
        between = max(max(found) - min(found) for found in by_path)
        found = [" / ".join(f"{x:.4f}" for x in each) for each in by_path]
        rows.append([name, str(len(timed(run)[0]["losses"])), *found, f"{paths:.4f}", f"{between:.4f}"])
    yield from table(["model", "steps", "by kernels", "by PyTorch", "paths", "seeds"], rows)
    yield from left_out(run, lambda row: f"{row['name']}, {row['path']}, seed {row['seed']}")


def end(row: Run) -> float:
    last = row["losses"][-LAST:]
    return sum(last) / len(last)


def draw_losses(run: Run) -> Figure:
    """Above the losses; below what is left of their difference between paths beside that between seeds."""
    names = list(dict.fromkeys(row["name"] for row in timed(run)))
    figure = Figure(figsize=(4 * len(names), 5), layout="constrained")
    axes = figure.subplots(2, len(names), sharex=True, squeeze=False, height_ratios=(2, 1))
    for (above, below), name in zip(axes.T, names, strict=True):
        of = {(row["path"], row["seed"]): smoothed(row["losses"]) for row in timed(run) if row["name"] == name}
        first, *others = sorted({seed for _, seed in of})
        for (path, seed), values in of.items():
            line = "-" if path == PATHS[0] else ":"
            above.plot(values, line, color="C0" if seed == first else "C1", label=f"{path}, seed {seed}")
        pairs = [("paths", (PATHS[0], first), (PATHS[1], first))]
        pairs += [("seeds", (PATHS[0], first), (PATHS[0], seed)) for seed in others[:1]]
        for label, a, b in pairs:
            if a in of and b in of:
                below.plot([x - y for x, y in zip(of[a], of[b], strict=True)], label=label)
        above.set(title=name, ylabel="loss")
        below.set(xlabel="steps", ylabel="difference")
        for each in (above, below):
            each.spines[["top", "right"]].set_visible(False)
            each.legend(frameon=False, fontsize=8)
    return figure


def smoothed(values: list[float]) -> list[float]:
    """Each the mean of the last LAST."""
    return [sum(found := values[max(0, i - LAST + 1) : i + 1]) / len(found) for i in range(len(values))]


# By file: the heading, what is said of all its runs, and the lines of one.
SECTIONS: dict[str, tuple[str, str, Callable[[Run], Iterator[str]]]] = {
    "train": (
        "Training steps of whole models",
        "*6N* is six times the parameters times tokens/s over the chip's dense peak, *FLOPs* what the model counts.\n"
        "By torch.compile: *compiled* the whole model, *blocks compiled* each block, *eager* nothing. Packed\n"
        "documents do not see each other, as in training here; whole rows are of one document each.",
        training,
    ),
    "ops": (
        "Operators",
        "A forward and a backward pass. *Kernels*: the time in a GPU's kernels, without the host's between them.",
        operators,
    ),
    "starts": ("Which presets start", "", starting),
    "scaling": ("Several GPUs of one host", "", several),
    "losses": ("The same losses without kernels", "", losses),
    "length": (
        "Longer and longer sequences",
        "Tokens per second; a step has the same number of tokens at every length.",
        lengths,
    ),
    "decode": (
        "Decoding",
        "Greedy, by each model's own `generate`. A token is one of each row. GB: peaks, of prefill and of all.",
        decoding,
    ),
}


def section(folder: Path) -> str:
    """What stands between the markers."""
    made = []
    for name, (title, said, lines_of) in SECTIONS.items():
        if (path := folder / "speed" / f"{name}.json").exists():
            try:
                runs = ["\n".join(lines_of(run)) for run in runs_of(path)]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is not what `benchmark.py {name}` writes ({error!r})") from None
            made += [f"## {title}", *[said] * bool(said), *runs]
            if name in PICTURES:
                file, shown, _ = PICTURES[name]
                made.append(f"![{shown}]({file}.svg)")
    return "\n\n".join(made)


def runs_of(path: Path) -> list[Run]:
    """The run that is stored there, and those that were put under `further` by hand: of the same command at another
    time, where rows of one run are not all that there are."""
    run = json.loads(path.read_text())
    return [run, *run.get("further", [])]


def with_section(page: str, lines: str) -> str:
    """The page with these lines between its markers."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page has not one line each of {BEGIN} and {END}")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{lines}{chr(10) * 2 * bool(lines)}{END}{rest.split(END)[1]}"


def draw(runs: list[Run]) -> Figure:
    """A mixer whose time is linear in T is flat. A further run has broken lines, of models with more than one row."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    colors: dict[str, str] = {}
    for i, run in enumerate(runs):
        for name in dict.fromkeys(row["name"] for row in timed(run)):
            points = [(row["seq_len"], row["tokens_per_second"]) for row in timed(run) if row["name"] == name]
            if i == 0 or len(points) > 1:
                label, color = f"{name}, another run" if i else name, colors.setdefault(name, f"C{len(colors)}")
                line = "--" if i else "-"
                axes.plot(*zip(*points, strict=True), line, marker="o", markersize=4, label=label, color=color)
    lengths = sorted({row["seq_len"] for run in runs for row in timed(run)})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{T // 1024}k" if T >= 1024 else str(T) for T in lengths])
    axes.set(xlabel="tokens of a sequence", ylabel="tokens per second", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


# By section: the file, what it shows, and how it is drawn.
PICTURES: dict[str, tuple[str, str, Callable[[list[Run]], Figure]]] = {
    "length": ("speed", "Tokens per second over the length of a sequence", draw),
    "losses": ("losses", "Losses by kernels and by PyTorch alone", lambda runs: draw_losses(runs[0])),
}


def write(folder: Path) -> None:
    page = folder / "speed.md"
    page.write_text(with_section(page.read_text(), section(folder)))
    matplotlib.rcParams["svg.hashsalt"] = "speed"  # the same file every time
    for name, (picture, _, drawn) in PICTURES.items():
        if (found := folder / "speed" / f"{name}.json").exists():
            drawn(runs_of(found)).savefig(folder / f"{picture}.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DOCS)
    try:
        write(parser.parse_args().folder)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
