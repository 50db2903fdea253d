"""The gradient of a chunk by its queries, keys, step sizes and gates, all chunks at once.

    scores_gradient   by what tokens find in the keys of their chunk, [C, C]
    within            from there to queries and keys, with what they read of the chunk's first memory
    gradient          what is written into its last, and the sum of all

Three kernels, and one part of the gradient to a program: with all in one program registers went to memory and back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.channel_delta.tiles import (
    AFTER,
    BEFORE,
    FROM,
    LEAST,
    UP_TO,
    near,
    near_factors,
    neighbours,
    partners,
    sums,
    wide_sums,
)
from models.kernels.delta.tiles import place
from models.kernels.momentum.tiles import dot, of_gates, of_matrix, of_square, of_tokens

PARTS = 4  # of the gradient by what is within a chunk: `within` says which


@triton.jit
def scores_gradient(
    step_size,  # [B, T, H]
    do,  # [B, T, H, V]
    errors,  # [B, T, H, V]
    dv,  # [B, T, H, V]
    dscores,  # out, [2, B H N, C, C]: by queries' scores, and by keys'
    down,  # out, [B, T, H]: W_tt; what a token reads of its own write has not faded
    T, N, H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W = dO U^T or X = -dV U^T: times b in the rows of readers, and transposed, without b, in those of writers."""
    bh, n = place(tl.program_id(0), N, H)
    chunk = bh * N + n
    t = tl.arange(0, C)
    at_gates, real = of_gates(step_size, bh, n, T, H, C)
    b = tl.load(at_gates, mask=real, other=0.0)
    at, mask = of_tokens(errors, bh, n, 0, T, H, V, C, BV)
    error = tl.load(at, mask=mask, other=0.0)
    if tl.program_id(1) == 0:
        dy, sign = do, 1.0
    else:
        dy, sign = dv, -1.0
    at, mask = of_tokens(dy, bh, n, 0, T, H, V, C, BV)
    given = tl.load(at, mask=mask, other=0.0)
    if tl.program_id(1) == 0:
        at_gates, real = of_gates(down, bh, n, T, H, C)
        tl.store(at_gates, tl.sum(given.to(tl.float32) * error, 1), mask=real)
    by_readers = dot(given, tl.trans(error), PRECISION) * b[None, :]
    by_writers = dot(error, tl.trans(given), PRECISION)
    found = sign * tl.where(t[:, None] > t[None, :], by_readers, by_writers)
    at = of_square(dscores, tl.program_id(1) * tl.num_programs(0) + chunk, C)
    tl.store(at, found.to(dscores.dtype.element_ty))


