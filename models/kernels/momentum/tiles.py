"""What the momentum kernels share: where a chunk's rows lie, how its gates fade, and a triangular inverse.

Triton code: `C` tokens of a chunk, `bh` a sequence's head, n a chunk; tiles are float32 unless they are operands of a
product, which have the dtype of q, k and v.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
ROWS = 9


@triton.jit
def dot(x, y, PRECISION: tl.constexpr):
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def wide_dot(x, y, PRECISION: tl.constexpr):
    """x y of a float32 tile and an operand y, with twice an operand's digits of x = high + low."""
    high = x.to(y.dtype)
    product = dot(high, y, PRECISION)
    if not y.dtype.is_fp32():
        product += dot((x - high.to(tl.float32)).to(y.dtype), y, PRECISION)
    return product


@triton.jit
def wider_dot(x, y, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """x y of float32 tiles, with twice the digits of an operand, which has the dtype TYPE. (With eight warps a product
    of TF32 operands ends in an illegal memory access.)"""
    high = y.to(TYPE)
    product = wide_dot(x, high, PRECISION)
    if not TYPE.is_fp32():
        product += dot(x.to(TYPE), (y - high.to(tl.float32)).to(TYPE), PRECISION)
    return product


@triton.jit
def of_tokens(pointer, bh, n, first, T, H, X, C: tl.constexpr, BX: tl.constexpr):
    """Addresses and mask [C, BX] of a chunk's rows of [B, T, H, X], from column `first`."""
    t = n * C + tl.arange(0, C)
    x = first + tl.arange(0, BX)
    row = ((bh // H).to(tl.int64) * T + t) * H + bh % H
    return pointer + row[:, None] * X + x[None, :], (t < T)[:, None] & (x < X)[None, :]


@triton.jit
def of_gates(pointer, bh, n, T, H, C: tl.constexpr):
    """Addresses and mask [C] of a chunk's rows of [B, T, H]."""
    t = n * C + tl.arange(0, C)
    return pointer + ((bh // H).to(tl.int64) * T + t) * H + bh % H, t < T


@triton.jit
def of_matrix(pointer, index, first, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """Addresses and mask [BK, BV] of matrix `index` of [*, K, V], from column `first`."""
    k = tl.arange(0, BK)
    v = first + tl.arange(0, BV)
    at = pointer + index.to(tl.int64) * K * V + k[:, None] * V + v[None, :]
    return at, (k < K)[:, None] & (v < V)[None, :]


@triton.jit
def of_square(pointer, chunk, C: tl.constexpr):
    """Addresses [C, C] of a chunk's coefficients."""
    i = tl.arange(0, C)
    return pointer + chunk.to(tl.int64) * C * C + i[:, None] * C + i[None, :]


@triton.jit
def fades(log_gate, C: tl.constexpr):
    """L [C, C], the product of the gates after token i up to t, 0 for i > t; and the products from the chunk's
    beginning [C]. Differences of sums from the beginning, which in float64 lose nothing: float32 would take the digits
    of the gates after a document's start, or after 64 momenta of 1e-6. A gate of 0 has an infinite log, for which -1000
    does."""
    t = tl.arange(0, C)
    summed = tl.cumsum(tl.maximum(log_gate, -1000.0).to(tl.float64), 0)
    between = (summed[:, None] - summed[None, :]).to(tl.float32)
    L = tl.exp(tl.where(t[:, None] >= t[None, :], between, -float("inf")))
    return L, tl.exp(summed.to(tl.float32))


@triton.jit
def log_gate_gradient(dL, L, dstart, start, C: tl.constexpr):
    """The gradient by the log gates [C] from those by L and by the products from the beginning: gate r is in the
    entries of i < r <= t, which are those of t >= r without those of i >= r. A difference once more, in float64."""
    t = tl.arange(0, C)
    D = tl.where(t[:, None] > t[None, :], dL * L, 0.0).to(tl.float64)
    ending = tl.sum(D, 1) + (dstart * start).to(tl.float64)
    return tl.cumsum(ending - tl.sum(D, 0), 0, reverse=True).to(tl.float32)


@triton.jit
def unit_inverse(X, C: tl.constexpr, LOG_C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + X)^-1 of a strictly lower X [C, C], by halves from blocks of 4: models/regression/chunks.py. Whole tiles
    are multiplied, with zeros where a smaller product would have nothing: no tile need be cut."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    block = tl.where(i // 4 == j // 4, X, 0.0)
    square = dot(block, block, PRECISION)
    inverse = tl.where(i == j, 1.0, 0.0) - block + square - dot(block, square, PRECISION)
    for log_size in tl.static_range(2, LOG_C):
        size = 1 << log_size
        below = tl.where((i // (2 * size) == j // (2 * size)) & (i // size != j // size), X, 0.0)
        inverse -= dot(dot(inverse, below, PRECISION), inverse, PRECISION)
    return inverse
