"""The kernels over a chunk's tokens and over chunks: the system of every chunk, and the two scans, forward for the
memory and backward for its gradient, the only steps that wait for one another.

A scan's program has some columns of the values, for which the memory is in its registers, turned around, [BV, K], as
are its errors, [BV, C]: a product of warp groups takes its left operand from the registers in which it was summed up,
and only what was loaded comes from shared memory. The memory is multiplied first and stored then: momentum/scans.py
says why.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.delta import tiles
from models.kernels.delta.tiles import fading, last_of, of_memory, of_state, of_tokens, place, system_inverse
from models.kernels.momentum.tiles import dot, of_gates, of_square
from models.kernels.spans import span_of


@triton.jit
def prepare(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    step_size,  # [B, T, H]
    log_decay,  # [B, T, H], or None
    R,  # out, [B H N, C, C]: (I + A diag(b))^-1, without its ones
    attend,  # out, [B H N, C, C]: Q K^T * L
    system,  # out, [B H N, C, C]: A, K K^T * L below the diagonal, or None
    vectors,  # out, [B H N, ROWS, C]
    T, N, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
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
    tl.store(row + tiles.LEFT * C, tl.exp((last_of(c, C) - c).to(tl.float32)))
    tl.store(row + tiles.STEP * C, b)
    L = fading(high, low, C)
    at, mask = of_tokens(k, bh, n, 0, T, H, K, C, BK)
    keys = tl.load(at, mask=mask, other=0.0)
    at, mask = of_tokens(q, bh, n, 0, T, H, K, C, BK)
    queries = tl.load(at, mask=mask, other=0.0)
    tl.store(of_square(attend, chunk, C), (dot(queries, tl.trans(keys), PRECISION) * L).to(keys.dtype))
    below = t[:, None] > t[None, :]
    similar = tl.where(below, dot(keys, tl.trans(keys), PRECISION) * L, 0.0)
    if system is not None:
        tl.store(of_square(system, chunk, C), similar.to(keys.dtype))
    inverse = system_inverse(similar * b[None, :], C, PRECISION)
    tl.store(of_square(R, chunk, C), tl.where(below, inverse, 0.0).to(keys.dtype))


@triton.jit
def leave(tile, pointer, bh, n, first, real, T, H: tl.constexpr, X: tl.constexpr, C: tl.constexpr, BX: tl.constexpr):
    """Stores a chunk's tile [BX, C] as rows of [B, T, H, X], if it is real."""
    at, mask = of_tokens(pointer, bh, n, first, T, H, X, C, BX)
    tl.store(at, tl.trans(tile.to(pointer.dtype.element_ty)), mask=mask & real)


