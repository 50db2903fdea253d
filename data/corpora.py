"""Corpora: where documents come from.

A corpus is an iterable of documents (split, name, text), each in the training or the validation split, in an order that
is the same on every machine. Iterating reads everything once, for both splits: a corpus may be a stream of gigabytes.

Where a corpus has no validation split of its own, the hash of a document's name decides. A document then stays on its
side when others are added, and no sequence of the validation split has a neighbour from its own document in training.

    PythonSource   the Python standard library of the running interpreter: source code that every machine has already
    TextFiles      files of your own: .txt, .json, .jsonl and .parquet, compressed or not
    Hub            a data set of the Hugging Face hub (see hub.py)
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SPLITS = ("train", "validation")


class Document(NamedTuple):
    """A text, the split it belongs to, and the name by which it was put there."""

    split: str  # "train" or "validation"
    name: str
    text: str


class Corpus(ABC):
    """What every corpus answers."""

    @abstractmethod
    def __iter__(self) -> Iterator[Document]: ...

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything that decides the documents and their order. Cheap: it does not read the texts."""

    @abstractmethod
    def describe(self) -> str:
        """One line: what it is and where from."""

    def texts(self, split: str) -> Iterator[str]:
        return (document.text for document in self if document.split == split)


def split_of(name: str, validation_fraction: float) -> str:
    """The split that this document's name falls into: a hash below the fraction is validation."""
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "validation" if position < validation_fraction else "train"


def check_fraction(validation_fraction: float) -> float:
    if not 0 < validation_fraction < 1:
        raise ValueError(
            f"data.corpus.validation_fraction={validation_fraction} must lie between 0 and 1, both excluded"
        )
    return float(validation_fraction)


