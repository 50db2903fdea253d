"""What the momentum kernels share: where a chunk's rows lie, how its gates fade, and a triangular inverse.

Triton code: `C` tokens of a chunk, `bh` a sequence's head, n a chunk; tiles are float32 unless they are operands of a
product, which have the dtype of q, k and v.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.momentum import rule
from models.kernels.momentum.rule import ROWS  # noqa: F401

# Rows of a chunk's vectors [ROWS, C]. Their last entries, at C - 1, are what the scan multiplies the matrices with.
A = tl.constexpr(0)  # what is left of the chunk's first memory in M_t,
F = tl.constexpr(1)  # and of its first momentum
M = tl.constexpr(2)  # what is left of the first momentum in S_t
REFER_A = tl.constexpr(3)  # the same of M_ref(t): of the first memory,
REFER_F = tl.constexpr(4)  # of the first momentum,
REFER_R = tl.constexpr(5)  # and of the reference that was carried along
WRITE_M = tl.constexpr(6)  # the last row of G: how much of each token's write is in the last memory,
WRITE_S = tl.constexpr(7)  # in the last momentum,
WRITE_R = tl.constexpr(8)  # and in the last reference
HIGH = tl.constexpr(9)  # the log momenta summed from the chunk's beginning,
LOW = tl.constexpr(10)  # and what float32 left out of it


PART = tl.constexpr(rule.PART)
SECTOR = tl.constexpr(8)  # float32 numbers that memory moves together
SMALL = tl.constexpr("tf32x3")  # products of tiles of 16


@triton.jit
def dot(x, y, PRECISION: tl.constexpr, acc=None):
    return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def split(x, TYPE: tl.constexpr):
    """A float32 tile x as operands of products: x = high + low to 16 bits where they are of bf16 (TYPE); else x, twice:
    fp16 has not the range, and float32 needs no parts."""
    if TYPE.is_bf16():
        bits = x.to(tl.int32, bitcast=True)  # rounded by hand: a conversion back would be one number at a time
        high = ((bits + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
        return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)
    else:
        return x, x


@triton.jit
def split_dot(x, x_low, y, y_low, PRECISION: tl.constexpr, acc=None):
    """acc and the product of two float32 tiles, each as split gives it."""
    product = dot(x, y, PRECISION, acc)
    if x.dtype.is_bf16():
        product = dot(x, y_low, PRECISION, dot(x_low, y, PRECISION, product))
    return product


@triton.jit
def select_dot(chosen, x, TYPE: tl.constexpr, PRECISION: tl.constexpr, acc=None):
    """acc and chosen x, of a tile of zeros and ones, which no rounding changes, and a float32 tile."""
    high, low = split(x, TYPE)
    ones = tl.where(chosen, 1.0, 0.0).to(high.dtype)
    product = dot(ones, high, PRECISION, acc)
    return dot(ones, low, PRECISION, product) if TYPE.is_bf16() else product


@triton.jit
def halves(x, TYPE: tl.constexpr):
    """A float32 tile x as two operands whose sum has twice the digits of one; of float32, x alone counts."""
    if TYPE.is_bf16():
        high, low = split(x, TYPE)
    else:
        high = x.to(TYPE)
        low = (x - high.to(tl.float32)).to(TYPE)
    return high, low


@triton.jit
def wide_dot(x, y, PRECISION: tl.constexpr, acc=None):
    """acc and x y of a float32 tile and an operand y, with twice an operand's digits of x = high + low."""
    high, low = halves(x, y.dtype)
    product = dot(high, y, PRECISION, acc)
    return product if y.dtype.is_fp32() else dot(low, y, PRECISION, product)


@triton.jit
def unit_dot(x, y, y_low, PRECISION: tl.constexpr):
    """x (I + y + y_low) of a float32 tile x and one in two operands, as halves gives them: with the digits of both."""
    high, low = halves(x, y.dtype)
    product = dot(high, y, PRECISION, x)
    if not y.dtype.is_fp32():
        product = dot(low, y, PRECISION, dot(high, y_low, PRECISION, product))
    return product


