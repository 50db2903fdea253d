"""Multi-query associative recall: can the memory store n pairs and find each of them again?

The task of Zoology (Arora et al. 2023, arXiv 2312.04927, section 4 and appendix), on which recurrent models differ
most:

    k_1 v_1 k_2 v_2 ... k_n v_n | . . k_3 . k_1 . . . . k_n . . .
                                      v_3   v_1         v_n           labels, at the queries alone

The first 2n tokens are the pairs: keys from [1, V/2), values from [V/2, V), each drawn without repetition in a
sequence. Behind them every key comes once more, at position 2n + 2g for a gap g, and its value is to be predicted
there; it is not written after the query. The n gaps are drawn without repetition from {0, ..., G-1}, G = (L - 2n) // 2,
the g-th in proportion to a (g+1)^(a-1): a = 1 is uniform, the usual a = 0.01 puts most queries soon after the pairs.
Every other position holds token 0; with `random_filler` any token of the vocabulary, keys and values included, so that
a model has to tell what is noise.

The labels need no shift: labels[t] is what is to be predicted at position t.

Published settings: (L, n) = (64, 4), (128, 8), (256, 16), (512, 64), 100,000 training and 3,000 test sequences, V =
8192, a = 0.01, no random filler (Zoology, figure 2). The original draws all sequences of a split in one go from NumPy's
global generator. Here sequence i has a generator of its own, seeded by (seed, split, i): the distribution is the same,
single sequences are not, and none needs storing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.text import IGNORE


class AssociativeRecall:
    """The task, with the interface of `data.text.Text`.

    num_pairs        n
    vocab_size       V; V/2 - 1 keys, V/2 values, and the filler 0
    power_a          a in (0, 1]
    random_filler    fill the gaps with random tokens instead of 0. Noise then resembles keys and values, which is
                     harder
    train_size, validation_size   sequences in each split
    seed             of the data; the order is seeded elsewhere
    """

    bytes_per_token = None

    def __init__(
        self,
        seq_len: int,
        num_pairs: int,
        vocab_size: int = 8192,
        power_a: float = 0.01,
        random_filler: bool = False,
        train_size: int = 100_000,
        validation_size: int = 3_000,
        seed: int = 0,
        tokenizer: object = None,  # there is no text here: accepted, so that every task is built alike, and ignored
    ):
        check_recall(seq_len, num_pairs, vocab_size)
        if not 0 < power_a <= 1:
            raise ValueError(f"data.power_a={power_a} must lie above 0 and at most at 1 (uniform gaps)")
        for name, size in (("train_size", train_size), ("validation_size", validation_size)):
            if size < 1:
                raise ValueError(f"data.{name}={size} must be positive")
        if seed < 0:
            raise ValueError(f"data.seed={seed} must not be negative")
        self.seq_len, self.num_pairs, self.vocab_size = seq_len, num_pairs, vocab_size
        self.power_a, self.random_filler, self.seed = float(power_a), random_filler, seed
        self.train_size, self.validation_size = train_size, validation_size
        self.tokenizer = None
        self.targets_per_token = num_pairs / seq_len
        self.chance = 1 / (vocab_size - vocab_size // 2)  # the accuracy of a guess among all values

    def prepare(self, num_workers: int = 0, verify: bool = False) -> None:
        """Nothing to prepare: sequences are made when they are asked for."""

    @property
    def folders(self) -> list[Path]:
        return []

    def prepare_part(self, part: int, parts: int, num_workers: int = 0) -> list[Path]:
        return []

    @property
    def identity(self) -> dict[str, str]:
        return {"data fingerprint": self.fingerprint}

    @property
    def fingerprint(self) -> str:
        settings = (self.seq_len, self.num_pairs, self.vocab_size, self.power_a, self.random_filler, self.train_size)
        return hashlib.sha256(f"associative_recall {settings} {self.validation_size} {self.seed}".encode()).hexdigest()

    def describe(self) -> list[str]:
        filler = "random tokens" if self.random_filler else "0"
        return [
            f"multi-query associative recall: {self.num_pairs} pairs in {self.seq_len} tokens",
            f"vocabulary {self.vocab_size:,}; gaps by a power law, a = {self.power_a}; filler: {filler}",
            f"accuracy of a guess: {self.chance:.3g} among all values, {1 / self.num_pairs:.3g} among a sequence's own",
            f"train: {self.train_size:,} sequences; validation: {self.validation_size:,}",
        ]

    def train_samples(self) -> RecallSequences:
        return RecallSequences(self, "train", self.train_size, self.seq_len)

    def validation_samples(self, seq_len: int | None = None) -> RecallSequences:
        """Another seq_len has as many pairs, and more room for the queries behind them."""
        seq_len = seq_len or self.seq_len
        check_recall(seq_len, self.num_pairs, self.vocab_size)
        return RecallSequences(self, "validation", self.validation_size, seq_len)


class RecallSequences(Dataset):
    """One split. input_ids, labels, segments: int64 [L]; segments are all 0, a sequence being one document."""

    def __init__(self, task: AssociativeRecall, split: str, size: int, seq_len: int):
        self.task, self.split, self.size, self.seq_len = task, split, size, seq_len
        self.gap_probabilities = gap_probabilities(seq_len, task.num_pairs, task.power_a)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        task, half = self.task, self.task.vocab_size // 2
        random = np.random.default_rng((task.seed, int(self.split == "validation"), index))
        keys = 1 + random.choice(half - 1, task.num_pairs, replace=False)
        values = half + random.choice(task.vocab_size - half, task.num_pairs, replace=False)
        gaps = random.choice(len(self.gap_probabilities), task.num_pairs, replace=False, p=self.gap_probabilities)
        input_ids, labels = place(keys, values, gaps, self.seq_len)
        if task.random_filler:
            # as in the original, all zeros are replaced, and 0 is among what they are replaced by
            empty = input_ids == 0
            input_ids[empty] = random.integers(task.vocab_size, size=int(empty.sum()))
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "segments": torch.zeros(self.seq_len, dtype=torch.int64),
        }


def gap_probabilities(seq_len: int, num_pairs: int, power_a: float) -> np.ndarray:
    """p(g) in proportion to a (g+1)^(a-1) for g = 0, ..., G-1.  float64 [G]."""
    weights = power_a * np.arange(1, (seq_len - 2 * num_pairs) // 2 + 1) ** (power_a - 1.0)
    return weights / weights.sum()


def place(keys: np.ndarray, values: np.ndarray, gaps: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """The sequences of these pairs and gaps ([..., n] each), with filler 0. Returns input_ids and labels, int64
    [..., L]."""
    context = 2 * keys.shape[-1]
    queries = context + 2 * gaps
    input_ids = np.zeros((*keys.shape[:-1], seq_len), dtype=np.int64)
    input_ids[..., 0:context:2], input_ids[..., 1:context:2] = keys, values
    np.put_along_axis(input_ids, queries, keys, axis=-1)
    labels = np.full_like(input_ids, IGNORE)
    np.put_along_axis(labels, queries, values, axis=-1)
    return input_ids, labels


def check_recall(seq_len: int, num_pairs: int, vocab_size: int) -> None:
    """n pairs and n queries at every other position take 4 n tokens, and n keys a vocabulary of 2 n + 2."""
    if num_pairs < 1:
        raise ValueError(f"data.num_pairs={num_pairs} must be positive")
    if 4 * num_pairs > seq_len:
        raise ValueError(
            f"data.num_pairs={num_pairs} does not fit seq_len={seq_len}: a pair and its query take 4 tokens, so "
            f"at most {seq_len // 4} pairs do"
        )
    if vocab_size < 2 * num_pairs + 2:
        raise ValueError(
            f"data.vocab_size={vocab_size} is too small for data.num_pairs={num_pairs}: keys are the numbers from 1 "
            f"to below half of it, so at least {2 * num_pairs + 2} is needed"
        )
