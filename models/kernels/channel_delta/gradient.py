"""The gradient of a chunk by its queries, keys, step sizes and gates, all chunks at once."""

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
    parts,
    sums,
)
from models.kernels.delta.tiles import place
from models.kernels.momentum.tiles import dot, of_gates, of_matrix, of_tokens


@triton.jit
def scores_gradient(
    dscores,  # [C, C]: of readers in the rows of readers, transposed in those of writers
    readers,  # [C, BK]
    writers,  # [C, BK]
    ones, high, low, nearest, dreaders, dwriters, C: tl.constexpr, LOG_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dreaders and dwriters, and what is to be added to them: the gradients by both of prepare.py's products between
    them, for near tokens and by halvings."""
    TYPE: tl.constexpr = writers.dtype
    nothing = tl.zeros([C, C], TYPE)
    summed = sums(ones, nearest, high, low, C, PRECISION)
    reading, writing = near_factors(summed, nearest, TYPE, C)
    chosen = tl.where(neighbours(nearest, True, C), dscores, nothing)
    dreaders += dot(chosen, (writers * writing).to(TYPE), PRECISION) * reading
    chosen = tl.where(neighbours(nearest, False, C), dscores, nothing)
    dwriters += dot(chosen, (readers * reading).to(TYPE), PRECISION) * writing
    for halving in range(nearest + 1, LOG_C):
        left = tl.exp(sums(ones, halving, high, low, C, PRECISION))
        reads = ((tl.arange(0, C) >> halving) & 1 == 1)[:, None]
        mixed = (tl.where(reads, readers, writers) * left).to(TYPE)
        chosen = tl.where(partners(halving, False, C), dscores, nothing)
        found = dot(chosen, mixed, PRECISION) * left
        dreaders += tl.where(reads, found, 0.0)
        dwriters += tl.where(reads, 0.0, found)
    return dreaders, dwriters


@triton.jit
def gradient(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    step_size,  # [B, T, H]
    log_decay,  # [B, T, H, K]
    ones,  # [LOG_C + ORDERS, C, C], by tiles.py's write_ones
    do,  # [B, T, H, V]
    errors,  # [B, T, H, V]
    dv,  # [B, T, H, V]
    states,  # [B H N, K, V]
    dstates,  # [B H N, K, V]
    dq,  # out, [B, T, H, K]
    dk,  # out, [B, T, H, K]
    dstep_size,  # out, [K / BK, B, T, H], to be summed
    dlog_decay,  # out, [B, T, H, K]
    T, N, H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With W = dO U^T, X = -dV U^T and dS by the memory the chunk ends with, in sums over i < t that fade by channel,
        dq_t = sum_i W_ti b_i k_i + e^c dO S^T ,    dk_t as reader: sum_i X_ti b_i k_i - e^c dV S^T ,
        dk_i as writer: b_i times  sum_t (W_ti q_t + X_ti k_t) + e^{c_C - c} U dS^T ,
    whose product with k_i is the gradient by b_i. Of a halving a token is a reader or a writer, so one tile has W in
    its rows of readers and W^T in those of writers, and another X and X^T. A gate is in whatever is read at it or later
    and was written before it.
    """
    bh, n = place(tl.program_id(0), N, H)
    chunk = bh * N + n
    first = tl.program_id(1) * BK
    t = tl.arange(0, C)
    below = t[:, None] > t[None, :]
    at_gates, real = of_gates(step_size, bh, n, T, H, C)
    b = tl.load(at_gates, mask=real, other=0.0)
    at_k, mask = of_tokens(log_decay, bh, n, first, T, H, K, C, BK)
    gates = tl.maximum(tl.load(at_k, mask=mask, other=0.0), LEAST)
    high, low = parts(gates, k.dtype.element_ty)
    nearest = near(gates, LOG_C, k.dtype.element_ty)
    ended = tl.exp(tl.sum(gates, 0))
    at_k, mask = of_tokens(k, bh, n, first, T, H, K, C, BK)
    keys = tl.load(at_k, mask=mask, other=0.0)
    at_k, mask = of_tokens(q, bh, n, first, T, H, K, C, BK)
    queries = tl.load(at_k, mask=mask, other=0.0)
    at_v, mask_v = of_tokens(errors, bh, n, 0, T, H, V, C, BV)
    error = tl.load(at_v, mask=mask_v, other=0.0)
    at_v, mask_v = of_tokens(do, bh, n, 0, T, H, V, C, BV)
    doutput = tl.load(at_v, mask=mask_v, other=0.0)
    down = tl.sum(doutput.to(tl.float32) * error, 1)  # W_tt: what a token reads of its own write has not faded

    by_readers = dot(doutput, tl.trans(error), PRECISION) * b[None, :]
    dscores = tl.where(below, by_readers, dot(error, tl.trans(doutput), PRECISION)).to(keys.dtype)
    dquery = tl.zeros([C, BK], tl.float32)
    dwriter = tl.zeros([C, BK], tl.float32)
    dquery, dwriter = scores_gradient(
        dscores, queries, keys, ones, high, low, nearest, dquery, dwriter, C, LOG_C, PRECISION
    )
    at_s, inside = of_matrix(states, chunk, 0, K, V, BK, BV, first)
    memory = tl.load(at_s, mask=inside, other=0.0)
    left = tl.exp(sums(ones, LOG_C + UP_TO, high, low, C, PRECISION))
    dquery += dot(doutput, tl.trans(memory), PRECISION) * left
    read = queries * dquery
    dquery += (down * b)[:, None] * keys
    at_k, mask = of_tokens(dq, bh, n, first, T, H, K, C, BK)
    tl.store(at_k, dquery.to(keys.dtype), mask=mask)

    at_v, mask_v = of_tokens(dv, bh, n, 0, T, H, V, C, BV)
    dright = tl.load(at_v, mask=mask_v, other=0.0)
    by_readers = dot(dright, tl.trans(error), PRECISION) * b[None, :]
    dscores = (-tl.where(below, by_readers, dot(error, tl.trans(dright), PRECISION))).to(keys.dtype)
    dreader = tl.zeros([C, BK], tl.float32)
    dreader, dwriter = scores_gradient(
        dscores, keys, keys, ones, high, low, nearest, dreader, dwriter, C, LOG_C, PRECISION
    )
    left = tl.exp(sums(ones, LOG_C + UP_TO, high, low, C, PRECISION))
    dreader -= dot(dright, tl.trans(memory), PRECISION) * left
    # a gate is in what is read later, or at it, but not what was written later; and in what the chunk ends with
    summed, rest = parts(read + keys * (dreader - b[:, None] * dwriter), keys.dtype)
    dgates = sums(ones, LOG_C + FROM, summed, rest, C, PRECISION)
    at_s, inside = of_matrix(dstates, chunk, 0, K, V, BK, BV, first)
    dmemory = tl.load(at_s, mask=inside, other=0.0)
    dgates += (tl.sum(memory.to(tl.float32) * dmemory, 1) * ended)[None, :]
    left = tl.exp(sums(ones, LOG_C + AFTER, high, low, C, PRECISION))
    dended = dot(error, tl.trans(dmemory), PRECISION) * left
    summed, rest = parts(b[:, None] * keys * dended, keys.dtype)
    dgates += sums(ones, LOG_C + BEFORE, summed, rest, C, PRECISION)
    at_k, mask = of_tokens(dlog_decay, bh, n, first, T, H, K, C, BK)
    tl.store(at_k, dgates, mask=mask)

    dwriter += dended + down[:, None] * queries
    at_k, mask = of_tokens(dk, bh, n, first, T, H, K, C, BK)
    tl.store(at_k, (dreader + b[:, None] * dwriter).to(keys.dtype), mask=mask)
    begin = tl.program_id(1) * (tl.num_programs(0) // (H * N)).to(tl.int64) * T * H
    at_gates, real = of_gates(dstep_size + begin, bh, n, T, H, C)
    tl.store(at_gates, tl.sum(dwriter * keys, 1), mask=real)
