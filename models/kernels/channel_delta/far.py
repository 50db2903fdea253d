"""Scores, and the gradient, of chunks some of whose channels fade too far for two factors: a product for each halving.

    far_scores            prepare.py's `scores`
    far_scores_gradient   by what tokens find in the keys of their chunk, [C, C]
    far_gradient          gradient.py's `gradient`, of these, queries and keys

Blocks of tokens in which all channels are near have one product, as a chunk that is near has. Their size is a power of
two, by prepare.py's `fade`. Halvings down to it have one each. Loops load what they want, from the caches: held from
before a loop it went to memory and back. Programs of chunks that are near end at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.channel_delta.tiles import (
    AFTER,
    FROM,
    LEAST,
    LOG_GROUP,
    UP_TO,
    WITHIN,
    begins,
    exp,
    log2_from,
    log_gates_gradient,
    log_size_at,
    log_size_of,
    meets,
    of_rows,
    of_starts,
    sums,
    together,
    wide_sums,
)
from models.kernels.delta.tiles import of_tokens, place, system_inverse
from models.kernels.momentum.tiles import dot, of_gates, of_matrix, of_square


@triton.jit
def far_scores(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    step_size,  # [B, T, H]
    gates,  # [B, T, H, K], in the dtype of ones
    ones,  # [LOG_C + ORDERS, C, C], by tiles.py's write_ones
    sizes,  # [B H N, FLAGS]
    starts,  # [B N, 1 + C], or None
    R,  # out, [B H N, C, C]: (I + A)^-1 without its ones, A_ti = b_i sum_j k_tj e^{c_tj - c_ij} k_ij for i < t
    attend,  # out, [B H N, C, C]: the same of q_t for k_t, and i <= t
    T, N, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, FLAGS: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    bh, n = place(tl.program_id(0), N, H)
    chunk = bh * N + n
    log_size = log_size_of(sizes, chunk, FLAGS)
    if log_size == LOG_C:
        return
    TYPE: tl.constexpr = k.dtype.element_ty
    t = tl.arange(0, C)
    at, mask = of_tokens(gates, bh, n, 0, T, H, K, C, BK)
    gate = tl.load(at, mask=mask, other=0.0)
    if starts is not None:
        gate = tl.where(gate > LEAST, gate, 0.0).to(gate.dtype)
    at_k, mask = of_tokens(k, bh, n, 0, T, H, K, C, BK)
    at_q, mask = of_tokens(q, bh, n, 0, T, H, K, C, BK)
    summed = sums(ones, LOG_C + WITHIN + log_size, gate, C, PRECISION)
    keys = tl.load(at_k, mask=mask, other=0.0)
    kept = exp(summed)
    writer = tl.trans((keys * exp(-summed)).to(TYPE))
    system = dot((keys * kept).to(TYPE), writer, PRECISION)
    found = dot((tl.load(at_q, mask=mask, other=0.0) * kept).to(TYPE), writer, PRECISION)
    halving = log_size
    while halving < LOG_C:
        kept = exp(sums(ones, halving, gate, C, PRECISION))
        keys = (tl.load(at_k, mask=mask, other=0.0) * kept).to(TYPE)
        queries = (tl.load(at_q, mask=mask, other=0.0) * kept).to(TYPE)
        pairs = meets(halving, False, C)
        system = tl.where(pairs, dot(keys, tl.trans(keys), PRECISION), system)
        found = tl.where(pairs, dot(queries, tl.trans(keys), PRECISION), found)
        halving += 1
    at, real = of_gates(step_size, bh, n, T, H, C)
    b = tl.load(at, mask=real, other=0.0)[None, :]
    found = tl.where(t[:, None] >= t[None, :], found * b, 0.0)
    system = tl.where(t[:, None] > t[None, :], system * b, 0.0)
    if starts is not None:
        _, since = of_starts(starts, bh, n, N, H, C)
        if since > 0:
            alike = t[None, :] >= begins(starts, bh, n, N, H, C)[:, None]
            found, system = tl.where(alike, found, 0.0), tl.where(alike, system, 0.0)
    tl.store(of_square(attend, chunk, C), found.to(TYPE))
    inverse = system_inverse(system, C, PRECISION)
    tl.store(of_square(R, chunk, C), tl.where(t[:, None] > t[None, :], inverse, 0.0).to(TYPE))


@triton.jit
def far_scores_gradient(
    step_size,  # [B, T, H]
    do,  # [B, T, H, V]
    errors,  # [B H N, V, C]
    dv,  # [B, T, H, V]
    sizes,  # [B H N, FLAGS]
    starts,  # [B N, 1 + C], or None
    dscores,  # out, [2, B H N, C, C]: by queries' scores, and by keys'
    down,  # out, [B, T, H]: W_tt; what a token reads of its own write has not faded
    T, N, H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, FLAGS: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W = dO U^T or X = -dV U^T: below the diagonal, which is 0, times b, and above it transposed, without b."""
    of_queries = tl.program_id(0) % 2 == 0
    bh, n = place(tl.program_id(0) // 2, N, H)
    chunk = bh * N + n
    if log_size_of(sizes, chunk, FLAGS) == LOG_C:
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
    later = t[:, None] > t[None, :]
    found = tl.where(t[:, None] == t[None, :], 0.0, sign * tl.where(later, by_readers, by_writers))
    if starts is not None:
        _, since = of_starts(starts, bh, n, N, H, C)
        if since > 0:
            begun = begins(starts, bh, n, N, H, C)
            alike = tl.where(later, t[None, :] >= begun[:, None], t[:, None] >= begun[None, :])
            found = tl.where(alike, found, 0.0)
    at = of_square(dscores, tl.program_id(0) % 2 * (tl.num_programs(0) // 2) + chunk, C)
    tl.store(at, found.to(dscores.dtype.element_ty))


@triton.jit
def add_met(
    dread,  # [C, BK]
    derase,  # [C, BK]
    dwriter,  # [C, BK]
    q,  # addresses [C, BK]
    k,  # addresses [C, BK]
    mask_k,
    by_queries,  # addresses [C, C]
    by_keys,  # addresses [C, C]
    gate,  # [C, BK]
    ones,
    halving, GROUPS: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of what reads, erases and writes, and what a halving adds to them. A token either reads in it, or
    it writes: so a product has a row for the one or for the other, of queries that met keys and keys that met queries.
    """
    kept = exp(sums(ones, halving, gate, C, PRECISION))
    reads = tl.where(tl.arange(0, C) >> halving & 1 == 1, 1.0, 0.0)[:, None]
    pairs = meets(halving, GROUPS, C)
    keys = tl.load(k, mask=mask_k, other=0.0) * kept
    queries = tl.load(q, mask=mask_k, other=0.0) * kept
    dscores = tl.load(by_queries, mask=pairs, other=0.0)
    met = dot(dscores, tl.where(reads > 0.0, queries, keys).to(dscores.dtype), PRECISION) * kept
    dread += met * reads
    dwriter += met * (1.0 - reads)
    dscores = tl.load(by_keys, mask=pairs, other=0.0)
    met = dot(dscores, keys.to(dscores.dtype), PRECISION) * kept
    return dread, derase + met * reads, dwriter + met * (1.0 - reads)


@triton.jit
def far_gradient(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    step_size,  # [B, T, H]
    gates,  # [B, T, H, K], in the dtype of ones
    ones,  # [LOG_C + ORDERS, C, C], by tiles.py's write_ones
    same,  # in the dtype of q and k
    scale,  # [B H N, 2, K]
    sizes,  # [B H N, FLAGS]
    starts,  # [B N, 1 + C], or None
    dscores,  # [2, B H N, C, C]
    down,  # [B, T, H]
    do,  # [B, T, H, V]
    dv,  # [B, T, H, V]
    errors,  # [B H N, V, C]
    states,  # [B H N, V, K]
    dstates,  # [B H N, V, K]
    log_rate,  # [H], or None: log decays were given
    dq,  # out, [B, T, H, K]
    dk,  # out, [B, T, H, K]
    dstep_size,  # out, [K / BK, B, T, H], to be summed
    dlog_decay,  # out, [B, T, H, K]; with a rate, by what log decays are made of
    dbias,  # out, [B N, H K], to be summed, or None
    drate,  # out, [B N K / BK, H], to be summed, or None: by log_rate
    T, N, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    FLAGS: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """By keys that write: sum_t W_ti q_t + X_ti k_t, and with dS by the memory the chunk ends with, e^{c_C - c} U dS^T.
    The product of all that with k is the gradient by b, and b times it that by k. Then by queries, sum_i W_ti b_i k_i
    + e^c dO S^T, and by keys that read, sum_i X_ti b_i k_i - e^c dV S^T. A gate is in whatever is read at it or later
    and was written before it.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    block = tl.program_id(0) % BLOCKS
    first = block * BK
    bh, n = place(tl.program_id(0) // BLOCKS, N, H)
    chunk = bh * N + n
    log_size = log_size_at(sizes, chunk, first, FLAGS, WIDTH)
    if log_size == LOG_C:
        return
    log_size = tl.where(log_size < LOG_GROUP, 0, log_size)  # where a token alone has no pairs
    num_chunks = tl.num_programs(0) // BLOCKS
    TYPE: tl.constexpr = k.dtype.element_ty
    t, channels = tl.arange(0, C), first + tl.arange(0, BK)
    at_gate, mask_k = of_tokens(gates, bh, n, first, T, H, K, C, BK)
    gate = tl.load(at_gate, mask=mask_k, other=0.0)
    until, since = C, 0
    if starts is not None:
        until, since = of_starts(starts, bh, n, N, H, C)
        gate = tl.where(gate > LEAST, gate, 0.0).to(gate.dtype)
    at_scale = scale + chunk.to(tl.int64) * (2 * K) + channels
    at_k, mask_k = of_tokens(k, bh, n, first, T, H, K, C, BK)
    at_q, mask_k = of_tokens(q, bh, n, first, T, H, K, C, BK)
    by_queries = of_square(dscores, chunk, C)
    by_keys = by_queries + num_chunks.to(tl.int64) * (C * C)

    at, inside = of_rows(states, chunk, first, V, K, BV, BK)
    memory = tl.load(at, mask=inside, other=0.0)
    at, inside = of_rows(dstates, chunk, first, V, K, BV, BK)
    dmemory = tl.load(at, mask=inside, other=0.0)
    summed = sums(ones, LOG_C + WITHIN + log_size, gate, C, PRECISION)
    kept = exp(summed)
    left = exp(-summed)
    pairs = together(log_size, C)
    later = t[:, None] > t[None, :]
    writer = (tl.load(at_k, mask=mask_k, other=0.0) * left).to(TYPE)
    dscores = tl.load(by_queries, mask=pairs, other=0.0)
    dread = dot(tl.where(later, dscores, 0.0).to(TYPE), writer, PRECISION) * kept
    reader = (tl.load(at_q, mask=mask_k, other=0.0) * kept).to(TYPE)
    dwriter = dot(tl.where(later, 0.0, dscores).to(TYPE), reader, PRECISION)
    dscores = tl.load(by_keys, mask=pairs, other=0.0)
    derase = dot(tl.where(later, dscores, 0.0).to(TYPE), writer, PRECISION) * kept
    reader = (tl.load(at_k, mask=mask_k, other=0.0) * kept).to(TYPE)
    dwriter = dot(tl.where(later, 0.0, dscores).to(TYPE), reader, PRECISION, dwriter) * left
    halving = log_size
    while halving < LOG_GROUP:
        dread, derase, dwriter = add_met(
            dread, derase, dwriter, at_q, at_k, mask_k, by_queries, by_keys, gate, ones, halving, False, C, PRECISION
        )
        halving += 1
    while halving < LOG_C:
        dread, derase, dwriter = add_met(
            dread, derase, dwriter, at_q, at_k, mask_k, by_queries, by_keys, gate, ones, halving, True, C, PRECISION
        )
        halving += 1

    half = tl.load(at_scale + K, mask=channels < K, other=0.0)[None, :]
    left = tl.exp2(log2_from(sums(ones, LOG_C + UP_TO, gate, C, PRECISION), half, TYPE))
    if until < C:
        left = tl.where(t[:, None] < until, left, 0.0)
    at, mask = of_tokens(do, bh, n, 0, T, H, V, C, BV)
    dread += dot(tl.load(at, mask=mask, other=0.0), memory, PRECISION) * left
    at, mask = of_tokens(dv, bh, n, 0, T, H, V, C, BV)
    derase -= dot(tl.load(at, mask=mask, other=0.0), memory, PRECISION) * left
    keys = tl.load(at_k, mask=mask_k, other=0.0)
    found = tl.load(at_q, mask=mask_k, other=0.0) * dread + keys * derase
    at, real = of_gates(step_size, bh, n, T, H, C)
    b = tl.load(at, mask=real, other=0.0)[:, None]
    at, real = of_gates(down, bh, n, T, H, C)
    itself = tl.load(at, mask=real, other=0.0)[:, None]
    at, mask_k = of_tokens(dq, bh, n, first, T, H, K, C, BK)
    tl.store(at, (dread + itself * b * keys).to(TYPE), mask=mask_k)

    at, mask = of_rows(errors, chunk, 0, V, C, BV, C)
    dended = dot(tl.trans(tl.load(at, mask=mask, other=0.0)), dmemory, PRECISION)
    carried = dot(tl.trans(memory), dmemory, PRECISION)
    dended *= tl.exp2(log2_from(sums(ones, LOG_C + AFTER, gate, C, PRECISION), half, TYPE))
    if since > 0:
        dended = tl.where(t[:, None] >= since, dended, 0.0)
    if TYPE.is_fp16():
        carried *= tl.load(at_scale, mask=channels < K, other=0.0)[None, :]
    i = tl.arange(0, BK)
    own = tl.where((i[:, None] == i[None, :]) & (until == C), carried, 0.0)
    keys = tl.load(at_k, mask=mask_k, other=0.0)
    # no gate of the chunk fades what its last token writes, which in a difference would take the digits of small gates
    written = tl.where(t[:, None] < tl.minimum(C, T - n * C) - 1, b * keys * dended, 0.0)
    total = tl.sum(written + own, 0) if BK == C else tl.sum(written, 0) + tl.sum(own, 0)  # one sum for two
    found -= (b * keys) * dwriter + written
    dwriter += dended + itself * tl.load(at_q, mask=mask_k, other=0.0)
    begin = block.to(tl.int64) * (num_chunks // (H * N)) * T * H
    at, real = of_gates(dstep_size + begin, bh, n, T, H, C)
    tl.store(at, tl.sum(dwriter * keys, 1), mask=real)
    at, mask_k = of_tokens(dk, bh, n, first, T, H, K, C, BK)
    tl.store(at, (derase + b * dwriter).to(TYPE), mask=mask_k)

    dgates = wide_sums(same, LOG_C + FROM, found, C, PRECISION) + total[None, :]
    if log_rate is not None:
        gate = tl.load(at_gate, mask=mask_k, other=0.0).to(tl.float32)
        dgates = tl.where(gate > LEAST, dgates, 0.0)  # none of a gate that is closed
        row = bh // H * N + n
        rates = tl.sum(dgates * gate)
        tl.store(drate + (row * BLOCKS + block).to(tl.int64) * H + bh % H, rates)
        dgates *= log_gates_gradient(gate, tl.exp(tl.load(log_rate + bh % H)))
        at = dbias + row.to(tl.int64) * (H * K) + bh % H * K + channels
        tl.store(at, tl.sum(dgates, 0), mask=channels < K)
    at, mask_k = of_tokens(dlog_decay, bh, n, first, T, H, K, C, BK)
    tl.store(at, dgates.to(dlog_decay.dtype.element_ty), mask=mask_k)
