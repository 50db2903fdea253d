"""Data sets of the Hugging Face hub, read through the `datasets` library.

They are read as a stream by default: the texts pass through once, on their way into token shards, and never lie on this
disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

from data.corpora import Corpus, Document, check_fraction, hash_of, split_of, text_of


class Hub(Corpus):
    """`datasets.load_dataset(path, name, split=split)`, one document a row.

    validation_split     a split of the data set to validate on; null holds out `validation_fraction` of `split`, by the
                         hash of a row's number
    text_field           the column with the text
    document_start       a regular expression for data sets that store lines: a row that it matches opens a new
                         document, the rows up to the next one are joined to it. null: every row is a document
    max_documents        stop after so many documents of `split`; null takes all
    revision             a commit or branch of the data set, for runs that must be repeatable for years
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        validation_split: str | None = None,
        validation_fraction: float = 0.001,
        text_field: str = "text",
        document_start: str | None = None,
        max_documents: int | None = None,
        revision: str | None = None,
        streaming: bool = True,
    ):
        if max_documents is not None and max_documents < 1:
            raise ValueError(f"data.corpus.max_documents={max_documents} must be positive, or null for all")
        if validation_split == split:
            raise ValueError(f"data.corpus.validation_split={validation_split!r} is the training split too")
        self.path, self.name, self.split, self.validation_split = path, name, split, validation_split
        self.validation_fraction = check_fraction(validation_fraction)
        self.text_field, self.max_documents = text_field, max_documents
        self.revision, self.streaming = revision, streaming
        self.document_start = re.compile(document_start) if document_start else None

    def __iter__(self) -> Iterator[Document]:
        if self.validation_split:
            for index, text in enumerate(self._documents(self.validation_split)):
                yield Document("validation", f"{self.validation_split}:{index}", text)
        for index, text in enumerate(islice(self._documents(self.split), self.max_documents)):
            name = f"{self.split}:{index}"
            own = "train" if self.validation_split else split_of(name, self.validation_fraction)
            yield Document(own, name, text)

    def _documents(self, split: str) -> Iterator[str]:
        rows = (text_of(row, self.text_field, self.path) for row in self._load(split))
        if self.document_start is None:
            yield from rows
            return
        lines: list[str] = []
        for line in rows:
            if lines and self.document_start.match(line):
                yield "".join(lines)
                lines = []
            lines.append(line)
        yield "".join(lines)

    def _load(self, split: str):
        import datasets

        try:
            return datasets.load_dataset(
                self.path, self.name, split=split, revision=self.revision, streaming=self.streaming
            )
        except (OSError, ValueError) as error:  # unreachable or unknown; an unknown name or split of a known one
            reason = " ".join(str(error).split())
            raise ValueError(
                f"data.corpus.path={self.path!r} (name={self.name!r}, split={split!r}) can't be loaded from the hub or "
                f"its cache: {reason[:300]}"
            ) from error

    def fingerprint(self) -> str:
        pattern = self.document_start.pattern if self.document_start else None
        settings = (self.path, self.name, self.split, self.validation_split, self.validation_fraction, self.text_field)
        return hash_of("hub", *settings, pattern, self.max_documents, self.revision)

    def describe(self) -> str:
        return f"{self.path}{f' ({self.name})' if self.name else ''} from the Hugging Face hub"
