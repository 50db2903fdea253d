"""What the kernels over pairs share: a query uses those from its first to its last, and they come in blocks.

Blocks that no mask touches come first, and then those at the edges: the mask is a quarter of a loop's instructions.
Query t is pair past + t and uses those from `low` to `high`.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(-1e30)  # the logarithm of the weight of what can't be seen, before the largest is known
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load(base, rows, num_rows, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK], zero beyond the last row and column."""
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store(base, rows, num_rows, stride, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], x, mask=inside)


@triton.jit
def interval(start, b, rows, T, S, past, window, DOCUMENTS: tl.constexpr):
    """The first and the last pair of each query."""
    high = tl.minimum(past + rows, S - 1)
    low = tl.maximum(past + rows + 1 - window, 0)
    if DOCUMENTS:
        low = tl.maximum(low, tl.load(start + b * T + rows, mask=rows < T, other=S))
    return tl.minimum(low, high), high


@triton.jit
def spans(begin, end, inner_from, inner_to, BLOCK: tl.constexpr):
    """Of the blocks from `begin` to before `end`, the ones that lie between inner_from and before inner_to and need no
    mask: where those begin and how many there are; where the others begin, how many come before them and how many
    there are."""
    begin = begin // BLOCK * BLOCK
    inner_from = tl.maximum(tl.cdiv(inner_from, BLOCK) * BLOCK, begin)
    num_inner = tl.maximum(inner_to - inner_from, 0) // BLOCK
    num_below = tl.where(num_inner > 0, (inner_from - begin) // BLOCK, 0)
    return inner_from, num_inner, begin, num_below, tl.maximum(tl.cdiv(end - begin, BLOCK), 0) - num_inner


@triton.jit
def num_blocks(span, EDGES: tl.constexpr):
    return span[4] if EDGES else span[1]


@triton.jit
def block_at(i, span, EDGES: tl.constexpr, BLOCK: tl.constexpr):
    """Where block i of the inner ones, or of the others, begins."""
    return span[2] + (i + tl.where(i >= span[3], span[1], 0)) * BLOCK if EDGES else span[0] + i * BLOCK


@triton.jit
def hide(x, otherwise, j, low, high, EDGES: tl.constexpr):
    """x [BM, BN] with something else for pairs that are hidden from a query."""
    if EDGES:
        x = tl.where((j[None, :] >= low[:, None]) & (j[None, :] <= high[:, None]), x, otherwise)
    return x
