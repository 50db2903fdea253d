"""What the kernels share: the gates between two tokens of a chunk, channel by channel.

With a decay per channel, sum_j x_tj e^{c_tj - c_ij} y_ij is no product of two tiles: e^{-c_ij} alone may be more than
any number. In a chunk that is near it is not, and two factors do, e^{c_t - m} and e^{m - c_i}, with m half of the sum
of the chunk's gates. Where channels fade further there is a border r between two tokens, t >= r > i, and (x_t e^{c_t -
c_r}) (y_i e^{c_r - c_i}): both factors are at most 1, whatever the gates. So a chunk is halved, and its halves, down to
blocks of tokens that are near, if need be of one token. In a halving a pair of neighbouring blocks of 2^halving tokens
meets at its border, the first writes and the second reads, and each pair of tokens t > i is of one halving: that of the
highest bit in which t and i differ.

A sum of gates is a product with zeros and ones. It has the gates between the two and no others, so that a gate that
forgets, at a document's start, takes no digits of those after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.momentum.tiles import dot, of_square

LEAST = tl.constexpr(-1000.0)  # at a document's start, for the log of a gate of 0, which is infinite
CLOSED = tl.constexpr(-999.0)  # that of any other gate at least: what is told by LEAST are starts alone
MOST = tl.constexpr(64.0)  # |log| of a factor that bf16 and float32 hold with all digits of what it multiplies
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """By the instruction alone: what is less than 2^-126 becomes 0. tl.exp has four more around it."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def log2_from(x, m, TYPE: tl.constexpr):
    """(x - m) / log(2), for tl.exp2. In 16 bits by one instruction; float32 wants the digits of a small difference."""
    return (x - m) * LOG2_E if TYPE.is_fp32() else x * LOG2_E - m * LOG2_E


@triton.jit
def bound(TYPE: tl.constexpr):
    """|log| of a chunk's factors at most: fp16 holds none that is above 1."""
    return 0.0 if TYPE.is_fp16() else MOST


@triton.jit
def reach(TYPE: tl.constexpr):
    """How far the channels of a chunk that is near fade at most. Sums of gates have the rounding of the largest, as
    both of a pair's factors have, however little fades between them: float32 would lose more digits than it may."""
    return MOST if TYPE.is_fp32() else 2 * bound(TYPE)


@triton.jit
def reach_of_blocks(TYPE: tl.constexpr):
    """The same of blocks of tokens, which many more of those sums are of."""
    return 12.0 if TYPE.is_fp16() else 0.5 * MOST if TYPE.is_fp32() else reach(TYPE)


@triton.jit
def log_size_of(sizes, chunk, FLAGS: tl.constexpr):
    """Of the blocks of tokens in which all of a chunk's channels are near, by prepare.py's `fade`."""
    return tl.min(tl.load(sizes + chunk * FLAGS + tl.arange(0, FLAGS)), 0)


