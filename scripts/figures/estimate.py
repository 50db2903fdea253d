"""Pages of what needs no trained model: docs/evidence/NAME/ with README.md, figure.svg, table.json and table.txt.

    python scripts/figures/estimate.py parabola       # or distances, functions, half_lives, optimizers, ...; seconds
    python scripts/figures/estimate.py all            # two minutes on one core

A page says for each claim whether the numbers bear it out. notes.md in the folder stands in it as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib
import torch
from matplotlib.figure import Figure

from models.training.origin import describe, origin
from scripts.figures.estimators import distances, functions, half_lives, optimizers, parabola, switching, taylor
from scripts.figures.estimators.finding import Finding
from scripts.figures.evidence import FOLDER, markdown, text
from scripts.figures.results import Row

FINDINGS: dict[str, Callable[[], Finding]] = {
    "switching": switching.finding,
    "distances": distances.finding,
    "taylor": taylor.finding,
    "optimizers": optimizers.finding,
    "parabola": parabola.finding,
    "functions": functions.finding,
    "half_lives": half_lives.finding,
}
TALL = {"optimizers": 6.5}  # inches, of figures with two rows


def tables(rows: list[Row]) -> list[list[Row]]:
    """Rows of the same columns, one table each."""
    found: list[list[Row]] = []
    for row in rows:
        if not found or list(found[-1][0]) != list(row):
            found.append([])
        found[-1].append(row)
    return found


def page(name: str, finding: Finding, seconds: float, notes: str) -> str:
    made = origin(torch.device("cpu"))
    lines = [f"# {finding.title}", "", finding.says, "", f"![{finding.title}](figure.svg)", "", finding.shows, ""]
    for table in tables(finding.table):
        lines += [*markdown(table), ""]
    lines += ["## What was to be seen", "", f"The claim is from {finding.source}.", ""]
    lines += [f"* {'Seen' if holds else '**Not seen**'}: {what}." for what, holds in finding.checks]
    lines += ["", *([notes.strip(), ""] if notes.strip() else []), "## How it was made", ""]
    lines += ["```text", f"python scripts/figures/estimate.py {name}", "```", ""]
    lines += [f"* {seconds:.0f} seconds on {made['device']}, {datetime.now(UTC).date().isoformat()}"]
    return "\n".join([*lines, f"* {describe(made | {'device': 'nothing was learned before'})}"]) + "\n"


def write(name: str, finding: Finding, seconds: float, folder: Path) -> None:
    to = folder / name
    to.mkdir(parents=True, exist_ok=True)
    notes = to / "notes.md"
    (to / "README.md").write_text(page(name, finding, seconds, notes.read_text() if notes.exists() else ""))
    (to / "table.json").write_text(json.dumps(finding.table, indent=1) + "\n")
    (to / "table.txt").write_text("\n".join(map(text, tables(finding.table))))
    look: dict[Any, Any] = {"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(look | {"font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"]}):
        figure = Figure(figsize=(9, TALL.get(name, 3.8)), layout="constrained")
        finding.draw(figure)
        figure.savefig(to / "figure.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=(*FINDINGS, "all"))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of all pages (default: docs/evidence)")
    given = parser.parse_args()
    for name in FINDINGS if given.name == "all" else (given.name,):
        began = time.process_time()
        finding = FINDINGS[name]()
        write(name, finding, time.process_time() - began, given.folder)
        print("\n".join(map(text, tables(finding.table))), end="")
        print("\n".join(f"{'seen' if holds else 'NOT SEEN'}: {what}" for what, holds in finding.checks), flush=True)


if __name__ == "__main__":
    main()
