"""State tracking: the answer at a position hangs on every token before it. Lengths that were not trained on show
whether a model has the automaton or a table.

Formal languages (Deletang et al. 2023; Beck et al. 2024; Grazzi et al. 2025, arXiv 2411.12537, section 5.1): the answer
is asked once, at the last token, of sequences of 3 to 40 tokens in training and 40 to 256 in the test. A length counts
the place of the answer, which is not written.

    parity               b_1 ... b_n -> 1 + sum b mod 2          tokens: 0 filler, 1 and 2 the bits
    modular_arithmetic   3 * 2 - 4 =  -> 2 (mod 5)               0 filler, + - * = are 1 to 4, then the digits
    modular_brackets     ( ( 3 ) - ( - 1 ) ) = -> 4 (mod 5)      the digits, then + - * ( ) = and the filler

Draw for draw they are those of automl/unlocking_state_tracking (commit df8f840), whose generator is xLSTM's. Published
training: batches of 256, AdamW, rate 10^-3, bf16, 20,000 steps (parity) or 100,000 (arithmetic), the best of three
seeds. What is reported is (accuracy - chance) / (1 - chance).

Word problems (Merrill, Petty and Sabharwal 2024, arXiv 2404.08819; Siems et al. 2025, arXiv 2502.10297): elements g_1,
g_2, ... of a group of permutations, and at every position their product so far, p_t = g_t after p_(t-1). S3, S5 and A5
have 6, 120 and 60 elements, each a token; they are numbered in lexicographic order. As published, a token of its own
stands before the first element: what it writes is what the elements then turn. A length counts it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np

from data.made import Made, Sequences, Task, positive, uniform, whole
from data.text import IGNORE

Draw = Callable[[int], int]  # of n: one of {0, ..., n - 1}
PLUS, MINUS, TIMES, EQUALS, DIGITS = 1, 2, 3, 4, 5  # tokens of modular arithmetic, 0 being the filler
SIGNS = "+-*()="  # of that with brackets, behind its digits


class StateTracking(Task):
    """train_size: sequences of an epoch. validation_size, test_size: of those held out at lengths of training, and of
    the test point. test_length: tokens of the longest there.
    """

    by_position = True

    def __init__(
        self,
        seq_len: int,
        vocab_size: int,
        num_answers: int,
        train_size: int,
        validation_size: int,
        test_size: int,
        test_length: int,
        seed: int,
        **settings: Any,
    ):
        positive(train_size=train_size, validation_size=validation_size, test_size=test_size, test_length=test_length)
        self.train_size, self.validation_size, self.test_size = train_size, validation_size, test_size
        self.test_length, self.vocab_size, self.chance = test_length, vocab_size, 1 / num_answers
        super().__init__(seq_len, seed, train_size=train_size, **settings)

    @abstractmethod
    def make(self, split: str, length: int, indices: np.ndarray) -> Made:
        """Sequences of the lengths of this split, padded to at most `length`."""

    def train_samples(self) -> Sequences:
        return self._samples("train", self.train_size, self.seq_len)

    def validation_samples(self, seq_len: int | None = None) -> Sequences:
        return self._samples("validation", self.validation_size, seq_len or self.seq_len)

    def test_points(self) -> dict[str, Sequences]:
        return {"longer": self._samples("test", self.test_size, self.test_length)}

    def _samples(self, split: str, size: int, length: int) -> Sequences:
        return Sequences(partial(self.make, split, length), size, length)


class FormalLanguage(StateTracking):
    """language: parity, modular_arithmetic or modular_brackets. train_lengths, test_lengths: the shortest and the
    longest. modulus: of arithmetic; parity has 2. Another seq_len for validation only pads otherwise.
    """

    def __init__(
        self,
        seq_len: int,
        language: str,
        modulus: int = 5,
        train_lengths: tuple[int, int] = (3, 40),
        test_lengths: tuple[int, int] = (40, 256),
        train_size: int = 5_120_000,
        validation_size: int = 1_024,
        test_size: int = 8_192,
        seed: int = 0,
        tokenizer: object = None,  # there is no text here: accepted, so that every task is built alike, and ignored
    ):
        if language not in LANGUAGES:
            raise ValueError(f"data.language={language} is not one of {', '.join(LANGUAGES)}")
        modulus = 2 if language == "parity" else modulus
        if modulus < 2:
            raise ValueError(f"data.modulus={modulus} must be at least 2")
        for name, lengths in (("train_lengths", train_lengths), ("test_lengths", test_lengths)):
            if len(lengths) != 2 or not 3 <= lengths[0] <= lengths[1] or (lengths[1] < 5 and "brackets" in language):
                raise ValueError(f"data.{name}={list(lengths)} must be the shortest, at least 3, and the longest")
        if train_lengths[1] > seq_len:
            raise ValueError(f"seq_len={seq_len} is shorter than the longest of data.train_lengths={[*train_lengths]}")
        self.language, self.modulus = language, modulus
        self.train_lengths = train_lengths[0], train_lengths[1]
        self.test_lengths = test_lengths[0], test_lengths[1]
        self.targets_per_token = 1 / seq_len
        vocab_size = {"parity": 3, "modular_arithmetic": modulus + 5, "modular_brackets": modulus + 7}[language]
        sizes = (train_size, validation_size, test_size, self.test_lengths[1])
        named: dict[str, Any] = {"language": language, "modulus": modulus, "lengths": self.train_lengths}
        super().__init__(seq_len, vocab_size, modulus, *sizes, seed, **named)

    def describe(self) -> list[str]:
        return [
            f"{self.language.replace('_', ' ')}, modulo {self.modulus}: the answer at the last token",
            "tokens, with the answer: {} to {} in training, {} to {} in the test".format(
                *self.train_lengths, *self.test_lengths
            ),
            f"accuracy of a guess: {self.chance:.3g}",
            f"train: {self.train_size:,} sequences an epoch; validation: {self.validation_size:,}; test: "
            f"{self.test_size:,}",
        ]

    def make(self, split: str, length: int, indices: np.ndarray) -> Made:
        lengths = self.test_lengths if split == "test" else self.train_lengths
        if lengths[1] > length:
            raise ValueError(f"seq_len={length} is shorter than the longest of data.train_lengths={[*lengths]}")
        u = uniform(self.seed, split, indices, lengths[1] + 1)
        return LANGUAGES[self.language](u, lengths, self.modulus)


# u [N, longest + 1], the shortest and the longest, modulus -> input_ids and labels [N, longest]


def parity(u: np.ndarray, lengths: tuple[int, int], modulus: int) -> Made:
    sizes = lengths[0] + whole(u[:, -1], lengths[1] - lengths[0] + 1)
    return parity_of(1 + whole(u[:, :-1], modulus), sizes, modulus)


def parity_of(tokens: np.ndarray, sizes: np.ndarray, modulus: int) -> Made:
    """The first sizes - 1 of these tokens [N, L], 1 to modulus each, and their sum behind the last."""
    input_ids = np.where(np.arange(tokens.shape[1]) < sizes[:, None] - 1, tokens, 0)
    return asked(input_ids, sizes - 2, (input_ids.sum(1) - (sizes - 1)) % modulus + 1)


def modular_arithmetic(u: np.ndarray, lengths: tuple[int, int], modulus: int) -> Made:
    fewest, most = ((length + 1) // 2 for length in lengths)
    sizes = 2 * (fewest + whole(u[:, -1], most - fewest + 1)) - 1
    tokens = whole(u[:, :-1], modulus) + DIGITS
    tokens[:, 1::2] = 1 + whole(u[:, 1:-1:2], 3)
    return value_of(tokens, sizes, modulus)


def value_of(tokens: np.ndarray, sizes: np.ndarray, modulus: int) -> Made:
    """Digits and operators in turn [N, L], of which the first sizes - 2 are the expression; products go before sums."""
    place = np.arange(tokens.shape[1])
    input_ids = np.where(place < sizes[:, None] - 2, tokens, 0)
    input_ids[np.arange(len(tokens)), sizes - 2] = EQUALS
    total, product = np.zeros(len(tokens), dtype=np.int64), np.ones(len(tokens), dtype=np.int64)
    for t in range(0, int(sizes.max()) - 2, 2):
        before = input_ids[:, t - 1] if t else np.full(len(tokens), PLUS)
        digit, there = input_ids[:, t] - DIGITS, t < sizes - 2
        times = before == TIMES
        total += np.where(there & ~times, product if t else 0, 0)
        signed = np.where(before == MINUS, -digit, digit)
        product = np.where(there, np.where(times, product * digit, signed) % modulus, product)
    return asked(input_ids, sizes - 2, (total + product) % modulus + DIGITS)


def modular_brackets(u: np.ndarray, lengths: tuple[int, int], modulus: int) -> Made:
    rows = [bracketed(drawing(row), lengths, modulus) for row in u]
    filler = modulus + len(SIGNS)
    input_ids = np.full((len(rows), lengths[1]), filler, dtype=np.int64)
    for row, (tokens, _) in zip(input_ids, rows, strict=True):
        row[: len(tokens)] = tokens
    ends = np.array([len(tokens) - 1 for tokens, _ in rows])
    return asked(input_ids, ends, np.array([answer for _, answer in rows]))


def drawing(u: np.ndarray) -> Draw:
    numbers = iter(u.tolist())
    return lambda n: int(next(numbers) * n)


def bracketed(draw: Draw, lengths: tuple[int, int], modulus: int) -> tuple[list[int], int]:
    """An expression with = behind it, and what it is."""
    size = max(lengths[0] + draw(lengths[1] - lengths[0] + 1), 5)
    tokens, answer = expression(draw, size - 3, modulus)
    return [*tokens, modulus + SIGNS.index("=")], answer


def expression(draw: Draw, length: int, modulus: int) -> tuple[list[int], int]:
    """(left + right) or (left - right) of two shorter ones; of fewer than 5 tokens: d, -d, (d) or (-d)."""
    plus, minus, _, opening, closing, _ = range(modulus, modulus + len(SIGNS))
    if length < 5:
        digit = draw(modulus)
        negative, inside = length % 2 == 0, [*([minus] * (length % 2 == 0)), digit]
        return [opening, *inside, closing] if length > 2 else inside, -digit % modulus if negative else digit
    short = 1 + draw(length - 4)
    left, a = expression(draw, short, modulus)
    right, b = expression(draw, length - short - 3, modulus)
    negative = draw(2) == 1
    tokens = [opening, *left, minus if negative else plus, *right, closing]
    return tokens, (a - b if negative else a + b) % modulus


def asked(input_ids: np.ndarray, places: np.ndarray, answers: np.ndarray) -> Made:
    """The labels of one answer in a sequence."""
    labels = np.full_like(input_ids, IGNORE)
    labels[np.arange(len(input_ids)), places] = answers
    return input_ids, labels


LANGUAGES: dict[str, Callable[[np.ndarray, tuple[int, int], int], Made]] = {
    "parity": parity,
    "modular_arithmetic": modular_arithmetic,
    "modular_brackets": modular_brackets,
}


class WordProblem(StateTracking):
    """group: S or A and a number up to 5. Sequences of seq_len tokens in training, of test_length in the test."""

    def __init__(
        self,
        seq_len: int,
        group: str,
        test_length: int = 513,
        train_size: int = 100_000,
        validation_size: int = 1_024,
        test_size: int = 1_024,
        seed: int = 0,
        tokenizer: object = None,  # there is no text here: accepted, so that every task is built alike, and ignored
    ):
        if group not in (known := [f"{kind}{n}" for kind in "SA" for n in range(3, 6)]):
            raise ValueError(f"data.group={group} is not one of {', '.join(known)}")
        if min(seq_len, test_length) < 2:
            raise ValueError(f"seq_len={seq_len} and data.test_length={test_length} must be at least 2")
        self.group, self.products = group, multiplication(group)
        size = len(self.products)
        self.targets_per_token = 1 - 1 / seq_len
        super().__init__(
            seq_len, size + 1, size, train_size, validation_size, test_size, test_length, seed, group=group
        )

    def describe(self) -> list[str]:
        return [
            f"the word problem of {self.group}, which has {len(self.products)} elements: their product so far",
            f"tokens, with the one at the beginning: {self.seq_len} in training, {self.test_length} in the test",
            f"accuracy of a guess: {self.chance:.3g}",
            f"train: {self.train_size:,} sequences; validation: {self.validation_size:,}; test: {self.test_size:,}",
        ]

    def make(self, split: str, length: int, indices: np.ndarray) -> Made:
        size = len(self.products)
        input_ids = whole(uniform(self.seed, f"{split} {length}", indices, length), size)
        input_ids[:, 0] = size
        steps = input_ids.T.copy()  # [length, N]: a position's elements lie side by side
        steps[0] = IGNORE
        for t in range(2, length):
            steps[t] = self.products[steps[t], steps[t - 1]]
        return input_ids, np.ascontiguousarray(steps.T)


def multiplication(group: str) -> np.ndarray:
    """[a, b] is the number of the permutation that applies b and then a. S3: all permutations of 3 things; A3: the even
    ones; in lexicographic order.
    """
    elements = [p for p in permutations(range(int(group[1]))) if group[0] == "S" or even(p)]
    number = {p: i for i, p in enumerate(elements)}
    return np.array([[number[tuple(a[x] for x in b)] for b in elements] for a in elements])


def even(p: tuple[int, ...]) -> bool:
    return sum(p[i] > p[j] for j in range(len(p)) for i in range(j)) % 2 == 0
