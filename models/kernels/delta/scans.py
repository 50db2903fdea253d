"""The kernels over a chunk's tokens and over chunks: the system of every chunk, and the two scans, forward for the
memory and backward for its gradient, the only steps that wait for one another.

A scan's program has some columns of the values, for which the memory is [K, BV] in its registers. The memory is
multiplied first and stored then: momentum/scans.py says why.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.delta import tiles
from models.kernels.delta.tiles import fading, last_of, of_matrix, of_tokens, place, system_inverse
from models.kernels.momentum.tiles import dot, of_gates, of_square


@triton.jit
def prepare(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    step_size,  # [B, T, H]
    log_decay,  # [B, T, H], or None
    R,  # out, [B H N, C, C]: (I + K K^T * G)^-1, without its ones; G = L diag(b)
    attend,  # out, [B H N, C, C]: Q K^T * G
    vectors,  # out, [B H N, ROWS, C]
    T, N, H, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    bh, n = place(tl.program_id(0), N, H)
    chunk = bh * N + n
    t = tl.arange(0, C)
    at, real = of_gates(step_size, bh, n, T, H, C)
    b = tl.load(at, mask=real, other=0.0)
    c = tl.zeros([C], tl.float64)
    if log_decay is not None:
        at, _ = of_gates(log_decay, bh, n, T, H, C)  # a gate of 0 has an infinite log, for which -1000 does
        c = tl.cumsum(tl.maximum(tl.load(at, mask=real, other=0.0), -1000.0).to(tl.float64), 0)
    high = c.to(tl.float32)
    low = (c - high.to(tl.float64)).to(tl.float32)
    row = vectors + chunk.to(tl.int64) * tiles.ROWS * C + t
    tl.store(row + tiles.HIGH * C, high)
    tl.store(row + tiles.LOW * C, low)
    tl.store(row + tiles.KEPT * C, tl.exp(high))
    tl.store(row + tiles.WRITTEN * C, tl.exp((last_of(c, C) - c).to(tl.float32)) * b)
    G = fading(high, low, C) * b[None, :]
    at, mask = of_tokens(k, bh, n, 0, T, H, K, C, BK)
    keys = tl.load(at, mask=mask, other=0.0)
    at, mask = of_tokens(q, bh, n, 0, T, H, K, C, BK)
    queries = tl.load(at, mask=mask, other=0.0)
    tl.store(of_square(attend, chunk, C), (dot(queries, tl.trans(keys), PRECISION) * G).to(keys.dtype))
    below = t[:, None] > t[None, :]
    system = tl.where(below, dot(keys, tl.trans(keys), PRECISION) * G, 0.0)
    inverse = system_inverse(system, C, PRECISION)
    tl.store(of_square(R, chunk, C), tl.where(below, inverse, 0.0).to(keys.dtype))


@triton.jit
def scan(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    R,  # [B H N, C, C]
    attend,  # [B H N, C, C]
    vectors,  # [B H N, ROWS, C]
    first,  # [B, H, K, V]
    o,  # out, [B, T, H, V], or None
    errors,  # out, [B, T, H, V], or None
    states,  # out, [B H N, K, V], what every chunk begins with, or None
    last,  # out, [B, H, K, V], or None
    T, N, H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U = R (V - diag(e^c) K S), O = diag(e^c) Q S + (Q K^T * G) U, and the memory S after them."""
    first_v, bh = tl.program_id(0) * BV, tl.program_id(1)
    t = tl.arange(0, C)
    rows, columns = tl.arange(0, BK), first_v + tl.arange(0, BV)
    at, inside = of_matrix(first, bh, rows, columns, K, V)
    memory = tl.load(at, mask=inside, other=0.0)
    for n in range(N):
        chunk = bh * N + n
        at_k, mask_k = of_tokens(k, bh, n, 0, T, H, K, C, BK)
        keys = tl.load(at_k, mask=mask_k, other=0.0)
        at_v, mask_v = of_tokens(v, bh, n, first_v, T, H, V, C, BV)
        error = tl.load(at_v, mask=mask_v, other=0.0).to(tl.float32)
        inverse = tl.load(of_square(R, chunk, C))
        row = vectors + chunk.to(tl.int64) * tiles.ROWS * C
        kept = tl.load(row + tiles.KEPT * C + t)
        written = tl.load(row + tiles.WRITTEN * C + t)
        kept_last = tl.load(row + tiles.KEPT * C + C - 1)

        operand = memory.to(keys.dtype)
        error -= kept[:, None] * dot(keys, operand, PRECISION)
        if o is not None:
            at_q, mask_k = of_tokens(q, bh, n, 0, T, H, K, C, BK)
            queries = tl.load(at_q, mask=mask_k, other=0.0)
            output = kept[:, None] * dot(queries, operand, PRECISION)
        if states is not None:
            at_states, inside_states = of_matrix(states, chunk, rows, columns, K, V)
            tl.store(at_states, operand, mask=inside_states)
        error += dot(inverse, error.to(keys.dtype), PRECISION)
        rounded = error.to(keys.dtype)
        memory = memory * kept_last + dot(tl.trans(keys), (written[:, None] * error).to(keys.dtype), PRECISION)
        if o is not None:
            output += dot(tl.load(of_square(attend, chunk, C)), rounded, PRECISION)
            at_o, mask_v = of_tokens(o, bh, n, first_v, T, H, V, C, BV)
            tl.store(at_o, output.to(keys.dtype), mask=mask_v)
        if errors is not None:
            at_u, mask_v = of_tokens(errors, bh, n, first_v, T, H, V, C, BV)
            tl.store(at_u, rounded, mask=mask_v)
    if last is not None:
        at, inside = of_matrix(last, bh, rows, columns, K, V)
        tl.store(at, memory, mask=inside)


