"""A preparation divided over machines: parts, which any of them prepare, and one merge.

Part k of n takes consecutive files of the corpus, of about an n-th of its bytes, and writes them as a corpus of its
own, to a folder beside that of the whole:

    NAME-HASH.parts/00003-of-00016    as data/shards.py has it, but a split may be empty
                    tokenizer/        of all parts; the first one trains it where it has to be

A part is prepared as the whole would be: a kill loses nothing, and several parts never touch the same file. What
prepares the whole, with a run's start or without, finds all parts and appends them one behind the other. Its files are
then those that one machine would have written, byte for byte.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from data.corpora import SPLITS, Corpus
from data.pieces import Piece
from data.prepare import Preparation, prepare
from data.shards import SHARD_TOKENS, TokenShards, check
from data.tokenizer import Tokenizer
from data.tokenizing import Tokens

CHUNK = 2**24  # tokens that are copied at once


def parts_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.parts")


def prepare_part(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    part: int,
    parts: int,
    shard_tokens: int = SHARD_TOKENS,
    num_workers: int = 0,
    drop_duplicates: bool = False,
) -> Path:
    """Write part `part` (from 0) of `parts` of this corpus, unless it is there. Returns its folder, or that of the
    whole where this is prepared already.

    Raises ValueError where the corpus can't be divided so.
    """
    if not isinstance(parts, int) or parts < 1:
        raise ValueError(f"parts={parts} must be a whole number, at least 1: into how many parts the corpus is divided")
    if not isinstance(part, int) or not 0 <= part < parts:
        raise ValueError(f"part={part} of parts={parts} must be a whole number from 0 to {parts - 1}")
    if drop_duplicates:
        raise ValueError(
            "data.drop_duplicates=true compares all documents, of which a part sees only its own; docs/data.md says "
            "how datatrove removes duplicates before"
        )
    if folder.exists():
        return folder
    own = parts_folder(folder) / f"{part:05d}-of-{parts:05d}"
    how = partial(_Part, part=part, parts=parts)
    prepare(corpus, tokenizer, own, shard_tokens, num_workers, how=how)
    return own


def merge(corpus: Corpus, tokenizer: Tokenizer, folder: Path, shard_tokens: int = SHARD_TOKENS) -> None:
    """Write the whole from its parts, where this is not done yet, and remove them. Raises ValueError where some are not
    there.
    """
    prepare(corpus, tokenizer, folder, shard_tokens, how=_Merge)
    shutil.rmtree(parts_folder(folder), ignore_errors=True)  # a rest is found by no one


def divided(folder: Path) -> bool:
    """Whether there are parts of a corpus. Beside the whole they are what a killed merge has left."""
    return parts_folder(folder).exists()


class _Part(Preparation):
    """Of some files of a corpus."""

    def __init__(self, *arguments: Any, part: int, parts: int):
        super().__init__(*arguments)
        self.whole, self.corpus = self.corpus, self.corpus.part(part, parts)

    def _prepare_tokenizer(self) -> None:
        place = self.folder.parent
        with FileLock(place / "tokenizer.lock"):
            self._learn(self.whole, place)
        if not (self.partial / "tokenizer").exists():
            draft = self.partial / "tokenizer.draft"
            shutil.copytree(place / "tokenizer", draft, dirs_exist_ok=True)
            draft.rename(self.partial / "tokenizer")

    def _refuse_nothing(self, counts: dict[str, dict[str, int]], total: int, empty: int) -> None:
        """The whole may have what this part has not."""


class _Merge(Preparation):
    """Of the parts of a corpus. A position is a part, and the tokens of each split that are behind it in the part."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.parts = _all_parts(parts_folder(self.folder))

    def _prepare_tokenizer(self) -> None:
        if not (self.partial / "tokenizer").exists():
            draft = self.partial / "tokenizer.draft"
            shutil.copytree(self.parts[0] / "tokenizer", draft, dirs_exist_ok=True)
            draft.rename(self.partial / "tokenizer")
        self._learn(self.corpus, self.partial)
        for part in self.parts:
            check(part, self.tokenizer)

    def _recipe(self) -> dict[str, Any]:
        return super()._recipe() | {"parts": len(self.parts), "chunk": CHUNK}

    def _fraction(self, position: Any) -> float:
        return position[0] / len(self.parts)

    def _pieces(
        self, dtype: np.dtype, position: Any, within: bool, seen: set[str] | None, dropped: int, empty: int
    ) -> Iterator[tuple[Piece, dict[str, Tokens]]]:
        first, *done = position or (0, 0, 0)
        for number in range(first, len(self.parts)):
            shards = [TokenShards(self.parts[number], split) for split in SPLITS]
            ended = False
            while not ended:
                stops = [min(start + CHUNK, s.num_tokens) for start, s in zip(done, shards, strict=True)]
                ended = stops == [s.num_tokens for s in shards]
                found = {s.split: _chunk(s, a, b) for s, a, b in zip(shards, done, stops, strict=True)}
                done = [0, 0] if ended else stops
                last = ended and number + 1 == len(self.parts)
                behind = None if last else [number + ended, *done]
                yield Piece([], behind, False, [], dropped, empty), found


def _chunk(shards: TokenShards, start: int, stop: int) -> Tokens:
    """Tokens start to stop - 1, with their share of the bytes of text: the sum over all chunks is exact."""
    first, last = np.searchsorted(shards.offsets[1:], [start, stop], side="right")
    begin, end = (shards.num_bytes * place // max(1, shards.num_tokens) for place in (start, stop))
    return Tokens(shards.read(start, stop), shards.offsets[1:][first:last] - start, end - begin)


def _all_parts(folder: Path) -> list[Path]:
    """Those of one division, in order."""
    found: dict[int, set[int]] = {}
    for path in folder.iterdir():
        if name := re.fullmatch(r"(\d{5,})-of-(\d{5,})(\.partial)?", path.name):
            prepared = found.setdefault(int(name[2]), set())
            prepared |= set() if name[3] else {int(name[1])}
    whole = [parts for parts, prepared in sorted(found.items()) if len(prepared) == parts]
    if not whole:
        parts = max(found, key=lambda parts: len(found[parts]), default=0)
        missing = sorted(set(range(parts)) - found.get(parts, set()))
        shown = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
        raise ValueError(
            f"{folder} holds a preparation in parts={parts}, of which {len(missing):,} are not there: part={shown}; "
            "prepare them (scripts/prepare_data.py), or delete that folder, and the whole is prepared at once"
        )
    return [folder / f"{part:05d}-of-{whole[0]:05d}" for part in range(whole[0])]
