"""What the scans multiply with, of gates, queries, keys and step sizes alone, all chunks at once."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.channel_delta.tiles import (
    AFTER,
    LEAST,
    UP_TO,
    near,
    near_factors,
    neighbours,
    partners,
    parts,
    sums,
)
from models.kernels.delta.tiles import place, system_inverse
from models.kernels.momentum.tiles import dot, of_gates, of_square, of_tokens


@triton.jit
def prepare(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    step_size,  # [B, T, H]
    log_decay,  # [B, T, H, K]
    ones,  # [LOG_C + ORDERS, C, C], by tiles.py's write_ones
    reads,  # out, [B, T, H, K]: e^c q
    erases,  # out, [B, T, H, K]: e^c k
    writes,  # out, [B, T, H, K]: b e^{c_C - c} k
    ended,  # out, [B H N, K]: e^{c_C}
    R,  # out, [B H N, C, C], or None: (I + A)^-1 without its ones, A_ti = b_i sum_j k_tj e^{c_tj - c_ij} k_ij for i < t
    attend,  # out, [B H N, C, C], or None: the same of q_t for k_t, and i <= t
    T, N, H, K: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    bh, n = place(tl.program_id(0), N, H)
    chunk = bh * N + n
    t = tl.arange(0, C)
    below = t[:, None] > t[None, :]
    at_gates, real = of_gates(step_size, bh, n, T, H, C)
    b = tl.load(at_gates, mask=real, other=0.0)
    system = tl.zeros([C, C], tl.float32)
    similar = tl.zeros([C, C], tl.float32)
    own = tl.zeros([C], tl.float32)
    for first in range(0, K, BK):
        at, mask = of_tokens(k, bh, n, first, T, H, K, C, BK)
        keys = tl.load(at, mask=mask, other=0.0)
        at, mask = of_tokens(q, bh, n, first, T, H, K, C, BK)
        queries = tl.load(at, mask=mask, other=0.0)
        at, mask = of_tokens(log_decay, bh, n, first, T, H, K, C, BK)
        gates = tl.maximum(tl.load(at, mask=mask, other=0.0), LEAST)
        high, low = parts(gates, keys.dtype)
        left = tl.exp(sums(ones, LOG_C + UP_TO, high, low, C, PRECISION))
        at, mask = of_tokens(reads, bh, n, first, T, H, K, C, BK)
        tl.store(at, (queries * left).to(keys.dtype), mask=mask)
        at, mask = of_tokens(erases, bh, n, first, T, H, K, C, BK)
        tl.store(at, (keys * left).to(keys.dtype), mask=mask)
        left = tl.exp(sums(ones, LOG_C + AFTER, high, low, C, PRECISION)) * b[:, None]
        at, mask = of_tokens(writes, bh, n, first, T, H, K, C, BK)
        tl.store(at, (keys * left).to(keys.dtype), mask=mask)
        channels = first + tl.arange(0, BK)
        at = ended + chunk.to(tl.int64) * K + channels
        tl.store(at, tl.exp(tl.sum(gates, 0)), mask=channels < K)
        if R is not None:
            own += tl.sum(queries.to(tl.float32) * keys, 1)
            of_near = near(gates, LOG_C, keys.dtype)
            summed = sums(ones, of_near, high, low, C, PRECISION)
            reading, writing = near_factors(summed, of_near, keys.dtype, C)
            writer = tl.trans((keys * writing).to(keys.dtype))
            chosen = neighbours(of_near, True, C)
            system += tl.where(chosen, dot((keys * reading).to(keys.dtype), writer, PRECISION), 0.0)
            similar += tl.where(chosen, dot((queries * reading).to(keys.dtype), writer, PRECISION), 0.0)
            for halving in range(of_near + 1, LOG_C):
                left = tl.exp(sums(ones, halving, high, low, C, PRECISION))
                key = (keys * left).to(keys.dtype)
                query = (queries * left).to(keys.dtype)
                chosen = partners(halving, True, C)
                system += tl.where(chosen, dot(key, tl.trans(key), PRECISION), 0.0)
                similar += tl.where(chosen, dot(query, tl.trans(key), PRECISION), 0.0)
    if R is not None:
        similar = tl.where(t[:, None] == t[None, :], own[:, None], similar) * b[None, :]
        tl.store(of_square(attend, chunk, C), similar.to(attend.dtype.element_ty))
        inverse = system_inverse(system * b[None, :], C, PRECISION)
        tl.store(of_square(R, chunk, C), tl.where(below, inverse, 0.0).to(R.dtype.element_ty))
