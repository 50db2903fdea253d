"""In-context regression: pairs of a vector and a number, and a function of its own in every sequence, which a model has
to find from the pairs before (Garg et al. 2022, arXiv 2208.01066; von Oswald et al. 2025).

    x_1  y_1  x_2  y_2  ...      tokens; at each x_t its y_t is to be predicted, which is the token behind it

A token is a vector of 1 + D channels: y_t in the first, or x_t in the others, and zeros elsewhere. x_t is normal with
covariance I, and y_t has variance 1:

    linear        y = w.x ,                    w ~ N(0, I / D)
    anisotropic   the same, where channel i of x has a variance in proportion to 1 / i: a few matter most
    switching     the same, and another w from a random pair on, in the middle half of the sequence
    piecewise     y = w_1.x or w_2.x ,         by the sign of a.x
    parabola      y = sum_i w_i (x_i^2 - 1) / sqrt(2) ,     linear in the squares

What is minimised is (y - f)^2 / 2, so validation/nats_at/FIRST-LAST is half the squared error by position: 0.5 for a
model that says 0, and 0 for a linear memory that has seen D pairs of `linear`. The model is a language model that reads
vectors by its embedding (models/continuous.py).
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from data.made import Made, Sequences, Task, positive, uniform
from data.text import IGNORE

FUNCTIONS = ("linear", "anisotropic", "switching", "piecewise", "parabola")


class InContextRegression(Task):
    """function: one of FUNCTIONS. size: D. noise: standard deviation of what is added to y. seq_len is twice the number
    of pairs. The test point has test_length tokens.
    """

    bytes_per_token = chance = None  # type: ignore[assignment]  # no answer is right or wrong
    targets_per_token = 0.5
    by_position = True
    continuous = True

    def __init__(
        self,
        seq_len: int,
        function: str,
        size: int = 16,
        noise: float = 0.0,
        test_length: int = 256,
        train_size: int = 1_000_000,
        validation_size: int = 1_024,
        seed: int = 0,
        tokenizer: object = None,  # there is no text here: accepted, so that every task is built alike, and ignored
    ):
        if function not in FUNCTIONS:
            raise ValueError(f"data.function={function} is not one of {', '.join(FUNCTIONS)}")
        positive(size=size, test_length=test_length, train_size=train_size, validation_size=validation_size)
        for name, length in (("seq_len", seq_len), ("data.test_length", test_length)):
            if length % 2 or length < 8:
                raise ValueError(f"{name}={length} must be even, two tokens a pair, and at least 8")
        if noise < 0:
            raise ValueError(f"data.noise={noise} must be at least 0")
        self.function, self.size, self.noise, self.test_length = function, size, float(noise), test_length
        self.train_size, self.validation_size = train_size, validation_size
        self.vocab_size = 1 + size  # channels of a token
        super().__init__(seq_len, seed, function=function, size=size, noise=self.noise, train_size=train_size)

    def describe(self) -> list[str]:
        return [
            f"in-context regression, {self.function}: {self.size} inputs, noise {self.noise:g}",
            f"pairs: {self.seq_len // 2} in training, {self.test_length // 2} in the test",
            "half the squared error of a model that says 0: 0.5",
            f"train: {self.train_size:,} sequences; validation and test: {self.validation_size:,}",
        ]

    def train_samples(self) -> Sequences:
        return self._samples("train", self.train_size, self.seq_len)

    def validation_samples(self, seq_len: int | None = None) -> Sequences:
        return self._samples("validation", self.validation_size, seq_len or self.seq_len)

    def test_points(self) -> dict[str, Sequences]:
        return {"longer": self._samples("test", self.validation_size, self.test_length)}

    def _samples(self, split: str, size: int, length: int) -> Sequences:
        return Sequences(partial(self.make, split, length), size, length)

    def make(self, split: str, length: int, indices: np.ndarray) -> Made:
        """Tokens [N, length, 1 + D] and answers [N, length], float32."""
        x, y = self.pairs(split, length // 2, indices)
        tokens = np.zeros((len(x), length, 1 + self.size), dtype=np.float32)
        tokens[:, 0::2, 1:], tokens[:, 1::2, 0] = x, y
        answers = np.full((len(x), length), IGNORE, dtype=np.float32)
        answers[:, 0::2] = y
        return tokens, answers

    def pairs(self, split: str, num_pairs: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x [N, n, D] and y [N, n], float64."""
        N, n, D = len(indices), num_pairs, self.size
        counts = (n * D, n, 3 * D, 1)
        u = np.split(uniform(self.seed, f"{split} {n}", indices, sum(counts)), np.cumsum(counts)[:-1], axis=1)
        x, noise, w = normal(u[0]).reshape(N, n, D), normal(u[1]), normal(u[2]).reshape(N, 3, D)
        if self.function == "anisotropic":
            variance = 1 / np.arange(1, D + 1)
            x = x * np.sqrt(variance * D / variance.sum())
        first, second, side = (np.einsum("bnd,bd->bn", x, w[:, i]) / D**0.5 for i in range(3))
        if self.function == "switching":
            switch = n // 4 + (u[3] * (n - 2 * (n // 4))).astype(int)
            y = np.where(np.arange(n) < switch, first, second)
        elif self.function == "piecewise":
            y = np.where(side > 0, first, second)
        elif self.function == "parabola":
            y = np.einsum("bnd,bd->bn", (x**2 - 1) / 2**0.5, w[:, 0]) / D**0.5
        else:
            y = first
        return x, y + self.noise * noise


def normal(u: np.ndarray) -> np.ndarray:
    """Of the uniform numbers, by the inverse of the distribution function."""
    return torch.special.ndtri(torch.from_numpy(u + 2.0**-54)).numpy()
