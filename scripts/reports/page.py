"""The page: one file, which needs no other and no network, with all that a comparison of runs has to show."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scripts.reports import figures
from scripts.reports.evaluations import evaluations
from scripts.reports.inner import inner
from scripts.reports.runs import Record
from scripts.reports.svg import FAINT, VARIABLES
from scripts.reports.tables import by_position, decimals_of, number, results, runs, settings, state, unfinished
from scripts.reports.variants import Comparison, value_of

HERE = Path(__file__).parent
SAMPLE = 2000  # characters that are shown of one


class Sample(NamedTuple):
    """What a variant wrote at the end of its training."""

    label: str
    text: str


def html(comparison: Comparison, records: Sequence[Record], title: str) -> str:
    """The page. records: all, those that are not finished too."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = (HERE / "page.css").read_text()
    return environment.get_template("page.html").render(
        title=title,
        style=style,
        lead=lead(comparison, records),
        legend=legend(comparison),
        notes=notes(comparison, records),
        results=results(comparison),
        settings=settings(comparison),
        curves=figures.curves(comparison),
        positions=figures.positions(comparison),
        states=figures.states(comparison),
        by_position=by_position(comparison),
        inner=inner(comparison),
        evaluations=evaluations(comparison),
        samples=samples(comparison),
        runs=runs(comparison),
        unfinished=unfinished(comparison, records),
        commands=commands(records),
        common="\n".join(f"{key}: {value_of('', value)}" for key, value in sorted(comparison.common.items())),
    )


def lead(comparison: Comparison, records: Sequence[Record]) -> str:
    """What a reader in a hurry takes along."""
    done = sum(len(variant.runs) for variant in comparison.variants)
    best = comparison.variants[0]
    said = (
        f"{_plural(done, 'finished run')} of {_plural(len(comparison.variants), 'variant')}{_trained_on(comparison)}."
    )
    mean = best.number(comparison.metric)
    if not math.isfinite(mean.mean):
        return f"{said} No variant has a finite result."
    told = number(mean, decimals_of(comparison))
    said += f" The best is {best.label}: {told} {comparison.unit} on validation"
    difference = best.minus_baseline(comparison.metric)
    if difference is None or difference.of == 0:
        return f"{said}."
    against = f"{said}, {number(difference, decimals_of(comparison), '+')} against softmax"
    if difference.half is None:
        return f"{against}, with one seed in common, which says nothing of chance."
    if abs(difference.mean) <= difference.half:
        return f"{against}, which seeds alone may explain."
    return f"{against}; the 95 % interval does not hold 0."


def _trained_on(comparison: Comparison) -> str:
    configs = [run.config for variant in comparison.variants for run in variant.runs]
    names = {
        str(c.get("data", {}).get("name") or value_of("_target_", c.get("data", {}).get("_target_"))) for c in configs
    }
    tokens = {c.get("tokens") for c in configs}
    if len(names) > 1 or len(tokens) > 1 or None in tokens:
        return ""
    return f", each trained on {tokens.pop():,} tokens of {names.pop()}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def notes(comparison: Comparison, records: Sequence[Record]) -> list[str]:
    """What makes numbers less than they seem."""
    found = []
    open_ones = [record for record in records if not record.finished]
    for record in open_ones[:8]:
        found.append(f"{record.folder.name}: {state(record)}.")
    if len(open_ones) > 8:
        found.append(f"{len(open_ones) - 8} more runs are not finished; they are listed below.")
    done = [run for variant in comparison.variants for run in variant.runs]
    bad = [run.folder.name for run in done if not math.isfinite((run.result or {}).get(comparison.metric, math.nan))]
    if bad:
        found.append(f"The result is not finite: {', '.join(bad)}. It makes the mean of its variant so.")
    seeds = {tuple(run.seed for run in variant.runs) for variant in comparison.variants}
    if len(seeds) > 1:
        found.append("The variants do not have the same seeds.")
    found += [
        f"{a.folder.name} has the config and the seed of {b.folder.name}, and is left out." for a, b in comparison.twice
    ]
    for key, noun in {"commit": "commits", "device": "kinds of device", "versions": "sets of package versions"}.items():
        kinds = {str((run.result or {}).get(key)) for run in done}
        if len(kinds) > 1:
            found.append(f"The runs come from {len(kinds)} {noun}: see the table of runs.")
    if any((run.result or {}).get("changed") for run in done):
        found.append("Some runs come from files that no commit has (with changes).")
    skipped = {run.folder.name: run.rows[-1].get("train/skipped_steps", 0) for run in done if run.rows}
    found += [
        f"{name} left out {count:.0f} steps that were not finite." for name, count in skipped.items() if count > 0
    ]
    return found


def legend(comparison: Comparison) -> list[dict[str, Any]]:
    found, others = [], 0
    for label, look in figures.looks(comparison).items():
        if look.colour == FAINT:
            others += 1
            continue
        dash = " ".join(f"{2 * n:g}" for n in look.dash[1]) if isinstance(look.dash, tuple) else ""
        found.append({"label": label, "colour": VARIABLES[look.colour], "width": 2 * look.width, "dash": dash})
    if others:
        found.append({"label": f"{others} others", "colour": VARIABLES[FAINT], "width": 2, "dash": ""})
    return found


def samples(comparison: Comparison) -> list[Sample]:
    """One a variant, of its first seed that has one."""
    found = []
    for variant in comparison.variants[: figures.MOST + 1]:
        run = next((run for run in variant.runs if run.sample), None)
        if run is not None:
            found.append(Sample(f"{variant.label}, seed {run.seed}", run.sample[:SAMPLE]))
    return found


def commands(records: Iterable[Record]) -> str:
    lines = []
    for record in records:
        known = (record.result or {}).get("command")
        words = "python train.py -m " + " ".join(map(shlex.quote, record.words)) if record.words else None
        lines.append(known or words or f"# {record.folder.name}: its command was not recorded")
    return "\n".join(lines)
