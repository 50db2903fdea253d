"""Text files of one's own as a corpus, read from any position on. data/finding.py says which files, data/formats.py how
each is read.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from copy import copy
from itertools import accumulate
from pathlib import Path

from data.corpora import Corpus, Document, check_fraction, escaped, hash_of, split_of
from data.finding import find
from data.formats import ROWS, TEXT, Reader
from data.held_out import with_held_out
from data.remote import id_of, size_of, stamp_of


class TextFiles(Corpus):
    """The files of a folder, or that match a pattern (`**` crosses folders), or one file, in the order of their paths,
    on this machine or elsewhere (data/remote.py).

    path          a list takes several
    validation    another path; without it, `validation_fraction` of the documents is held out, and some text
                  where these are too few (data/held_out.py)
    text_field    the column of a table that holds the text
    separator     splits a text file into documents
    invalid_utf8  what to do with bytes that are not UTF-8: "error", or "replace" by U+FFFD
    """

    def __init__(
        self,
        path: str | list[str],
        validation: str | list[str] | None = None,
        validation_fraction: float = 0.01,
        text_field: str = "text",
        separator: str | None = None,
        invalid_utf8: str = "error",
    ):
        self.path, self.validation = path, validation
        self.validation_fraction = check_fraction(validation_fraction)
        if separator == "":
            raise ValueError("data.corpus.separator='' can't separate documents; use null for one document a file")
        if invalid_utf8 not in ("error", "replace"):
            raise ValueError(f"data.corpus.invalid_utf8={invalid_utf8!r} is not one of error, replace")
        self.reader = Reader(text_field, separator, invalid_utf8)
        self.found = {"train": find("data.corpus.path", path)}
        if validation is not None:
            self.found["validation"] = find("data.corpus.validation", validation)
            known = self.found["train"].ids
            both = [file for file in self.found["validation"].files if id_of(file) in known]
            if both:
                raise ValueError(
                    f"data.corpus.validation={validation!r} and data.corpus.path={path!r} share {len(both)} files, "
                    f"such as {both[0]}; keep what to validate on in a folder of its own"
                )
        self.files = [(split, file) for split, found in self.found.items() for file in found.files]
        self.numbers = range(len(self.files))  # that are read

    def read(self, position: list[int] | None = None) -> Iterator[Document]:
        first, offset, index = position or (self.numbers.start, 0, 0)
        for number in range(first, self.numbers.stop):
            split, file = self.files[number]
            for text, last, behind in self.reader.parts(file, offset, index):
                named = f"{self.found[split].files[file]}:{behind[1] - last}"
                own = split if self.validation is not None else split_of(named, self.validation_fraction)
                yield Document(own, named, text, last, [number, *behind])
            offset = index = 0

    def part(self, part: int, parts: int) -> TextFiles:
        """Whole files: those whose middle lies in the part-th of `parts` stretches of equal bytes."""
        if parts > len(self.files):
            raise ValueError(
                f"parts={parts} is more than the {len(self.files)} files of {self.describe()}, which are not divided"
            )
        sizes = [size_of(file) or 0 for _, file in self.files]
        total, behind = max(1, sum(sizes)), list(accumulate(sizes))
        places = [
            min(parts - 1, (2 * end - size) * parts // (2 * total)) for end, size in zip(behind, sizes, strict=True)
        ]
        found = copy(self)
        found.numbers = range(bisect_left(places, part), bisect_right(places, part))
        return found

    def with_both_splits(self) -> Corpus:
        return self if self.validation is not None else with_held_out(self, self.validation_fraction)

    def fraction(self, position: list[int]) -> float:
        number, offset, _ = position
        sizes = {n: size_of(self.files[n][1]) or 0 for n in self.numbers}
        plain = self.files[number][1].lower().endswith((*TEXT, *ROWS))
        within = min(offset, sizes[number]) if plain else 0
        return (sum(size for n, size in sizes.items() if n < number) + within) / max(1, sum(sizes.values()))

    def fingerprint(self) -> str:
        """Paths, sizes and times of change: a file that was edited is prepared again. And names where they decide the
        split: a folder and one within it may hold the same files. (Those of patterns are left out, so that what was
        prepared before is found.)
        """
        reader = self.reader
        settings = (
            reader.text_field,
            reader.separator,
            self.validation,
            self.validation_fraction,
            reader.invalid_utf8,
        )
        files = []
        for split, file in self.files:
            try:
                stamp = stamp_of(file)
            except OSError as error:
                raise ValueError(f"data.corpus.path={self.path!r}: {file} has gone ({error.strerror})") from error
            found, line = self.found[split], f"{split} {file} {stamp}"
            named = self.validation is None and file in found.walked and found.files[file] != escaped(Path(file).name)
            files.append(f"{line} {found.files[file]}" if named else line)
        return hash_of("text_files", *settings, *files)

    def describe(self) -> str:
        return escaped(f"{self.path}{f' and {self.validation}' if self.validation else ''} ({len(self.files)} files)")

    def left_out(self) -> str:
        return ", ".join(sentence for found in self.found.values() if (sentence := found.sentence()))
