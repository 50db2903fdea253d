"""Languages that are met in context: RegBench (Akyurek et al. 2024, arXiv 2401.12973).

A sequence has words of one automaton, which no other sequence has, and at every symbol the next one is to be predicted:

    a c b c | c b | a c ...

An automaton has 4 to 12 states and an alphabet of 4 to 18 of the 18 symbols. 1 to 3 edges leave a state, to different
other states, with different symbols. A word begins in the first state and takes 1 to 49 edges, each with the same
chance. A sequence has 10 to 19 words, with a separator between two. Nothing is asked where a separator comes next. A
prediction counts as right if the automaton has an edge of that symbol, whether or not it is the one that was taken.

The distributions are those of berlino/seq_icl (commit 9b9223d), which the paper's experiments used; there an automaton
is also brought to its smallest form, which has the same words with the same chances. Published: 5,000 sequences for 200
epochs, batches of 32, AdamW with weight decay 0.1, 500 held out.
"""

from __future__ import annotations

import numpy as np

from data.made import Sequences, Task, positive, uniform, whole
from data.text import IGNORE

SYMBOLS, SEPARATOR, FILLER = 18, 18, 19
STATES, ALPHABET, EDGES = (4, 12), (4, 18), (1, 3)  # the fewest and the most
WORDS, LENGTHS = (10, 19), (1, 49)
LONGEST = WORDS[1] * (LENGTHS[1] + 1) - 2  # inputs of a sequence: its tokens but the last
Answered = tuple[np.ndarray, np.ndarray, np.ndarray]  # of data.made.Made


class RegBench(Task):
    """train_size, validation_size: sequences, and so automata, in training and held out."""

    vocab_size = 20
    chance = sum(EDGES) / 2 / SYMBOLS  # of one of all symbols

    def __init__(
        self,
        seq_len: int,
        train_size: int = 5_000,
        validation_size: int = 500,
        seed: int = 0,
        tokenizer: object = None,  # there is no text here: accepted, so that every task is built alike, and ignored
    ):
        positive(train_size=train_size, validation_size=validation_size)
        if seq_len < LONGEST:
            raise ValueError(
                f"seq_len={seq_len} is shorter than the longest sequence of RegBench; {LONGEST} are needed"
            )
        self.train_size, self.validation_size = train_size, validation_size
        symbols = sum(WORDS) / 2 * sum(LENGTHS) / 2  # on average; the first of a sequence is not asked for
        self.targets_per_token = (symbols - 1) / seq_len
        super().__init__(seq_len, seed, train_size=train_size)

    def describe(self) -> list[str]:
        return [
            "RegBench: words of an automaton that is met in context; right is what it may go on with",
            f"accuracy of a guess: {self.chance:.3g}",
            f"train: {self.train_size:,} sequences; validation: {self.validation_size:,}",
        ]

    def train_samples(self) -> Sequences:
        return Sequences(lambda indices: self.make("train", indices), self.train_size, self.seq_len)

    def validation_samples(self, seq_len: int | None = None) -> Sequences:
        return Sequences(
            lambda indices: self.make("validation", indices), self.validation_size, seq_len or self.seq_len
        )

    def make(self, split: str, indices: np.ndarray) -> Answered:
        """Tokens, labels, and the symbols that are right as the bits of a number, [N, LONGEST] each."""
        most, (num_words, length) = STATES[1], (WORDS[1], LENGTHS[1])
        counts = (2, SYMBOLS, most, most * SYMBOLS, most * most, 1, num_words, num_words * length)
        u = np.split(uniform(self.seed, split, indices, sum(counts)), np.cumsum(counts)[:-1], axis=1)
        symbols, targets, edges = automata(*u[:5])
        words = between(u[5][:, 0], *WORDS)
        lengths = between(u[6], *LENGTHS)
        return laid_out(*walks(symbols, targets, edges, u[7].reshape(-1, num_words, length)), words, lengths)


def between(u: np.ndarray, least: int, most: int) -> np.ndarray:
    return least + whole(u, most - least + 1)


def automata(
    sizes: np.ndarray, alphabet: np.ndarray, counts: np.ndarray, marks: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """symbols and targets [N, states, 3] of the edges, and how many of these a state has [N, states].

    Numbers of [0, 1): sizes [N, 2], alphabet [N, 18], counts [N, states], and an order of the symbols and of the other
    states for each state, marks and ends.
    """
    N, most = counts.shape
    num_states, num_symbols = between(sizes[:, 0], *STATES), between(sizes[:, 1], *ALPHABET)
    letters = alphabet.argsort(axis=1, kind="stable")  # the first num_symbols of them are the alphabet
    marks = np.where(np.arange(SYMBOLS) < num_symbols[:, None, None], marks.reshape(N, most, SYMBOLS), 2.0)
    symbols = letters[np.arange(N)[:, None, None], marks.argsort(axis=2, kind="stable")[..., : EDGES[1]]]
    there = np.arange(most) < num_states[:, None, None]
    ends = np.where(there & ~np.eye(most, dtype=bool), ends.reshape(N, most, most), 2.0)
    return symbols, ends.argsort(axis=2, kind="stable")[..., : EDGES[1]], between(counts, *EDGES)


def walks(symbols: np.ndarray, targets: np.ndarray, edges: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Words of the automata by u [N, words, length]: their symbols, and the bits of all that might have come."""
    row, state = np.arange(len(u))[:, None], np.zeros(u.shape[:2], dtype=np.int64)
    real = np.arange(EDGES[1]) < edges[..., None]
    bits = np.where(real, np.int64(1) << symbols, 0).sum(-1)  # [N, states]
    taken, allowed = np.empty(u.shape, dtype=np.int64), np.empty(u.shape, dtype=np.int64)
    for i in range(u.shape[2]):
        edge = whole(u[:, :, i], edges[row, state])
        taken[:, :, i], allowed[:, :, i] = symbols[row, state, edge], bits[row, state]
        state = targets[row, state, edge]
    return taken, allowed


def laid_out(taken: np.ndarray, allowed: np.ndarray, words: np.ndarray, lengths: np.ndarray) -> Answered:
    """Words one behind the other, with separators, as inputs, labels and the bits of what is right."""
    N, num_words, length = taken.shape
    place, word = np.arange(length + 1), np.arange(num_words)[:, None]
    last = word == words[:, None, None] - 1
    kept = (word < words[:, None, None]) & (place < lengths[..., None] + ~last)
    ends = place == lengths[..., None]
    padded = [np.concatenate([x, np.zeros((N, num_words, 1), np.int64)], axis=2) for x in (taken, allowed)]
    tokens, right = np.where(ends, SEPARATOR, padded[0]), np.where(ends, 0, padded[1])
    order = (~kept).reshape(N, -1).argsort(axis=1, kind="stable")[:, : LONGEST + 1]
    row = np.arange(N)[:, None]
    tokens, right, real = (x.reshape(N, -1)[row, order] for x in (tokens, right, kept))
    tokens = np.where(real, tokens, FILLER)
    asked = real & (tokens != SEPARATOR)
    return tokens[:, :-1], np.where(asked, tokens, IGNORE)[:, 1:], np.where(asked, right, 0)[:, 1:]