@triton.jit
def of_tokens(pointer, bh, n, first, T, H, X, C: tl.constexpr, BX: tl.constexpr):
    """Addresses and mask [C, BX] of a chunk's rows of [B, T, H, X], from column `first`. Only where a tile begins is
    worked out in 64 bits, and once for all its numbers."""
    i, x = tl.arange(0, C), tl.arange(0, BX)
    begin = (((bh // H).to(tl.int64) * T + n * C) * H + bh % H) * X + first
    inside = (i < T - n * C)[:, None] & (x < X - first)[None, :]
    return pointer + begin + (i[:, None] * (H * X) + x[None, :]), inside


@triton.jit
def of_gates(pointer, bh, n, T, H, C: tl.constexpr):
    """Addresses and mask [C] of a chunk's rows of [B, T, H]."""
    i = tl.arange(0, C)
    begin = ((bh // H).to(tl.int64) * T + n * C) * H + bh % H
    return pointer + begin + i * H, i < T - n * C


@triton.jit
def of_matrix(pointer, index, first, K, V, BK: tl.constexpr, BV: tl.constexpr, first_k=0):
    """Addresses and mask [BK, BV] of matrix `index` of [*, K, V], from column `first` and row `first_k`."""
    k, v = tl.arange(0, BK), tl.arange(0, BV)
    begin = (index.to(tl.int64) * K + first_k) * V + first
    return pointer + begin + (k[:, None] * V + v[None, :]), (k < K - first_k)[:, None] & (v < V - first)[None, :]


@triton.jit
def of_states(
    pointer, chunk, first_v, first_k, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    N_MATRICES: tl.constexpr, FIRST: tl.constexpr = 0, J: tl.constexpr = 1,
):  # fmt: skip
    """Addresses and mask [BV, J BK]: columns of the keys, from first_k, of J matrices of a chunk side by side, the
    first of them the one called FIRST. Kept are PART columns of all N_MATRICES, row by row of the values, and then the
    next columns (rule.py): what a program of the tokens' gradient has at a time lies in one piece."""
    WIDTH: tl.constexpr = N_MATRICES * PART
    v, column = tl.arange(0, BV), tl.arange(0, J * BK)
    k = column % BK
    begin = (chunk.to(tl.int64) * ((K + PART - 1) // PART) + first_k // PART) * (V * WIDTH) + first_v * WIDTH
    place = (column // BK + FIRST) * PART + k
    if BK > PART:
        place += k // PART * (V * WIDTH - PART)
    return pointer + begin + (v[:, None] * WIDTH + place[None, :]), (v < V - first_v)[:, None] & (k < K - first_k)[
        None, :
    ]


@triton.jit
def of_turned(pointer, index, first, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """Addresses and mask [BV, BK] of columns of such a matrix, turned around."""
    k, v = tl.arange(0, BK), tl.arange(0, BV)
    begin = index.to(tl.int64) * K * V + first
    return pointer + begin + (k[None, :] * V + v[:, None]), (k < K)[None, :] & (v < V - first)[:, None]


@triton.jit
def of_square(pointer, chunk, C: tl.constexpr):
    """Addresses [C, C] of a chunk's coefficients."""
    i = tl.arange(0, C)
    return pointer + chunk.to(tl.int64) * (C * C) + (i[:, None] * C + i[None, :])


@triton.jit
def of_lower(pointer, chunk, C: tl.constexpr):
    """The same of a lower triangle, and its mask: whole sectors of memory, of 32 bytes, and no others are written or
    read. It is 9/16 of the bytes of float32 and 5/8 of those of 16 bits."""
    SIDE: tl.constexpr = SECTOR * 32 // pointer.dtype.element_ty.primitive_bitwidth
    i = tl.arange(0, C) // SIDE
    return of_square(pointer, chunk, C), i[None, :] <= i[:, None]


@triton.jit
def lower(pointer, chunk, C: tl.constexpr):
    """[C, C]: such a triangle, and zeros."""
    at, inside = of_lower(pointer, chunk, C)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def leave_lower(pointer, chunk, x, C: tl.constexpr):
    """Stores x [C, C] as such a triangle."""
    at, inside = of_lower(pointer, chunk, C)
    tl.store(at, x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def unit_inverse(X, C: tl.constexpr, LOG_C: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + X)^-1 of a strictly lower X [C, C], by halves from blocks of 4 (models/regression/chunks.py): up to blocks
    of 16 for those on the diagonal alone, all at once and a block a warp, and then by products of whole tiles."""
    D: tl.constexpr = C // 16
    e = tl.arange(0, 16)[None, :, None]
    f = tl.arange(0, 16)[None, None, :]
    d = tl.arange(0, D)
    own = (d[:, None] == d[None, :])[:, None, :, None]
    small = tl.sum(tl.where(own, tl.reshape(X, [D, 16, D, 16]), 0.0), 2)
    block = tl.where(e // 4 == f // 4, small, 0.0)
    square = dot(block, block, SMALL)
    inverse = tl.where(e == f, 1.0, 0.0) - block + square - dot(block, square, SMALL)
    for log_size in tl.static_range(2, 4):
        size = 1 << log_size
        below = tl.where((e // (2 * size) == f // (2 * size)) & (e // size != f // size), small, 0.0)
        inverse -= dot(dot(inverse, below, SMALL), inverse, SMALL)
    whole = tl.where(own, tl.broadcast_to(inverse[:, :, None, :], [D, 16, D, 16]), 0.0)
    whole = tl.reshape(whole, [C, C])
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    for log_size in tl.static_range(4, LOG_C):
        size = 1 << log_size
        between = (i // (2 * size) == j // (2 * size)) & (i // size != j // size)
        below, below_low = split(tl.where(between, -X, 0.0), TYPE)
        high, low = split(whole, TYPE)
        product, product_low = split(split_dot(high, low, below, below_low, PRECISION), TYPE)
        whole = split_dot(product, product_low, high, low, PRECISION, whole)
    return whole
