"""Token shards: a corpus tokenised once, read by index ever after.

A folder holds, for each split,

    train_00000.bin, train_00001.bin, ...   token ids, uint16 where the vocabulary fits, else uint32; no header
    train_offsets.bin                       int64 [documents + 1]: where each document starts among the split's tokens,
                                            and their number
    meta.json                               counts of tokens, documents and bytes, tokenizer, source; the size and hash
                                            of each file above
    stamps.json                             when those files last changed, as far as that has been checked
    tokenizer/                              the tokenizer's own files, in the form that `transformers` loads

Every document ends with the end-of-document token. Boundaries are kept as offsets because that id may, with some
tokenizers, also occur within a text.

data/prepare.py writes such a folder. What is wrong with one is found in three steps: `check`, at every start, compares
sizes, and hashes the files that have been touched since they were last hashed (copied, restored, edited);
`check(everything=True)`, on demand, hashes them all; and a read that gets less than it should says so.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from data.corpora import SPLITS, Corpus
from data.tokenizer import Tokenizer

FORMAT = 2  # of these files; part of the folder's name
SHARD_TOKENS = 2**28  # half a gigabyte at uint16
BLOCK = 2**24  # bytes that are hashed at once


def cache_folder() -> Path:
    """Where prepared corpora are kept: the environment variable TTR_CACHE, or ~/.cache/test-time-regression."""
    return Path(os.environ.get("TTR_CACHE") or "~/.cache/test-time-regression").expanduser()


def shard_folder(name: str, corpus: Corpus, tokenizer: Tokenizer, drop_duplicates: bool = False) -> Path:
    """The folder of this corpus in this tokenizer. It is known before a tokenizer is trained."""
    recipe = "\n".join((str(FORMAT), corpus.fingerprint(), tokenizer.spec(), str(drop_duplicates)))
    return cache_folder() / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


class SplitWriter:
    """Appends pieces to the files of one split. Each appended piece has a record, by which it is recognised again.

    A new writer takes up the files that are there: for each record in order, `keep` it if it `holds`, then `cut_off`.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.tokens = self.documents = self.bytes = 0
        self.files: dict[str, dict[str, Any]] = {}
        self._hashes: list[Any] = []  # running, a shard each
        self._candidate: np.ndarray | None = None

    def append(self, piece) -> dict[str, Any]:
        """piece: a data.tokenizing.Tokens. Returns its record."""
        for number, begin, part in self._over_shards(piece.ids):
            with open(self._shard(number), "ab") as file:
                assert file.tell() == begin * self.dtype.itemsize, (file.name, file.tell(), begin)
                file.write(part.data)
        ends = piece.ends + self.tokens
        with open(self._offsets, "ab") as file:
            file.write(ends)
        record = {"tokens": len(piece.ids), "documents": len(ends), "bytes": piece.num_bytes}
        record["sha256"] = _digest(piece.ids, ends)
        self._count(piece.ids, record)
        return record

    def holds(self, record: dict[str, Any]) -> bool:
        """Whether the files go on with the piece of this record."""
        parts = [
            _read(self._shard(number), self.dtype, begin, len(part))
            for number, begin, part in self._over_shards(np.empty(record["tokens"], np.uint8))
        ]
        self._candidate = np.concatenate([np.empty(0, self.dtype), *parts])
        ends = _read(self._offsets, np.dtype(np.int64), self.documents + 1, record["documents"])
        return record["sha256"] == _digest(self._candidate, ends)

    def keep(self, record: dict[str, Any]) -> None:
        assert self._candidate is not None, "holds comes first"
        self._count(self._candidate, record)
        self._candidate = None

    def cut_off(self) -> None:
        """Removes what is behind the pieces that were kept, and begins the offsets where there are none."""
        self._candidate = None
        for file in self.folder.glob(f"{self.split}_[0-9]*.bin"):
            length = self.tokens - int(file.stem.removeprefix(f"{self.split}_")) * self.shard_tokens
            if length <= 0:
                file.unlink()
            else:
                os.truncate(file, min(length, self.shard_tokens) * self.dtype.itemsize)
        if not self.documents:
            self._offsets.write_bytes(bytes(8))
        os.truncate(self._offsets, 8 * (self.documents + 1))

    def close(self) -> dict[str, int]:
        shards = {self._shard(number): digest.hexdigest() for number, digest in enumerate(self._hashes)}
        for file, digest in (shards | {self._offsets: hash_file(self._offsets)}).items():
            sync(file)
            self.files[file.name] = {"bytes": file.stat().st_size, "sha256": digest}
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "shards": len(self._hashes)}

    @property
    def _offsets(self) -> Path:
        return self.folder / f"{self.split}_offsets.bin"

    def _shard(self, number: int) -> Path:
        return self.folder / f"{self.split}_{number:05d}.bin"

    def _over_shards(self, ids: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
        """(number of the shard, where in it, which of ids) for ids that follow what is there."""
        found, done = [], 0
        while done < len(ids):
            number, begin = divmod(self.tokens + done, self.shard_tokens)
            part = ids[done : done + self.shard_tokens - begin]
            found.append((number, begin, part))
            done += len(part)
        return found

    def _count(self, ids: np.ndarray, record: dict[str, Any]) -> None:
        for number, _, part in self._over_shards(ids):
            if number == len(self._hashes):
                self._hashes.append(hashlib.sha256())
            self._hashes[number].update(part)
        self.tokens += record["tokens"]
        self.documents += record["documents"]
        self.bytes += record["bytes"]


def _read(file: Path, dtype: np.dtype, begin: int, count: int) -> np.ndarray:
    """Items of a file, fewer where it has not so many."""
    if not file.exists():
        return np.empty(0, dtype)
    return np.fromfile(file, dtype, count, offset=begin * dtype.itemsize)


def _digest(ids: np.ndarray, ends: np.ndarray) -> str:
    digest = hashlib.sha256(ids.data)
    digest.update(ends.data)
    return digest.hexdigest()


def hash_file(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """To the disk, so that a machine that goes down keeps it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check(folder: Path, tokenizer: Tokenizer, everything: bool = False) -> None:
    """Raises ValueError, naming the file, where the folder does not hold what was written to it, and where `tokenizer`
    is not the one that it was written with.
    """
    meta = read_meta(folder)
    stamps = {}
    with suppress(OSError, ValueError):  # without stamps, everything is hashed
        stamps = json.loads((folder / "stamps.json").read_text())
    touched = []
    for name, expected in meta["files"].items():
        if not (folder / name).exists():
            raise ValueError(f"{folder / name} has gone; {_AGAIN}")
        if (size := (folder / name).stat().st_size) != expected["bytes"]:
            raise ValueError(f"{folder / name} has {size:,} bytes, and {expected['bytes']:,} were written; {_AGAIN}")
        if everything or stamps.get(name) != _stamp(folder / name):
            touched.append(name)
    for name in touched:
        if hash_file(folder / name) != meta["files"][name]["sha256"]:
            raise ValueError(f"{folder / name} is not what was written: its bytes have changed; {_AGAIN}")
    if touched:
        with suppress(OSError):  # a cache that can't be written to is hashed at every start
            write_stamps(folder, meta["files"])
    if tokenizer.fingerprint() != meta["tokenizer_fingerprint"]:
        raise ValueError(
            f"{folder / 'tokenizer'} ({meta['tokenizer']}) is not the tokenizer that the tokens beside it were written "
            f"with: {meta['tokenizer_fingerprint']} then, {tokenizer.fingerprint()} now; {_AGAIN}"
        )


_AGAIN = "delete the folder, and it is made again"


def read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return {key: meta[key] for key in ("files", "splits", "dtype", "shard_tokens")} | meta
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'meta.json'} can't be read ({error}); {_AGAIN}") from error


def write_stamps(folder: Path, names: Iterable[str]) -> None:
    draft = folder / f".stamps.json.{os.getpid()}"
    draft.write_text(json.dumps({name: _stamp(folder / name) for name in names}))
    draft.replace(folder / "stamps.json")


def _stamp(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


class TokenShards:
    """One split of a prepared folder.

    offsets: int64 [num_documents + 1], the first token of each document and the number of all, memory-mapped.

    Tokens are read, not mapped: a map of a file that is truncated under a run kills it without a word (SIGBUS). A file
    that is deleted under a run stays readable until it ends.
    """

    def __init__(self, folder: str | Path, split: str):
        assert split in SPLITS, split
        self.folder, self.split = Path(folder), split
        self.meta = read_meta(self.folder)
        counts = self.meta["splits"][split]
        self.num_tokens, self.num_documents, self.num_bytes = counts["tokens"], counts["documents"], counts["bytes"]
        self.shard_tokens, self.dtype = self.meta["shard_tokens"], np.dtype(self.meta["dtype"])
        try:
            paths = [self.folder / f"{split}_{number:05d}.bin" for number in range(counts["shards"])]
            self.shards = [open(path, "rb", buffering=0) for path in paths]  # noqa: SIM115, open as long as this is
            self.offsets = np.asarray(np.memmap(self.folder / f"{split}_offsets.bin", np.int64, mode="r"))
        except (OSError, ValueError) as error:  # ValueError: an empty file can't be mapped
            raise ValueError(f"{self.folder} can't be opened ({error}); {_AGAIN}") from error
        if len(self.offsets) != self.num_documents + 1 or int(self.offsets[-1]) != self.num_tokens:
            raise ValueError(
                f"{self.folder} holds other {split} tokens than its meta.json counts, {self.num_tokens:,}; {_AGAIN}"
            )

    def __reduce__(self):
        # a loader's worker opens the files itself
        return TokenShards, (self.folder, self.split)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1, as they are stored, across shards."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        out = np.empty(stop - start, self.dtype)
        done = start
        while done < stop:
            number, within = divmod(done, self.shard_tokens)
            count = min(stop - done, self.shard_tokens - within)
            self._read_into(out[done - start : done - start + count], number, within)
            done += count
        return out

    def _read_into(self, out: np.ndarray, number: int, begin: int) -> None:
        """Fills it with the tokens of a shard from `begin` on."""
        file, size = self.shards[number], self.dtype.itemsize
        try:
            count = os.preadv(file.fileno(), [out.data], begin * size)
        except OSError as error:
            raise ValueError(f"{file.name} can't be read any more ({error.strerror})") from error
        if count < len(out) * size:
            raise ValueError(f"{file.name} ends at byte {begin * size + count:,}: it has been cut since the start")

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """`length` tokens from each of these places on, as they are stored. [n, length]."""
        out = np.empty((len(starts), length), self.dtype)
        for row, start in zip(out, starts.tolist(), strict=True):
            number, within = divmod(start, self.shard_tokens)
            if within + length <= self.shard_tokens:
                self._read_into(row, number, within)
            else:
                row[:] = self.read(start, start + length)
        return out

    def document_starts(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Which tokens of such rows begin a document that is not the row's first one. Bool [n, length]."""
        out = np.zeros((len(starts), length), dtype=bool)
        first = np.searchsorted(self.offsets, starts, side="right")
        counts = np.searchsorted(self.offsets, starts + length, side="left") - first
        rows = np.repeat(np.arange(len(starts)), counts)
        documents = np.arange(len(rows)) + np.repeat(first - np.cumsum(counts) + counts, counts)
        out[rows, self.offsets[documents] - starts[rows]] = True
        return out