@triton.jit
def scan_gradient(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    R,  # [B H N, C, C]
    attend,  # [B H N, C, C]
    vectors,  # [B H N, ROWS, C]
    do,  # [B, T, H, V]
    dlast,  # [B, H, K, V], or None
    dv,  # out, [B, T, H, V]
    dstates,  # out, [B H N, K, V]: by what every chunk ends with
    dfirst,  # out, [B, H, K, V]
    T, N, H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Each line is the transpose of one of scan's. The gradient by the right-hand side of a system is that by v."""
    first_v, bh = tl.program_id(0) * BV, tl.program_id(1)
    t = tl.arange(0, C)
    rows, columns = tl.arange(0, BK), first_v + tl.arange(0, BV)
    dmemory = tl.zeros([BK, BV], tl.float32)
    if dlast is not None:
        at, inside = of_matrix(dlast, bh, rows, columns, K, V)
        dmemory = tl.load(at, mask=inside, other=0.0)
    for i in range(N):
        n = N - 1 - i
        chunk = bh * N + n
        at_k, mask_k = of_tokens(k, bh, n, 0, T, H, K, C, BK)
        keys = tl.load(at_k, mask=mask_k, other=0.0)
        at_q, mask_k = of_tokens(q, bh, n, 0, T, H, K, C, BK)
        queries = tl.load(at_q, mask=mask_k, other=0.0)
        at_v, mask_v = of_tokens(do, bh, n, first_v, T, H, V, C, BV)
        doutput = tl.load(at_v, mask=mask_v, other=0.0)
        inverse = tl.load(of_square(R, chunk, C))
        similar = tl.load(of_square(attend, chunk, C))
        row = vectors + chunk.to(tl.int64) * tiles.ROWS * C
        kept = tl.load(row + tiles.KEPT * C + t)
        written = tl.load(row + tiles.WRITTEN * C + t)
        kept_last = tl.load(row + tiles.KEPT * C + C - 1)

        operand = dmemory.to(keys.dtype)
        derror = written[:, None] * dot(keys, operand, PRECISION)
        at_states, inside = of_matrix(dstates, chunk, rows, columns, K, V)
        tl.store(at_states, operand, mask=inside)
        derror += dot(tl.trans(similar), doutput, PRECISION)
        derror += dot(tl.trans(inverse), derror.to(keys.dtype), PRECISION)
        dmemory *= kept_last
        dmemory += dot(tl.trans(queries), (kept[:, None] * doutput.to(tl.float32)).to(keys.dtype), PRECISION)
        dmemory -= dot(tl.trans(keys), (kept[:, None] * derror).to(keys.dtype), PRECISION)
        at_e, mask_v = of_tokens(dv, bh, n, first_v, T, H, V, C, BV)
        tl.store(at_e, derror.to(keys.dtype), mask=mask_v)
    at, inside = of_matrix(dfirst, bh, rows, columns, K, V)
    tl.store(at, dmemory, mask=inside)
