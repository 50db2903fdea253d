"""What each experiment is to show: its table, from the lines of results.jsonl, and its figure.

Runs that differ in their seed alone are averaged. Of several rates the best counts, by the mean over seeds, as in the
papers; the table says which.
"""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from scripts.figures import language, published, regbench, tiny
from scripts.figures.results import (
    Claim,
    Row,
    about,
    accuracy,
    best,
    curve,
    grouped,
    guess,
    label,
    legend,
    line,
    mean,
    mean_if_any,
    points,
    settings,
    spread,
    ticks,
)

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
        most = max((spread(points(run)[p] for run in runs) for p in at), key=lambda x: x or 0)
        found.append({"mixer": name, "state": runs[0]["state_size"]} | at | {"spread": most} | about(runs))
    return found


def memory_figure(rows: list[Row], figure: Figure) -> None:
    table = memory_table(rows)
    pairs = sorted({int(name.split("x")[1]) for row in rows for name in points(row)})
    for axes, n in zip(figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0], pairs, strict=True):
        for i, row in enumerate(table):
            at = {int(name.split("x")[0]): x for name, x in row.items() if name.endswith(f"x{n}")}
            line(axes, i, at, row["mixer"])
        axes.set(xscale="log", xlabel="tokens", ylabel="accuracy", title=f"{n} pairs")
        ticks(axes, at)
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
            row |= {task: max(map(scaled, runs), default=None), f"{task}, mean": mean_if_any(map(scaled, runs))}
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
        chance = next(row["validation/chance"] for row in rows if settings(row)["data"] == task)
        guess(axes, chance)
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


# needles


def needle_table(rows: list[Row]) -> list[Row]:
    """A row for each mixer and task, with the accuracy at each length."""
    found = []
    for (task, name), runs in best(rows, lambda row: (settings(row)["data"], label(row)), recall_mean).items():
        at = {point: mean(points(run)[point] for run in runs) for point in points(runs[0])}
        found.append({"task": task.removeprefix("needle_"), "mixer": name} | at | about(runs))
    return found


def needle_figure(rows: list[Row], figure: Figure) -> None:
    table = needle_table(rows)
    tasks, names = (list(dict.fromkeys(row[key] for row in table)) for key in ("task", "mixer"))
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for row in (row for row in table if row["task"] == task):
            at = {int(length): x for length, x in row.items() if length.isdigit()}
            line(axes, names.index(row["mixer"]), at, row["mixer"])
        guess(axes, next(row["validation/chance"] for row in rows if settings(row)["data"] == f"needle_{task}"))
        axes.set(xscale="log", xlabel="bytes", ylabel="accuracy of a digit", title=task)
        ticks(axes, at)
        axes.label_outer()
    legend(figure)


# in-context regression


def error(row: Row) -> float:
    """Half the mean squared error at the longer sequences."""
    return row["validation/nats_on/longer"]


def regression_runs(rows: list[Row]) -> tuple[list[str], list[str], dict[tuple[str, str], list[Row]]]:
    """The functions, the mixers, and the runs of each pair."""
    chosen = best(rows, lambda row: (settings(row)["data"], label(row)), lambda row: -error(row))
    functions, names = (list(dict.fromkeys(pair[i] for pair in chosen)) for i in (0, 1))
    return functions, names, chosen


def regression_table(rows: list[Row]) -> list[Row]:
    functions, names, chosen = regression_runs(rows)
    found = []
    for name in names:
        of = {f.removeprefix("regression_"): chosen.get((f, name), []) for f in functions}
        row: Row = {"mixer": name} | {f: mean_if_any(map(error, runs)) for f, runs in of.items()}
        found.append(row | {"seeds": max(map(len, of.values()))})
    return found


def regression_figure(rows: list[Row], figure: Figure) -> None:
    functions, names, chosen = regression_runs(rows)
    panels = figure.subplots(1, len(functions), sharey=True, squeeze=False)[0]
    for axes, function in zip(panels, functions, strict=True):
        for i, name in enumerate(names):
            if runs := chosen.get((function, name)):
                each = [curve(run, "longer") for run in runs]
                line(axes, i, {at: mean(of[at] for of in each) for at in each[0]}, name, log=True)
        guess(axes, 0.5, "one that says 0")
        axes.set(xlabel="tokens, two a pair", ylabel="half the squared error", title=function.partition("_")[2])
        axes.label_outer()
    panels[0].set_ylim(top=1.0)
    legend(figure)


CLAIMS = {
    "tiny_table": Claim(
        "Every preset on one text",
        ("tiny_table",),
        "Mixers trained from the command line, at equal parameters, on equal tokens of one text.",
        "Bits per byte of files of Python's standard library that were not trained on, after 2.2 million bytes of the\n"
        "others at size=tiny, where no further word says another number, and the largest difference between seeds.\n"
        "State: numbers held per sequence of 128 bytes. Half a million parameters tell little of large models, and a\n"
        "difference that is not much larger than those between seeds is none.",
        lambda row: -tiny.bits(row),
        tiny.table,
        tiny.figure,
        options="--at-once 24 --minutes 9",
    ),
    "mqar": Claim(
        "Recall against the size of the memory",
        ("mqar",),
        "How much of what it was told a mixer finds again grows with the numbers that it holds, and at the same size "
        "the rules of writing differ.",
        "Accuracy at each test point, tokens x pairs (Zoology's mixture, 2 layers), and their mean. State: numbers "
        "after a sequence of training.",
        recall_mean,
        recall_table,
        recall_figure,
    ),
    "mqar_memory": Claim(
        "One memory of 64 x 64, with 64 and with 128 pairs",
        ("mqar_memory",),
        "One layer with one short convolution recalls 64 pairs to 4,096 tokens. With more pairs than keys have "
        "channels, a linear memory forgets, and least squares holds longer.",
        "Accuracy at each test point, tokens x pairs. Spread is the largest difference between seeds. State: "
        "numbers after a sequence of training.",
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
        "Accuracy at all of 512 elements after training on 128, scaled so that a guess is 0: the best of the "
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
    "needles": Claim(
        "Needles in a haystack",
        ("needles",),
        "A memory of fixed size must know at once what of a text is worth keeping, and keep it while the text goes on.",
        "Accuracy of a digit of the answer, by bytes of the text, after training on 1,024.",
        recall_mean,
        needle_table,
        needle_figure,
    ),
    "regression": Claim(
        "In-context regression",
        ("regression",),
        "A mixer that fits what it has seen predicts the next pair of a function that it has never met. Which ones it "
        "can fit depends on what its memory can express.",
        "Half the mean squared error over 128 pairs after training on 64; 0.5 for a model that says 0. The figure ends "
        "at 1, and a curve that leaves it is worse than that.",
        lambda row: -error(row),
        regression_table,
        regression_figure,
    ),
    "regbench": Claim(
        "Languages that are met in context",
        ("regbench",),
        "A mixer that counts what has followed the last symbols knows a sequence's language after some words of it. "
        "A memory of fixed size has to count in less room than a key-value cache.",
        "How often the likeliest symbol is one that the automaton allows, in all and by position in the sequence; "
        "0.111 for a guess. State: numbers after 960 symbols.",
        accuracy,
        regbench.table,
        regbench.figure,
    ),
    **language.CLAIMS,
}
