"""What the kernels of deep memories share: where tiles lie, and the activation.

Triton code. `chunk` is one of [B H N], its C tokens rows of [B, N C, H, *] from `first_token` on; K and V are widths
of keys and values, F of the hidden layer, of which a tile has BF. The weights of a network are packed, W_1 [K, F] and
then W_2 [F, V], PAIR numbers; a state is N of both, and S of both after it, SIZE. Tiles are float32 unless they are
operands of a product, which have the dtype of q, k, v.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(x, y, PRECISION: tl.constexpr):
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def tile(pointer, offset, R: tl.constexpr, X: tl.constexpr, STRIDE):
    """Addresses [R, X] from `offset` (int64), rows STRIDE apart."""
    return pointer + offset + tl.arange(0, R)[:, None] * STRIDE + tl.arange(0, X)[None, :]


@triton.jit
def turned(pointer, offset, R: tl.constexpr, X: tl.constexpr, STRIDE):
    """Addresses [R, X] of the transpose of a tile: columns STRIDE apart."""
    return pointer + offset + tl.arange(0, R)[:, None] + tl.arange(0, X)[None, :] * STRIDE


@triton.jit
def first_token(bh, n, N, H, C: tl.constexpr):
    """The row of [B, N C, H, *] that a chunk begins with; its tokens are H rows apart."""
    return ((bh // H) * N + n) * C * H + bh % H


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
def row_sum(x):
    return tl.sum(x, 1)[:, None]


@triton.jit
def column_sum(x):
    return tl.sum(x, 0)[None, :]


@triton.jit
def square(x):
    """|x|^2 of columns [1, C]."""
    x = x.to(tl.float32)
    return column_sum(x * x)


@triton.jit
def scaled(c, x):
    """Rows of an operand times c [C, 1], or columns times c [1, C], an operand again."""
    return (c * x.to(tl.float32)).to(x.dtype)
