"""What is handed in and from one kernel to another, each name once: a kernel takes these tuples whole, and reads and
writes what it wants of them. None where there is none.

A slot is a mini-batch of at most C tokens, which lie one after another in [B T, H, *]; a document has its slots one
after another. `chunk` is a slot of a head, one of [L H], slot by slot. The weights of a network are
packed, W_1 turned to [F, K] and then W_2 [F, V], PAIR numbers; a state is N of both, and S of both after it, SIZE. What
the scans read or write has the hidden layer for rows, as their tiles do: to turn one around takes four times as many
barriers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Scan(NamedTuple):
    """L slots of P documents: what a call has. n = 2 matrices with a momentum and 1 without."""

    q: Tensor  # [B, T, H, K], of one dtype with
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V]
    step_size: Tensor  # [1, L C, H]: gates have C places for every slot
    log_momentum: Tensor | None  # [1, L C, H]
    log_decay: Tensor | None  # [1, L C, H]
    first: Tensor | None  # [H, PAIR]: N before a document that begins in the call, or None for 0
    carried: Tensor | None  # [B H, n PAIR]: N and S before the first document of each row, or None where all begin here
    base: Tensor | None  # [H, PAIR]: W, or None for 0
    reference: Tensor | None  # [B H, PAIR]: R of the first slot of each row, or None for W + N
    filled: Tensor | None  # [1, L C]: which places have tokens, None for all
    slots: Tensor  # [L, 3]: the first token, of B T; how many; and the row that begins with the slot, or -1
    runs: Tensor  # [P, 4], of a document: its row, its first slot, the one after its last, whether it ends the row


class Call(NamedTuple):
    """Of a Scan, with the coefficients of models/kernels/momentum."""

    q: Tensor
    k: Tensor
    v: Tensor
    first: Tensor | None
    carried: Tensor | None
    base: Tensor | None  # in the dtype of q
    reference: Tensor | None
    slots: Tensor
    runs: Tensor
    G: Tensor  # [L H, C, C]
    vectors: Tensor  # [L H, ROWS, C]
    H: int


class Left(NamedTuple):
    """What the scan leaves behind of every chunk. R is not among it: it is W + N, or what was handed in."""

    states: Tensor  # [L H, SIZE]: N and S before it
    hidden: Tensor  # [L H, F, C]: X_2
    errors1: Tensor  # [L H, F, C]: E_1 without the limit
    errors2: Tensor  # [L H, C, V]: E_2 without it
    limits: Tensor  # [L H, 3, C]: the share of both that is written, |X_2|^2 and |E_1|^2
    z: Tensor  # [L H, F, C]: k W_1
    back: Tensor | None  # [L H, F, C]: E_2 W_2^T, for the backward pass alone


class Last(NamedTuple):
    """After the last document of each row, or the gradients by it."""

    state: Tensor  # [B H, SIZE]: N and S
    held: Tensor  # [B H, PAIR]: N before the last slot


class Found(NamedTuple):
    """Gradients, in the order in which the backward pass finds them."""

    do: Tensor  # [B, T, H, V]
    dlast: Tensor | None  # Last's, None for zeros
    dheld: Tensor | None
    dfirst: Tensor | None  # [P H, SIZE]: by N and S before a document, where any is wanted
    inner: Tensor  # [L H, C, F]: no gradient, but what the queries put to the second layer
    dinner: Tensor  # [L H, C, F]: by what they got of the first
    dq: Tensor  # [B, T, H, K]
    dkeys: Tensor  # [B, T, H, K]: of the outputs, as the next three
    dhidden: Tensor  # [L H, F, C]: by X_2
    derrors1: Tensor  # [L H, F, C]: by what is written of E_1
    derrors2: Tensor  # [L H, C, V]: and of E_2
    dcoefficients: Tensor  # [L H, C, C]: by G
    dvectors: Tensor  # [L H, ROWS, C]: A and F of the outputs; then what the writes say of all
    dstates: Tensor  # [L H, SIZE]: D and E, by N and S after every slot
    dback: Tensor  # [L H, F, C]: by E_2 W_2^T
    dz: Tensor  # [L H, F, C]: by k W_1
    dv: Tensor  # [B, T, H, V], which is minus the one by X_2 W_2
    dlength: Tensor  # [L H, C]: by |k|^2 of the limit
    dreference: Tensor | None  # [B H, PAIR]
    dk: Tensor  # [B, T, H, K]


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
