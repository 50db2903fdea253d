"""What the kernels of TTT-MLP share: where tiles lie, and the activation.

As linear.py, with two layers: what is said there of a layer holds for each, with inputs X = k and gelu(Z_1). Tokens are
columns: what belongs to the hidden layer is [F, C], and both layers' weights are [F, K], W_1 transposed.

Memory, for T tokens of a slab, the mini-batches that begin in G spans of C of them (mlp.py):

    weights [B H, G, 2, F, K]  both layers', in the type of q: before a mini-batch that goes on with a document. One at
                               most of those that begin in a span does: a full one lies before it.
    biases  [B H, G, F + K]    float32
    wide    [B H, T, 9, F]     in the type of q: see WIDE
    narrow  [B H, T, 7, K]     float32: see NARROW
"""

from __future__ import annotations

import triton
import triton.language as tl

WIDE = tl.constexpr(9)
MIDDLE = tl.constexpr(0)  # of errors: gelu(Z_1), its derivative, its second one times u_2 W_2', and u_1
SLOPE = tl.constexpr(1)
BEND = tl.constexpr(2)
ERROR = tl.constexpr(3)
READ = tl.constexpr(4)  # of queries: gelu(Z_1) and dZ_1
DREAD = tl.constexpr(5)
DMIDDLE_READ = tl.constexpr(6)  # because of queries, of errors: the gradients by gelu(Z_1) and u_1
DERROR1_READ = tl.constexpr(7)
DSUM = tl.constexpr(8)  # of errors, in all: dZ_1

NARROW = tl.constexpr(7)
STANDARD = tl.constexpr(0)  # of errors: (Z_2 - mean) / deviation, dl/dZ_2, and 1 / deviation, which is one number
GRADIENT = tl.constexpr(1)
SCALE = tl.constexpr(2)
DOUT = tl.constexpr(3)  # of queries: dZ_2
DERROR_READ = tl.constexpr(4)  # because of queries: the gradients by u_2 and k
DKEY_READ = tl.constexpr(5)
DERROR = tl.constexpr(6)  # of errors, in all: du_2


@triton.jit
def gelu(z):
    """z S, S = sigmoid(2 c (z + d z^3)), and its first and second derivative. Numbers: 2 c, d, 3 d and 12 c d."""
    S = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    dw = 1.5957691216057308 * (1 + 0.134145 * z * z)
    dS = S * (1 - S) * dw
    ddS = dS * (1 - 2 * S) * dw + S * (1 - S) * (0.42812495301279414 * z)
    return z * S, S + z * dS, 2 * dS + z * ddS


@triton.jit
def wide_at(wide, index, which: tl.constexpr, unit, F: tl.constexpr):
    """Pointers to some hidden units of tokens, as columns."""
    return wide + index[None, :] * (WIDE * F) + which * F + unit[:, None]


@triton.jit
def narrow_at(narrow, index, which: tl.constexpr, K: tl.constexpr):
    """Pointers to what tokens have of the width of keys, as columns."""
    return narrow + index[None, :] * (NARROW * K) + which * K + tl.arange(0, K)[:, None]


@triton.jit
def sum_columns(x):
    return tl.sum(x, 1, keep_dims=True)
