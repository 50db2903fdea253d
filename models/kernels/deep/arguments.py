"""What is handed in and from one kernel to another, each name once: a kernel takes these tuples whole, and reads and
writes what it wants of them. None where there is none.

`chunk` is one of [B H N], its C tokens rows of [B, N C, H, *]. The weights of a network are packed, W_1 [K, F] and then
W_2 [F, V], PAIR numbers; a state is N of both, and S of both after it, SIZE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Scan(NamedTuple):
    """Mini-batches, N of C tokens, T = N C: what a call has. n = 2 matrices with a momentum and 1 without."""

    q: Tensor  # [B, T, H, K], of one dtype with
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V]
    step_size: Tensor  # [B, T, H]
    log_momentum: Tensor | None  # [B, T, H]
    log_decay: Tensor | None  # [B, T, H]
    begin: Tensor  # [P H, n PAIR]: N and S before a document
    base: Tensor | None  # [H, PAIR]: W, or None for 0
    reference: Tensor | None  # [B H, PAIR]: R of the first mini-batch of every row, or None for W + N
    filled: Tensor | None  # [B, T]: where tokens are, None for everywhere
    runs: Tensor  # [P, 4], of a document: its row, its first mini-batch, the one after its last, the last with tokens


class Call(NamedTuple):
    """Of a Scan, with the coefficients of models/kernels/momentum."""

    q: Tensor
    k: Tensor
    v: Tensor
    base: Tensor | None  # in the dtype of q
    reference: Tensor | None
    runs: Tensor
    G: Tensor  # [B H N, C, C]
    vectors: Tensor  # [B H N, ROWS, C]
    B: int
    N: int
    H: int


class Left(NamedTuple):
    """What the scan leaves behind of every mini-batch."""

    states: Tensor  # [B H N, SIZE]: N and S before it
    references: Tensor  # [B H N, PAIR]: R
    hidden: Tensor  # [B H N, C, F]: X_2
    errors1: Tensor  # [B H N, C, F]: E_1 without the limit
    errors2: Tensor  # [B H N, C, V]: E_2 without it
    limits: Tensor  # [B H N, 3, C]: the share of both that is written, |X_2|^2 and |E_1|^2
    slopes: Tensor | None  # [B H N, C, F]: s' at k W_1, for the backward pass alone
    curves: Tensor | None  # [B H N, C, F]: s'' * E_2 W_2^T, likewise


class Found(NamedTuple):
    """Gradients, in the order in which the backward pass finds them."""

    do: Tensor  # [B, N C, H, V]
    dheld: Tensor  # [P H, PAIR]
    dfirst: Tensor  # [P H, SIZE]: by N and S after a document, and in the end before it
    inner: Tensor  # [B H N, C, F]: no gradient, but what the queries put to the second layer
    dinner: Tensor  # [B H N, C, F]: by what they got of the first
    dq: Tensor  # [B, N C, H, K]
    dkeys: Tensor  # [B, N C, H, K]: of the outputs, as the next three
    dhidden: Tensor  # [B H N, C, F]: by X_2
    derrors1: Tensor  # [B H N, C, F]: by what is written of E_1
    derrors2: Tensor  # [B H N, C, V]: and of E_2
    dcoefficients: Tensor  # [B H N, C, C]: by G
    dvectors: Tensor  # [B H N, ROWS, C]: A and F of the outputs; then what the writes say of all
    dstates: Tensor  # [B H N, SIZE]: D and E, by N and S after every mini-batch
    dback: Tensor  # [B H N, C, F]: by E_2 W_2^T
    dz: Tensor  # [B H N, C, F]: by k W_1
    dv: Tensor  # [B, N C, H, V], which is minus the one by X_2 W_2
    dlength: Tensor  # [B H N, C]: by |k|^2 of the limit
    dreference: Tensor | None  # [B H, PAIR]
    dk: Tensor  # [B, N C, H, K]


@dataclass(frozen=True)
class Sizes:
    """What is known when a kernel is compiled."""

    C: int  # tokens of a mini-batch
    K: int  # widths of keys,
    F: int  # of the hidden layer
    V: int  # and of values
    MOMENTUM: bool
    PRECISION: str
    BF: int  # of the hidden layer, what a tile has

    @property
    def pair(self) -> int:
        return self.F * (self.K + self.V)

    @property
    def size(self) -> int:
        return (1 + self.MOMENTUM) * self.pair

    @property
    def split(self) -> int:
        """Programs of a scan for every document of a head."""
        return self.F // self.BF
