"""A store of prepared text that machines share: TTR_STORE=s3://bucket/prepared, or any other URL or folder.

A run that lacks the shards of its text looks there before it makes them, and copies them whole into its own cache
(TTR_CACHE), from which it reads. scripts/prepare_data.py puts there what it has made.

    STORE/NAME-HASH/...           the files of data/shards.py
                    stored.json   of each its bytes and SHA-256; written last: what has it is whole
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from data.remote import file_system, said
from data.shards import hash_file, sync

VARIABLE = "TTR_STORE"
LIST = "stored.json"
OWN = ("stamps.json", LIST)  # of one machine


class DamagedError(ValueError):
    """The store holds other bytes than were put there."""


def fetch(folder: Path) -> bool:
    """Copies a folder from the store to the cache, where the store has it and the cache has not. Whether it did.

    A copy goes on where it was killed. Raises ValueError where the store can't be read, or holds other bytes than were
    put there.
    """
    if not os.environ.get(VARIABLE) or folder.exists():
        return False
    system, place = _place(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"), _told("read"):
        if folder.exists() or not system.exists(f"{place}/{LIST}"):
            return False
        files = json.loads(system.cat_file(f"{place}/{LIST}"))
        print(f"Copying {folder.name} from {os.environ[VARIABLE]}: {_size(files)}", flush=True)
        draft = folder.with_name(f"{folder.name}.fetched")
        for name, about in files.items():
            file = draft / name
            if file.exists() and file.stat().st_size == about["bytes"] and hash_file(file) == about["sha256"]:
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            system.get_file(f"{place}/{name}", str(file))
            if hash_file(file) != about["sha256"]:
                raise DamagedError(f"{place}/{name} is not what was put there; delete {place}, and put it there again")
            sync(file)
        draft.rename(folder)
    return True


def put(folder: Path) -> bool:
    """Copies a prepared folder to the store, where this has not got it. Whether it did. Raises ValueError where the
    store can't be written.
    """
    if not os.environ.get(VARIABLE):
        return False
    system, place = _place(folder)
    with _told("written"):
        if system.exists(f"{place}/{LIST}"):
            return False
        files = dict(_files(folder))
        print(f"Copying {folder.name} to {os.environ[VARIABLE]}: {_size(files)}", flush=True)
        for name in files:
            system.makedirs(f"{place}/{name}".rpartition("/")[0], exist_ok=True)
            system.put_file(str(folder / name), f"{place}/{name}")
        system.pipe_file(f"{place}/{LIST}", json.dumps(files, indent=2).encode())
    return True


def _place(folder: Path) -> tuple[Any, str]:
    system, path = file_system(os.environ[VARIABLE], VARIABLE)
    return system, f"{path.rstrip('/')}/{folder.name}"


def _files(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in OWN and not name.startswith("."):
            yield name, {"bytes": file.stat().st_size, "sha256": hash_file(file)}


def _size(files: dict[str, dict[str, Any]]) -> str:
    return f"{len(files)} files, {sum(about['bytes'] for about in files.values()) / 1e6:,.1f} MB"


@contextmanager
def _told(what: str) -> Iterator[None]:
    """An error of the store, of whatever library, becomes a sentence."""
    try:
        yield
    except DamagedError:
        raise
    except Exception as error:
        raise ValueError(f"{VARIABLE}={os.environ[VARIABLE]} can't be {what} ({said(error)})") from error
