"""Data sets of the Hugging Face hub, read through the `datasets` library.

They are read as a stream by default: the texts pass through once, on their way into token shards, and never lie on this
disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import copy
from itertools import islice

from data.corpora import BrokenOffError, Corpus, Document, check_fraction, hash_of, split_of, text_of


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
        self.share = (0, 1)

    def read(self, position: list[int] | None = None) -> Iterator[Document]:
        splits = [self.validation_split, self.split] if self.validation_split else [self.split]
        part, shard, row, index = position or (0, 0, 0, 0)
        for number in range(part, len(splits)):
            split = splits[number]
            limit = self.max_documents if split == self.split else None
            documents = self._documents(split, shard, row)
            for text, behind in islice(documents, None if limit is None else max(0, limit - index)):
                name = f"{split}:{index}"
                own = "train" if split == self.split else "validation"
                if not self.validation_split:
                    own = split_of(name, self.validation_fraction)
                index += 1
                yield Document(own, name, text, position=[number, *behind, index])
            shard = row = index = 0

    def part(self, part: int, parts: int) -> Hub:
        """Of the data set's own files, where no count of the rows before them matters."""
        counted = {
            "validation_split": self.validation_split is None,
            "max_documents": self.max_documents is not None,
            "document_start": self.document_start is not None,
            "streaming": not self.streaming,
        }
        if found := [name for name, counts in counted.items() if counts]:
            raise ValueError(
                f"parts={parts}: data.corpus.{found[0]}={getattr(self, found[0])} needs all rows before a part's own; "
                f"data=text_files data.corpus.path=hf://datasets/{self.path}/FOLDER reads its files in parts"
            )
        found_part = copy(self)
        found_part.share = (part, parts)
        return found_part

    def _documents(self, split: str, shard: int, row: int) -> Iterator[tuple[str, list[int]]]:
        """Texts, and the shard and row behind each."""
        rows = self._rows(split, shard, row)
        if self.document_start is None:
            yield from rows
            return
        lines: list[str] = []
        behind = [shard, row]
        for line, place in rows:
            if lines and self.document_start.match(line):
                yield "".join(lines), behind
                lines = []
            lines.append(line)
            behind = place
        if lines:
            yield "".join(lines), behind

    def _rows(self, split: str, shard: int, row: int) -> Iterator[tuple[str, list[int]]]:
        import datasets

        data = self._load(split)
        shards = data.num_shards if self.streaming else 1  # a shard is a file, and rows are in the order of the files
        begin, end = (shards * number // self.share[1] for number in (self.share[0], self.share[0] + 1))
        for number in range(max(shard, begin), end):
            part = data.shard(shards, number) if shards > 1 else data
            if row and not self.streaming and row == len(part):
                return  # which skip can't say of a table
            try:
                for count, example in enumerate(part.skip(row) if row else part, start=row + 1):
                    yield text_of(example, self.text_field, self.path), [number, count]
            except (OSError, datasets.exceptions.DatasetGenerationError) as error:
                raise BrokenOffError(
                    f"data.corpus.path={self.path!r} broke off in {split} ({' '.join(str(error).split())[:300]})"
                ) from error
            row = 0

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

    def fraction(self, position: list[int]) -> float | None:
        return (
            position[3] / self.max_documents
            if self.max_documents and position[0] == bool(self.validation_split)
            else None
        )

    def describe(self) -> str:
        return f"{self.path}{f' ({self.name})' if self.name else ''} from the Hugging Face hub"
