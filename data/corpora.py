"""Corpora: where documents come from.

A corpus is an iterable of documents (split, name, text), each in the training or the validation split, in an order that
is the same on every machine. Iterating reads everything once, for both splits: a corpus may be a stream of gigabytes.
Reading can begin in the middle, behind any document whose `position` is known.

Where a corpus has no validation split of its own, the hash of a document's name decides. A document then stays on its
side when others are added, and no sequence of the validation split has a neighbour from its own document in training.

    PythonSource   the Python standard library of the running interpreter: source code that every machine has already
    TextFiles      files of your own: text, JSON, tables, pages (see files.py)
    Hub            a data set of the Hugging Face hub (see hub.py)
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

SPLITS = ("train", "validation")


class Document(NamedTuple):
    """A text, the split it belongs to, and the name by which it was put there. A long text may come in parts."""

    split: str  # "train" or "validation"
    name: str
    text: str
    last: bool = True  # False: the next one goes on with the same document
    position: Any = None  # where reading goes on behind it, as JSON; None where it can't


class BrokenOffError(ValueError):
    """Reading or writing ended for a reason that may pass: what has been prepared is kept."""


class Corpus(ABC):
    """What every corpus answers."""

    @abstractmethod
    def read(self, position: Any = None) -> Iterator[Document]:
        """The documents, or those behind this position."""

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    def fraction(self, position: Any) -> float | None:
        """How much of the corpus lies before this position, None where that is not known."""
        return None

    def part(self, part: int, parts: int) -> Corpus:
        """What part `part` (from 0) of `parts` reads of this corpus, each document in the split and under the name that
        it has here; all parts, one behind the other, read all of it. Raises ValueError where it can't be divided.
        """
        raise ValueError(f"parts={parts}: {self.describe()} can't be prepared in parts")

    def with_both_splits(self) -> Corpus:
        """What is prepared: this corpus, or one whose splits are not empty where this one's would be."""
        return self

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything that decides the documents and their order. Cheap: it does not read the texts."""

    @abstractmethod
    def describe(self) -> str:
        """One line: what it is and where from."""

    def edition(self) -> str:
        """Which one it is, where one name stands for several texts; "" where it stands for one."""
        return ""

    def left_out(self) -> str:
        """A line about what was found and is not read, "" where there is nothing to say."""
        return ""

    def texts(self, split: str) -> Iterator[str]:
        return (document.text for document in self if document.split == split)


def split_of(name: str, validation_fraction: float) -> str:
    """The split that this document's name falls into: a hash below the fraction is validation."""
    return "validation" if hash_position(name) < validation_fraction else "train"


def hash_position(name: str) -> float:
    """Where the hash of a name lies, in [0, 1)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def check_fraction(validation_fraction: float) -> float:
    if not 0 < validation_fraction < 1:
        raise ValueError(
            f"data.corpus.validation_fraction={validation_fraction} must lie between 0 and 1, both excluded"
        )
    return float(validation_fraction)


def hash_of(*parts: object) -> str:
    return hashlib.sha256(escaped("\n".join(map(str, parts))).encode()).hexdigest()


def escaped(name: str) -> str:
    """A name of a file that is not UTF-8 as text that can be printed and hashed; any other as it is."""
    return name.encode("utf-8", errors="backslashreplace").decode()


class PythonSource(Corpus):
    """The .py files of the standard library, without installed packages and tests. About 11 MB, 730 documents. They are
    those of the running Python: of another release they are other text, and a run goes on with the one it began with.

    Tests are left out (`test`, `tests` with the fixtures of lib2to3, `idle_test`): they are another 19 MB, and some are
    broken on purpose. So is `pydoc_data`: its one large file is the English of the reference manual in a string, not
    source code, and falls into validation, of which it would be 62 %.
    """

    EXCLUDED = frozenset(("site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"))

    def __init__(self, validation_fraction: float = 0.05):
        self.validation_fraction = check_fraction(validation_fraction)
        self.root = Path(sysconfig.get_path("stdlib"))
        self.share = (0, 1)

    def _files(self) -> list[str]:
        """Paths relative to the library, in the order of their characters."""
        found: list[str] = []
        for folder, subfolders, files in os.walk(self.root):
            subfolders[:] = set(subfolders) - self.EXCLUDED  # os.walk goes on into these only
            # _sysconfigdata*.py holds the paths and compiler flags of this machine
            wanted = (f for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata"))
            found += ((Path(folder) / f).relative_to(self.root).as_posix() for f in wanted)
        return sorted(found)

    def read(self, position: int | None = None) -> Iterator[Document]:
        files, (part, parts) = self._files(), self.share
        begin, end = (len(files) * number // parts for number in (part, part + 1))
        for index, name in enumerate(files[position or begin : end], start=position or begin):
            text = (self.root / name).read_bytes().decode("utf-8", errors="replace")
            yield Document(split_of(name, self.validation_fraction), name, text, position=index + 1)

    def part(self, part: int, parts: int) -> PythonSource:
        found = copy(self)
        found.share = (part, parts)
        return found

    def fraction(self, position: int) -> float:
        part, parts = self.share
        return position * parts / len(self._files()) - part

    def fingerprint(self) -> str:
        sizes = (f"{name} {(self.root / name).stat().st_size}" for name in self._files())
        return hash_of("python_source", sys.version, self.validation_fraction, *sizes)

    def edition(self) -> str:
        return f"{platform.python_implementation()} {platform.python_version()}"

    def describe(self) -> str:
        return f"the standard library of {self.edition()}"


def text_of(row: Any, text_field: str, source: str, otherwise: str = "; name the column that holds the text") -> str:
    """The text of a table's row, "" where it is null. `source` says where the row is, `otherwise` what to do where it
    has no such column.
    """
    if not isinstance(row, dict):
        raise ValueError(
            f"{source} holds {type(row).__name__}, a row with data.corpus.text_field={text_field!r} is needed"
        )
    if text_field not in row:
        raise ValueError(
            f"data.corpus.text_field={text_field!r} is not a column of {source}, which has "
            f"{', '.join(sorted(row)) or 'none'}{otherwise}"
        )
    if row[text_field] is None:
        return ""
    if not isinstance(row[text_field], str):
        raise ValueError(
            f"data.corpus.text_field={text_field!r} of {source} holds {type(row[text_field]).__name__}, text is needed"
        )
    return row[text_field]
