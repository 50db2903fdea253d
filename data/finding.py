"""Which files a path means: a file, a folder, or a pattern, each file once."""

from __future__ import annotations

import difflib
import glob
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data.corpora import escaped
from data.formats import COMPRESSED, SUFFIXES, compressed, readable
from data.remote import Id, id_of, is_remote, listed
from data.shards import cache_folder

REACHED_TWICE = "reached twice"
HIDDEN, OWN = "hidden", "of runs or prepared data"
NOWHERE = "links to nothing"


class Found(NamedTuple):
    """files: each path or URL, with its name relative to where its pattern starts, in the order of the patterns and,
    within one, of the paths.  ids: of all that was found (data/remote.py: id_of), and whether it was found again.
    left_out: what was found too, and how often.  walked: those of the files that are from a folder, not from a pattern.
    """

    files: dict[str, str]
    ids: dict[Id, bool]
    left_out: Counter[str]
    walked: set[str]

    def sentence(self) -> str:
        said = {NOWHERE: "link to nothing"}
        counts = sorted(self.left_out.items())
        return ", ".join(f"{count:,} {said.get(what, what) if count == 1 else what}" for what, count in counts)


def find(setting: str, path: str | list[str]) -> Found:
    """The files that can be read among those that `path` means; several are a list. A URL is one of data/remote.py.

    A path that exists is taken as it is written, brackets and all. A folder stands for all files below it but hidden
    ones and those of runs, and links are followed. Other patterns are those of `glob`, where ** crosses folders. Raises
    ValueError where there is nothing to read.
    """
    found = Found({}, {}, Counter(), set())
    patterns = [str(item) for item in (path if isinstance(path, list) else [path])]
    if not patterns:
        raise ValueError(f"{setting}={path!r} names nothing; a file, a folder or a pattern is needed")
    for pattern in patterns:
        if not pattern.strip() or path is None:
            raise ValueError(f"{setting}={path!r} names nothing; a file, a folder or a pattern is needed")
        before = set(found.files.items())
        if is_remote(pattern):
            _add_remote(found, pattern, setting)
            continue
        start, files = _files(pattern, found.left_out, setting)
        # of a file and links to it, the file gives the name
        for file in sorted(files, key=lambda file: (os.path.islink(file), file)):
            _add(found, file, start)
        added = sorted(found.files.items() - before)
        found.files.update({file: found.files.pop(file) for file, _ in added})
        if start == Path(pattern).expanduser():
            found.walked.update(file for file, _ in added)
    if found.files:
        return found
    shown = path if isinstance(path, list) else patterns[0]
    if not found.left_out:
        hint = "" if is_remote(patterns[0]) else missing(Path(patterns[0]).expanduser())
        raise ValueError(f"{setting}={shown!r} matches no file{hint}")
    raise ValueError(
        f"{setting}={shown!r} matches nothing that can be read, but {found.sentence()}; what can be is "
        f"{', '.join(SUFFIXES)}, all but the last also compressed ({', '.join(COMPRESSED)})"
    )


def _add(found: Found, file: str, start: Path) -> None:
    try:
        key = id_of(file)
    except OSError:  # a link to nothing, or in a circle
        found.left_out[NOWHERE] += 1
        return
    if Path(file).is_file():  # not a folder that a pattern matches, or a pipe
        _take(found, file, key, escaped(Path(file).relative_to(start).as_posix()))


def _add_remote(found: Found, url: str, setting: str) -> None:
    start, files = listed(url, setting)
    for file, name in sorted(files.items()):
        if any(part.startswith(".") for part in name.split("/")):
            found.left_out[HIDDEN] += 1
        else:
            _take(found, file, file, escaped(name))
    if url.rstrip("/").endswith(start.strip("/")):  # a folder
        found.walked.update(files.keys() & found.files.keys())


def _take(found: Found, file: str, key: Id, name: str) -> None:
    """Counts a file, and keeps it under this name if it is new and can be read."""
    if (found_before := found.ids.get(key)) is not None:
        found.left_out[REACHED_TWICE] += not found_before
        found.ids[key] = True
        return
    found.ids[key] = False
    if readable(file):
        found.files[file] = name
    else:
        suffixes = [s.lower() for s in Path(file).suffixes[-1 - compressed(file) :]]
        found.left_out[escaped("".join(suffixes)) or "without a suffix"] += 1


def missing(path: Path) -> str:
    """The first part of a path that is not there, with the near match."""
    for part in (*reversed(path.parents), path):
        if glob.has_magic(part.name):
            return ""
        if not os.path.exists(part):
            folder = part.parent.absolute()
            near = difflib.get_close_matches(part.name, os.listdir(folder) if folder.is_dir() else [], n=1)
            return f": {folder} has no {part.name!r}{f'; did you mean {near[0]!r}?' if near else ''}"
    return ""


def _files(pattern: str, left_out: Counter[str], setting: str) -> tuple[Path, list[str]]:
    """Where the pattern starts (names relative to it, and with them the split, are the same wherever it is), and all
    that it matches.
    """
    path = Path(pattern).expanduser()
    if os.path.isdir(path):  # which, unlike Path.is_dir, takes a name that is too long
        return path, list(_walk(path, left_out, setting))
    if os.path.isfile(path):
        return path.parent, [str(path)]
    start = path.parent
    while glob.has_magic(str(start)) and not os.path.isdir(start):
        start = start.parent
    escaped = Path(glob.escape(str(start))) / path.relative_to(start)
    return start, glob.glob(str(escaped), recursive=True)


def _walk(folder: Path, left_out: Counter[str], setting: str) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise ValueError(f"{setting}={str(folder)!r}: {error.filename} can't be read ({error.strerror})") from error

    # what was made of the text is no text: runs and prepared data that lie in the folder
    own = [os.path.realpath(place) for place in (os.path.expanduser(os.environ.get("RUNS") or "runs"), cache_folder())]
    seen = set()
    places = [str(folder)]  # and links to folders, which come last: a file has its name from where it lies
    for place in places:
        for root, folders, files in os.walk(place, onerror=fail):
            if (key := id_of(root)) in seen:  # by a link that leads back, or twice to one place
                left_out[REACHED_TWICE] += 1
                folders.clear()
                continue
            seen.add(key)
            hidden = {name for name in (*folders, *files) if name.startswith(".") or name == "__MACOSX"}
            made = {name for name in folders if os.path.realpath(os.path.join(root, name)) in own}
            left_out.update({what: len(names) for what, names in ((HIDDEN, hidden), (OWN, made)) if names})
            folders[:] = sorted(set(folders) - hidden - made)
            places += (link for name in folders if os.path.islink(link := os.path.join(root, name)))
            yield from (os.path.join(root, name) for name in files if name not in hidden)
