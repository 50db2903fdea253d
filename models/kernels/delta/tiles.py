"""What the kernels of the delta rule share: how a chunk's gates fade. Where its rows lie is momentum/tiles.py's.

Triton code: `C` tokens of a chunk, `bh` a sequence's head, n a chunk; tiles are float32 unless they are operands of a
product, which have the dtype of q, k and v.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.momentum.tiles import dot

# Rows of a chunk's vectors [ROWS, C]:
KEPT = tl.constexpr(0)  # what is left after token t of the memory that the chunk began with, e^{c_t}
LEFT = tl.constexpr(1)  # what is left of the write of token t in the memory that it ends with, e^{c_C - c_t}
STEP = tl.constexpr(2)  # b, and 0 after the last token
HIGH = tl.constexpr(3)  # c, the log decays summed from the chunk's beginning,
LOW = tl.constexpr(4)  # and what float32 left out of it
ROWS = 5


@triton.jit
def place(program, N, H):
    """Sequence and head, and chunk, of a program: the heads of a token lie beside each other in memory."""
    h = program % H
    n = (program // H) % N
    return (program // (H * N)) * H + h, n


@triton.jit
def of_tokens(pointer, bh, n, first, T, H: tl.constexpr, X: tl.constexpr, C: tl.constexpr, BX: tl.constexpr):
    """Addresses and mask [C, BX] of a chunk's rows of [B, T, H, X], from column `first`. Only where a tile begins is
    worked out in 64 bits, and once for all its numbers."""
    i, x = tl.arange(0, C), tl.arange(0, BX)
    begin = (((bh // H).to(tl.int64) * T + n * C) * H + bh % H) * X + first
    mask = (i < T - n * C)[:, None]
    if X % BX != 0:
        mask = mask & (x < X - first)[None, :]
    return pointer + begin + (i[:, None] * (H * X) + x[None, :]), mask


@triton.jit
def of_state(pointer, index, v, k, V: tl.constexpr, K: tl.constexpr):
    """Addresses and mask of rows v and columns k of matrix `index` of [*, V, K]."""
    return pointer + index.to(tl.int64) * K * V + (v[:, None] * K + k[None, :]), (v < V)[:, None] & (k < K)[None, :]


@triton.jit
def of_memory(pointer, index, v, k, V: tl.constexpr, K: tl.constexpr):
    """The same of [*, K, V]: a tile of the matrix turned around."""
    return pointer + index.to(tl.int64) * K * V + (k[None, :] * V + v[:, None]), (v < V)[:, None] & (k < K)[None, :]


@triton.jit
def fading(high, low, C: tl.constexpr):
    """L [C, C]: what is left of token i's write after token t, e^{c_t - c_i}, and 0 for i > t. Of sums in two parts:
    one alone would lose the digits of the gates after a document's start."""
    t = tl.arange(0, C)
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp(tl.where(t[:, None] >= t[None, :], between, -float("inf")))


@triton.jit
def system_inverse(X, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + X)^-1 of a strictly lower X [C, C], by halves from blocks of 4 (models/regression/chunks.py): up to blocks
    of 16 for those on the diagonal alone, all at once, and then by products of whole tiles."""
    D: tl.constexpr = C // 16
    e = tl.arange(0, 16)[None, :, None]
    f = tl.arange(0, 16)[None, None, :]
    d = tl.arange(0, D)
    own = (d[:, None] == d[None, :])[:, None, :, None]
    small = tl.sum(tl.where(own, tl.reshape(X, [D, 16, D, 16]), 0.0), 2)
    block = tl.where(e // 4 == f // 4, small, 0.0)
    square = dot(block, block, PRECISION)
    inverse = tl.where(e == f, 1.0, 0.0) - block + square - dot(block, square, PRECISION)
    for log_size in tl.static_range(2, 4):
        size = 1 << log_size
        below = tl.where((e // (2 * size) == f // (2 * size)) & (e // size != f // size), small, 0.0)
        inverse -= dot(dot(inverse, below, PRECISION), inverse, PRECISION)
    whole = tl.where(own, tl.broadcast_to(inverse[:, :, None, :], [D, 16, D, 16]), 0.0)
    whole = tl.reshape(whole, [C, C])
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    for log_size in tl.static_range(4, 6):
        size = 1 << log_size
        below = tl.where((i // (2 * size) == j // (2 * size)) & (i // size != j // size), X, 0.0)
        whole -= dot(dot(whole, below, PRECISION), whole, PRECISION)
    return whole


@triton.jit
def last_of(x, C: tl.constexpr):
    """The last of C numbers."""
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, x, 0.0), 0)
