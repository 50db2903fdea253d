"""The workspace and the report of an ablation in wandb, whose runs were trained with logger=wandb.

    python scripts/dashboard.py runs/ablation            # makes both, and prints where they are
    python scripts/dashboard.py runs/ablation --dry-run  # prints what they would show; no network, no account

It needs wandb-workspaces, an extra: pip install -e '.[dashboard]'. docs/logging.md says what is in them. Made again,
they are new ones beside the old: what somebody changed by hand stays.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.reports import runs


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of runs, or of a single run")
    parser.add_argument("--entity", help="whose project it is (default: the runs' own, else that of your account)")
    parser.add_argument("--title", help="of both (default: the name of the folder)")
    parser.add_argument("--dry-run", action="store_true", help="print what they would show, and send nothing")
    return parser.parse_args(words)


def account(entity: str | None) -> str:
    """The entity to whose project they go. Raises ValueError where wandb can't be asked."""
    import wandb

    try:
        found = str(wandb.Api().default_entity or "")
    except (wandb.errors.Error, OSError) as error:
        raise ValueError(f"wandb can't be reached, or knows no account here: {_sentence(error)}") from error
    if not (entity or found):
        raise ValueError("your account in wandb has no default entity; --entity names one")
    return entity or found


def send(made: Any, kind: str) -> str:
    """Its address. Raises ValueError, in a sentence."""
    import wandb

    try:
        return made.save().url
    except (wandb.errors.Error, OSError, ValueError) as error:
        raise ValueError(f"the {kind} could not be sent to wandb: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main() -> None:
    given = arguments()
    try:
        from scripts.reports import dashboard
    except ModuleNotFoundError as error:
        sys.exit(f"error: this needs wandb-workspaces, which is not installed: pip install -e '.[dashboard]' ({error})")
    try:
        records = runs.find(given.folders)
        plan = dashboard.plan(records, given.title or dashboard.title_of(given.folders), given.entity)
        if given.dry_run:
            print(dashboard.outline(plan))
            return
        whole = dashboard.plan(records, plan.title, account(plan.entity))
        print(f"workspace {send(dashboard.workspace(whole), 'workspace')}")
        print(f"report    {send(dashboard.report(whole), 'report')}")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
