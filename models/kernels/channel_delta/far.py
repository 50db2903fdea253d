"""Scores, and the gradient, of chunks some of whose channels fade too far for two factors: a product for each halving.

    far_scores            prepare.py's `scores`
    far_scores_gradient   by what tokens find in the keys of their chunk, [C, C]
    far_readers           from there to queries and to keys that read, with what they read of the chunk's first memory
    far_gradient          to keys that write, in their chunk and into its last memory, and the sum of all

The gradient is three kernels, whose loops load what they want: with all in one, or held from before a loop, registers
went to memory and back. Programs of chunks that are near end at once.
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
    is_near,
    log_gates_gradient,
    meet,
    sums,
    unscaled,
    wide_sums,
)
from models.kernels.delta.tiles import place, system_inverse
from models.kernels.momentum.tiles import dot, of_gates, of_matrix, of_square, of_tokens


@triton.jit
def far_scores(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    step_size,  # [B, T, H]
    gates,  # [B, T, H, K], in the dtype of ones
    ones,  # [LOG_C + ORDERS, C, C], by tiles.py's write_ones
    near,  # [B H N, FLAGS]
    R,  # out, [B H N, C, C]: (I + A)^-1 without its ones, A_ti = b_i sum_j k_tj e^{c_tj - c_ij} k_ij for i < t
    attend,  # out, [B H N, C, C]: the same of q_t for k_t, and i <= t
    T, N, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, FLAGS: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One of the two in a program: with both, registers went to memory and back."""
    of_queries = tl.program_id(0) % 2 == 1
    bh, n = place(tl.program_id(0) // 2, N, H)
    chunk = bh * N + n
    if is_near(near, chunk, FLAGS):
        return
    t = tl.arange(0, C)
    TYPE: tl.constexpr = k.dtype.element_ty
    x = q if of_queries else k
    found = tl.zeros([C, C], tl.float32)
    own = tl.zeros([C], tl.float32)
    for first in range(0, K, BK):
        at_k, mask = of_tokens(k, bh, n, first, T, H, K, C, BK)
        keys = tl.load(at_k, mask=mask, other=0.0)
        at_k, mask = of_tokens(x, bh, n, first, T, H, K, C, BK)
        readers = tl.load(at_k, mask=mask, other=0.0)
        own += tl.sum(readers.to(tl.float32) * keys, 1)
        at_k, mask = of_tokens(gates, bh, n, first, T, H, K, C, BK)
        gate = tl.load(at_k, mask=mask, other=0.0)
        halving = LOG_C - 1
        while halving >= 0:
            reading, writing, pairs, halving = meet(ones, halving, gate, True, C, TYPE, PRECISION)
            product = dot((readers * reading).to(TYPE), tl.trans((keys * writing).to(TYPE)), PRECISION)
            found += tl.where(pairs, product, 0.0)
    at, real = of_gates(step_size, bh, n, T, H, C)
    b = tl.load(at, mask=real, other=0.0)
    found *= b[None, :]
    if of_queries:
        found = tl.where(t[:, None] == t[None, :], (own * b)[:, None], found)
        tl.store(of_square(attend, chunk, C), found.to(TYPE))
    else:
        inverse = system_inverse(found, C, PRECISION)
        tl.store(of_square(R, chunk, C), tl.where(t[:, None] > t[None, :], inverse, 0.0).to(TYPE))


@triton.jit
def far_scores_gradient(
    step_size,  # [B, T, H]
    do,  # [B, T, H, V]
    errors,  # [B H N, V, C]
    dv,  # [B, T, H, V]
    near,  # [B H N, FLAGS]
    dscores,  # out, [2, B H N, C, C]: by queries' scores, and by keys'
    down,  # out, [B, T, H]: W_tt; what a token reads of its own write has not faded
    T, N, H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, FLAGS: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W = dO U^T or X = -dV U^T: times b in the rows of readers, and transposed, without b, in those of writers."""
    of_queries = tl.program_id(0) % 2 == 0
    bh, n = place(tl.program_id(0) // 2, N, H)
    chunk = bh * N + n
    if is_near(near, chunk, FLAGS):
        return
    t = tl.arange(0, C)
    at_gates, real = of_gates(step_size, bh, n, T, H, C)
    b = tl.load(at_gates, mask=real, other=0.0)
    at, mask = of_matrix(errors, chunk, 0, V, C, BV, C)
    error = tl.load(at, mask=mask, other=0.0)
    if of_queries:
        dy, sign = do, 1.0
    else:
        dy, sign = dv, -1.0
    at, mask = of_tokens(dy, bh, n, 0, T, H, V, C, BV)
    given = tl.load(at, mask=mask, other=0.0)
    if of_queries:
        at_gates, real = of_gates(down, bh, n, T, H, C)
        tl.store(at_gates, tl.sum(given.to(tl.float32) * tl.trans(error), 1), mask=real)
    by_readers = dot(given, error, PRECISION) * b[None, :]
    by_writers = dot(tl.trans(error), tl.trans(given), PRECISION)
    found = sign * tl.where(t[:, None] > t[None, :], by_readers, by_writers)
    at = of_square(dscores, tl.program_id(0) % 2 * (tl.num_programs(0) // 2) + chunk, C)
    tl.store(at, found.to(dscores.dtype.element_ty))


@triton.jit
def far_readers(
    k,  # [B, T, H, K]
    gates,  # [B, T, H, K], in the dtype of ones
    ones,  # [LOG_C + ORDERS, C, C], by tiles.py's write_ones
    dscores,  # [2, B H N, C, C]
    do,  # [B, T, H, V]
    dv,  # [B, T, H, V]
    states,  # [B H N, V, K]
    near,  # [B H N, FLAGS]
    scale,  # [B H N, 2, K]
    dquery,  # out, [B, T, H, K]: sum_i W_ti b_i k_i + e^c dO S^T, whose sums fade by channel
    dreader,  # out, [B, T, H, K]: sum_i X_ti b_i k_i - e^c dV S^T
    T, N, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    FLAGS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    block = tl.program_id(0) % BLOCKS
    first = block * BK
    bh, n = place(tl.program_id(0) // BLOCKS, N, H)
    chunk = bh * N + n
    if is_near(near, chunk, FLAGS):
        return
    num_chunks = tl.num_programs(0) // BLOCKS
    TYPE: tl.constexpr = k.dtype.element_ty
    at, mask = of_tokens(gates, bh, n, first, T, H, K, C, BK)
    gate = tl.load(at, mask=mask, other=0.0)
    at_k, mask = of_tokens(k, bh, n, first, T, H, K, C, BK)
    at_scores = of_square(dscores, chunk, C)
    further = num_chunks.to(tl.int64) * (C * C)
    by_queries, by_keys = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    halving = LOG_C - 1
    while halving >= 0:
        reading, writing, pairs, halving = meet(ones, halving, gate, True, C, TYPE, PRECISION)
        writers = (tl.load(at_k, mask=mask, other=0.0) * writing).to(TYPE)
        dscore = tl.where(pairs, tl.load(at_scores), 0.0).to(TYPE)
        by_queries += dot(dscore, writers, PRECISION) * reading
        dscore = tl.where(pairs, tl.load(at_scores + further), 0.0).to(TYPE)
        by_keys += dot(dscore, writers, PRECISION) * reading
    at, inside = of_matrix(states, chunk, first, V, K, BV, BK)
    memory = tl.load(at, mask=inside, other=0.0)
    left = tl.exp(sums(ones, LOG_C + UP_TO, gate, C, PRECISION)) * unscaled(scale, chunk, first, K, BK, TYPE)
    at, mask = of_tokens(do, bh, n, 0, T, H, V, C, BV)
    by_queries += dot(tl.load(at, mask=mask, other=0.0), memory, PRECISION) * left
    at, mask = of_tokens(dquery, bh, n, first, T, H, K, C, BK)
    tl.store(at, by_queries.to(TYPE), mask=mask)
    at, mask = of_tokens(dv, bh, n, 0, T, H, V, C, BV)
    by_keys -= dot(tl.load(at, mask=mask, other=0.0), memory, PRECISION) * left
    at, mask = of_tokens(dreader, bh, n, first, T, H, K, C, BK)
    tl.store(at, by_keys.to(TYPE), mask=mask)


@triton.jit
def far_gradient(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    step_size,  # [B, T, H]
    gates,  # [B, T, H, K], in the dtype of ones
    ones,  # [LOG_C + ORDERS, C, C], by tiles.py's write_ones
    same,  # in the dtype of q and k
    dscores,  # [2, B H N, C, C]
    down,  # [B, T, H]
    errors,  # [B H N, V, C]
    states,  # [B H N, V, K]
    dstates,  # [B H N, V, K]
    dreader,  # [B, T, H, K]
    log_rate,  # [H], or None: log decays were given
    near,  # [B H N, FLAGS]
    scale,  # [B H N, 2, K]
    dq,  # in: readers' dquery; out, [B, T, H, K]
    dk,  # out, [B, T, H, K]
    dstep_size,  # out, [K / BK, B, T, H], to be summed
    dlog_decay,  # out, [B, T, H, K]; with a rate, by what log decays are made of
    dbias,  # out, [B N, H K], to be summed, or None
    drate,  # out, [B N K / BK, H], to be summed, or None: by log_rate
    T, N, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    FLAGS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """By keys that write: sum_t W_ti q_t + X_ti k_t, and with dS by the memory the chunk ends with, e^{c_C - c} U dS^T.
    The product of all that with k is the gradient by b, and b times it that by k. A gate is in whatever is read at it
    or later and was written before it.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    block = tl.program_id(0) % BLOCKS
    first = block * BK
    bh, n = place(tl.program_id(0) // BLOCKS, N, H)
    chunk = bh * N + n
    if is_near(near, chunk, FLAGS):
        return
    num_chunks = tl.num_programs(0) // BLOCKS
    TYPE: tl.constexpr = k.dtype.element_ty
    at, mask_k = of_tokens(gates, bh, n, first, T, H, K, C, BK)
    gate = tl.load(at, mask=mask_k, other=0.0)
    ended = tl.exp(tl.sum(gate.to(tl.float32), 0))
    at_k, mask_k = of_tokens(k, bh, n, first, T, H, K, C, BK)
    at_q, mask_k = of_tokens(q, bh, n, first, T, H, K, C, BK)
    at_scores = of_square(dscores, chunk, C)
    further = num_chunks.to(tl.int64) * (C * C)
    dwriter = tl.zeros([C, BK], tl.float32)
    halving = LOG_C - 1
    while halving >= 0:
        writing, reading, pairs, halving = meet(ones, halving, gate, False, C, TYPE, PRECISION)
        reader = (tl.load(at_q, mask=mask_k, other=0.0) * reading).to(TYPE)
        found = dot(tl.where(pairs, tl.load(at_scores), 0.0).to(TYPE), reader, PRECISION)
        reader = (tl.load(at_k, mask=mask_k, other=0.0) * reading).to(TYPE)
        found = dot(tl.where(pairs, tl.load(at_scores + further), 0.0).to(TYPE), reader, PRECISION, found)
        dwriter += found * writing

    at, real = of_gates(step_size, bh, n, T, H, C)
    b = tl.load(at, mask=real, other=0.0)[:, None]
    at, real = of_gates(down, bh, n, T, H, C)
    itself = tl.load(at, mask=real, other=0.0)[:, None]
    keys = tl.load(at_k, mask=mask_k, other=0.0)
    queries = tl.load(at_q, mask=mask_k, other=0.0)
    at, mask = of_tokens(dq, bh, n, first, T, H, K, C, BK)
    dquery = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (dquery + itself * b * keys).to(TYPE), mask=mask)
    at_readers, mask = of_tokens(dreader, bh, n, first, T, H, K, C, BK)
    here = queries * dquery + keys * (tl.load(at_readers, mask=mask, other=0.0) - b * dwriter)
    dgates = wide_sums(same, LOG_C + FROM, here, C, PRECISION)
    dwriter += itself * queries

    at, inside = of_matrix(dstates, chunk, first, V, K, BV, BK)
    dmemory = tl.load(at, mask=inside, other=0.0)
    at, mask = of_matrix(errors, chunk, 0, V, C, BV, C)
    dended = dot(tl.trans(tl.load(at, mask=mask, other=0.0)), dmemory, PRECISION)
    at, inside = of_matrix(states, chunk, first, V, K, BV, BK)
    own = unscaled(scale, chunk, first, K, BK, TYPE)
    dended_by = tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float32) * dmemory, 0)[None, :]
    dgates += ended[None, :] * own * (dended_by * own)
    dended *= tl.exp(sums(ones, LOG_C + AFTER, gate, C, PRECISION)) * own
    dwriter += dended
    keys = tl.load(at_k, mask=mask_k, other=0.0)
    dgates += wide_sums(same, LOG_C + BEFORE, b * keys * dended, C, PRECISION)
    if log_rate is not None:
        at, mask = of_tokens(gates, bh, n, first, T, H, K, C, BK)
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        row, channels = bh // H * N + n, first + tl.arange(0, BK)
        dgates = tl.where(gate > LEAST, dgates, 0.0)  # none of a gate that is closed
        rates = tl.sum(tl.sum(dgates * gate, 1), 0)
        tl.store(drate + (row * BLOCKS + block).to(tl.int64) * H + bh % H, rates)
        dgates *= log_gates_gradient(gate, tl.exp(tl.load(log_rate + bh % H)))
        at = dbias + row.to(tl.int64) * (H * K) + bh % H * K + channels
        tl.store(at, tl.sum(dgates, 0), mask=channels < K)
    at, mask = of_tokens(dlog_decay, bh, n, first, T, H, K, C, BK)
    tl.store(at, dgates.to(dlog_decay.dtype.element_ty), mask=mask)
    at, mask = of_tokens(dk, bh, n, first, T, H, K, C, BK)
    tl.store(at, (tl.load(at_readers, mask=mask, other=0.0) + b * dwriter).to(TYPE), mask=mask)
    begin = block.to(tl.int64) * (num_chunks // (H * N)) * T * H
    at, real = of_gates(dstep_size + begin, bh, n, T, H, C)
    tl.store(at, tl.sum(dwriter * keys, 1), mask=real)
