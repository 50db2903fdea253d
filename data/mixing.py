"""The global order of several parts by weight, as a pure function of (seed, step).

Part i with share w_i (all shares together are 1) has its k-th sample at the time

    t = (k + 1/2) / w_i,   k = 0, 1, 2, ...

and the samples of all parts follow each other by t, at one time by the number of the part. (Divisors 1, 3, 5, ...: the
method of Webster and Sainte-Lague, by which parliaments share their seats.) Of the first n samples part i has n w_i,
less than a sample more or less where there are two or three parts. Step s takes those from s B to (s + 1) B: the shares
of every batch are as even as its size allows, and no step needs those before it.

Sample k of a part of N samples is the (k mod N)-th of a permutation, drawn from the seed, the part's name and the epoch
k // N: a part whose samples run out begins again in another order, and what another part does changes nothing in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.order import GlobalOrder, epoch_permutation


class MixedOrder(GlobalOrder):
    """A global order over parts whose samples are numbered one part behind the other.

    sizes: samples of each part.  weights: positive, in any unit.  names: by which the parts are shuffled.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        names: Sequence[str],
        batch: Batch,
        seed: int,
        rank: int = 0,
        first_step: int = 0,
        overfit: bool = False,
    ):
        super().__init__(sum(sizes), batch, seed, rank, first_step, overfit)
        self.counts, self.shares = np.array(sizes), shares_of(weights)
        self.begins = np.cumsum(self.counts) - self.counts
        self.seeds = [_seed_of(seed, name) for name in names]
        self._permutations: dict[int, tuple[int, Tensor]] = {}  # of a part: its epoch, and the order in it

    def samples(self, step: int) -> Tensor:
        parts, numbers = between(step * self.batch.sequences, (step + 1) * self.batch.sequences, self.shares)
        epochs, places = np.divmod(numbers, self.counts[parts])
        found = torch.empty(len(parts), dtype=torch.int64)
        for part, epoch in sorted(set(zip(parts.tolist(), epochs.tolist(), strict=True))):
            mine = torch.from_numpy((parts == part) & (epochs == epoch))
            found[mine] = self._shuffled(part, epoch)[torch.from_numpy(places)[mine]] + int(self.begins[part])
        return found

    def _shuffled(self, part: int, epoch: int) -> Tensor:
        if self._permutations.get(part, (-1,))[0] != epoch:
            self._permutations[part] = epoch, epoch_permutation(int(self.counts[part]), self.seeds[part], epoch)
        return self._permutations[part][1]


def shares_of(weights: Sequence[float]) -> np.ndarray:
    """Float64 [P], together 1."""
    found = np.array(weights, dtype=np.float64)
    return found / found.sum()


def counts(num: int, shares: np.ndarray) -> np.ndarray:
    """How many of the first `num` samples are of each part. int64 [P]."""
    found = np.floor(num * shares + 0.5).astype(np.int64)  # near, and exact but for a few
    while True:
        rest = num - int(found.sum())
        first = min(range(len(found)), key=lambda i: ((found[i] + 0.5) / shares[i], i))  # that is not in
        last = max(range(len(found)), key=lambda i: ((found[i] - 0.5) / shares[i], i))  # that is in
        swapped = ((found[last] - 0.5) / shares[last], last) > ((found[first] + 0.5) / shares[first], first)
        if not rest and not swapped:
            return found
        found[first] += rest >= 0
        found[last] -= rest <= 0


def between(start: int, stop: int, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of each sample from start to stop - 1, and its number within that part. int64 [stop - start] both."""
    low, high = counts(start, shares), counts(stop, shares)
    parts = np.repeat(np.arange(len(shares)), high - low)
    numbers = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
    order = np.lexsort((parts, (numbers + 0.5) / shares[parts]))
    return parts[order], numbers[order]


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")
