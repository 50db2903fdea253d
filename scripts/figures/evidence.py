"""The page of an experiment: docs/evidence/NAME/ with README.md, figure.svg, table.json and table.txt.

    python scripts/evidence.py mqar --at-once 8 --minutes 20      # makes results, on a machine with a GPU
    python scripts/figures/evidence.py mqar                       # draws from the stored results, on any machine

Reads results.jsonl of the experiment, and of others that belong to it (scripts/figures/claims.py). notes.md, where it
is there, stands in the README as it is: what agrees with the published numbers, what does not, and why.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from conf.folders import FREE_TO_CHANGE, setting
from scripts.figures.claims import CLAIMS
from scripts.figures.results import DIVERGED, RATES, Claim, Row, label, settings
from scripts.sweeps.jobs import params, sweep
from scripts.sweeps.results import Results

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "evidence"
WIDTH = 120  # of a line of a page
POINTS = 5.0  # percent, from which on a difference to a published number is named


def read(claim: Claim, folder: Path) -> list[Row]:
    """Raises ValueError where there is no result yet, or one of settings that another has not."""
    found: list[Row] = []
    kinds: Counter[tuple[str, str]] = Counter()
    for source in claim.sources:
        path = folder / source / "results.jsonl"
        rows = [row for row in Results(path).read() if not claim.needs or claim.needs in row]
        for row in rows:
            if (experiment := settings(row).get("experiment")) != source:
                raise ValueError(f"{path} has a run of experiment={experiment}, which is not {source}")
        kinds.update((source, beyond(source, row)) for row in rows)
        found += sorted(rows, key=lambda row: place(source, row))
    if len({kind for _, kind in kinds}) > 1:
        each = (f"{n} of {source} with {kind or 'those of the sweep'}" for (source, kind), n in kinds.items())
        raise ValueError(f"{folder} has runs of several settings, which one table can't hold: {'; '.join(each)}")
    if not found:
        what = f"results with {claim.needs}" if claim.needs else "results"
        command = claim.then or "python scripts/evidence.py"
        raise ValueError(f"{folder / claim.sources[0]} has no {what} yet; {command} makes them")
    return found


def beyond(source: str, row: Row) -> str:
    """The settings of a run that its sweep is not over, and that change what is computed, as words."""
    over = {"experiment", "name", "seed", *RATES, *params(source)[1]}
    free = {"hydra", "strategy", *FREE_TO_CHANGE}
    words = {word.partition("=")[0]: word for word in row["words"]}
    return shlex.join(word for key, word in sorted(words.items()) if key not in over and setting(word) not in free)


@cache
def planned(experiment: str) -> list[Row]:
    """The jobs of its sweep, as far as they have words."""
    return [{"words": list(job.words)} for job in sweep(experiment, [])]


def point(source: str, row: Row) -> tuple[str | None, ...]:
    """Where in its sweep a run is."""
    return tuple(settings(row).get(key) for key in params(source)[1])


def place(source: str, row: Row) -> tuple[float, ...]:
    """By which results are brought into the order of the sweep, then of the rates, its seeds last: they are in the
    order in which runs ended. Behind the sweep's own values are the others, as they come."""
    here = settings(row)
    found = {key: values_of(source, key) for key in params(source)[1]}
    index = {key: values.index(here[key]) if here.get(key) in values else len(values) for key, values in found.items()}
    seed = index.pop("seed", 0)
    return (*index.values(), *(float(here.get(key, 0)) for key in RATES), seed)


@cache
def values_of(source: str, key: str) -> list[str]:
    """In the sweep."""
    return list(dict.fromkeys(settings(job)[key] for job in planned(source)))


def points_as_words(source: str, rows: list[Row], options: str) -> Iterator[str]:
    """What of a sweep was run besides its own points: other seeds, say, or rates. options: of the page's command."""
    for key in dict.fromkeys(["name", "seed", *params(source)[1], *RATES]):
        if key == "optimizer.lr" and "--rates" in options:
            continue
        here, plan = (
            {settings(row)[key]: None for row in of if key in settings(row)} for of in (rows, planned(source))
        )
        if not here.keys() <= plan.keys():
            yield f"{key}={','.join(here)}"


def missing(source: str, rows: list[Row]) -> list[str]:
    """By mixer, how many runs of the sweep have no result."""
    there = {point(source, row) for row in rows}
    plan = Counter(label(job) for job in planned(source))
    left = Counter(label(job) for job in planned(source) if point(source, job) not in there)
    return [name if n == plan[name] else f"{name} ({n} of {plan[name]} runs)" for name, n in left.items()]


