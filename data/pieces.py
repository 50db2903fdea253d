"""A corpus cut into pieces: consecutive documents, of some 16 MB of text together, that are tokenised at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from data.corpora import Corpus, Document
from data.formats import PART, boundary
from data.tokenizing import Part

PIECE = 2**24  # characters of text


class Piece(NamedTuple):
    """Consecutive parts of documents, and what the journal says of them."""

    parts: list[Part]
    position: Any  # where reading goes on behind it
    within: bool  # whether that is within a document
    hashes: list[str]  # of its documents, where duplicates are dropped
    dropped: int
    empty: int  # documents without text, which are left out


def cut(
    corpus: Corpus, position: Any, within: bool, seen: set[str] | None, dropped: int, empty: int
) -> Iterator[Piece]:
    """The corpus from this position on, which may be within a document. A piece ends behind the first part that fills
    it and has a position.
    """
    parts: list[Part] = []
    hashes, size, behind = [], 0, None
    for document in corpus.read(position):
        whole, within = document.last and not within, not document.last
        behind = document.position
        if whole and seen is not None and document.text:
            digest = hashlib.sha256(document.text.encode("utf-8", errors="replace")).hexdigest()[:32]
            if digest in seen:
                dropped += 1
                continue
            seen.add(digest)
            hashes.append(digest)
        if whole and not document.text:
            empty += 1  # it has nothing to predict
            continue
        parts += _divided(document)
        size += len(document.text)
        if size >= PIECE and behind is not None:
            yield Piece(parts, behind, within, hashes, dropped, empty)
            parts, hashes, size = [], [], 0
    yield Piece(parts, behind, within, hashes, dropped, empty)


def _divided(document: Document) -> Iterator[Part]:
    """A long text in parts, the same as data/formats.py makes of a .txt file: a tokenizer takes a hundred times the
    memory of its text.
    """
    split, text, last = document.split, document.text, document.last
    if len(text) <= PART // 4:  # a character has at most 4 bytes
        yield Part(split, text, last)
        return
    raw, begin = text.encode("utf-8", errors="replace"), 0
    while len(raw) - begin > PART:
        stop = boundary(raw, begin, begin + PART)
        yield Part(split, raw[begin:stop].decode(), False)
        begin = stop
    yield Part(split, raw[begin:].decode(), last)
