"""The tables of a page, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scripts.reports.figures import POSITION
from scripts.reports.intervals import Interval
from scripts.reports.runs import Record
from scripts.reports.variants import ABSENT, Comparison, shown, value_of

NONE = "–"


class Table(NamedTuple):
    """explain: more about a column, by its head. says: what all must know."""

    head: list[str]
    rows: list[list[str]]
    says: str = ""
    explain: Mapping[str, str] = {}


def number(found: Interval | None, decimals: int, sign: str = "") -> str:
    """mean ± half."""
    if found is None or found.of == 0:
        return NONE
    if not math.isfinite(found.mean):
        return "not finite"
    half = "" if found.half is None else f" ± {found.half:.{decimals}f}"
    return f"{found.mean:{sign}.{decimals}f}{half}".replace("-", "−")


def decimals_of(comparison: Comparison) -> int:
    return 4 if abs(comparison.variants[0].number(comparison.metric).mean) < 1 else 3


def results(comparison: Comparison) -> Table:
    """Means over seeds, the best variant first."""
    decimals, metric = decimals_of(comparison), comparison.metric
    compared = any(variant.baseline not in (None, variant) for variant in comparison.variants)
    costs = {
        "parameters": lambda v: _count(v.number("parameters").mean),
        "state": lambda v: _count(v.number("state_size").mean),
        "FLOPs a token": lambda v: _amount(v.number("flops").mean / max(1.0, v.number("tokens").mean)),
        "tokens/s": lambda v: _count(v.number("tokens_per_second").mean),
    }
    differences = ["minus softmax"] if compared else []
    rows = []
    for variant in comparison.variants:
        seeds = [f"{(run.result or {}).get(metric, math.nan):.{decimals}f}" for run in variant.runs]
        each = ", ".join(seeds[:5]) + (", ..." if len(seeds) > 5 else "")
        row = [variant.label, str(len(seeds)), number(variant.number(metric), decimals), each]
        row += [number(variant.minus_baseline(metric), decimals, "+")] if compared else []
        rows.append(row + [cost(variant) for cost in costs.values()])
    says = (
        f"Validation at the end of training; {'higher' if comparison.higher_is_better else 'lower'} is better. Mean ± "
        "half the width of a 95 % confidence interval over seeds, by Student's t: with two seeds 12.7 standard errors, "
        "with three 4.3, with five 2.8."
    )
    if compared:
        says += (
            " Minus softmax: the mean and the interval of the differences between runs of the same seed; an interval "
            "that holds 0 shows no difference. Each interval is of one variant alone: the more there are, the likelier "
            "one of them misses."
        )
    explain = {
        "state": "numbers that all layers hold for one sequence, after as many tokens as in training",
        "FLOPs a token": "to train: forward and backward, counted from the model",
        "tokens/s": "the median of each run; only comparable on one machine that did nothing else",
    }
    return Table(["variant", "seeds", comparison.unit, "each seed", *differences, *costs], rows, says, explain)


def settings(comparison: Comparison) -> Table:
    """All settings that differ among finished runs, with a column a variant."""
    keys = list(comparison.variants[0].settings)
    rows = [
        [key.removesuffix("._target_"), *(value_of(key, variant.settings[key]) for variant in comparison.variants)]
        for key in keys
    ]
    return Table(["setting", *(variant.label for variant in comparison.variants)], rows)


def by_position(comparison: Comparison) -> Table:
    names = {name for variant in comparison.variants for run in variant.runs for name in run.result or {}}
    ends = sorted((int(match[1]), int(match[2]), name) for name in names if (match := POSITION.fullmatch(name)))
    rows = [[variant.label, *(number(variant.number(name), 3) for *_, name in ends)] for variant in comparison.variants]
    head = ["variant", *(f"{first}–{last}" for first, last, _ in ends)]
    return Table(head, rows, "Nats per token at these positions of a sequence, with 95 % intervals over seeds.")


def runs(comparison: Comparison) -> Table:
    """Each finished run: what came out and what computed it. What is the same of all is said below."""
    done = [(variant, run, run.result or {}) for variant in comparison.variants for run in variant.runs]
    origins = {
        "device": [came.get("device") or NONE for _, _, came in done],
        "versions": [" ".join(f"{k} {v}" for k, v in came.get("versions", {}).items()) or NONE for *_, came in done],
    }
    apart = {name: values for name, values in origins.items() if len(set(values)) > 1}
    rows = []
    for i, (variant, run, came) in enumerate(done):
        seconds = run.validations[-1]["seconds"] if run.validations else math.nan
        numbers = [f"{came.get(comparison.metric, math.nan):.4f}", _count(came.get("tokens", math.nan)), _time(seconds)]
        from_where = [_commit(came), *(values[i] for values in apart.values())]
        rows.append([variant.label, str(run.seed), *numbers, *from_where, run.folder.name])
    head = ["variant", "seed", comparison.unit, "tokens", "time", "commit", *apart, "folder"]
    says = "; ".join(values[0] for name, values in origins.items() if name not in apart and values[0] != NONE)
    explain = {"time": "hours:minutes:seconds of training, without validations and checkpoints"}
    return Table(head, rows, f"All on {says}." if says else "", explain)


def unfinished(comparison: Comparison, records: Sequence[Record]) -> Table:
    rows = []
    for record in (record for record in records if not record.finished):
        differ = comparison.unlike.get(record.folder, {})
        words = ", ".join(shown(key, value, list(differ)) for key, value in differ.items() if value != ABSENT)
        rows.append([record.folder.name, words or " ".join(record.words) or NONE, str(record.seed), state(record)])
    return Table(["folder", "settings", "seed", "state"], rows)


def state(record: Record) -> str:
    """Of a run that is not finished."""
    if not record.config:
        return f"failed before it began: {record.failure}"
    done = f"{record.tokens:,.0f} of {record.config['tokens']:,} tokens"
    return f"failed after {done}: {record.failure}" if record.failure else f"stopped, or still running, after {done}"


def text(table: Table, most: int = 6) -> str:
    """For a terminal: the first columns."""
    cells = [row[:most] for row in (table.head, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  " + "   ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    )


def _count(x: float) -> str:
    return f"{x:,.0f}" if math.isfinite(x) else NONE


def _amount(x: float) -> str:
    """With a prefix, like 3.1M."""
    if not math.isfinite(x):
        return NONE
    power = min(5, max(0, int(math.log10(max(x, 1)) // 3)))
    return f"{x / 1000**power:.3g}{['', 'k', 'M', 'G', 'T', 'P'][power]}"


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return NONE
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _commit(came: Mapping[str, Any]) -> str:
    if not came.get("commit"):
        return NONE
    return came["commit"][:10] + (" with changes" if came.get("changed") else "")
