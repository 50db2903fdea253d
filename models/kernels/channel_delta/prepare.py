"""What the scans multiply with, of gates, queries, keys and step sizes alone, all chunks at once."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.channel_delta.tiles import AFTER, LEAST, UP_TO, log_gates, meet, sums
from models.kernels.delta.tiles import place, system_inverse
from models.kernels.momentum.tiles import dot, of_gates, of_square, of_tokens


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
    reads,  # out, [B, T, H, K]: e^c q
    erases,  # out, [B, T, H, K]: e^c k
    writes,  # out, [B, T, H, K]: b e^{c_C - c} k
    ended,  # out, [B H N, K]: e^{c_C}
    T, N, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    first = tl.program_id(0) % BLOCKS * BK
    bh, n = place(tl.program_id(0) // BLOCKS, N, H)
    chunk = bh * N + n
    at, real = of_gates(step_size, bh, n, T, H, C)
    b = tl.load(at, mask=real, other=0.0)
    at_k, mask = of_tokens(k, bh, n, first, T, H, K, C, BK)
    keys = tl.load(at_k, mask=mask, other=0.0)
    at_k, mask = of_tokens(q, bh, n, first, T, H, K, C, BK)
    queries = tl.load(at_k, mask=mask, other=0.0)
    at_gates, mask = of_tokens(gates, bh, n, first, T, H, K, C, BK)
    if log_decay is not None:
        at_k, mask = of_tokens(log_decay, bh, n, first, T, H, K, C, BK)
        log_gate = tl.load(at_k, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            log_gate = log_gates(log_gate, bias, log_rate, bh % H, first, K, BK)
        if segments is not None:
            token = n * C + tl.arange(0, C)
            at = segments + (bh // H).to(tl.int64) * T + token
            inner = (token > 0) & (token < T)
            starts = tl.load(at, mask=inner, other=0) != tl.load(at - 1, mask=inner, other=0)
            log_gate = tl.where(starts[:, None], LEAST, log_gate)
        gate = tl.where(mask, tl.maximum(log_gate, LEAST), 0.0).to(gates.dtype.element_ty)
        tl.store(at_gates, gate, mask=mask)
    else:
        gate = tl.load(at_gates, mask=mask, other=0.0)
    channels = first + tl.arange(0, BK)
    total = tl.sum(gate.to(tl.float32), 0)
    tl.store(ended + chunk.to(tl.int64) * K + channels, tl.exp(total), mask=channels < K)
    left = tl.exp(sums(ones, LOG_C + UP_TO, gate, C, PRECISION))
    at_k, mask = of_tokens(reads, bh, n, first, T, H, K, C, BK)
    tl.store(at_k, (queries * left).to(keys.dtype), mask=mask)
    at_k, mask = of_tokens(erases, bh, n, first, T, H, K, C, BK)
    tl.store(at_k, (keys * left).to(keys.dtype), mask=mask)
    left = tl.exp(sums(ones, LOG_C + AFTER, gate, C, PRECISION)) * b[:, None]
    at_k, mask = of_tokens(writes, bh, n, first, T, H, K, C, BK)
    tl.store(at_k, (keys * left).to(keys.dtype), mask=mask)


@triton.jit
def scores(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    step_size,  # [B, T, H]
    gates,  # [B, T, H, K], in the dtype of ones
    ones,  # [LOG_C + ORDERS, C, C], by tiles.py's write_ones
    R,  # out, [B H N, C, C]: (I + A)^-1 without its ones, A_ti = b_i sum_j k_tj e^{c_tj - c_ij} k_ij for i < t
    attend,  # out, [B H N, C, C]: the same of q_t for k_t, and i <= t
    T, N, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One of the two in a program: with both, registers went to memory and back."""
    of_queries = tl.program_id(0) % 2 == 1
    bh, n = place(tl.program_id(0) // 2, N, H)
    chunk = bh * N + n
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
