"""A validation split for few documents, or one: the end of the longest is held out.

Documents are split by their names (data/corpora.py), which leaves a split empty, or nearly, where they are few. Then
all text is trained on but the last A bytes of the longest document, the first of several of one length:

    A = min(max(fraction x all bytes, LEAST), half of that document)

It is cut before those A bytes, at the end of a paragraph where one ends among the A bytes before; else at the end of a
line, else at a blank, else between two characters (of the part of the document that is read at once). Copies of that
document are left out. The split by names stands where it holds out LEAST bytes, or as much as the cut would. Nothing
but the texts and their order decides, so that every machine cuts at the same place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from data.corpora import SPLITS, Corpus, Document
from data.formats import boundary

LEAST = 4096  # bytes: some sequences of the smallest model


def end_held_out(corpus: Corpus, fraction: float) -> Corpus:
    """The corpus itself where its own split will do. It is read until that is known, which takes few documents."""
    held_out = dict.fromkeys(SPLITS, 0)
    number = size = total = length = 0
    name = ""
    longest: dict[int, bytes] = {}  # the documents of this length, and their hashes
    digest = hashlib.sha256()
    for document in corpus:
        raw = _raw(document.text)
        digest.update(raw)
        num_bytes = len(raw)
        held_out[document.split] += num_bytes
        total, size = total + num_bytes, size + num_bytes
        if held_out["train"] and held_out["validation"] >= LEAST:
            return corpus
        if document.last:
            if size > length:
                longest, length, name = {}, size, document.name
            if size == length:
                longest[number] = digest.digest()
            number, size, digest = number + 1, 0, hashlib.sha256()
    amount = min(max(int(fraction * total), LEAST), length // 2)
    if not amount or (held_out["train"] and held_out["validation"] >= min(LEAST, amount)):
        return corpus
    first, *others = longest
    copies = frozenset(other for other in others if longest[other] == longest[first])
    return EndHeldOut(corpus, first, name, length - amount, amount, copies)


def _raw(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")


class EndHeldOut(Corpus):
    """A corpus in training, but for the end of its document of this number, which is cut at `cut` bytes or before, and
    for copies of that document.

    A position is that of the corpus, the number of the document that comes next, and how many bytes of it are done.
    """

    def __init__(self, corpus: Corpus, number: int, name: str, cut: int, amount: int, copies: frozenset[int]):
        self.corpus, self.number, self.name, self.cut, self.amount = corpus, number, name, cut, amount
        self.copies = copies

    def read(self, position: tuple[Any, int, int] | None = None) -> Iterator[Document]:
        behind, number, done = position or (None, 0, 0)
        for document in self.corpus.read(behind):
            raw, begin = _raw(document.text), done
            done += len(raw)
            place = (document.position, number, done) if not document.last else (document.position, number + 1, 0)
            whole = document._replace(split="train", position=place)
            if number != self.number or done <= self.cut:
                if number not in self.copies:
                    yield whole
            elif begin > self.cut:
                yield whole._replace(split="validation")
            else:
                at = self._cut(raw, self.cut - begin) or (0 if begin else len(document.text[:1].encode()))
                yield Document("train", document.name, raw[:at].decode(), True)
                yield whole._replace(split="validation", name=f"{document.name}, its end", text=raw[at:].decode())
            if document.last:
                number, done = number + 1, 0

    def _cut(self, raw: bytes, stop: int) -> int:
        for end in (b"\n\n", b"\r\n\r\n", b"\n"):
            if (at := raw.rfind(end, max(0, stop - self.amount), stop)) >= 0:
                return at + len(end)
        at = boundary(raw, 0, stop) if stop else 0
        return at if len(raw) <= at or raw[at] & 0xC0 != 0x80 else 0

    def fraction(self, position: tuple[Any, int, int]) -> float | None:
        return self.corpus.fraction(position[0])

    def fingerprint(self) -> str:
        return self.corpus.fingerprint()

    def describe(self) -> str:
        return (
            f"{self.corpus.describe()}; these are few documents, so that the end of {self.name.rpartition(':')[0]}, "
            f"some {self.amount:,} bytes, is the validation split"
            f"{f', and {len(self.copies):,} copies of it are left out' if self.copies else ''}"
        )

    def left_out(self) -> str:
        return self.corpus.left_out()
