"""RegBench: its table and figure. Beside the mixers stand n-grams that are counted in the sequence: nothing is learned.

An n-gram looks at the last n - 1 symbols of the word so far, or at all of it, and says what has followed them most
often in this sequence. Where they have not been met it looks at one symbol less. Akyürek et al. 2024 (arXiv 2401.12973)
find that Transformers behave like such counts. No published number stands beside ours, since none was checked at its
source.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache

import numpy as np
from matplotlib.figure import Figure

from data.automata import SEPARATOR, RegBench
from data.text import IGNORE
from scripts.figures.results import (
    Row,
    about,
    accuracy,
    accuracy_by_range,
    best,
    guess,
    label,
    legend,
    line,
    look,
    mean,
    ranges_axis,
    settings,
    spread,
)

ORDERS = (2, 3, 4)  # a fifth adds 0.002
DASHES = ((0, (1, 1)), (0, (3, 1.5)), (0, (6, 2)))


def guesses(tokens: np.ndarray, asked: np.ndarray, order: int) -> np.ndarray:
    """What an n-gram of this order says comes next, where it is asked; [T] each. Of equally frequent symbols the one
    that was met first."""
    met: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
    found = np.zeros(len(tokens), dtype=np.int64)
    word: tuple[int, ...] = (SEPARATOR,)
    for t, token in enumerate(tokens.tolist()):
        for begin in range(max(0, len(word) - order + 1), len(word) + 1):
            if token != SEPARATOR:
                counts = met[word[begin:]]
                counts[token] = counts.get(token, 0) + 1
        word = (SEPARATOR,) if token == SEPARATOR else (*word, token)
        if asked[t]:
            begins = range(max(0, len(word) - order + 1), len(word) + 1)
            counts = next(met[word[begin:]] for begin in begins if word[begin:] in met)
            found[t] = max(counts, key=counts.__getitem__)
    return found


@cache
def counted(order: int, num_sequences: int, seed: int, ranges: tuple[tuple[int, int], ...]) -> tuple[float, ...]:
    """The accuracy of an n-gram on the validation set, and in these ranges of positions, both ends in them."""
    tokens, labels, right = RegBench(960, seed=seed).make("validation", np.arange(num_sequences))
    asked = labels != IGNORE
    said = np.stack([guesses(*row, order) for row in zip(tokens, asked, strict=True)])
    hits = asked & (right >> said & 1).astype(bool)
    parts = [slice(None), *(slice(first, last + 1) for first, last in ranges)]
    return tuple(float(hits[:, part].sum() / asked[:, part].sum()) for part in parts)


def n_grams(row: Row) -> dict[int, tuple[float, dict[str, float]]]:
    """By their order: on the sequences that this run was validated on, in all and by range."""
    of = settings(row)
    num = int(of.get("data.validation_size", 500))
    if "validation_tokens" in of:
        num = min(num, -(-int(of["validation_tokens"]) // 960))
    names = list(accuracy_by_range(row))
    ranges = tuple((int(first), int(last)) for first, last in (name.split("-") for name in names))
    found = {order: counted(order, num, int(of.get("data.seed", 0)), ranges) for order in ORDERS}
    return {order: (whole, dict(zip(names, parts, strict=True))) for order, (whole, *parts) in found.items()}


def named(order: int) -> str:
    return f"{order}-gram, counted"


def table(rows: list[Row]) -> list[Row]:
    """The best first."""
    found = []
    for name, runs in best(rows, label, accuracy).items():
        each = list(map(accuracy, runs))
        row: Row = {"mixer": name, "accuracy": mean(each), "spread": spread(each)}
        row |= {part: mean(accuracy_by_range(run)[part] for run in runs) for part in accuracy_by_range(runs[0])}
        row |= {"state": runs[0]["state_size"], "parameters": runs[0]["parameters"]}
        found.append(row | about(runs))
    nothing = dict.fromkeys(found[0])
    found += [nothing | {"mixer": named(n), "accuracy": x} | parts for n, (x, parts) in n_grams(rows[0]).items()]
    return sorted(found, key=lambda row: -row["accuracy"])


def figure(rows: list[Row], figure: Figure) -> None:
    """Left: a line for each mixer and n-gram, a point for each seed. Right: accuracy by position."""
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    order, chosen = [row["mixer"] for row in table(rows)], best(rows, label, accuracy)
    figure.set_size_inches(9, max(3.8, 1.2 + 0.2 * len(order)))
    middle = {name: sum(map(int, name.split("-"))) / 2 for name in accuracy_by_range(rows[0])}
    names = [name for name in order if name in chosen]
    for i, name in enumerate(names):
        runs = chosen[name]
        left.plot([accuracy(run) for run in runs], [order.index(name)] * len(runs), linestyle="none", **look(i, 5))
        line(right, i, {at: mean(accuracy_by_range(run)[part] for run in runs) for part, at in middle.items()}, name)
    for (n, (whole, parts)), dash in zip(n_grams(rows[0]).items(), DASHES, strict=True):
        left.plot(whole, order.index(named(n)), "|", color="0.4", markersize=8)
        right.plot(
            list(middle.values()), list(parts.values()), color="0.4", linestyle=dash, label=named(n), linewidth=1
        )
    chance = rows[0]["validation/chance"]
    guess(right, chance)
    left.axvline(chance, color="0.7", linewidth=1)
    left.set_yticks(range(len(order)), order, fontsize=8)
    left.set(xlabel="accuracy", xlim=(-0.03, 1.03), ylim=(len(order) - 0.4, -0.6))
    left.grid(alpha=0.3)
    left.spines[["top", "right"]].set_visible(False)
    right.set(xlabel="position, symbols", ylabel="accuracy")
    ranges_axis(right, max(middle.values()))
    legend(figure)
