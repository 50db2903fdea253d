"""Preparing a corpus: text in, token shards out, in pieces that survive a kill.

The corpus is read in order by one process and cut into pieces of some 16 MB of text. They are tokenised by
`num_workers` processes (0: this one) and appended to the shards in order, so that the bytes are the same for any number
of workers. Behind each piece a line goes to a journal: where reading goes on, and the hash of what was appended. The
same command after a kill reads the journal, keeps every piece whose hash is right, cuts off what is behind it, and goes
on there.

All this happens in a folder of another name, which is renamed whole, under a lock: what has the name of a prepared
corpus is one, and of several processes that start together one prepares while the others wait.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from data import pieces
from data.corpora import SPLITS, BrokenOffError, Corpus
from data.pieces import Piece
from data.shards import FORMAT, SHARD_TOKENS, SplitWriter, sync, write_stamps
from data.tokenizer import Tokenizer, Trainable
from data.tokenizing import Tokens, tokenized

JOURNAL = "journal.jsonl"


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    shard_tokens: int = SHARD_TOKENS,
    num_workers: int = 0,
    drop_duplicates: bool = False,
    how: Callable[..., Preparation] | None = None,
) -> None:
    """Write the shards of this corpus to `folder`, unless they are there; on return they are, and the tokenizer is
    trained.

    drop_duplicates leaves out documents whose whole text has been before, in either split. It takes some 100 bytes of
    memory a document; documents that come in parts (data/formats.py: PART) are not compared.

    how: another way than from the text, which is Preparation (data/divided.py has two).

    Raises ValueError if either split has no document, or the corpus changes or breaks off while it is read.
    """
    folder = Path(folder)
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
        except OSError as error:
            reason = "it is a file, not a folder" if isinstance(error, FileExistsError) else error
            raise ValueError(f"{folder.parent} can't be written ({reason}); TTR_CACHE names another folder") from error
        with lock:
            if not folder.exists():
                make = how or Preparation
                make(corpus, tokenizer, folder, shard_tokens, num_workers, drop_duplicates).run()
    if isinstance(tokenizer, Trainable) and not tokenizer.trained:
        tokenizer.load(folder / "tokenizer")


def _lock(folder: Path) -> AbstractContextManager[Any]:
    lock = FileLock(f"{folder}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"Waiting for another process, which prepares {folder}", flush=True)
        return lock.acquire()


class Preparation:
    """One preparation, from the start or from where another was killed."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        folder: Path,
        shard_tokens: int,
        num_workers: int,
        drop_duplicates: bool,
    ):
        self.fingerprint, self.given = corpus.fingerprint(), corpus
        self.corpus = corpus.with_both_splits()
        self.tokenizer, self.folder, self.shard_tokens = tokenizer, folder, shard_tokens
        self.num_workers, self.drop_duplicates = num_workers, drop_duplicates
        self.partial = folder.with_name(folder.name + ".partial")

    def run(self) -> None:
        self.partial.mkdir(exist_ok=True)
        try:
            self._prepare_tokenizer()
            self._write()
        except BrokenOffError as error:
            raise ValueError(
                f"{error}; what has been prepared is kept, and the same command goes on from there"
            ) from error
        except ValueError:  # of the corpus or the settings: no other command would go on from here
            shutil.rmtree(self.partial)
            raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "make room there, or set TTR_CACHE to a folder that has some; " if full else ""
            raise ValueError(
                f"{self.partial} can't be written ({error}); {advice}what has been prepared is kept"
            ) from error
        self.partial.rename(self.folder)
        sync(self.folder.parent)
        (self.folder / JOURNAL).unlink()

    def _prepare_tokenizer(self) -> None:
        self._learn(self.corpus, self.partial)

    def _learn(self, corpus: Corpus, place: Path) -> None:
        """The tokenizer from the corpus, or from the files at this place, where they are on return."""
        ready = place / "tokenizer"
        if isinstance(self.tokenizer, Trainable) and not self.tokenizer.trained:
            if ready.exists():
                self.tokenizer.load(ready)
            else:
                print(f"Training the tokenizer ({self.tokenizer.spec()}) on {corpus.describe()}", flush=True)
                self.tokenizer.train(corpus.texts("train"))
        if not ready.exists():
            draft = place / "tokenizer.draft"
            shutil.rmtree(draft, ignore_errors=True)
            self.tokenizer.save(draft)
            draft.rename(ready)

    def _write(self) -> None:
        dtype = np.dtype(np.uint16 if self.tokenizer.vocab_size <= 2**16 else np.uint32)
        self.writers = {split: SplitWriter(self.partial, split, dtype, self.shard_tokens) for split in SPLITS}
        with open(self.partial / JOURNAL, "a+b") as journal:
            position, within, seen, dropped, empty = self._restore(journal)
            progress = _Progress(self.folder.name, self._fraction, position, self.writers.values())
            for piece, encoded in self._pieces(dtype, position, within, seen, dropped, empty):
                record: dict[str, Any] = {
                    split: writer.append(encoded[split]) for split, writer in self.writers.items()
                }
                record |= {"position": piece.position, "within": piece.within, "hashes": piece.hashes}
                record |= {"dropped": piece.dropped, "empty": piece.empty}
                journal.write(json.dumps(record).encode() + b"\n")
                journal.flush()
                dropped, empty = piece.dropped, piece.empty
                progress.update(piece.position)
        self._finish(dtype, dropped, empty)
        progress.say("Prepared")

    def _pieces(
        self, dtype: np.dtype, position: Any, within: bool, seen: set[str] | None, dropped: int, empty: int
    ) -> Iterator[tuple[Piece, dict[str, Tokens]]]:
        """What is to be written from this position on."""
        found = pieces.cut(self.corpus, position, within, seen, dropped, empty)
        return tokenized(found, self.tokenizer, dtype, self.num_workers)

    def _fraction(self, position: Any) -> float | None:
        return self.corpus.fraction(position)

    def _recipe(self) -> dict[str, Any]:
        """What a journal must have been written with to be gone on with."""
        recipe: dict[str, Any] = {
            "piece": pieces.PIECE,
            "part": pieces.PART,
            "shard_tokens": self.shard_tokens,
            "format": FORMAT,
        }
        if self.corpus is not self.given:  # its positions are others
            recipe["corpus"] = self.corpus.describe()
        return recipe

    def _restore(self, journal) -> tuple[Any, bool, set[str] | None, int, int]:
        """Keeps the pieces that are whole, and says where reading goes on, whether that is within a document, what has
        been seen, and how many documents have been dropped and were empty.
        """
        header = json.dumps(self._recipe() | {"tokenizer": self.tokenizer.fingerprint()}).encode() + b"\n"
        journal.seek(0)
        seen: set[str] | None = set() if self.drop_duplicates else None
        position, within, dropped, empty, end = None, False, 0, 0, len(header)
        if journal.readline() == header:
            for line in journal:
                record = _parsed(line)
                if record is None or record["position"] is None:
                    break
                if seen is not None and "within" not in record:
                    break  # of a version that took the end of a long document for a whole one
                if not all(writer.holds(record[writer.split]) for writer in self.writers.values()):
                    break  # torn when the machine went down
                for split, writer in self.writers.items():
                    writer.keep(record[split])
                position, within = record["position"], record.get("within", False)
                dropped, empty = record["dropped"], record.get("empty", 0)
                end += len(line)
                if seen is not None:
                    seen.update(record["hashes"])
        for writer in self.writers.values():
            writer.cut_off()
        if position is None:
            journal.truncate(0)
            journal.write(header)
        else:
            journal.truncate(end)
            tokens = sum(writer.tokens for writer in self.writers.values())
            print(f"Going on with {self.folder.name} behind {tokens:,} tokens that are done", flush=True)
        return position, within, seen, dropped, empty

    def _finish(self, dtype: np.dtype, dropped: int, empty: int) -> None:
        counts = {split: writer.close() for split, writer in self.writers.items()}
        total = sum(count["documents"] for count in counts.values())
        self._refuse_nothing(counts, total, empty)
        if self.corpus.fingerprint() != self.fingerprint:
            raise ValueError(f"{self.corpus.describe()} has changed while it was read; the same command begins anew")
        files = {name: entry for split in SPLITS for name, entry in self.writers[split].files.items()}
        digests = "".join(entry["sha256"] for entry in files.values())
        meta = {
            "format": FORMAT,
            "source": self.corpus.describe(),
            "corpus_fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer.spec(),
            "tokenizer_fingerprint": self.tokenizer.fingerprint(),
            "vocab_size": self.tokenizer.vocab_size,
            "eos": self.tokenizer.eos,
            "dtype": dtype.name,
            "shard_tokens": self.shard_tokens,
            "duplicates_dropped": dropped,
            "splits": counts,
            "files": files,
            # of the tokens themselves: two machines with equal fingerprints train on the same data
            "fingerprint": hashlib.sha256(digests.encode()).hexdigest(),
        }
        (self.partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        sync(self.partial / "meta.json")
        write_stamps(self.partial, files)
        if dropped:
            print(f"{dropped:,} documents were left out, having been before", flush=True)
        if empty:
            print(f"{empty:,} of {empty + dropped + total:,} documents are empty or null and were left out", flush=True)

    def _refuse_nothing(self, counts: dict[str, dict[str, int]], total: int, empty: int) -> None:
        """Raises ValueError where there is no text, or not in both splits."""
        if not total:
            raise ValueError(f"data.corpus has no text: {self.corpus.describe()} holds {empty:,} documents, all empty")
        for split in SPLITS:
            if not counts[split]["documents"]:
                raise ValueError(
                    f"data.corpus leaves the {split} split without a document, of {total} in {self.corpus.describe()}; "
                    "more or smaller documents, another validation_fraction, or a validation set of its own help"
                )


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line of the journal; None for the last one if it is torn."""
    with suppress(ValueError):
        return json.loads(line) if line.endswith(b"\n") else None
    return None


class _Progress:
    """A line every few seconds, and one at the end, with the rate and, where it is known, the time left."""

    EVERY = 10.0  # seconds

    def __init__(self, name: str, fraction: Callable[[Any], Any], position: Any, writers: Iterable[SplitWriter]):
        self.name, self.fraction, self.writers, self.start = name, fraction, list(writers), time.monotonic()
        self.printed = self.start
        self.bytes_before = sum(w.bytes for w in self.writers)
        self.before = 0.0 if position is None else fraction(position)

    def update(self, position: Any) -> None:
        if time.monotonic() - self.printed < self.EVERY:
            return
        left = ""
        done = self.fraction(position) if position is not None else None
        if done is not None and self.before is not None and done > self.before:
            seconds = (time.monotonic() - self.start) * (1 - done) / (done - self.before)
            left = f", {100 * done:.0f} %, {seconds / 60:.0f} min left"
        self.say("Preparing", left)
        self.printed = time.monotonic()

    def say(self, verb: str, left: str = "") -> None:
        seconds = time.monotonic() - self.start
        tokens, documents = sum(w.tokens for w in self.writers), sum(w.documents for w in self.writers)
        rate = (sum(w.bytes for w in self.writers) - self.bytes_before) / max(seconds, 1e-9) / 1e6
        amount = f"{documents:,} documents, {tokens:,} tokens in {seconds:.0f} s ({rate:.1f} MB of text a second{left})"
        print(f"{verb} {self.name}: {amount}", flush=True)
