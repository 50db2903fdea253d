"""What made tasks share: sequences with right answers, which are made when they are asked for and never stored.

Sequence i of a split depends on (seed, split, i) alone. Its numbers are numbers i m to i m + m - 1 of one stream of
SplitMix64 (Steele, Lea and Flood 2014, figure 17), which can be entered anywhere:

    x_j = mix(start + (j + 1) 0x9e3779b97f4a7c15) ,    start = SHA-256 of seed and split

So a whole batch is made at once, with NumPy, some thirty times as fast as by a generator for each sequence, and it is
the same under every release of NumPy.

The labels of a made task need no shift: labels[t] is what is to be predicted at position t.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.text import IGNORE

GAMMA, FIRST, SECOND = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
# input_ids and labels, int64 [N, L] each, or vectors [N, L, C] and numbers; and where several answers are right, these
# as the bits of a number, int64 [N, L]
Made = tuple[np.ndarray, np.ndarray] | tuple[np.ndarray, np.ndarray, np.ndarray]


def uniform(seed: int, split: str, indices: np.ndarray, count: int) -> np.ndarray:
    """`count` numbers of [0, 1) for each of these sequences.  float64 [N, count], multiples of 2^-53."""
    start = int.from_bytes(hashlib.sha256(f"{seed} {split}".encode()).digest()[:8], "little")
    numbers = indices.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
    return (stream(start, numbers) >> np.uint64(11)) * 2.0**-53


def stream(start: int, numbers: np.ndarray) -> np.ndarray:
    """These numbers of the stream, from 0 on.  uint64."""
    z = np.uint64(start) + (numbers + np.uint64(1)) * GAMMA
    z = (z ^ (z >> np.uint64(30))) * FIRST
    z = (z ^ (z >> np.uint64(27))) * SECOND
    return z ^ (z >> np.uint64(31))


def whole(u: np.ndarray, most: int | np.ndarray) -> np.ndarray:
    """Numbers of [0, 1) as whole numbers of {0, ..., most - 1}.  int64."""
    return (u * most).astype(np.int64)


def distinct(u: np.ndarray, most: int) -> np.ndarray:
    """n different numbers of {0, ..., most - 1} in random order, by the first n steps of Fisher and Yates' shuffle.
    u [N, n] -> int64 [N, n].
    """
    N, n = u.shape
    row, deck = np.arange(N), np.tile(np.arange(most, dtype=np.int32), (N, 1))
    for j in range(n):
        other = j + whole(u[:, j], most - j)
        deck[row, other], deck[:, j] = deck[:, j], deck[row, other]
    return deck[:, :n].astype(np.int64)


def weighted(u: np.ndarray, probabilities: np.ndarray, n: int) -> np.ndarray:
    """n different indices, each drawn among those that are left in proportion to its probability, in the order in which
    they are drawn: the n largest of log p + Gumbel noise (Yellott 1977). u [N, G], p [G] -> int64 [N, n].
    """
    noise = -np.log(-np.log(np.maximum(u, 2.0**-54)))
    return np.argsort(-(np.log(probabilities) + noise), axis=1, kind="stable")[:, :n]


class Sequences(Dataset):
    """make(indices [N]) -> input_ids and labels [N, L], padded at their ends to length: with 0, which has no label.

    A sample is input_ids, labels and segments, int64 [length]; segments are all 0, a sequence being one document. And
    `right`, where the task says which other answers are.
    """

    def __init__(self, make: Callable[[np.ndarray], Made], size: int, length: int) -> None:
        self.make, self.size, self.length = make, size, length

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Iterable[int]) -> dict[str, Tensor]:
        """A whole batch, [B, length] each, which is what torch's loader asks for: to cut it into samples and stack
        these again takes as long as to make it."""
        made = self.make(np.array(list(indices)))
        missing = self.length - made[0].shape[1]
        padding = [[(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)] for x in made]
        each = zip(("input_ids", "labels", "right"), (0, IGNORE, 0), made, padding, strict=False)
        found = {name: torch.from_numpy(np.pad(x, pad, constant_values=fill)) for name, fill, x, pad in each}
        return {**found, "segments": torch.zeros(found["labels"].shape, dtype=torch.int64)}


class Kinds(Dataset):
    """Several kinds of sequences, one behind the other. A batch of training has sequences of one kind alone
    (data/order.py), so that each of its sequences has as many targets.
    """

    def __init__(self, kinds: Sequence[Sequences]) -> None:
        self.kinds, self.sizes = kinds, [len(kind) for kind in kinds]
        self.begins = [0, *accumulate(self.sizes)]

    def __len__(self) -> int:
        return self.begins[-1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch, in order, of kinds of the same length."""
        where, parts = [], []
        for kind, begin, end in zip(self.kinds, self.begins, self.begins[1:], strict=False):
            if mine := [i for i, index in enumerate(indices) if begin <= index < end]:
                where += mine
                parts.append(kind.__getitems__([indices[i] - begin for i in mine]))
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor(where).argsort()
        return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}


class Task:
    """The interface of `data.text.Text`, for what is made.

    A task says its vocab_size, chance (the accuracy of a guess), targets_per_token (None: as many as the batch has,
    whose sequences must then have equally many), lines for `describe`, and the samples of each split. test_points are
    sets that are validated on beside the validation split, each with an accuracy of its own; by_position adds that
    accuracy in ranges of positions.
    """

    tokenizer = None  # there is no text here
    bytes_per_token = None
    by_position = False
    vocab_size: int
    chance: float
    targets_per_token: float | None

    def __init__(self, seq_len: int, seed: int, **settings: Any) -> None:
        """settings: with the seed, all that the sequences depend on."""
        if seed < 0:
            raise ValueError(f"data.seed={seed} must not be negative")
        self.seq_len, self.seed, self.settings = seq_len, seed, settings

    def prepare(self, num_workers: int = 0, verify: bool = False) -> None:
        """Nothing to prepare: sequences are made when they are asked for."""

    @property
    def fingerprint(self) -> str:
        named = sorted(self.settings.items())
        return hashlib.sha256(f"{type(self).__name__} {self.seq_len} {self.seed} {named}".encode()).hexdigest()

    @property
    def identity(self) -> dict[str, str]:
        return {"data fingerprint": self.fingerprint}

    def describe(self) -> list[str]:
        raise NotImplementedError

    def train_samples(self) -> Sequences | Kinds:
        raise NotImplementedError

    def validation_samples(self, seq_len: int | None = None) -> Sequences | Kinds:
        raise NotImplementedError

    def test_points(self) -> dict[str, Sequences]:
        return {}


def positive(**sizes: int) -> None:
    """Raises ValueError for the first that is not a whole number from 1 on."""
    for name, size in sizes.items():
        if isinstance(size, bool) or int(size) != size or size < 1:
            raise ValueError(f"data.{name}={size} must be a whole number from 1 on")
