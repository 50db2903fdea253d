"""The gradient of a chunk by its queries, keys, step sizes and gates, all chunks at once, where tokens are near.

There what tokens find in each other are products of what the scans multiply with, whatever the channel: far.py has the
other chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.channel_delta.tiles import (
    FROM,
    LEAST,
    UP_TO,
    begins,
    log2_from,
    log_gates_gradient,
    log_size_at,
    of_rows,
    of_starts,
    sums,
    wide_sums,
)
from models.kernels.delta.tiles import of_tokens, place
from models.kernels.momentum.tiles import dot, of_gates


@triton.jit
def gradient(
    reads,  # [B, T, H, K]
    erases,  # [B, T, H, K]
    writes,  # [B, T, H, K]
    step_size,  # [B, T, H]
    gates,  # [B, T, H, K], in the dtype of ones
    ones,  # [LOG_C + ORDERS, C, C], by tiles.py's write_ones
    same,  # in the dtype of reads
    scale,  # [B H N, 2, K]
    sizes,  # [B H N, FLAGS]
    starts,  # [B N, 1 + C], or None
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
    """By what scans multiply with, and from there by queries, keys and step sizes. A gate is in whatever is read at it
    or later and was written before it: products of each of those three with its gradient, summed from there on."""
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    block = tl.program_id(0) % BLOCKS
    first = block * BK
    bh, n = place(tl.program_id(0) // BLOCKS, N, H)
    chunk = bh * N + n
    if log_size_at(sizes, chunk, first, FLAGS, WIDTH) < LOG_C:
        return
    TYPE: tl.constexpr = reads.dtype.element_ty
    t = tl.arange(0, C)
    at, mask = of_tokens(do, bh, n, 0, T, H, V, C, BV)
    doutput = tl.load(at, mask=mask, other=0.0)
    at, mask = of_rows(errors, chunk, 0, V, C, BV, C)
    error = tl.load(at, mask=mask, other=0.0)
    at, mask = of_tokens(dv, bh, n, 0, T, H, V, C, BV)
    dvalue = tl.load(at, mask=mask, other=0.0)
    by_queries = tl.where(t[:, None] >= t[None, :], dot(doutput, error, PRECISION), 0.0).to(TYPE)
    by_keys = tl.where(t[:, None] > t[None, :], -dot(dvalue, error, PRECISION), 0.0).to(TYPE)
    until, since = C, 0
    if starts is not None:
        until, since = of_starts(starts, bh, n, N, H, C)
        if since > 0:
            alike = t[None, :] >= begins(starts, bh, n, N, H, C)[:, None]
            by_queries = tl.where(alike, by_queries, 0.0).to(TYPE)
            by_keys = tl.where(alike, by_keys, 0.0).to(TYPE)

    at_k, mask_k = of_tokens(gates, bh, n, first, T, H, K, C, BK)
    gate = tl.load(at_k, mask=mask_k, other=0.0)
    at, inside = of_rows(dstates, chunk, first, V, K, BV, BK)
    dmemory = tl.load(at, mask=inside, other=0.0)
    at, inside = of_rows(states, chunk, first, V, K, BV, BK)
    memory = tl.load(at, mask=inside, other=0.0)
    at_k, mask_k = of_tokens(writes, bh, n, first, T, H, K, C, BK)
    write = tl.load(at_k, mask=mask_k, other=0.0)
    channels = first + tl.arange(0, BK)
    at = scale + chunk.to(tl.int64) * (2 * K) + K + channels
    half = tl.load(at, mask=channels < K, other=0.0)[None, :]
    opened = gate
    if until < C:
        opened = tl.where(gate > LEAST, gate, 0.0).to(gate.dtype)

    dwrite = dot(tl.trans(error), dmemory, PRECISION)
    if since > 0:
        dwrite = tl.where(t[:, None] >= since, dwrite, 0.0)
    carried = dot(tl.trans(memory), dmemory, PRECISION)
    i = tl.arange(0, BK)
    own = tl.where((i[:, None] == i[None, :]) & (until == C), carried, 0.0)
    written = write * dwrite
    total = tl.sum(written + own, 0) if BK == C else tl.sum(written, 0) + tl.sum(own, 0)  # one sum for two
    at_k, mask_k = of_tokens(reads, bh, n, first, T, H, K, C, BK)
    read = tl.load(at_k, mask=mask_k, other=0.0)
    at_k, mask_k = of_tokens(erases, bh, n, first, T, H, K, C, BK)
    erase = tl.load(at_k, mask=mask_k, other=0.0)
    dwrite = dot(tl.trans(by_queries), read, PRECISION, dwrite)
    dwrite = dot(tl.trans(by_keys), erase, PRECISION, dwrite)
    found = -write * dwrite
    faded = log2_from(sums(ones, LOG_C + UP_TO, opened, C, PRECISION), half, TYPE)
    left = tl.exp2(-faded)
    dwrite *= left
    begin = block.to(tl.int64) * (tl.num_programs(0) // (BLOCKS * H * N)) * T * H
    at, real = of_gates(dstep_size + begin, bh, n, T, H, C)
    tl.store(at, tl.sum(dwrite * (erase * left), 1), mask=real)
    at, real = of_gates(step_size, bh, n, T, H, C)
    dkey = tl.load(at, mask=real, other=0.0)[:, None] * dwrite

    kept = tl.exp2(faded)
    dread = dot(doutput, memory, PRECISION)
    if until < C:
        dread = tl.where(t[:, None] < until, dread, 0.0)
    dread = dot(by_queries, write, PRECISION, dread)
    found += read * dread
    at, mask_k = of_tokens(dq, bh, n, first, T, H, K, C, BK)
    tl.store(at, (dread * kept).to(TYPE), mask=mask_k)
    derase = -dot(dvalue, memory, PRECISION)
    if until < C:
        derase = tl.where(t[:, None] < until, derase, 0.0)
    derase = dot(by_keys, write, PRECISION, derase)
    found += erase * derase
    dkey += derase * kept
    at, mask_k = of_tokens(dk, bh, n, first, T, H, K, C, BK)
    tl.store(at, dkey.to(TYPE), mask=mask_k)

    dgates = wide_sums(same, LOG_C + FROM, found, C, PRECISION) + total[None, :]
    if log_rate is not None:
        if until < C:
            dgates = tl.where(gate > LEAST, dgates, 0.0)
        gate = gate.to(tl.float32)
        row = bh // H * N + n
        rates = tl.sum(dgates * gate)
        tl.store(drate + (row * BLOCKS + block).to(tl.int64) * H + bh % H, rates)
        dgates *= log_gates_gradient(gate, tl.exp(tl.load(log_rate + bh % H)))
        at = dbias + row.to(tl.int64) * (H * K) + bh % H * K + channels
        tl.store(at, tl.sum(dgates, 0), mask=channels < K)
    at, mask_k = of_tokens(dlog_decay, bh, n, first, T, H, K, C, BK)
    tl.store(at, dgates.to(dlog_decay.dtype.element_ty), mask=mask_k)