def digits(values: Iterable[Any]) -> int:
    """Behind the point, of all numbers of a column: percent have one, nats two where they are many."""
    most = max((abs(x) for x in values if isinstance(x, float) and math.isfinite(x)), default=0.0)
    return 3 if most < 10 else 2 if most < 20 else 1


def rates_tried(rows: list[Row]) -> dict[str, int]:
    """By mixer: the best of three has an advantage over the only one."""
    found: dict[str, set[tuple[str | None, ...]]] = {}
    for row in rows:
        found.setdefault(label(row), set()).add(tuple(settings(row).get(key) for key in RATES))
    return {name: len(rates) for name, rates in found.items()}


def cell(value: Any, decimals: int) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if 0 < abs(value) < 5e-4:
            return f"{value:.0e}"
        return f"{value:.{decimals}f}" if math.isfinite(value) else DIVERGED
    return f"{value:,}" if isinstance(value, int) else str(value)


def cells(rows: list[Row]) -> list[list[str]]:
    """Of a table, the head first."""
    names = list(rows[0])
    decimals = [digits(row.get(name) for row in rows) for name in names]
    return [names, *([cell(row.get(n), d) for n, d in zip(names, decimals, strict=True)] for row in rows)]


def markdown(rows: list[Row]) -> Iterator[str]:
    names, *others = cells(rows)
    yield "| " + " | ".join(names) + " |"
    yield "|" + " --- |" * len(names)
    yield from ("| " + " | ".join(row) + " |" for row in others)


def text(rows: list[Row]) -> str:
    """In columns."""
    lines = cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in lines) + "\n"


def beside(claim: Claim, rows: list[Row]) -> list[Row]:
    """Ours and the published numbers of the mixers that both have: ours, theirs."""
    found: list[Row] = []
    for mixer, task, ours, theirs in pairs(claim, rows):
        if not found or found[-1]["mixer"] != mixer:
            found.append({"mixer": mixer})
        decimals = digits([ours, theirs])
        found[-1][task] = f"{cell(ours, decimals) or '-'}, {cell(theirs, decimals)}"
    return found


def pairs(claim: Claim, rows: list[Row]) -> Iterator[tuple[str, str, float | None, float]]:
    """Mixer, column, our number and the published one, where there is one."""
    if claim.published is not None:
        for row in rows:
            theirs = claim.published.of.get(row["mixer"], ())
            for task, value in zip(claim.published.columns, theirs, strict=False):
                if value is not None:
                    yield row["mixer"], task, row.get(task), value


def differences(claim: Claim, rows: list[Row]) -> Iterator[str]:
    """A line for each number that is further from the published one than POINTS percent."""
    found = list(pairs(claim, rows))
    scale = 1 if any(theirs > 1.5 for *_, theirs in found) else 100
    for mixer, task, ours, theirs in found:
        if ours is not None and abs(ours - theirs) * scale > POINTS:
            decimals = digits([ours, theirs])
            here, there = cell(ours, decimals), cell(float(theirs), decimals)
            yield f"* {mixer}, {task.replace('_', ' ')}: {here} here, {there} there."


def page(name: str, claim: Claim, rows: list[Row], table: list[Row], notes: str, failures: Sequence[Row] = ()) -> str:
    """README.md. failures: runs that ended in an error."""
    of = {source: [row for row in rows if settings(row)["experiment"] == source] for source in claim.sources}
    kind = next(beyond(source, row) for source, mine in of.items() for row in mine)  # that of all
    commands = []
    for source, mine in of.items():
        words = [*points_as_words(source, mine, claim.options), kind]
        commands.append(" ".join(filter(None, [f"python scripts/evidence.py {source} {claim.options}", *words])))
    lines = [f"# {claim.title}", "", claim.says, "", f"![{claim.title}](figure.svg)", "", claim.shows, ""]
    if kind:
        lines += [f"All runs have these settings in the place of the sweep's own: `{kind}`.", ""]
    lines += [*markdown(table), ""]
    if failures:
        lines += ["These ended in an error:", ""]
        lines += [f"* `{' '.join(row['words'][1:])}`: {row['reason']}" for row in failures] + [""]
    if claim.published is not None:
        lines += ["## Beside the published numbers", "", f"Ours, and those of {claim.published.name}.", ""]
        lines += [*markdown(found), ""] if (found := beside(claim, table)) else ["None of these mixers is in it.", ""]
        if far := list(differences(claim, table)):
            lines += [f"Further apart than {POINTS:.0f} points:", "", *far, ""]
    lines += [notes.strip(), ""] if notes.strip() else []
    lines += [
        "## How it was made",
        "",
        "```text",
        *commands,
        *filter(None, [claim.then]),
        f"python scripts/figures/evidence.py {name}",
        "```",
        "",
    ]
    lines += [*made(of)]
    return "\n".join(lines) + "\n"


