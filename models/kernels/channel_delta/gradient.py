"""The gradient of a chunk by its queries, keys, step sizes and gates, all chunks at once."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.channel_delta.tiles import AFTER, BEFORE, FROM, LEAST, UP_TO, partners, parts, sums
from models.kernels.delta.tiles import place
from models.kernels.momentum.tiles import dot, of_gates, of_matrix, of_tokens


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
    zero, T, N, H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr,
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
    t = tl.arange(0, C)
    at, mask_v = of_tokens(do, bh, n, 0, T, H, V, C, BV)
    doutput = tl.load(at, mask=mask_v, other=0.0)
    at, mask_v = of_tokens(errors, bh, n, 0, T, H, V, C, BV)
    error = tl.load(at, mask=mask_v, other=0.0)
    at, mask_v = of_tokens(dv, bh, n, 0, T, H, V, C, BV)
    dright = tl.load(at, mask=mask_v, other=0.0)
    at_gates, real = of_gates(step_size, bh, n, T, H, C)
    b = tl.load(at_gates, mask=real, other=0.0)
    below = t[:, None] > t[None, :]
    reader = dot(doutput, tl.trans(error), PRECISION) * b[None, :]
    dattend = tl.where(below, reader, dot(error, tl.trans(doutput), PRECISION)).to(error.dtype)
    reader = dot(dright, tl.trans(error), PRECISION) * b[None, :]
    dsystem = (-tl.where(below, reader, dot(error, tl.trans(dright), PRECISION))).to(error.dtype)
    down = tl.sum(doutput.to(tl.float32) * error, 1)  # W_tt: what a token reads of its own write has not faded
    first = tl.program_id(1) * BK
    at_k, mask = of_tokens(log_decay, bh, n, first, T, H, K, C, BK)
    gates = tl.maximum(tl.load(at_k, mask=mask, other=0.0), LEAST)
    high, low = parts(gates, error.dtype)
    kept = tl.exp(tl.sum(gates, 0))
    at_keys, mask = of_tokens(k, bh, n, first, T, H, K, C, BK)
    at_queries, _ = of_tokens(q, bh, n, first, T, H, K, C, BK)
    dquery = tl.zeros([C, BK], tl.float32)
    dreader = tl.zeros([C, BK], tl.float32)
    dwriter = tl.zeros([C, BK], tl.float32)
    for halving in range(LOG_C):
        left = tl.exp(sums(ones, halving, high, low, C, PRECISION))
        keys = tl.load(at_keys + halving * zero, mask=mask, other=0.0)
        queries = tl.load(at_queries + halving * zero, mask=mask, other=0.0)
        reads = ((t >> halving) & 1 == 1)[:, None]
        key = keys * left
        mixed = tl.where(reads, queries * left, key).to(keys.dtype)
        of_halving = partners(halving, False, C)
        by_query = dot(tl.where(of_halving, dattend, 0.0).to(error.dtype), mixed, PRECISION) * left
        by_key = dot(tl.where(of_halving, dsystem, 0.0).to(keys.dtype), key.to(keys.dtype), PRECISION) * left
        dquery += tl.where(reads, by_query, 0.0)
        dreader += tl.where(reads, by_key, 0.0)
        dwriter += tl.where(reads, 0.0, by_query + by_key)

    keys = tl.load(at_keys, mask=mask, other=0.0)
    queries = tl.load(at_queries, mask=mask, other=0.0)
    at_s, inside = of_matrix(states, chunk, 0, K, V, BK, BV, first)
    memory = tl.load(at_s, mask=inside, other=0.0)
    at_s, inside = of_matrix(dstates, chunk, 0, K, V, BK, BV, first)
    dmemory = tl.load(at_s, mask=inside, other=0.0)
    left = tl.exp(sums(ones, LOG_C + UP_TO, high, low, C, PRECISION))
    dquery += dot(doutput, tl.trans(memory), PRECISION) * left
    dreader -= dot(dright, tl.trans(memory), PRECISION) * left
    left = tl.exp(sums(ones, LOG_C + AFTER, high, low, C, PRECISION))
    dended = dot(error, tl.trans(dmemory), PRECISION) * left
    # a gate is in what is read later, or at it, but not what was written later; and in what the chunk ends with
    summed, rest = parts(queries * dquery + keys * (dreader - b[:, None] * dwriter), keys.dtype)
    dgates = sums(ones, LOG_C + FROM, summed, rest, C, PRECISION)
    summed, rest = parts(b[:, None] * keys * dended, keys.dtype)
    dgates += sums(ones, LOG_C + BEFORE, summed, rest, C, PRECISION)
    dgates += (tl.sum(memory.to(tl.float32) * dmemory, 1) * kept)[None, :]
    at_k, mask = of_tokens(dlog_decay, bh, n, first, T, H, K, C, BK)
    tl.store(at_k, dgates, mask=mask)

    dwriter += dended + down[:, None] * queries
    at_gates, real = of_gates(
        dstep_size + tl.program_id(1) * (tl.num_programs(0) // (H * N)).to(tl.int64) * T * H, bh, n, T, H, C
    )
    tl.store(at_gates, tl.sum(dwriter * keys, 1), mask=real)
    dquery += (down * b)[:, None] * keys
    at_k, mask = of_tokens(dq, bh, n, first, T, H, K, C, BK)
    tl.store(at_k, dquery.to(keys.dtype), mask=mask)
    at_k, mask = of_tokens(dk, bh, n, first, T, H, K, C, BK)
    tl.store(at_k, (dreader + b[:, None] * dwriter).to(keys.dtype), mask=mask)
