"""Multi-query associative recall as Zoology defines it today: a mixture of lengths and numbers of pairs to train on,
and seven test points, of which two are longer than anything in training.

    train  (L, n) = (64, 4) 100,000 sequences; (128, 8), (256, 16), (256, 32), (256, 64) 20,000 each
    test   (64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256) 1,000 each

with V = 8192, a = 0.01, and random tokens in the place of the filler 0 (HazyResearch/zoology, configs of
mqar_example_configs and the generator multiquery_ar; commit d88d6f5 of 2026). data/synthetic.py has the layout of one
sequence and what its settings mean.

A batch holds sequences of one (L, n), and its loss is a mean over its queries, as there. Rows are padded to seq_len at
their ends, which a causal model does not see. Batches of all kinds are shuffled; Zoology trains on one kind after the
other, in each epoch anew. Published training: 32 epochs in batches of 256 sequences, AdamW with weight decay 0.1, a
cosine to 0, and the best of four rates, 10^-3 to 10^-1.5.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from data.made import Kinds, Made, Sequences, Task, distinct, positive, uniform, weighted, whole
from data.synthetic import check_recall, gap_probabilities, place


class RecallMixture(Task):
    """train, test: lists of [L, n, number of sequences]. validation_size: sequences of the training mixture that are
    held out, shared out among its kinds as the training sequences are.
    """

    targets_per_token = None  # n / L, of the batch's own kind

    def __init__(
        self,
        seq_len: int,
        train: list[list[int]],
        test: list[list[int]],
        vocab_size: int = 8192,
        power_a: float = 0.01,
        random_filler: bool = True,
        validation_size: int = 1_800,
        seed: int = 0,
        tokenizer: object = None,  # there is no text here: accepted, so that every task is built alike, and ignored
    ):
        positive(vocab_size=vocab_size, validation_size=validation_size)
        for name, kinds in (("train", train), ("test", test)):
            check_kinds(name, kinds, vocab_size)
        if not train:
            raise ValueError("data.train=[] has nothing to train on; it is a list of [tokens, pairs, sequences]")
        if (longest := max(length for length, *_ in train)) > seq_len:
            raise ValueError(f"seq_len={seq_len} is shorter than the longest of data.train, {longest} tokens")
        if not 0 < power_a <= 1:
            raise ValueError(f"data.power_a={power_a} must lie above 0 and at most at 1 (uniform gaps)")
        self.train, self.test = [(a, b, c) for a, b, c in train], [(a, b, c) for a, b, c in test]
        self.power_a, self.random_filler, self.validation_size = float(power_a), random_filler, validation_size
        self.vocab_size, self.chance = vocab_size, 1 / (vocab_size - vocab_size // 2)
        settings = {"train": self.train, "vocab_size": vocab_size, "power_a": self.power_a, "filler": random_filler}
        super().__init__(seq_len, seed, **settings)

    def describe(self) -> list[str]:
        def named(kinds: list[tuple[int, int, int]]) -> str:
            return ", ".join(f"{pairs} pairs in {length} tokens x {count:,}" for length, pairs, count in kinds)

        filler = "random tokens" if self.random_filler else "0"
        return [
            f"multi-query associative recall, a mixture of {len(self.train)}; filler: {filler}",
            f"vocabulary {self.vocab_size:,}; gaps by a power law, a = {self.power_a}",
            f"accuracy of a guess: {self.chance:.3g} among all values",
            f"train: {named(self.train)}",
            f"test: {named(self.test)}",
        ]

    def train_samples(self) -> Kinds:
        return Kinds([self._samples("train", *kind, self.seq_len) for kind in self.train])

    def validation_samples(self, seq_len: int | None = None) -> Kinds:
        """Of the training mixture. Another seq_len only pads otherwise."""
        total, seq_len = sum(count for *_, count in self.train), seq_len or self.seq_len
        if (longest := max(length for length, *_ in self.train)) > seq_len:
            raise ValueError(f"seq_len={seq_len} is shorter than the longest of data.train, {longest} tokens")
        shares = [(length, n, max(1, self.validation_size * count // total)) for length, n, count in self.train]
        return Kinds([self._samples("validation", *kind, seq_len) for kind in shares])

    def test_points(self) -> dict[str, Sequences]:
        return {f"{length}x{n}": self._samples("test", length, n, count, length) for length, n, count in self.test}

    def _samples(self, split: str, length: int, num_pairs: int, size: int, padded: int) -> Sequences:
        return Sequences(partial(self.make, f"{split} {length} {num_pairs}", length, num_pairs), size, padded)

    def make(self, split: str, length: int, num_pairs: int, indices: np.ndarray) -> Made:
        """Sequences of one kind.  int64 [N, length] each."""
        half, probabilities = self.vocab_size // 2, gap_probabilities(length, num_pairs, self.power_a)
        counts = (num_pairs, num_pairs, len(probabilities), length)
        u = np.split(uniform(self.seed, split, indices, sum(counts)), np.cumsum(counts)[:-1], axis=1)
        keys, values = 1 + distinct(u[0], half - 1), half + distinct(u[1], self.vocab_size - half)
        input_ids, labels = place(keys, values, weighted(u[2], probabilities, num_pairs), length)
        if self.random_filler:
            # as in the original, all zeros are replaced, and 0 is among what they are replaced by
            input_ids = np.where(input_ids == 0, whole(u[3], self.vocab_size), input_ids)
        return input_ids, labels


def check_kinds(name: str, kinds: list[list[int]], vocab_size: int) -> None:
    for kind in kinds:
        if len(kind) != 3 or any(isinstance(x, bool) or int(x) != x or x < 1 for x in kind):
            raise ValueError(
                f"data.{name} has {kind}, which is not [tokens, pairs, sequences], whole numbers from 1 on"
            )
        try:
            check_recall(kind[0], kind[1], vocab_size)
        except ValueError as error:
            raise ValueError(f"data.{name} has {kind}: {error}") from None
