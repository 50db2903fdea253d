"""Which rule a call of the momentum kernels computes, and of what."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

CHUNK = 64
PART = 16  # columns of the keys that matrices are kept by
PRECISE = 64  # channels of keys whose products are kept in float32, as gates' gradients have their rounding
ROWS = 11  # of a chunk's vectors: tiles.py names them
EMPTY = 2**30  # a source: no memory, but zero


class Rule(NamedTuple):
    """Which of its parts a call has. momentum: S. carried: M_ref as one more matrix, in and out. solve: whether errors
    refer to each other; not where every gradient of a chunk is taken at its first memory, which is then what comes out
    as M_ref. decayed: gradients taken after the decay, at a_t M_{t-1}, which without momentum is the gated delta rule.
    writes: of every so many tokens the last alone adds S to M; all write to S.
    """

    momentum: bool = True
    carried: bool = False
    solve: bool = True
    decayed: bool = False
    writes: int = 1

    @property
    def num_matrices(self) -> int:
        return 1 + self.momentum + self.carried


EXACT = Rule()


class Call(NamedTuple):
    """Tensors of a call. None where there is none."""

    q: Tensor  # [B, T, H, K], of one dtype with
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V]
    step_size: Tensor  # [B, T, H]
    log_momentum: Tensor | None  # [B, T, H]
    log_decay: Tensor | None  # [B, T, H]
    matrices: Tensor  # [B, H, n, K, V], what the call begins with
    write_key: Tensor | None = None  # [B, T, H, K], for rules without momentum: w in the write w^T u, None for k
    # [B, T]: the token of the call after which a gradient is taken, -1 for the call's first memory, less for the
    # reference carried into it, EMPTY for zero; None for the token before
    source: Tensor | None = None


class Kept(NamedTuple):
    """What a forward pass leaves for the backward one: coefficients, errors and states of every chunk. At K = V = 128
    with a momentum they take two and a half times the bytes of q, k, v and o in 16 bits."""

    G: Tensor  # [B H N, C, C]
    # [B H N, HALVES, C, C]: in 16 bits as two numbers, high and low; or none where errors refer to none of their chunk
    R: Tensor
    vectors: Tensor  # [B H N, ROWS, C]
    U: Tensor  # [B H N, V, C]
    # [B H N, ceil(K / PART), V, n, PART]: what chunks begin with, PART columns of the keys of all matrices together
    states: Tensor
    attend: Tensor  # [B H N, C, C]
    similar: Tensor  # [B H N, C, C], like `system` in float32 where keys have up to PRECISE channels
    system: Tensor  # [B H N, C, C], or none as R
    # [spans, B, H, n K, V + n K]: b and A, models/kernels/spans.py says of what; empty where rows are not cut into any
    spans: Tensor
