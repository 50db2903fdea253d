"""The gradient of a chunk by its queries, keys, step sizes and gates, all chunks at once."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.delta import tiles
from models.kernels.delta.tiles import fading, of_state, of_tokens, place
from models.kernels.momentum.tiles import dot, of_gates, of_square


@triton.jit
def gradient(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    attend,  # [B H N, C, C]
    system,  # [B H N, C, C]
    vectors,  # [B H N, ROWS, C]
    do,  # [B, T, H, V]
    errors,  # [B H N, V, C]
    dv,  # [B, T, H, V]
    states,  # [B H N, V, K]
    dstates,  # [B H N, V, K]
    dq,  # out, [B, T, H, K]
    dk,  # out, [B, T, H, K]
    dstep_size,  # out, [B, T, H]
    dlog_decay,  # out, [B, T, H], or None
    T, N, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, WIDTH: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With W = dO U^T, X = -dV U^T below the diagonal, P = W * G, M = X * G and dS by the memory the chunk ends with,
        dQ = diag(e^c) dO S^T + P K ,    dK = P^T Q + (M + M^T) K - diag(e^c) dV S^T + diag(b e^{c_C - c}) U dS^T ,
    and by G = L diag(b)  W * Q K^T + X * K K^T. Channels of the keys come by BK, so that sums over values are whole
    products.
    """
    bh, n = place(tl.program_id(0), N, H)
    chunk = bh * N + n
    t = tl.arange(0, C)
    at, mask_v = of_tokens(do, bh, n, 0, T, H, V, C, BV)
    doutput = tl.load(at, mask=mask_v, other=0.0)
    rows = tl.arange(0, BV)
    at, mask_v = of_state(errors, chunk, rows, t, V, C)
    error = tl.load(at, mask=mask_v, other=0.0)  # turned around
    at, mask_v = of_tokens(dv, bh, n, 0, T, H, V, C, BV)
    dright = tl.load(at, mask=mask_v, other=0.0)
    similar = tl.load(of_square(attend, chunk, C))
    alike = tl.load(of_square(system, chunk, C))
    row = vectors + chunk.to(tl.int64) * tiles.ROWS * C + t
    high = tl.load(row + tiles.HIGH * C)
    low = tl.load(row + tiles.LOW * C)
    b = tl.load(row + tiles.STEP * C)
    below = t[:, None] > t[None, :]
    G = fading(high, low, C) * b[None, :]
    dattend = dot(doutput, error, PRECISION)
    dfading = dattend * similar.to(tl.float32)
    dattend = (dattend * G).to(error.dtype)
    dsystem = dot(dright, error, PRECISION)
    dfading -= dsystem * alike.to(tl.float32)
    dsystem = tl.where(below, -dsystem * G, 0.0).to(error.dtype)
    dsystem += tl.trans(dsystem)  # of which one is always 0
    own = tl.sum(tl.where(t[:, None] == t[None, :], dfading, 0.0), 1)
    dfading = tl.where(below, dfading, 0.0)
    dstep = tl.sum(dfading, 0)
    dsummed = tl.sum(dfading * b[None, :], 1) - b * dstep
    dstep += own

    kept = tl.load(row + tiles.KEPT * C)
    left = tl.load(row + tiles.LEFT * C)
    written = left * b
    dkept = tl.zeros([C], tl.float32)
    dwritten = tl.zeros([C], tl.float32)
    dkept_last = tl.zeros([BV], tl.float32)
    for first in range(0, K, BK):
        at_k, mask_k = of_tokens(k, bh, n, first, T, H, K, C, BK)
        keys = tl.load(at_k, mask=mask_k, other=0.0)
        at_k, mask_k = of_tokens(q, bh, n, first, T, H, K, C, BK)
        queries = tl.load(at_k, mask=mask_k, other=0.0)
        columns = first + tl.arange(0, BK)
        at_s, inside = of_state(states, chunk, rows, columns, V, K)
        memory = tl.load(at_s, mask=inside, other=0.0)
        at_s, inside = of_state(dstates, chunk, rows, columns, V, K)
        dmemory = tl.load(at_s, mask=inside, other=0.0)
        dkept_last += tl.sum(dmemory.to(tl.float32) * memory, 1)
        product = dot(doutput, memory, PRECISION)
        dkept += tl.sum(product * queries, 1)
        dquery = kept[:, None] * product + dot(dattend, keys, PRECISION)
        at_k, mask_k = of_tokens(dq, bh, n, first, T, H, K, C, BK)
        tl.store(at_k, dquery.to(keys.dtype), mask=mask_k)
        product = dot(dright, memory, PRECISION)
        dkept -= tl.sum(product * keys, 1)
        dkey = -kept[:, None] * product
        product = dot(tl.trans(error), dmemory, PRECISION)
        dwritten += tl.sum(product * keys, 1)
        dkey += written[:, None] * product
        dkey += dot(tl.trans(dattend), queries, PRECISION)
        dkey += dot(dsystem, keys, PRECISION)
        at_k, mask_k = of_tokens(dk, bh, n, first, T, H, K, C, BK)
        tl.store(at_k, dkey.to(keys.dtype), mask=mask_k)

    at, real = of_gates(dstep_size, bh, n, T, H, C)
    tl.store(at, dstep + dwritten * left, mask=real)
    if dlog_decay is not None:
        # the last token's write is in the last memory as it is, and has to leave these sums without a trace
        whole = (written * dwritten).to(tl.float64)
        kept_last = tl.load(vectors + chunk.to(tl.int64) * tiles.ROWS * C + tiles.KEPT * C + C - 1)
        ended = tl.sum(whole, 0) + (kept_last * tl.sum(dkept_last)).to(tl.float64)
        total = (dsummed + dkept * kept).to(tl.float64) - whole + tl.where(t == C - 1, ended, 0.0)
        at, real = of_gates(dlog_decay, bh, n, T, H, C)
        tl.store(at, tl.cumsum(total, 0, reverse=True).to(tl.float32), mask=real)
