"""Token shards: a corpus tokenised once, read by index ever after.

A folder holds, for each split,

    train_00000.bin, train_00001.bin, ...   token ids, uint16 where the vocabulary fits, else uint32; no header
    train_offsets.npy                       int64 [documents + 1]: where each document starts among the split's tokens,
                                            and their number
    meta.json                               counts of tokens, documents and bytes, tokenizer, source, fingerprints
    tokenizer/                              the tokenizer's own files, in the form that `transformers` loads

Every document ends with the end-of-document token. Boundaries are kept as offsets because that id may, with some
tokenizers, also occur within a text.

The folder is written under another name and renamed whole, under a lock: a kill leaves no half-written corpus behind,
and of several processes that start together one prepares while the others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock

from data.corpora import SPLITS, Corpus, Document
from data.tokenizer import Tokenizer, Trainable

FORMAT = 1  # of the files below; part of the fingerprint
SHARD_TOKENS = 2**28  # half a gigabyte at uint16
BATCH_BYTES = 2**22  # of text, tokenised at once: enough to keep a parallel tokenizer busy


def cache_folder() -> Path:
    """Where prepared corpora are kept: the environment variable TTR_CACHE, or ~/.cache/test-time-regression."""
    return Path(os.environ.get("TTR_CACHE") or "~/.cache/test-time-regression").expanduser()


def shard_folder(name: str, corpus: Corpus, tokenizer: Tokenizer) -> Path:
    """The folder of this corpus in this tokenizer. It is known before a tokenizer is trained."""
    recipe = "\n".join((str(FORMAT), corpus.fingerprint(), tokenizer.spec()))
    return cache_folder() / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def prepare(corpus: Corpus, tokenizer: Tokenizer, folder: Path, shard_tokens: int = SHARD_TOKENS) -> None:
    """Write the shards of this corpus to `folder`, unless they are there; on return they are, and the tokenizer is
    trained.

    Raises ValueError if either split has no document.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                _prepare_locked(corpus, tokenizer, folder, shard_tokens)
    if isinstance(tokenizer, Trainable) and not tokenizer.trained:
        tokenizer.load(folder / "tokenizer")


def _prepare_locked(corpus: Corpus, tokenizer: Tokenizer, folder: Path, shard_tokens: int) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        if isinstance(tokenizer, Trainable) and not tokenizer.trained:
            print(f"Training the tokenizer ({tokenizer.spec()}) on {corpus.describe()}", flush=True)
            tokenizer.train(corpus.texts("train"))
        _write(corpus, tokenizer, partial, shard_tokens)
        tokenizer.save(partial / "tokenizer")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone after the rename; left by an error


