"""What the kernels of deep memories share: where tiles lie, and the activation.

Triton code; the tuples `call`, `left` and `found` and the sizes S are in arguments.py. Of the hidden layer a tile has
BF units, from j BF on. Tiles are float32 unless they are operands of a product, which have the dtype of q, k, v. A
place of a slot that has no token reads as zero, and nothing is stored for it.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from models.parts import precision

NOTHING = tl.constexpr(precision.NOTHING)
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def dot(x, y, S: tl.constexpr, acc=None):
    return tl.dot(x, y, acc, input_precision=S.PRECISION)


@triton.jit
def zeros(R: tl.constexpr, X: tl.constexpr):
    """[R, X]. Triton 3.6 makes no shape of fields of S themselves."""
    return tl.zeros([R, X], tl.float32)


@triton.jit
def tile(pointer, offset, R: tl.constexpr, X: tl.constexpr, STRIDE):
    """Addresses [R, X] from `offset` (int64), rows STRIDE apart."""
    return pointer + offset + tl.arange(0, R)[:, None] * STRIDE + tl.arange(0, X)[None, :]


@triton.jit
def turned(pointer, offset, R: tl.constexpr, X: tl.constexpr, STRIDE):
    """Addresses [R, X] of the transpose of a tile: columns STRIDE apart."""
    return pointer + offset + tl.arange(0, R)[:, None] + tl.arange(0, X)[None, :] * STRIDE


@triton.jit
def of_slot(call, n, head):
    """The chunk of a slot; its first token's row of [B T, H, *] (int64), how many tokens it has, and the row of B that
    it begins, or -1."""
    at = call.slots + 3 * n
    return n * call.H + head, tl.load(at).to(tl.int64) * call.H + head, tl.load(at + 1), tl.load(at + 2)


@triton.jit
def of_program(call):
    """A program's chunk, one for each; its head, and the rest of of_slot."""
    chunk = tl.program_id(0).to(tl.int64)
    head = chunk % call.H
    _, first, count, opens = of_slot(call, chunk // call.H, head)
    return chunk, head, first, count, opens


@triton.jit
def load_tokens(pointer, first, count, X: tl.constexpr, call, S: tl.constexpr):
    """[C, X] of a slot of [B, T, H, X]."""
    t = tl.arange(0, S.C)[:, None]
    return tl.load(tile(pointer, first * X, S.C, X, call.H * X), mask=t < count, other=0.0)


@triton.jit
def load_turned_tokens(pointer, first, count, X: tl.constexpr, call, S: tl.constexpr):
    """[X, C] of it."""
    t = tl.arange(0, S.C)[None, :]
    return tl.load(turned(pointer, first * X, X, S.C, call.H * X), mask=t < count, other=0.0)


@triton.jit
def store_tokens(pointer, first, count, x, X: tl.constexpr, call, S: tl.constexpr):
    t = tl.arange(0, S.C)[:, None]
    tl.store(tile(pointer, first * X, S.C, X, call.H * X), x, mask=t < count)


@triton.jit
def store_turned_tokens(pointer, first, count, x, X: tl.constexpr, call, S: tl.constexpr):
    t = tl.arange(0, S.C)[None, :]
    tl.store(turned(pointer, first * X, X, S.C, call.H * X), x, mask=t < count)


@triton.jit
def of_chunk(pointer, chunk, X: tl.constexpr, S: tl.constexpr):
    """Addresses [C, X] of [L H, C, X]."""
    return tile(pointer, chunk * (S.C * X), S.C, X, X)


@triton.jit
def of_queries(pointer, chunk, j, S: tl.constexpr):
    """Addresses [C, BF] of [L H, C, F]."""
    return tile(pointer, chunk * (S.C * S.F) + j * S.BF, S.C, S.BF, S.F)


@triton.jit
def of_units(pointer, chunk, j, S: tl.constexpr):
    """Addresses [BF, C] of [L H, F, C]."""
    return tile(pointer, (chunk * S.F + j * S.BF) * S.C, S.BF, S.C, S.C)


@triton.jit
def of_layers(pointer, offset, j, S: tl.constexpr):
    """Addresses of weights from `offset` on: [BF, K] of W_1, turned, and [BF, V] of W_2."""
    second = S.F * S.K + j * S.BF * S.V
    return tile(pointer, offset + j * S.BF * S.K, S.BF, S.K, S.K), tile(pointer, offset + second, S.BF, S.V, S.V)


@triton.jit
def load_layers(pointer, offset, j, S: tl.constexpr):
    at1, at2 = of_layers(pointer, offset, j, S)
    return tl.load(at1), tl.load(at2)


@triton.jit
def load_layers_where(wanted, pointer, offset, j, S: tl.constexpr):
    """The same where wanted is 1, zeros where it is 0."""
    at1, at2 = of_layers(pointer, offset, j, S)
    inside = tl.arange(0, S.BF)[:, None] < wanted * S.BF
    return tl.load(at1, mask=inside, other=0.0), tl.load(at2, mask=inside, other=0.0)


@triton.jit
def store_layers(pointer, offset, j, x1, x2, S: tl.constexpr):
    at1, at2 = of_layers(pointer, offset, j, S)
    tl.store(at1, x1)
    tl.store(at2, x2)


@triton.jit
def of_document(call, S: tl.constexpr):
    """A program's document of a head, of [P H], and its part of the hidden layer; its head and row of B; the document's
    first slot, the one after its last, and 1 if it ends the row, else 0."""
    program, part = (tl.program_id(0) // S.split).to(tl.int64), tl.program_id(0) % S.split
    run = call.runs + 4 * (program // call.H)
    row = tl.load(run).to(tl.int64)
    return program, part, program % call.H, row, tl.load(run + 1), tl.load(run + 2), tl.load(run + 3)


@triton.jit
def _sigmoid(z):
    """1 / (1 + exp(-z)) with the square of an inverse root for a quotient, a third of its instructions."""
    root = tl.rsqrt(1 + tl.exp2(z * -LOG2_E))
    return root * root


@triton.jit
def silu(z):
    """z g with g = sigmoid(z), and its first derivative."""
    gate = _sigmoid(z)
    return z * gate, gate * (1 + z * (1 - gate))


@triton.jit
def silu_curve(z):
    """The second derivative."""
    gate = _sigmoid(z)
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