@triton.jit(do_not_specialize=["N", "spans"])
def scan(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    R,  # [B H N, C, C]
    attend,  # [B H N, C, C]
    vectors,  # [B H N, ROWS, C]
    first,  # [spans B H, K, V], or None: b and A of every span are asked for (models/kernels/spans.py), and no more
    o,  # out, [B, T, H, V], or None
    last,  # out, [spans B H, K, V], or [spans B H, K, V + K]: b and A
    errors,  # out, [B H N, V, C], or None
    states,  # out, [B H N, V, K], what every chunk begins with, or None
    spans,  # how many a row is cut into, or None for 1
    T, N, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U = R (V - diag(e^c) K S), O = diag(e^c) Q S + (Q K^T * L) diag(b) U, and the memory S after them."""
    first_v, number = tl.program_id(0) * BV, tl.program_id(1)
    bh, begin, end = span_of(number, N, spans)
    t = tl.arange(0, C)
    rows, columns = first_v + tl.arange(0, BV), tl.arange(0, BK)
    if first is None:
        memory = tl.where(rows[:, None] == V + columns[None, :], 1.0, 0.0)
    else:
        at, inside = of_memory(first, number, rows, columns, V, K)
        memory = tl.load(at, mask=inside, other=0.0)
    one = tl.where(t[:, None] == t[None, :], 1.0, 0.0).to(k.dtype.element_ty)
    error_before, output_before = tl.zeros([BV, C], tl.float32), tl.zeros([BV, C], tl.float32)
    for i in tl.range(end - begin, disable_licm=True):
        n = begin + i
        chunk = bh * N + n
        # what the chunk before has found is stored while this one's tiles are on their way
        if o is not None:
            leave(output_before, o, bh, n - 1, first_v, i > 0, T, H, V, C, BV)
        if errors is not None:
            at_u, inside_u = of_state(errors, chunk - 1, rows, t, V, C)
            tl.store(at_u, error_before.to(k.dtype.element_ty), mask=inside_u & (i > 0))
        operand = memory.to(k.dtype.element_ty)
        if states is not None:
            at_states, inside = of_state(states, chunk, rows, columns, V, K)
            tl.store(at_states, operand, mask=inside)
        at_k, mask_k = of_tokens(k, bh, n, 0, T, H, K, C, BK)
        keys = tl.load(at_k, mask=mask_k, other=0.0)
        at_q, mask_k = of_tokens(q, bh, n, 0, T, H, K, C, BK)
        queries = tl.load(at_q, mask=mask_k, other=0.0)
        at_v, mask_v = of_tokens(v, bh, n, first_v, T, H, V, C, BV)
        if first is None:
            mask_v = mask_v & (rows < V)[None, :]
        values = tl.load(at_v, mask=mask_v, other=0.0)
        inverse = tl.load(of_square(R, chunk, C))
        similar = tl.load(of_square(attend, chunk, C))
        row = vectors + chunk.to(tl.int64) * tiles.ROWS * C
        kept = tl.load(row + tiles.KEPT * C + t)[None, :]
        left = tl.load(row + tiles.LEFT * C + t)[None, :]
        step = tl.load(row + tiles.STEP * C + t)[None, :]
        kept_last = tl.load(row + tiles.KEPT * C + C - 1)

        error = dot(tl.trans(values), one, PRECISION) - kept * dot(operand, tl.trans(keys), PRECISION)
        output = kept * dot(operand, tl.trans(queries), PRECISION)
        error += dot(error.to(keys.dtype), tl.trans(inverse), PRECISION)
        write = step * error
        memory = memory * kept_last + dot((left * write).to(keys.dtype), keys, PRECISION)
        output += dot(write.to(keys.dtype), tl.trans(similar), PRECISION)
        error_before, output_before = error, output
    if o is not None:
        leave(output_before, o, bh, end - 1, first_v, True, T, H, V, C, BV)
    if errors is not None:
        at_u, inside_u = of_state(errors, bh * N + end - 1, rows, t, V, C)
        tl.store(at_u, error_before.to(k.dtype.element_ty), mask=inside_u)
    at, inside = of_memory(last, number, rows, columns, V + K if first is None else V, K)
    tl.store(at, memory, mask=inside)


@triton.jit(do_not_specialize=["N", "spans"])
def scan_gradient(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    R,  # [B H N, C, C]
    attend,  # [B H N, C, C]
    vectors,  # [B H N, ROWS, C]
    do,  # [B, T, H, V]
    dlast,  # [spans B H, K, V], or None
    dv,  # out, [B, T, H, V], or None: c of every span is asked for (models/kernels/spans.py), and no more
    dstates,  # out, [B H N, V, K]: by what every chunk ends with, or None
    dfirst,  # out, [spans B H, K, V]; or c
    spans,  # how many a row is cut into, or None for 1
    T, N, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Each line is the transpose of one of scan's. The gradient by the right-hand side of a system is that by v."""
    first_v, number = tl.program_id(0) * BV, tl.program_id(1)
    bh, begin, end = span_of(number, N, spans)
    t = tl.arange(0, C)
    rows, columns = first_v + tl.arange(0, BV), tl.arange(0, BK)
    dmemory = tl.zeros([BV, BK], tl.float32)
    if dlast is not None:
        at, inside = of_memory(dlast, number, rows, columns, V, K)
        dmemory = tl.load(at, mask=inside, other=0.0)
    one = tl.where(t[:, None] == t[None, :], 1.0, 0.0).to(k.dtype.element_ty)
    derror_before = tl.zeros([BV, C], tl.float32)
    for i in tl.range(end - begin, disable_licm=True):
        n = end - 1 - i
        chunk = bh * N + n
        if dv is not None:
            leave(derror_before, dv, bh, n + 1, first_v, i > 0, T, H, V, C, BV)
        operand = dmemory.to(k.dtype.element_ty)
        if dstates is not None:
            at_states, inside = of_state(dstates, chunk, rows, columns, V, K)
            tl.store(at_states, operand, mask=inside)
        at_k, mask_k = of_tokens(k, bh, n, 0, T, H, K, C, BK)
        keys = tl.load(at_k, mask=mask_k, other=0.0)
        at_q, mask_k = of_tokens(q, bh, n, 0, T, H, K, C, BK)
        queries = tl.load(at_q, mask=mask_k, other=0.0)
        at_v, mask_v = of_tokens(do, bh, n, first_v, T, H, V, C, BV)
        doutput = tl.load(at_v, mask=mask_v, other=0.0)
        inverse = tl.load(of_square(R, chunk, C))
        similar = tl.load(of_square(attend, chunk, C))
        row = vectors + chunk.to(tl.int64) * tiles.ROWS * C
        kept = tl.load(row + tiles.KEPT * C + t)[None, :]
        left = tl.load(row + tiles.LEFT * C + t)[None, :]
        step = tl.load(row + tiles.STEP * C + t)[None, :]
        kept_last = tl.load(row + tiles.KEPT * C + C - 1)

        dwrite = left * dot(operand, tl.trans(keys), PRECISION)
        doutput = tl.trans(doutput)
        derror = step * (dwrite + dot(doutput, similar, PRECISION))
        derror += dot(derror.to(keys.dtype), inverse, PRECISION)
        dmemory *= kept_last
        dmemory += dot((kept * dot(doutput, one, PRECISION)).to(keys.dtype), queries, PRECISION)
        dmemory += dot((-kept * derror).to(keys.dtype), keys, PRECISION)
        derror_before = derror
    if dv is not None:
        leave(derror_before, dv, bh, begin, first_v, True, T, H, V, C, BV)
    at, inside = of_memory(dfirst, number, rows, columns, V, K)
    tl.store(at, dmemory, mask=inside)
