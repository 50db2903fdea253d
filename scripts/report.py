"""One page that compares runs: what differs, what came out, how sure that is, and how to repeat it.

    python scripts/report.py runs/ablation                     # all runs in it; writes report.html there
    python scripts/report.py runs/a runs/b --to compared.html  # runs of several folders

The page is one file. It needs no network, so that it can be sent and kept. Runs that differ in nothing but their seed
are one line of its table. docs/reports.md says how to read it. A sweep (train.py -m) writes it by itself at its end.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from models.training.sweep import Outcome

FILE = "report.html"


def write(folders: Sequence[Path], to: Path | None = None) -> tuple[Path, str]:
    """Writes the page. Returns its path, and the table of results as text. Raises ValueError where there is nothing to
    compare."""
    from scripts.reports import page, runs, tables, variants  # matplotlib and more, which no training needs

    records = runs.find(list(folders))
    compared = variants.compare(records)
    path = to or (folders[0] if len(folders) == 1 else Path(os.path.commonpath([f.resolve() for f in folders]))) / FILE
    title = (
        folders[0].resolve().name if len(folders) == 1 else f"{len(folders)} folders of {path.parent.resolve().name}"
    )
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")  # jobs of an array may end at once
    draft.write_text(page.html(compared, records, title), encoding="utf-8")
    draft.replace(path)
    return path, tables.text(tables.results(compared))


def of_sweep(outcomes: Sequence[Outcome]) -> str:
    """Of the jobs of a sweep, and of earlier ones in its folder: the table of results, and where the page is."""
    from scripts.reports.runs import keep_failures

    parents = {outcome.folder.parent for outcome in outcomes}
    said = {outcome.folder: (outcome.words, outcome.says if outcome.failed else "") for outcome in outcomes}
    for parent in parents:
        if parent.is_dir():
            keep_failures(parent, {folder: told for folder, told in said.items() if folder.parent == parent})
    if all(outcome.failed for outcome in outcomes):
        return ""
    # without name= a sweep over models has a folder for each of them
    alone = len(parents) == 1
    where = list(parents) if alone else [folder for folder in said if (folder / "config.yaml").exists()]
    path, table = write(where)
    return f"\n{table}\n\npage      {path}"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of runs, or of a single run")
    parser.add_argument("--to", type=Path, help="where the page is written (default: report.html in the folder)")
    return parser.parse_args(words)


def main() -> None:
    given = arguments()
    try:
        path, table = write(given.folders, given.to)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{table}\n\npage      {path}")


if __name__ == "__main__":
    main()
