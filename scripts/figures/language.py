"""The ablation of language models: its tables and figures."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.figures import published
from scripts.figures.results import (
    Claim,
    Row,
    best,
    by_position,
    grouped,
    known_first,
    label,
    learning_rate,
    legend,
    log_axis,
    look,
    mean,
    mean_if_any,
    ranges_axis,
    settings,
    spread,
    ticks,
)

BESIDE = "softmax"  # whose loss is taken from the others'
SHOWN = 10  # mixers in the left panel: more lines than that can't be told apart
WINDOWS = "0.6"  # the colour of softmax over windows


def better(row: Row) -> float:
    return -row["validation/nats"]


def ablation_table(rows: list[Row]) -> list[Row]:
    """In the order of the loss. place: among those that the published table has too, where three of them were run."""
    found = []
    for name, runs in best(rows, label, better).items():
        bits = [run["validation/bits_per_byte"] for run in runs]
        row: Row = {"mixer": name, "bits per byte": mean(bits), "spread": spread(bits), "seeds": len(runs)}
        row |= {"nats per token": mean(run["validation/nats"] for run in runs)}
        row |= {"rate": learning_rate(runs[0]), "parameters": runs[0]["parameters"]}
        speeds = [run["tokens_per_second"] for run in runs if run.get("tokens_per_second")]
        row |= {"state": runs[0]["state_size"], "tokens/s": round(max(speeds)) if speeds else None}
        found.append(row)
    found.sort(key=lambda row: known_first(row["bits per byte"]))
    places = [row["mixer"] for row in found if row["mixer"] in published.ABLATION.of]
    places = places if len(places) > 2 else []
    known = {name: row for name, row in published.ABLATION.of.items() if name in places}
    theirs = sorted(known, key=lambda name: known[name][0] or 0)
    return [row | {"place": places.index(row["mixer"]) + 1 if row["mixer"] in places else None,
                   "their place": theirs.index(row["mixer"]) + 1 if row["mixer"] in places else None}
            for row in found]  # fmt: skip


def ablation_figure(rows: list[Row], figure: Figure) -> None:
    """Left: loss by position, that of softmax taken away. Right: loss against the size of the state."""
    table, chosen = ablation_table(rows), best(rows, label, better)
    figure.set_size_inches(9, max(3.8, 0.8 + 0.18 * len(table)))
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    looks = {row["mixer"]: look(i) | {"label": row["mixer"]} for i, row in enumerate(table)}
    looks |= {name: looks[name] | {"color": WINDOWS} for name in looks if is_window(name)}
    if BESIDE in chosen:
        differences(left, chosen, looks)
    left.set(xlabel="position in the row, tokens", ylabel=f"nats per token, less those of {BESIDE}")
    for row in table:
        right.plot(row["state"], row["bits per byte"], linestyle="none", **looks[row["mixer"]])
    right.set(xscale="log", xlabel="state, numbers a sequence", ylabel="validation, bits per byte")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    legend(figure)


def is_window(name: str) -> bool:
    return name.startswith(f"{BESIDE} ")


def differences(axes: Axes, chosen: dict[str, list[Row]], looks: dict[str, Row]) -> None:
    """Of the best mixers, and of softmax's windows. These do not set the axis: the short ones are so far above the
    mixers that the differences between those would not be seen."""
    base = mean_by_position(chosen[BESIDE])
    mixers = [name for name in looks if name != BESIDE and not is_window(name)][:SHOWN]
    windows = [name for name in looks if is_window(name)]
    heights = [0.0]
    for name in [*mixers, *windows]:
        at = {position: x - base[position] for position, x in mean_by_position(chosen[name]).items()}
        axes.plot(list(at), list(at.values()), linewidth=1.3, **looks[name])
        heights += [x for x in at.values() if math.isfinite(x) and not (mixers and name in windows)]
    axes.axhline(0.0, color="0.5", linewidth=1)
    ranges_axis(axes, max(base))
    if (spread := max(heights) - min(heights)) > 0:
        axes.set_ylim(min(heights) - 0.1 * spread, max(heights) + 0.3 * spread)


def mean_by_position(runs: list[Row]) -> dict[float, float]:
    each = [by_position(run) for run in runs]
    return {position: mean(of[position] for of in each) for position in each[0]}


def rates_table(rows: list[Row]) -> list[Row]:
    """A row for each mixer: the loss at every rate, the rate of the least, and whether that is the lowest or highest
    at which it was run. Those with the least loss first."""
    rates = sorted({settings(row)["optimizer.lr"] for row in rows}, key=float)
    found = []
    for name, runs in grouped(rows, label).items():
        of = {
            rate: mean_if_any(run["validation/bits_per_byte"] for run in runs if settings(run)["optimizer.lr"] == rate)
            for rate in rates
        }
        best_rate = min(rates, key=lambda rate: known_first(of[rate]))
        run_at = [rate for rate in rates if any(settings(run)["optimizer.lr"] == rate for run in runs)]
        edge = "the only one" if len(run_at) == 1 else "yes" if best_rate in (run_at[0], run_at[-1]) else ""
        found.append({"mixer": name} | of | {"best": best_rate, "at the edge": edge})
    return sorted(found, key=lambda row: known_first(row[row["best"]]))


def rates_figure(rows: list[Row], figure: Figure) -> None:
    axes, table = figure.subplots(), rates_table(rows)
    rates = [rate for rate in table[0] if rate not in ("mixer", "best", "at the edge")]
    for i, row in enumerate(table):
        at = {float(rate): x for rate, x in row.items() if rate in rates}
        axes.plot(list(at), list(at.values()), linewidth=1.3, label=row["mixer"], **look(i))
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation, bits per byte")
    axes.set_xticks(list(map(float, rates)), rates, minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    legend(figure)


COPIED, BEFORE = "memory/copied/", "memory/before/"


def looked_into(rows: list[Row]) -> list[Row]:
    """A row for each mixer, at its best rate, of means over seeds; in the order of their loss."""
    found = []
    for runs in best(rows, label, better).values():
        means = {key: mean(run[key] for run in runs) for key in runs[0] if key.startswith(("memory/", "validation/"))}
        found.append(runs[0] | means | {"seeds": len(runs)})
    return sorted(found, key=lambda row: known_first(row["validation/nats"]))


def memory_of_text_table(rows: list[Row]) -> list[Row]:
    """Of the inner loss, the first range of positions and the last."""
    found, looked = [], looked_into(rows)
    along = list(dict.fromkeys(name for run in looked for name in run if name.startswith(BEFORE)))
    for run in looked:
        row: Row = {"mixer": label(run), "seeds": run["seeds"], "state": run["state_size"]}
        row |= {"nats per token": run["validation/nats"]}
        row |= {f"copied, {name[len(COPIED) :]}": x for name, x in run.items() if name.startswith(COPIED)}
        row |= {"pair seen": run["memory/seen"], "pair new": run["memory/new"]}
        found.append(row | {f"inner loss, {name[len(BEFORE) :]}": run.get(name) for name in along[:1] + along[1:][-1:]})
    return found


def memory_of_text_figure(rows: list[Row], figure: Figure) -> None:
    """What is left of a stretch by its distance; the loss of pairs that are new and seen; the inner loss."""
    left, middle, right = figure.subplots(1, 3)
    shown: set[int] = set()  # distances
    for i, run in enumerate(looked_into(rows)):
        at = {int(name[len(COPIED) :]): x for name, x in run.items() if name.startswith(COPIED)}
        left.plot(list(at), list(at.values()), linewidth=1.3, label=label(run), **look(i))
        shown |= at.keys()
        middle.plot(run["memory/new"], run["memory/seen"], linestyle="none", **look(i))
        ranges = {name[len(BEFORE) :]: x for name, x in run.items() if name.startswith(BEFORE)}
        middles = [sum(map(int, name.split("-"))) / 2 for name in ranges]
        right.plot(middles, list(ranges.values()), linewidth=1.3, **look(i))
        log_axis(right, ranges.values())
    left.set_xscale("symlog", linthresh=64)
    ticks(left, sorted(shown)[::2])
    left.set(xlabel="tokens between", ylabel="nats per token saved", title="a stretch shown again")
    middle.set(xlabel="pair new, nats", ylabel="pair seen, nats", title="rare pairs of tokens")
    ranges_axis(right, 2048)
    right.set(xlabel="position, tokens", title="inner loss before the write")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    legend(figure)


def gates_table(rows: list[Row]) -> list[Row]:
    """In the order of the loss; the loss at the first positions and at the last."""
    found = []
    for name, runs in best(rows, label, better).items():
        bits, at = [run["validation/bits_per_byte"] for run in runs], mean_by_position(runs)
        row: Row = {"mixer": name, "bits per byte": mean(bits), "spread": spread(bits), "seeds": len(runs)}
        row |= {"nats per token": mean(run["validation/nats"] for run in runs)}
        first, last = min(at), max(at)
        found.append(row | {f"at {first:.0f}": at[first], f"at {last:.0f}": at[last]})
    return sorted(found, key=lambda row: known_first(row["bits per byte"]))


def gates_figure(rows: list[Row], figure: Figure) -> None:
    """A line for each mixer from each start, a point for each seed."""
    ordered, axes = [row["mixer"] for row in gates_table(rows)], figure.subplots()
    chosen = best(rows, label, better)
    for i, model in enumerate(dict.fromkeys(name.split()[0] for name in ordered)):
        names = [name for name in ordered if name.split()[0] == model]
        points = [(run["validation/bits_per_byte"], ordered.index(name)) for name in names for run in chosen[name]]
        axes.plot(*zip(*points, strict=True), linestyle="none", label=model, **look(i, 6))
    axes.set_yticks(range(len(ordered)), ordered)
    axes.set(xlabel="validation, bits per byte", ylim=(len(ordered) - 0.5, -0.5))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    legend(figure)


SHOWS = (
    "Loss on text of packages that are not in training. Spread: between seeds. State: numbers after 2,048 tokens. "
    "Places: among what MesaNet's table 10 (400M) has too."
)
CLAIMS = {
    "ablation": Claim(
        "The language-model ablation",
        ("ablation", "ablation_windows", "ablation_convolutions", "ablation_gates"),
        "At equal parameters, tokens, data and order, what a mixer can keep of a text shows in the loss, and most "
        "where the text is long.",
        SHOWS,
        better,
        ablation_table,
        ablation_figure,
        options="--rates ablation_rates --times 0.75 --minutes 9",
    ),
    "ablation_170m": Claim(
        "The language-model ablation, larger",
        ("ablation_170m",),
        "The order of the best mixers holds at three times the size.",
        SHOWS,
        better,
        ablation_table,
        ablation_figure,
        options="--rates ablation_rates --times 0.5 --minutes 9",
    ),
    "ablation_rates": Claim(
        "Learning rates for the ablation",
        ("ablation_rates",),
        "Mixers differ in the rate that suits them, so that one rate for all would measure the rate.",
        "Validation loss in bits per byte of models of 384 x 6 layers after 26 million tokens, at each rate.",
        better,
        rates_table,
        rates_figure,
        options="--at-once 3 --minutes 9",
    ),
    "gates": Claim(
        "How fast memories forget at the start",
        ("gates",),
        "Mixers with a gamma per channel lose to simpler ones because their memories begin too short: from RetNet's "
        "half-lives they gain more than the others.",
        "Validation loss of models of 1.3 million parameters after a million tokens, from the start that each mixer "
        "has of its own and from half-lives as RetNet's, in tokens.",
        better,
        gates_table,
        gates_figure,
        options="--at-once 2",
    ),
    "output_gates": Claim(
        "What stands around a memory",
        ("output_gates", "convolutions", "decays"),
        "The convolution before a memory, how it fades and the gate behind it weigh as much as the rule of the memory.",
        "Validation loss of models of 1.3 million parameters after a million tokens, with each gate and decay, and "
        "with and without a convolution and an activation.",
        better,
        gates_table,
        gates_figure,
        options="--at-once 2",
    ),
    "ablation_memory": Claim(
        "What the models of the ablation remember of a text",
        ("ablation",),
        "A key-value cache keeps what it has seen at any distance, and a memory of fixed size forgets. Recall and the "
        "loss go together, and the inner loss falls along the sequence.",
        "Nats a token saved by a stretch of 64 tokens shown so many tokens before; loss on rare pairs of tokens, seen "
        "in the row or new;\ninner loss of the first and the last positions that were looked at, before the write.",
        better,
        memory_of_text_table,
        memory_of_text_figure,
        options="--rates ablation_rates --times 0.75 --minutes 9",
        then="python scripts/memory.py ablation",
        needs="memory/seen",
    ),
}
