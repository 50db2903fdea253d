"""What wandb's offline files hold of a run. wandb writes them in blocks of 32 KB, so that the rows of the last block
are lost where its process is killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768


def last_value(folder: Path, name: str) -> int | None:
    """The largest value of a metric in the newest file below `folder` that has one; -1 where no file has, and None
    where there is no file."""
    files = sorted(folder.glob("offline-run-*/*.wandb"), reverse=True)
    for path in files:
        if found := [row[name] for row in rows(path) if name in row]:
            return int(max(found))
    return -1 if files else None


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """What was logged: metrics by name."""
    for record in records(path):
        if record.history.item:
            yield {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}


def records(path: Path) -> Iterator[Any]:
    """Of wandb's file, which is LevelDB's log: blocks of records with a header of checksum, length, kind. A record that
    was cut off ends it."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made as it is imported

    data, part, at = path.read_bytes(), b"", 7
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + length > len(data):
            return
        part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""
