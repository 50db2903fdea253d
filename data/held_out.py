"""A validation split for few documents, or one.

Documents are split by their names (data/corpora.py), which leaves a split empty, or nearly, where they are few. That
split stands where it holds out LEAST bytes, or A of them. Else A of all N bytes are held out:

    A = min(max(fraction x N, min(LEAST, N / 8)), N / 2)

A document of at least 2 A bytes is cut, the longest one, the first of several of one length: its end is held out. The
cut is A bytes before its end, or before that: at the end of a paragraph where one ends among the A bytes before, else
at the end of a line, else at a blank, else between two characters (of the part of the document that is read at once).
Where all documents are shorter, whole ones are held out, in the order of the hashes of their names, until they have A
bytes.

A copy of a document that is held out is held out too, and one of the document that is cut is left out. Nothing but the
names, the texts and their order decides, so that every machine holds out the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from copy import copy
from typing import Any, NamedTuple

from data.corpora import SPLITS, Corpus, Document, hash_position
from data.formats import boundary

LEAST = 4096  # bytes: some sequences of the smallest model


class Size(NamedTuple):
    """What is known of a document."""

    name: str
    num_bytes: int
    digest: bytes


def with_held_out(corpus: Corpus, fraction: float) -> Corpus:
    """The corpus itself where its own split will do. It is read until that is known, which takes few documents."""
    found = dict.fromkeys(SPLITS, 0)
    sizes: list[Size] = []
    num_bytes, digest = 0, hashlib.sha256()
    for document in corpus:
        raw = _raw(document.text)
        found[document.split] += len(raw)
        if found["train"] and found["validation"] >= LEAST:
            return corpus
        digest.update(raw)
        num_bytes += len(raw)
        if document.last:
            sizes.append(Size(document.name, num_bytes, digest.digest()))
            num_bytes, digest = 0, hashlib.sha256()
    total = sum(found.values())
    amount = min(max(int(fraction * total), min(LEAST, total // 8)), total // 2)
    if found["train"] and found["validation"] >= max(1, min(LEAST, amount)):
        return corpus
    longest = max(range(len(sizes)), key=lambda number: sizes[number].num_bytes, default=0)
    if total < 2 or sizes[longest].num_bytes < 2 * max(amount, 1):
        return _whole(corpus, sizes, max(amount, 1))
    copies = frozenset(n for n, size in enumerate(sizes) if size.digest == sizes[longest].digest) - {longest}
    return EndHeldOut(corpus, longest, sizes[longest], max(amount, 1), copies)


def _whole(corpus: Corpus, sizes: list[Size], amount: int) -> Corpus:
    """Without a copy on either side, and never all of them."""
    held: set[bytes] = set()
    rest = {size.digest for size in sizes if size.num_bytes}
    for size in sorted(sizes, key=lambda size: hash_position(size.name)):
        if len(rest) > 1 and size.digest in rest and amount > 0:
            held.add(size.digest)
            rest.remove(size.digest)
            amount -= sum(other.num_bytes for other in sizes if other.digest == size.digest)
    numbers = frozenset(n for n, size in enumerate(sizes) if size.digest in held)
    return DocumentsHeldOut(corpus, numbers, sum(sizes[n].num_bytes for n in numbers)) if numbers else corpus


def _raw(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")


class HeldOut(Corpus):
    """A corpus in training, but for some of it. A position is that of the corpus, the number of the document that comes
    next, and how many bytes of it are done.
    """

    def __init__(self, corpus: Corpus):
        self.corpus = corpus
        self.first = 0  # the number of the document that is read first

    def read(self, position: tuple[Any, int, int] | None = None) -> Iterator[Document]:
        behind, number, done = position or (None, self.first, 0)
        for document in self.corpus.read(behind):
            raw, begin = _raw(document.text), done
            number_behind, done = (number + 1, 0) if document.last else (number, done + len(raw))
            place = (document.position, number_behind, done)
            yield from self._split(document._replace(split="train", position=place), raw, number, begin)
            number = number_behind

    def _split(self, document: Document, raw: bytes, number: int, begin: int) -> Iterator[Document]:
        """A part, which begins at this byte of the document of this number, in its splits."""
        raise NotImplementedError

    def part(self, part: int, parts: int) -> HeldOut:
        """The documents before it are read, to count them: they are few."""
        found = copy(self)
        found.corpus = self.corpus.part(part, parts)
        found.first = sum(document.last for n in range(part) for document in self.corpus.part(n, parts))
        return found

    def fraction(self, position: tuple[Any, int, int]) -> float | None:
        return self.corpus.fraction(position[0])

    def fingerprint(self) -> str:
        return self.corpus.fingerprint()

    def left_out(self) -> str:
        return self.corpus.left_out()


class DocumentsHeldOut(HeldOut):
    """But for the documents of these numbers."""

    def __init__(self, corpus: Corpus, numbers: frozenset[int], num_bytes: int):
        super().__init__(corpus)
        self.numbers, self.num_bytes = numbers, num_bytes

    def _split(self, document: Document, raw: bytes, number: int, begin: int) -> Iterator[Document]:
        yield document._replace(split="validation") if number in self.numbers else document

    def describe(self) -> str:
        held = f"{len(self.numbers):,} of them, {self.num_bytes:,} bytes, are the validation split"
        return f"{self.corpus.describe()}; these are few documents, so that {held}"


class EndHeldOut(HeldOut):
    """But for the end of the document of this number, and copies of that document."""

    def __init__(self, corpus: Corpus, number: int, size: Size, amount: int, copies: frozenset[int]):
        super().__init__(corpus)
        self.number, self.size, self.amount, self.copies = number, size, amount, copies
        self.at = size.num_bytes - amount

    def _split(self, document: Document, raw: bytes, number: int, begin: int) -> Iterator[Document]:
        end = document._replace(split="validation", name=f"{document.name}, its end")
        if number != self.number or begin + len(raw) <= self.at:
            if number not in self.copies:
                yield document
        elif begin > self.at:
            yield end
        else:
            at = self._cut(raw, self.at - begin) or (0 if begin else len(document.text[:1].encode()))
            yield Document("train", document.name, raw[:at].decode())
            yield end._replace(text=raw[at:].decode())

    def _cut(self, raw: bytes, stop: int) -> int:
        for end in (b"\n\n", b"\r\n\r\n", b"\n"):
            if (at := raw.rfind(end, max(0, stop - self.amount), stop)) >= 0:
                return at + len(end)
        at = boundary(raw, 0, stop) if stop else 0
        return at if len(raw) <= at or raw[at] & 0xC0 != 0x80 else 0

    def describe(self) -> str:
        held = f"the end of {self.size.name.rpartition(':')[0]}, some {self.amount:,} bytes, is the validation split"
        copies = f", and {len(self.copies):,} copies of it are left out" if self.copies else ""
        return f"{self.corpus.describe()}; these are few documents, so that {held}{copies}"