def hash_of(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


class PythonSource(Corpus):
    """The .py files of the standard library, without installed packages and tests. About 11 MB, 730 documents.

    Tests are left out (`test`, `tests` with the fixtures of lib2to3, `idle_test`): they are another 19 MB, and some are
    broken on purpose. So is `pydoc_data`: its one large file is the English of the reference manual in a string, not
    source code, and falls into validation, of which it would be 62 %.
    """

    EXCLUDED = frozenset(("site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"))

    def __init__(self, validation_fraction: float = 0.05):
        self.validation_fraction = check_fraction(validation_fraction)
        self.root = Path(sysconfig.get_path("stdlib"))

    def _files(self) -> list[str]:
        """Paths relative to the library, in the order of their characters."""
        found = []
        for folder, subfolders, files in os.walk(self.root):
            subfolders[:] = set(subfolders) - self.EXCLUDED  # os.walk goes on into these only
            # _sysconfigdata*.py holds the paths and compiler flags of this machine
            wanted = (f for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata"))
            found += ((Path(folder) / f).relative_to(self.root).as_posix() for f in wanted)
        return sorted(found)

    def __iter__(self) -> Iterator[Document]:
        for name in self._files():
            text = (self.root / name).read_bytes().decode("utf-8", errors="replace")
            yield Document(split_of(name, self.validation_fraction), name, text)

    def fingerprint(self) -> str:
        sizes = (f"{name} {(self.root / name).stat().st_size}" for name in self._files())
        return hash_of("python_source", sys.version, self.validation_fraction, *sizes)

    def describe(self) -> str:
        return f"the standard library of Python {sys.version.split()[0]}"


class TextFiles(Corpus):
    """Files that match a glob (`**` crosses folders), or one file, in the order of their paths.

    A .txt file is one document, or several where `separator` is given. Tables (.json, .jsonl, .parquet) have one
    document a row, in the column `text_field`. .txt.gz, .jsonl.gz and so on are read as they are; .zst needs the
    zstandard package.

    `validation` is a second path or glob. Without it, `validation_fraction` of the documents is held out.
    """

    TABLES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}  # noqa: RUF012
    COMPRESSED = (".gz", ".zst", ".bz2", ".xz")

    def __init__(
        self,
        path: str,
        validation: str | None = None,
        validation_fraction: float = 0.01,
        text_field: str = "text",
        separator: str | None = None,
    ):
        self.path, self.validation, self.text_field, self.separator = path, validation, text_field, separator
        self.validation_fraction = check_fraction(validation_fraction)
        if separator == "":
            raise ValueError("data.corpus.separator='' can't separate documents; use null for one document a file")
        self.files = {"train": self._find("data.corpus.path", path)}
        if validation is not None:
            self.files["validation"] = self._find("data.corpus.validation", validation)
            both = set(self.files["train"]) & set(self.files["validation"])
            if both:
                raise ValueError(
                    f"data.corpus.validation={validation!r} and data.corpus.path={path!r} share {len(both)} files, "
                    f"such as {min(both)}"
                )

    def _find(self, setting: str, pattern: str) -> list[str]:
        files = sorted(f for f in glob.glob(str(Path(pattern).expanduser()), recursive=True) if Path(f).is_file())
        if not files:
            raise ValueError(f"{setting}={pattern!r} matches no file")
        for file in files:
            if self._suffix(file) not in (".txt", *self.TABLES):
                raise ValueError(f"{setting}={pattern!r} matches {file}, which is not .txt, .json, .jsonl or .parquet")
        return files

    def _suffix(self, file: str) -> str:
        path = Path(file)
        return path.with_suffix("").suffix if path.suffix in self.COMPRESSED else path.suffix

    def __iter__(self) -> Iterator[Document]:
        for split, files in self.files.items():
            root = _fixed_folder(self.path if split == "train" else self.validation)
            for file in files:
                for index, text in enumerate(self._texts(file)):
                    name = f"{Path(file).relative_to(root).as_posix()}:{index}"
                    own = split if self.validation is not None else split_of(name, self.validation_fraction)
                    yield Document(own, name, text)

    def _texts(self, file: str) -> Iterator[str]:
        if self._suffix(file) in self.TABLES:
            yield from (text_of(row, self.text_field, file) for row in self._rows(file))
            return
        opened = gzip.open if file.endswith(".gz") else _open_plain
        with opened(file, "rb") as stream:
            text = stream.read().decode("utf-8", errors="replace")
        yield from text.split(self.separator) if self.separator else [text]

    def _rows(self, file: str) -> Iterator[dict]:
        import datasets

        kind = self.TABLES[self._suffix(file)]
        try:
            yield from datasets.load_dataset(kind, data_files=[file], split="train", streaming=True)
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:  # pyarrow's are ValueErrors
            raise ValueError(f"data.corpus.path={self.path!r}: {file} can't be read as {kind} ({error})") from error

    def fingerprint(self) -> str:
        """Names, sizes and times of change: a file that was edited is prepared again."""
        stats = {file: Path(file).stat() for files in self.files.values() for file in files}
        files = (
            f"{split} {f} {stats[f].st_size} {stats[f].st_mtime_ns}" for split in self.files for f in self.files[split]
        )
        return hash_of("text_files", self.text_field, self.separator, self.validation, self.validation_fraction, *files)

    def describe(self) -> str:
        count = sum(map(len, self.files.values()))
        return f"{self.path}{f' and {self.validation}' if self.validation else ''} ({count} files)"


def text_of(row: dict, text_field: str, source: str) -> str:
    """The text of a table's row."""
    if text_field not in row:
        raise ValueError(
            f"data.corpus.text_field={text_field!r} is not a column of {source}, which has {', '.join(sorted(row))}"
        )
    if not isinstance(row[text_field], str):
        raise ValueError(
            f"data.corpus.text_field={text_field!r} of {source} holds {type(row[text_field]).__name__}, text is needed"
        )
    return row[text_field]


def _fixed_folder(pattern: str) -> Path:
    """The folder a pattern starts from. Names relative to it, and with them the split, are the same wherever it is."""
    folder = Path(pattern).expanduser().parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    return folder


def _open_plain(file: str, mode: str):
    return open(file, mode)
