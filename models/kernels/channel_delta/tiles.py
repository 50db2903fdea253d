"""What the kernels share: the gates between two tokens of a chunk, channel by channel.

With a decay per channel, sum_j x_tj e^{c_tj - c_ij} y_ij is no product of two tiles: e^{-c_ij} alone may be more than
any number. It is one from a border r between them on, t >= r > i, as (x_t e^{c_t - c_r}) (y_i e^{c_r - c_i}): both
factors are at most 1, whatever the gates. So a chunk is halved, and its halves, down to single tokens. In the halving
at `size`, a pair of neighbouring blocks of so many tokens meets at its border, the first writes and the second reads,
and each pair of tokens t > i is of one halving: that of the highest bit in which t and i differ.

A sum of gates is a product with zeros and ones. It has the gates between the two and no others, so that a gate that
forgets, at a document's start, takes no digits of those after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.momentum.tiles import dot, of_square

LEAST = tl.constexpr(-1000.0)  # for the log of a gate of 0, which is infinite


@triton.jit
def parts(x, TYPE: tl.constexpr):
    """x = high + low, float32, as operands of products of dtype TYPE: to 16 bits in bf16, to 22 in fp16. float32 needs
    no parts, and gets x twice."""
    if TYPE.is_bf16():
        bits = x.to(tl.int32, bitcast=True)  # rounded by hand: a conversion back would be one number at a time
        high = ((bits + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
        return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)
    elif TYPE.is_fp16():
        high = x.to(tl.float16)
        return high, (x - high.to(tl.float32)).to(tl.float16)
    else:
        return x, x


# Which tokens r a sum [C, C] in `ones` has in its row t; after those of the halvings, 0 to LOG_C - 1:
UP_TO = tl.constexpr(0)  # r <= t
AFTER = tl.constexpr(1)  # r > t
FROM = tl.constexpr(2)  # r >= t
BEFORE = tl.constexpr(3)  # r < t
ORDERS = 4


@triton.jit
def write_ones(
    ones,  # out, [LOG_C + ORDERS, C, C]
    C: tl.constexpr,
    LOG_C: tl.constexpr,
):
    """A halving's: the gates from the border of its pair of blocks to a token that reads, or from a token that writes
    to the border."""
    which = tl.program_id(0)
    t, r = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    border = ((t >> (which + 1)) << (which + 1)) + (1 << which)
    order = which - LOG_C
    first = tl.where(order == FROM, t, tl.where(order == AFTER, t + 1, 0))
    end = tl.where(order == UP_TO, t + 1, tl.where(order == BEFORE, t, C))
    first = tl.where(order < 0, tl.minimum(border, t + 1), first)
    end = tl.where(order < 0, tl.maximum(border, t + 1), end)
    chosen = (r >= first) & (r < end)
    tl.store(of_square(ones, which, C), tl.where(chosen, 1.0, 0.0).to(ones.dtype.element_ty))


@triton.jit
def sums(ones, which, high, low, C: tl.constexpr, PRECISION: tl.constexpr):
    """Sums [C, BK] over tokens of numbers that parts has given."""
    chosen = tl.load(ones + which * C * C + (tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]))
    total = dot(chosen, high, PRECISION)
    return total if high.dtype.is_fp32() else dot(chosen, low, PRECISION, total)


@triton.jit
def near(gates, LOG_C: tl.constexpr, TYPE: tl.constexpr):
    """The halving up to whose pairs of blocks tokens are near: the gates of one block add up to FAR at least."""
    FAR: tl.constexpr = 6.0 if TYPE.is_fp16() else 40.0  # of e^FAR operands of 16 bits still have all their digits
    largest = -tl.min(tl.min(gates, 1), 0)
    halving = 0
    for i in tl.static_range(1, LOG_C):
        halving += (largest * (1 << i) <= FAR).to(tl.int32)
    return halving


@triton.jit
def near_factors(summed, halving, TYPE: tl.constexpr, C: tl.constexpr):
    """[C, BK]: by what queries and keys of near tokens are multiplied to read, and keys to write. `summed` is the
    halving's. What is not used, where tokens are not near, is cut off."""
    FAR: tl.constexpr = 6.0 if TYPE.is_fp16() else 40.0
    reads = ((tl.arange(0, C) >> halving) & 1 == 1)[:, None]
    back = tl.minimum(-summed, FAR)
    return tl.exp(tl.where(reads, summed, back)), tl.exp(tl.where(reads, back, summed))


@triton.jit
def partners(halving, READERS: tl.constexpr, C: tl.constexpr):
    """[C, C]: whether two tokens are of this halving, in either order, or with a reader in its row."""
    block = tl.arange(0, C) >> halving
    partner = tl.where(block & 1 == 1, block - 1, -1) if READERS else block ^ 1
    return partner[:, None] == block[None, :]


@triton.jit
def neighbours(halving, READERS: tl.constexpr, C: tl.constexpr):
    """[C, C]: whether two tokens are of the same pair of blocks, the reader in its row, or the writer."""
    t = tl.arange(0, C)
    pair = t >> (halving + 1)
    ordered = t[:, None] > t[None, :] if READERS else t[:, None] < t[None, :]
    return (pair[:, None] == pair[None, :]) & ordered
