"""What the kernels of deep memories share: where tiles lie, the activation, and the errors of a chunk.

Triton code. `chunk` is one of [N B H]; C tokens, K and V widths of keys and values, F of the hidden layer. The weights
of a network are packed, W_1 [K, F] and then W_2 [F, V], PAIR numbers; a state is N of both, and S of both after it.
Tiles are float32 unless they are operands of a product, which have the dtype of q, k and v.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(x, y, PRECISION: tl.constexpr):
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def tile(pointer, index, R: tl.constexpr, X: tl.constexpr):
    """Addresses [R, X] of matrix `index` (int64) of [*, R, X]."""
    return pointer + index * (R * X) + tl.arange(0, R)[:, None] * X + tl.arange(0, X)[None, :]


@triton.jit
def second(pointer, index, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, SIZE: tl.constexpr):
    """Addresses [F, V] of the second layer of packed weights `index`, of SIZE numbers each."""
    return pointer + index * SIZE + K * F + tl.arange(0, F)[:, None] * V + tl.arange(0, V)[None, :]


@triton.jit
def first(pointer, index, K: tl.constexpr, F: tl.constexpr, SIZE: tl.constexpr):
    """Addresses [K, F] of the first."""
    return pointer + index * SIZE + tl.arange(0, K)[:, None] * F + tl.arange(0, F)[None, :]


@triton.jit
def column(pointer, chunk, i, C: tl.constexpr, N: tl.constexpr):
    """Addresses [C, 1] of column i of [*, C, N]."""
    return pointer + chunk * (C * N) + tl.arange(0, C)[:, None] * N + i


@triton.jit
def silu(z):
    """z g with g = sigmoid(z), and its first derivative."""
    gate = tl.sigmoid(z)
    return z * gate, gate * (1 + z * (1 - gate))


@triton.jit
def silu_curve(z):
    """The second derivative."""
    gate = tl.sigmoid(z)
    return gate * (1 - gate) * (2 + z * (1 - 2 * gate))


@triton.jit
def square(x):
    return tl.sum(x * x, 1)[:, None]


@triton.jit
def errors(key, value, R1, R2, PRECISION: tl.constexpr):
    """z, X_2 and slope of the hidden layer, the error e at the prediction, rounded too, and what it is before the
    hidden layer's slope: all of them without the limit."""
    z = dot(key, R1, PRECISION)
    x, slope = silu(z)
    x = x.to(key.dtype)
    e = value.to(tl.float32) - dot(x, R2, PRECISION)
    rounded = e.to(key.dtype)
    return z, x, slope, e, rounded, dot(rounded, tl.trans(R2), PRECISION)


@triton.jit
def limit(key, x, e1, e, NOTHING: tl.constexpr):
    """The share of the errors that a step of size one may write, [C, 1], and what it is made of: |k|^2, |X_2|^2, the
    |e|^2 of both layers, the sum that is held, and the denominator."""
    keys, hidden = square(key.to(tl.float32)), square(x.to(tl.float32))
    size1, size = square(e1), square(e)
    moved = keys * size1 + hidden * size
    most = tl.maximum(size, moved) + NOTHING
    return (size + NOTHING) / most, keys, hidden, size1, size, moved, most
