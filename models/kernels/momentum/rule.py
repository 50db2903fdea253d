"""Which rule a call of the momentum kernels computes, and of what."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64
ROWS = 9  # of a chunk's vectors: tiles.py names them
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
    with a momentum they take twice the bytes of q, k, v and o in 16 bits."""

    G: Tensor  # [B H N, C, C]
    R: Tensor  # [B H N, C, C], or none where errors refer to none of their chunk
    vectors: Tensor  # [B H N, ROWS, C]
    U: Tensor  # [B, T, H, V]
    states: Tensor  # [B H N, n, K, V]
    attend: Tensor  # [B H N, C, C]


def new_kept(call: Call, rule: Rule) -> Kept:
    """Where it is written, with nothing in it."""
    (B, T, H, K), V = call.q.shape, call.v.shape[-1]
    chunks, matrices = B * H * -(-T // CHUNK), 1 + rule.momentum + (rule.carried and rule.solve)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return call.v.new_empty(shape, dtype=dtype)

    return Kept(
        G=new(chunks, CHUNK, CHUNK),
        R=new(chunks if rule.solve else 0, CHUNK, CHUNK),
        vectors=new(chunks, ROWS, CHUNK),
        U=new(*call.v.shape, dtype=call.v.dtype),
        states=new(chunks, matrices, K, V, dtype=call.v.dtype),
        attend=new(chunks, CHUNK, CHUNK, dtype=call.v.dtype),
    )
