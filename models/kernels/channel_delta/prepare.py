"""What the scans multiply with, of gates, queries, keys and step sizes alone, and the system of every chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.channel_delta.tiles import (
    AFTER,
    CLOSED,
    LEAST,
    UP_TO,
    WITHIN,
    begins,
    bound,
    log2_from,
    log_gates,
    log_size_of,
    of_starts,
    reach,
    reach_of_blocks,
    sums,
)
from models.kernels.delta.tiles import place, system_inverse
from models.kernels.momentum.tiles import dot, of_gates, of_square, of_tokens


@triton.jit
def write_starts(at, begun, C: tl.constexpr):
    """What tiles.py reads of the tokens [C] that documents begin with."""
    t = tl.arange(0, C)
    before = begun[None, :] & (t[None, :] <= t[:, None])
    tl.store(at, tl.min(tl.where(begun, t, C), 0))
    tl.store(at + 1 + t, tl.max(tl.where(before, t[None, :], 0), 1))


@triton.jit
def fade(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    step_size,  # [B, T, H]
    log_decay,  # [B, T, H, K], or None: `gates` is made; with a bias and a rate what log decays are made of
    bias,  # [H K], or None
    log_rate,  # [H], or None
    segments,  # [B, T], or None: at a document's start nothing is left
    ones,  # [LOG_C + ORDERS, C, C], by tiles.py's write_ones
    gates,  # [B, T, H, K], in the dtype of ones, out where log_decay is given: log decays, rounded and bounded
    reads,  # out, [B, T, H, K]: e^{c - m} q
    erases,  # out, [B, T, H, K]: e^{c - m} k
    writes,  # out, [B, T, H, K]: b e^{c_C - c - m} k
    scale,  # out, [B H N, 2, K]: e^m, in fp16 e^{c_C}, and m
    sizes,  # out, [B H N, K / BK]: log2 of the number of tokens of the largest blocks in which channels are near
    starts,  # out, [B N, 1 + C]: where in the chunk its first document after the first token's begins, C for
    # none, and where the document of each token does, 0 for one from before; or None, as segments
    T, N, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of gates c here have none of a document's start, for which others have masks. m is c_C / 2, but at least
    -bound: then all factors are at most e^bound."""
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    first = tl.program_id(0) % BLOCKS * BK
    bh, n = place(tl.program_id(0) // BLOCKS, N, H)
    chunk = bh * N + n
    TYPE: tl.constexpr = k.dtype.element_ty
    t = tl.arange(0, C)
    at, real = of_gates(step_size, bh, n, T, H, C)
    b = tl.load(at, mask=real, other=0.0)
    at_gates, mask = of_tokens(gates, bh, n, first, T, H, K, C, BK)
    if segments is not None:
        token = n * C + t
        at = segments + (bh // H).to(tl.int64) * T + token
        inner = (token > 0) & (token < T)
        begun = tl.load(at, mask=inner, other=0) != tl.load(at - 1, mask=inner, other=0)
        if (bh % H == 0) & (first == 0):
            write_starts(starts + (bh // H * N + n) * (1 + C), begun, C)
    if log_decay is not None:
        at_k, mask = of_tokens(log_decay, bh, n, first, T, H, K, C, BK)
        log_gate = tl.load(at_k, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            log_gate = log_gates(log_gate, bias, log_rate, bh % H, first, K, BK)
        log_gate = tl.maximum(log_gate, CLOSED)
        if segments is not None:
            log_gate = tl.where(begun[:, None], LEAST, log_gate)
        gate = tl.where(mask, log_gate, 0.0).to(gates.dtype.element_ty)
        tl.store(at_gates, gate, mask=mask)
    else:
        gate = tl.load(at_gates, mask=mask, other=0.0)
    channels = first + tl.arange(0, BK)
    at = scale + chunk.to(tl.int64) * (2 * K) + channels
    if TYPE.is_fp16():
        tl.store(at, tl.exp(tl.sum(gate.to(tl.float32), 0)), mask=channels < K)
    if segments is not None:
        gate = tl.where(begun[:, None], 0.0, gate).to(gate.dtype)
    total = tl.sum(gate.to(tl.float32), 0)
    BOUND: tl.constexpr = bound(TYPE)
    REACH: tl.constexpr = reach(TYPE)
    BLOCK_REACH: tl.constexpr = reach_of_blocks(TYPE)
    half = tl.maximum(0.5 * total, -BOUND)
    if not TYPE.is_fp16():
        tl.store(at, tl.exp(half), mask=channels < K)
    tl.store(at + K, half, mask=channels < K)
    at_k, mask = of_tokens(k, bh, n, first, T, H, K, C, BK)
    keys = tl.load(at_k, mask=mask, other=0.0)
    at_k, mask = of_tokens(q, bh, n, first, T, H, K, C, BK)
    queries = tl.load(at_k, mask=mask, other=0.0)
    left = tl.exp2(log2_from(sums(ones, LOG_C + UP_TO, gate, C, PRECISION), half[None, :], TYPE))
    at_k, mask = of_tokens(reads, bh, n, first, T, H, K, C, BK)
    tl.store(at_k, (queries * left).to(TYPE), mask=mask)
    at_k, mask = of_tokens(erases, bh, n, first, T, H, K, C, BK)
    tl.store(at_k, (keys * left).to(TYPE), mask=mask)
    left = tl.exp2(log2_from(sums(ones, LOG_C + AFTER, gate, C, PRECISION), half[None, :], TYPE)) * b[:, None]
    at_k, mask = of_tokens(writes, bh, n, first, T, H, K, C, BK)
    tl.store(at_k, (keys * left).to(TYPE), mask=mask)
    log_size, far = LOG_C, tl.min(total, 0) < -REACH
    while far:
        log_size -= 1
        within = sums(ones, LOG_C + WITHIN + log_size, gate, C, PRECISION)
        far = tl.min(tl.min(within, 1), 0) < -0.5 * BLOCK_REACH
    tl.store(sizes + chunk * BLOCKS + first // BK, log_size)


@triton.jit
def scores(
    reads,  # [B, T, H, K]
    erases,  # [B, T, H, K]
    writes,  # [B, T, H, K]
    sizes,  # [B H N, FLAGS]
    starts,  # [B N, 1 + C], or None
    R,  # out, [B H N, C, C]: (I + A)^-1 without its ones, A_ti = b_i sum_j k_tj e^{c_tj - c_ij} k_ij for i < t
    attend,  # out, [B H N, C, C]: the same of q_t for k_t, and i <= t
    T, N, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, FLAGS: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of chunks that are near, where e^{c_t - c_i} = e^{c_t - m} e^{m - c_i} is a product of what scans multiply with.
    far.py has the others'."""
    bh, n = place(tl.program_id(0), N, H)
    chunk = bh * N + n
    if log_size_of(sizes, chunk, FLAGS) < LOG_C:
        return
    t = tl.arange(0, C)
    TYPE: tl.constexpr = writes.dtype.element_ty
    at_reads, mask = of_tokens(reads, bh, n, 0, T, H, K, C, BK)
    at_erases, mask = of_tokens(erases, bh, n, 0, T, H, K, C, BK)
    at_writes, mask = of_tokens(writes, bh, n, 0, T, H, K, C, BK)
    write = tl.load(at_writes, mask=mask, other=0.0)
    erase = tl.load(at_erases, mask=mask, other=0.0)
    read = tl.load(at_reads, mask=mask, other=0.0)
    found = tl.where(t[:, None] >= t[None, :], dot(read, tl.trans(write), PRECISION), 0.0)
    system = tl.where(t[:, None] > t[None, :], dot(erase, tl.trans(write), PRECISION), 0.0)
    if starts is not None:
        _, since = of_starts(starts, bh, n, N, H, C)
        if since > 0:
            alike = t[None, :] >= begins(starts, bh, n, N, H, C)[:, None]
            found, system = tl.where(alike, found, 0.0), tl.where(alike, system, 0.0)
    tl.store(of_square(attend, chunk, C), found.to(TYPE))
    inverse = system_inverse(system, C, PRECISION)
    tl.store(of_square(R, chunk, C), tl.where(t[:, None] > t[None, :], inverse, 0.0).to(TYPE))