@triton.jit
def within(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    log_decay,  # [B, T, H, K]
    ones,  # [LOG_C + ORDERS, C, C], by tiles.py's write_ones
    dscores,  # [2, B H N, C, C]
    do,  # [B, T, H, V]
    dv,  # [B, T, H, V]
    states,  # [B H N, K, V]
    parts,  # out, [PARTS, B, T, H, K]
    T, N, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Part 0: sum_i W_ti b_i k_i + e^c dO S^T, by queries; 1: sum_i X_ti b_i k_i - e^c dV S^T, by keys that read;
    2 and 3: sum_t W_ti q_t and sum_t X_ti k_t, by keys that write, without b. Sums over tokens fade by channel."""
    part = tl.program_id(0) % 4
    first = tl.program_id(0) // 4 * BK
    bh, n = place(tl.program_id(1), N, H)
    chunk = bh * N + n
    TYPE: tl.constexpr = k.dtype.element_ty
    reader = part < 2  # what the gradient is by
    at, mask = of_tokens(log_decay, bh, n, first, T, H, K, C, BK)
    gates = tl.maximum(tl.load(at, mask=mask, other=0.0), LEAST)
    nearest = near(gates, LOG_C, TYPE)
    gates = gates.to(ones.dtype.element_ty)
    x = q if part == 2 else k
    at, mask = of_tokens(x, bh, n, first, T, H, K, C, BK)
    others = tl.load(at, mask=mask, other=0.0)
    dscore = tl.load(of_square(dscores, part % 2 * tl.num_programs(1) + chunk, C))
    own, theirs = near_factors(sums(ones, nearest, gates, C, PRECISION), nearest, reader, TYPE, C)
    chosen = tl.where(neighbours(nearest, reader, C), dscore, 0.0).to(TYPE)
    found = dot(chosen, (others * theirs).to(TYPE), PRECISION) * own
    for halving in range(nearest + 1, LOG_C):
        left = tl.exp(sums(ones, halving, gates, C, PRECISION))
        chosen = tl.where(partners(halving, reader, C), dscore, 0.0).to(TYPE)
        found += dot(chosen, (others * left).to(TYPE), PRECISION) * left
    if reader:
        dy, sign = do, 1.0
        if part == 1:
            dy, sign = dv, -1.0
        at_v, mask_v = of_tokens(dy, bh, n, 0, T, H, V, C, BV)
        given = tl.load(at_v, mask=mask_v, other=0.0)
        at_s, inside = of_matrix(states, chunk, 0, K, V, BK, BV, first)
        memory = tl.load(at_s, mask=inside, other=0.0)
        left = sign * tl.exp(sums(ones, LOG_C + UP_TO, gates, C, PRECISION))
        found += dot(given, tl.trans(memory), PRECISION) * left
    B = tl.num_programs(1) // (H * N)
    at, mask = of_tokens(parts + part.to(tl.int64) * B * T * H * K, bh, n, first, T, H, K, C, BK)
    tl.store(at, found.to(TYPE), mask=mask)


@triton.jit
def gradient(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    step_size,  # [B, T, H]
    log_decay,  # [B, T, H, K]
    ones,  # [LOG_C + ORDERS, C, C], by tiles.py's write_ones
    same,  # in the dtype of q and k
    parts,  # [PARTS, B, T, H, K]
    down,  # [B, T, H]
    errors,  # [B, T, H, V]
    states,  # [B H N, K, V]
    dstates,  # [B H N, K, V]
    dq,  # out, [B, T, H, K]
    dk,  # out, [B, T, H, K]
    dstep_size,  # out, [K / BK, B, T, H], to be summed
    dlog_decay,  # out, [B, T, H, K]
    T, N, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With dS by the memory the chunk ends with, e^{c_C - c} U dS^T comes to what is by keys that write: the product
    of all that with k is the gradient by b, and b times it that by k. A gate is in whatever is read at it or later and
    was written before it.
    """
    first = tl.program_id(0) * BK
    bh, n = place(tl.program_id(1), N, H)
    chunk = bh * N + n
    B = tl.num_programs(1) // (H * N)
    TYPE: tl.constexpr = k.dtype.element_ty
    at_gates, real = of_gates(step_size, bh, n, T, H, C)
    b = tl.load(at_gates, mask=real, other=0.0)[:, None]
    at, mask = of_tokens(log_decay, bh, n, first, T, H, K, C, BK)
    gates = tl.maximum(tl.load(at, mask=mask, other=0.0), LEAST)
    ended = tl.exp(tl.sum(gates, 0))
    gates = gates.to(ones.dtype.element_ty)
    at_s, inside = of_matrix(states, chunk, 0, K, V, BK, BV, first)
    memory = tl.load(at_s, mask=inside, other=0.0)
    at_s, inside = of_matrix(dstates, chunk, 0, K, V, BK, BV, first)
    dmemory = tl.load(at_s, mask=inside, other=0.0)
    ended *= tl.sum(memory.to(tl.float32) * dmemory, 1)
    at_gates, real = of_gates(down, bh, n, T, H, C)
    itself = tl.load(at_gates, mask=real, other=0.0)[:, None]
    size = (B * T).to(tl.int64) * H * K
    at, mask = of_tokens(k, bh, n, first, T, H, K, C, BK)
    keys = tl.load(at, mask=mask, other=0.0)
    at, mask = of_tokens(q, bh, n, first, T, H, K, C, BK)
    queries = tl.load(at, mask=mask, other=0.0)
    at, mask = of_tokens(parts, bh, n, first, T, H, K, C, BK)
    dquery = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at, mask = of_tokens(dq, bh, n, first, T, H, K, C, BK)
    tl.store(at, (dquery + itself * b * keys).to(TYPE), mask=mask)
    at, mask = of_tokens(parts + size, bh, n, first, T, H, K, C, BK)
    dreader = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at, mask = of_tokens(parts + 2 * size, bh, n, first, T, H, K, C, BK)
    dwriter = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at, mask = of_tokens(parts + 3 * size, bh, n, first, T, H, K, C, BK)
    dwriter += tl.load(at, mask=mask, other=0.0)
    dgates = queries * dquery + keys * (dreader - b * dwriter)
    dwriter += itself * queries
    dgates = wide_sums(same, LOG_C + FROM, dgates, C, PRECISION)
    at_v, mask_v = of_tokens(errors, bh, n, 0, T, H, V, C, BV)
    error = tl.load(at_v, mask=mask_v, other=0.0)
    left = tl.exp(sums(ones, LOG_C + AFTER, gates, C, PRECISION))
    dended = dot(error, tl.trans(dmemory), PRECISION) * left
    dgates += wide_sums(same, LOG_C + BEFORE, b * keys * dended, C, PRECISION)
    at, mask = of_tokens(dlog_decay, bh, n, first, T, H, K, C, BK)
    tl.store(at, dgates + ended[None, :], mask=mask)

    dwriter += dended
    at, mask = of_tokens(dk, bh, n, first, T, H, K, C, BK)
    tl.store(at, (dreader + b * dwriter).to(TYPE), mask=mask)
    at_gates, real = of_gates(dstep_size + tl.program_id(0) * B * T * H, bh, n, T, H, C)
    tl.store(at_gates, tl.sum(dwriter * keys, 1), mask=real)
