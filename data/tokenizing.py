"""Text to tokens by several processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np

from data.corpora import SPLITS, BrokenOffError
from data.tokenizer import Tokenizer

BATCH = 2**22  # characters of text that are tokenised at once: enough to keep a parallel tokenizer busy


class Part(NamedTuple):
    """A text, or a part of one, and whether its document ends with it."""

    split: str
    text: str
    last: bool


class Tokens(NamedTuple):
    """What a piece adds to one split."""

    ids: np.ndarray  # [n], each document followed by the end-of-document token
    ends: np.ndarray  # int64 [documents that end here], counted from the first of ids
    num_bytes: int  # of text


def encode(parts: list[Part], tokenizer: Tokenizer, dtype: np.dtype) -> dict[str, Tokens]:
    ids: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    ends: dict[str, list[int]] = {split: [] for split in SPLITS}
    length, num_bytes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    end = np.array([tokenizer.eos], dtype=dtype)
    for batch in _batches(parts):
        for part, encoded in zip(batch, tokenizer.encode_batch([part.text for part in batch]), strict=True):
            split = part.split
            ids[split].append(encoded.astype(dtype))
            length[split] += len(encoded)
            num_bytes[split] += len(part.text.encode("utf-8", errors="replace"))
            if part.last:
                ids[split].append(end)
                length[split] += 1
                ends[split].append(length[split])
    nothing = np.empty(0, dtype)
    return {
        split: Tokens(np.concatenate([nothing, *ids[split]]), np.array(ends[split], np.int64), num_bytes[split])
        for split in SPLITS
    }


def _batches(parts: list[Part]) -> Iterator[list[Part]]:
    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += len(part.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenized(
    pieces: Iterable[Any], tokenizer: Tokenizer, dtype: np.dtype, num_workers: int
) -> Iterator[tuple[Any, dict[str, Tokens]]]:
    """Each piece (which has `parts`) with its tokens, in order; at most num_workers + 2 pieces are in memory."""
    if not num_workers:
        for piece in pieces:
            yield piece, encode(piece.parts, tokenizer, dtype)
        return
    with ProcessPoolExecutor(num_workers, initializer=_start, initargs=(tokenizer, dtype)) as pool:
        waiting: deque[tuple[Any, Any]] = deque()
        try:
            for piece in pieces:
                waiting.append((piece, pool.submit(_encode, piece.parts)))
                if len(waiting) > num_workers + 1:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BrokenProcessPool as error:
            raise BrokenOffError(
                f"one of num_workers={num_workers} processes that tokenise was killed, for want of memory perhaps"
            ) from error


_own: tuple[Tokenizer, np.dtype]  # a worker's


def _start(tokenizer: Tokenizer, dtype: np.dtype) -> None:
    global _own
    _own = (tokenizer, dtype)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent can't end its workers, which would hold its lock for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one
    wait([parent.sentinel])
    os._exit(1)


def _encode(parts: list[Part]) -> dict[str, Tokens]:
    return encode(parts, *_own)