@triton.jit
def log_size_at(sizes, chunk, first, FLAGS: tl.constexpr, WIDTH: tl.constexpr):
    """The same of those WIDTH channels alone that channel `first` is of."""
    return tl.load(sizes + chunk * FLAGS + first // WIDTH)


@triton.jit
def of_rows(pointer, index, first, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """Addresses and mask [BV, BK] of matrix `index` of [*, V, K], from column `first`: no mask where tiles are full."""
    v, k = tl.arange(0, BV), tl.arange(0, BK)
    mask = tl.full([BV, BK], True, tl.int1)
    if V != BV:
        mask = mask & (v < V)[:, None]
    if K % BK != 0:
        mask = mask & (k < K - first)[None, :]
    return pointer + index.to(tl.int64) * (K * V) + first + (v[:, None] * K + k[None, :]), mask


@triton.jit
def begins(starts, bh, n, N, H, C: tl.constexpr):
    """Where in the chunk the document of each token [C] begins, 0 for one from before."""
    return tl.load(starts + (bh // H * N + n) * (1 + C) + 1 + tl.arange(0, C))


@triton.jit
def of_starts(starts, bh, n, N, H, C: tl.constexpr):
    """The tokens of a chunk that read its first memory are those before `until`, C if that is left after it; those
    whose writes its last one has are from `since` on."""
    at = starts + (bh // H * N + n) * (1 + C)
    return tl.load(at), tl.load(at + C)


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
WITHIN = tl.constexpr(4)  # and LOG_C of these, by the size of blocks: half of those of a block up to t and but its
# first, less half of those after t
ORDERS = 4 + 6


@triton.jit
def write_ones(
    ones,  # out, [LOG_C + ORDERS, C, C]
    same,  # out, the same in another dtype
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
    weight = tl.where((r >= first) & (r < end), 1.0, 0.0)
    size = 1 << tl.maximum(order - WITHIN, 0)
    within = (r // size == t // size) & (r % size != 0)
    weight = tl.where(order >= WITHIN, tl.where(within, tl.where(r <= t, 0.5, -0.5), 0.0), weight)
    tl.store(of_square(ones, which, C), weight.to(ones.dtype.element_ty))
    tl.store(of_square(same, which, C), weight.to(same.dtype.element_ty))


@triton.jit
def ones_of(ones, which, C: tl.constexpr):
    return tl.load(ones + which * C * C + (tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]))


@triton.jit
def sums(ones, which, gates, C: tl.constexpr, PRECISION: tl.constexpr):
    """Sums [C, BK] over tokens of gates [C, BK], which have the dtype of `ones`."""
    return dot(ones_of(ones, which, C), gates, PRECISION)


@triton.jit
def wide_sums(ones, which, x, C: tl.constexpr, PRECISION: tl.constexpr):
    """Sums [C, BK] over tokens of float32 numbers of any size: in 16 bits, of two parts of each."""
    chosen = ones_of(ones, which, C)
    high, low = parts(x, ones.dtype.element_ty)
    total = dot(chosen, high, PRECISION)
    return total if high.dtype.is_fp32() else dot(chosen, low, PRECISION, total)


@triton.jit
def log1p(e):
    """log(1 + e) of 0 <= e <= 1, within 4e-7 of it: a polynomial of degree 9, e - e^2/2 + ... with other digits, which
    is next to it at 200 Chebyshev points. What tl.log makes of 1 + e takes three times as long and has not the digits
    of a small e."""
    p = -0.14697665 + e * (0.091076573 + e * (-0.037743336 + e * 0.0073637238))
    p = -0.49999983 + e * (0.33331103 + e * (-0.24949984 + e * (0.19561563 + e * p)))
    return e + e * e * p


@triton.jit
def log_gates(raw, bias, log_rate, head, first, K: tl.constexpr, BK: tl.constexpr):
    """-exp(log_rate) softplus(raw + bias) [C, BK], of a head's channels from `first`."""
    channels = first + tl.arange(0, BK)
    x = raw + tl.load(bias + head * K + channels, mask=channels < K, other=0.0)[None, :]
    e = exp(-tl.abs(x))
    softplus = tl.maximum(x, 0.0) + log1p(e)
    return -tl.exp(tl.load(log_rate + head)) * softplus


@triton.jit
def log_gates_gradient(gates, rate):
    """By raw [C, BK], for 1 by the log gates: -rate sigmoid(raw + bias), which is 1 - e^(log gate / rate) of them."""
    x = gates * (1 / rate)
    small = -x * (1 + x * (0.5 + x * (1 / 6)))
    return -rate * tl.where(x > -0.03, small, 1 - exp(x))


LOG_GROUP = tl.constexpr(3)  # of a group of tokens: a load of 16 bytes has as many numbers of 16 bits


@triton.jit
def meets(halving, GROUPS: tl.constexpr, C: tl.constexpr):
    """The pairs of tokens [C, C] that meet in a halving. GROUPS: if it is of whole groups of tokens, so that one bit is
    enough of a mask for 8 numbers that are loaded."""
    block = tl.arange(0, C) >> halving
    if GROUPS:
        block = tl.max_constancy(block, 8)
    return (block ^ 1)[:, None] == block[None, :]


@triton.jit
def together(log_size, C: tl.constexpr):
    """The pairs of tokens [C, C] of a block of 2^log_size, which is of whole groups, or no pair if log_size is 0."""
    block = tl.max_constancy(tl.arange(0, C) >> tl.maximum(log_size, LOG_GROUP), 8)
    rows = tl.max_constancy(tl.where(log_size > 0, block, -1), 8)
    return rows[:, None] == block[None, :]
