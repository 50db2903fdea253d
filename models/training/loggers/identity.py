"""Under which name a service knows a run: kept in the run's folder, so that it goes on in the same curve."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

FILE = "loggers.json"
LONGEST = 128  # characters of an id of wandb


def known(folder: Path, service: str) -> str | None:
    """The id that the run in this folder has with this service, None where it has none yet."""
    return _read(folder / FILE).get(service)


def keep(folder: Path, service: str, identity: str) -> None:
    path, draft = folder / FILE, folder / f".{FILE}.draft"
    draft.write_text(json.dumps(_read(path) | {service: identity}, indent=2) + "\n")
    draft.replace(path)


def _read(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} can't be read ({error}); mend it, or remove it, and services see a new run") from None


def unique(name: str) -> str:
    """The name with eight random digits behind it: somebody else of the project may have a folder of this name."""
    mark = secrets.token_hex(4)
    return f"{name[: LONGEST - len(mark) - 1]}-{mark}"