def made(of: dict[str, list[Row]]) -> Iterator[str]:
    """Where the numbers come from: runs, which are missing, machines, time, versions, commits. of: by experiment."""
    counts: list[str] = []
    lacking = {}
    for source, mine in of.items():
        if names := list(dict.fromkeys(settings(row)["name"] for row in mine if "name" in settings(row))):
            counts.append(f"{len(mine)} runs of `{'` and `'.join(names)}`")  # with models of somebody's own, say
            continue
        plan, here = ({point(source, row) for row in rows} for rows in (planned(source), mine))
        more = sum(point(source, row) not in plan for row in mine)
        counts.append(
            f"{len(plan & here)} of the {len(plan)} runs of `{source}`" + f", and {more} beside them" * (more > 0)
        )
        lacking[source] = missing(source, mine)
    yield from textwrap.wrap(f"`results.jsonl` has {' and '.join(counts)}, each with its command.", WIDTH)
    rows = [row for mine in of.values() for row in mine]
    hours = sum(row.get("seconds") or 0 for row in rows) / 3600
    yield f"Their seconds add up to {hours:.2f} hours, of processes that shared a machine."
    yield ""
    yield from (f"* no result yet of `{source}`: {', '.join(left)}" for source, left in lacking.items() if left)
    if len(set((tried := rates_tried(rows)).values())) > 1:
        yield f"* rates that were run: {', '.join(f'{name} {count}' for name, count in tried.items())}"
    for kind in ("device", "date", "commit", "versions"):
        values: dict[str, int] = {}
        for row in rows:
            value = row.get(kind)
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            if kind == "commit":
                shown = f"{shown[:10]}{' with changes' if row.get('changed') else ''}"
            values[shown] = values.get(shown, 0) + 1
        said = [f"{value} ({count} {'run' if count == 1 else 'runs'})" for value, count in values.items()]
        yield f"* {kind}: {'; '.join(said)}"


def plain(row: Row) -> Row:
    """For JSON, which has none but finite numbers."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}


def refuse_incomplete(claim: Claim, folder: Path) -> None:
    """Raises ValueError for the first result that has no page by itself, with its line."""
    for source in claim.sources:
        path = folder / source / "results.jsonl"
        for number, row in enumerate(Results(path).read(), 1):
            if claim.needs and claim.needs not in row:
                continue
            try:
                claim.table([row])
                claim.draw([row], Figure())
            except KeyError as error:
                raise ValueError(f"{path}, line {number}, is of a run without {error.args[0]}") from error
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}, can't be drawn: {error}") from error


def write(name: str, folder: Path) -> list[Row]:
    """All files of the page. Returns the table. Raises ValueError where results are missing or incomplete."""
    rows = read(CLAIMS[name], folder)
    try:
        return written(name, folder, rows)
    except (KeyError, TypeError, ValueError):
        refuse_incomplete(CLAIMS[name], folder)
        raise


def written(name: str, folder: Path, rows: list[Row]) -> list[Row]:
    claim, to = CLAIMS[name], folder / name
    table = claim.table(rows)
    notes = to / "notes.md"
    to.mkdir(parents=True, exist_ok=True)
    failures = [row for source in claim.sources for row in Results(folder / source / "results.jsonl").failures()]
    said = notes.read_text() if notes.exists() else ""
    (to / "README.md").write_text(page(name, claim, rows, table, said, failures))
    (to / "table.json").write_text(json.dumps(list(map(plain, table)), indent=1, allow_nan=False) + "\n")
    (to / "table.txt").write_text(text(table))
    look: dict[Any, Any] = {"svg.hashsalt": name, "svg.fonttype": "none"}
    with matplotlib.rc_context(look | {"font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"], "font.size": 9}):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        claim.draw(rows, figure)
        figure.savefig(to / "figure.svg", metadata={"Date": None})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CLAIMS, help="an experiment")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of all experiments (default: docs/evidence)")
    given = parser.parse_args()
    if not given.folder.is_dir():
        sys.exit(f"error: --folder={given.folder} is no folder")
    try:
        print(text(write(given.name, given.folder)), end="")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
