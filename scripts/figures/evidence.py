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
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.figures.claims import CLAIMS
from scripts.figures.results import RATES, Claim, Row, settings
from scripts.sweeps.jobs import params, sweep
from scripts.sweeps.results import Results

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "evidence"
POINTS = 5.0  # percent, from which on a difference to a published number is named


def read(claim: Claim, folder: Path) -> list[Row]:
    """Raises ValueError where there is no result yet, or one of settings that another has not."""
    found = []
    for source in claim.sources:
        path = folder / source / "results.jsonl"
        rows = Results(path).read()
        kinds: dict[str, int] = {}
        for row in rows:
            kinds[beyond(source, row)] = kinds.get(beyond(source, row), 0) + 1
        if len(kinds) > 1:
            each = "; ".join(f"{count} with {kind or 'those of the sweep'}" for kind, count in kinds.items())
            raise ValueError(f"{path} has runs of several settings, which one table can't hold: {each}")
        found += rows
    if not found:
        raise ValueError(f"{folder / claim.sources[0]} has no results yet; python scripts/evidence.py makes them")
    return found


def beyond(source: str, row: Row) -> str:
    """The settings of a run that its sweep is not over, as words."""
    over = {"experiment", "name", "seed", *RATES, *params(source)[1]}
    words = (f"{key}={value}" for key, value in settings(row).items() if key not in over)
    return " ".join(word for word in words if not word.startswith("hydra."))


@cache
def planned(experiment: str) -> int:
    """How many jobs its sweep has."""
    return len(sweep(experiment, []))


def cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(rows: list[Row]) -> Iterator[str]:
    names = list(rows[0])
    yield "| " + " | ".join(names) + " |"
    yield "|" + " --- |" * len(names)
    yield from ("| " + " | ".join(cell(row.get(name)) for name in names) + " |" for row in rows)


def text(rows: list[Row]) -> str:
    """In columns."""
    lines = [list(rows[0]), *([cell(row.get(name)) for name in rows[0]] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in lines) + "\n"


def beside(claim: Claim, rows: list[Row]) -> list[Row]:
    """Ours and the published numbers of the mixers that both have: ours, theirs."""
    if claim.published is None:
        return []
    found = []
    for row in rows:
        theirs = dict(zip(claim.published.columns, claim.published.of.get(row["mixer"], ()), strict=False))
        both = {k: f"{cell(row.get(k)) or '-'}, {cell(v)}" for k, v in theirs.items() if v is not None}
        found += [{"mixer": row["mixer"]} | both] if both else []
    return found


def differences(claim: Claim, rows: list[Row]) -> Iterator[str]:
    """A line for each number that is further from the published one than POINTS percent."""
    if claim.published is None:
        return
    for row in rows:
        theirs = zip(claim.published.columns, claim.published.of.get(row["mixer"], ()), strict=False)
        for task, value in theirs:
            ours = row.get(task)
            scale = 1 if max(x or 0 for of in claim.published.of.values() for x in of) > 1.5 else 100
            if ours is not None and value is not None and abs(ours - value) * scale > POINTS:
                yield f"* {row['mixer']}, {task.replace('_', ' ')}: {cell(ours)} here, {cell(float(value))} there."


def page(name: str, claim: Claim, rows: list[Row], table: list[Row], notes: str, failures: Sequence[Row] = ()) -> str:
    """README.md. failures: runs that ended in an error."""
    jobs = {source: planned(source) for source in claim.sources}
    words: dict[str, set[str]] = {source: set() for source in jobs}
    for row in rows:
        source = row["words"][0].partition("=")[2]
        words.setdefault(source, set()).add(beyond(source, row))
    commands = [
        " ".join(filter(None, [f"python scripts/evidence.py {source} {claim.options}", *words[source]]))
        for source in claim.sources
    ]
    lines = [f"# {claim.title}", "", claim.says, "", f"![{claim.title}](figure.svg)", "", claim.shows, ""]
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
    lines += [*made(rows, jobs)]
    return "\n".join(lines) + "\n"


def made(rows: list[Row], jobs: dict[str, int]) -> Iterator[str]:
    """Where the numbers come from: runs, machines, time, versions, commits."""
    of = Counter(row["job"].partition("/")[0] for row in rows)
    there = " and ".join(f"{of[name]} of the {count} runs of `{name}`" for name, count in jobs.items())
    yield f"`results.jsonl` has {there}, each with its command."
    hours = sum(row.get("seconds") or 0 for row in rows) / 3600
    yield f"Their seconds add up to {hours:.2f} hours, of processes that shared a machine."
    yield ""
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


def write(name: str, folder: Path) -> list[Row]:
    """All files of the page. Returns the table."""
    claim, to = CLAIMS[name], folder / name
    rows = read(claim, folder)
    table = claim.table(rows)
    notes = to / "notes.md"
    to.mkdir(parents=True, exist_ok=True)
    failures = [row for source in claim.sources for row in Results(folder / source / "results.jsonl").failures()]
    said = notes.read_text() if notes.exists() else ""
    (to / "README.md").write_text(page(name, claim, rows, table, said, failures))
    finite = [
        {k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in row.items()} for row in table
    ]
    (to / "table.json").write_text(json.dumps(finite, indent=1, allow_nan=False) + "\n")
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
    try:
        print(text(write(given.name, given.folder)), end="")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