def _write(corpus: Corpus, tokenizer: Tokenizer, folder: Path, shard_tokens: int) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    writers = {split: _SplitWriter(folder, split, dtype, tokenizer.eos, shard_tokens) for split in SPLITS}
    progress = _Progress(folder.name.removesuffix(".partial"))
    for batch in _batches(corpus):
        encoded = tokenizer.encode_batch([document.text for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            writers[document.split].add(ids, num_bytes=len(document.text.encode("utf-8", errors="replace")))
        progress.update(writers.values())
    counts = {split: writer.close() for split, writer in writers.items()}
    for split in SPLITS:
        if not counts[split]["documents"]:
            total = sum(count["documents"] for count in counts.values())
            raise ValueError(
                f"data.corpus leaves the {split} split without a document, of {total} in {corpus.describe()}; more or "
                "smaller documents, another validation_fraction, or a validation set of its own help"
            )
    meta = {
        "format": FORMAT,
        "source": corpus.describe(),
        "corpus_fingerprint": corpus.fingerprint(),
        "tokenizer": tokenizer.spec(),
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "eos": tokenizer.eos,
        "dtype": dtype.name,
        "splits": counts,
        # of the tokens themselves: two machines with equal fingerprints train on the same data
        "fingerprint": hashlib.sha256("".join(counts[split]["sha256"] for split in SPLITS).encode()).hexdigest(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    progress.finish(writers.values())


def _batches(corpus: Corpus) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in corpus:
        if not document.text:
            continue  # an empty document has nothing to predict
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Appends documents to the shards of one split."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, eos: int, shard_tokens: int):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.end = np.array([eos], dtype=dtype)
        self.tokens = self.bytes = self.shards = 0
        self.lengths: list[int] = []
        self.digest = hashlib.sha256()
        self.stream = None

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        self._append(np.concatenate((ids.astype(self.dtype), self.end)))
        self.lengths.append(len(ids) + 1)
        self.bytes += num_bytes

    def _append(self, ids: np.ndarray) -> None:
        self.digest.update(ids)
        while len(ids):
            if self.tokens == self.shards * self.shard_tokens:  # the last shard is full, or there is none yet
                self._next_shard()
            part = ids[: self.shards * self.shard_tokens - self.tokens]
            part.tofile(self.stream)
            self.tokens += len(part)
            ids = ids[len(part) :]

    def _next_shard(self) -> None:
        if self.stream:
            self.stream.close()
        self.stream = open(self.folder / f"{self.split}_{self.shards:05d}.bin", "wb")  # noqa: SIM115
        self.shards += 1

    def close(self) -> dict[str, int | str]:
        if self.stream:
            self.stream.close()
        offsets = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64))).astype(np.int64)
        np.save(self.folder / f"{self.split}_offsets.npy", offsets)
        self.digest.update(offsets)
        return {
            "documents": len(self.lengths),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "shards": self.shards,
            "shard_tokens": self.shard_tokens,
            "sha256": self.digest.hexdigest(),
        }


class _Progress:
    """A line every few seconds, and one at the end, with the rate."""

    EVERY = 10.0  # seconds

    def __init__(self, name: str):
        self.name, self.start = name, time.monotonic()
        self.printed = self.start

    def update(self, writers) -> None:
        if time.monotonic() - self.printed >= self.EVERY:
            self.finish(writers, verb="Preparing")
            self.printed = time.monotonic()

    def finish(self, writers, verb: str = "Prepared") -> None:
        writers = list(writers)
        seconds = time.monotonic() - self.start
        tokens, documents = sum(w.tokens for w in writers), sum(len(w.lengths) for w in writers)
        rate = tokens / max(seconds, 1e-9) / 1e6
        amount = f"{documents:,} documents, {tokens:,} tokens in {seconds:.0f} s ({rate:.2f} M tokens/s)"
        print(f"{verb} {self.name}: {amount}", flush=True)


class TokenShards:
    """One split of a prepared folder, memory-mapped.

    offsets: int64 [num_documents + 1], the first token of each document and the number of all.
    """

    def __init__(self, folder: str | Path, split: str):
        assert split in SPLITS, split
        self.folder, self.split = Path(folder), split
        self.meta = json.loads((self.folder / "meta.json").read_text())
        counts = self.meta["splits"][split]
        self.num_tokens, self.num_documents, self.num_bytes = counts["tokens"], counts["documents"], counts["bytes"]
        self.shard_tokens = counts["shard_tokens"]
        files = [self.folder / f"{split}_{i:05d}.bin" for i in range(counts["shards"])]
        self.shards = [np.memmap(file, dtype=self.meta["dtype"], mode="r") for file in files]
        self.offsets = np.load(self.folder / f"{split}_offsets.npy", mmap_mode="r")
        if sum(map(len, self.shards)) != self.num_tokens or int(self.offsets[-1]) != self.num_tokens:
            raise ValueError(
                f"{self.folder} does not hold the {self.num_tokens:,} {split} tokens that its meta.json counts; "
                "delete the folder, and it is made again"
            )

    def __reduce__(self):
        # a loader's worker maps the files itself; a map that is pickled becomes a copy
        return TokenShards, (self.folder, self.split)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1 as int64, across shards."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        out = np.empty(stop - start, dtype=np.int64)
        done = start
        while done < stop:
            shard, within = divmod(done, self.shard_tokens)
            part = self.shards[shard][within : within + stop - done]
            out[done - start : done - start + len(part)] = part
            done += len(part)
        return out

    def document_numbers(self, start: int, stop: int) -> np.ndarray:
        """Which document each of these tokens belongs to, counted from 0 within the range. int64."""
        first = int(np.searchsorted(self.offsets, start, side="right"))  # the first document that starts after `start`
        last = int(np.searchsorted(self.offsets, stop, side="left"))
        starts = np.zeros(stop - start, dtype=np.int64)
        starts[np.asarray(self.offsets[first:last]) - start] = 1
        return np.cumsum(starts)
