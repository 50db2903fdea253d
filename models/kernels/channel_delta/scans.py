"""The memory from chunk to chunk, and its gradient: delta/scans.py's, with keys and queries that have faded before.

As there the memory is turned around, [BV, K], as are a chunk's errors, [BV, C], and what a chunk has found is stored
while the next one's tiles are on their way.

A chunk's first memory is multiplied as e^m S, and its last one comes as what e^m is to be multiplied with: what both
meet has e^-m in it. In fp16, which can't hold that, it is S, and fades by e^{c_C}.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.channel_delta.tiles import of_starts
from models.kernels.delta.scans import leave
from models.kernels.delta.tiles import of_memory, of_state, of_tokens
from models.kernels.momentum.tiles import dot, of_square
from models.kernels.spans import span_of


@triton.jit
def kept_again(scale, chunk, columns, K: tl.constexpr):
    """e^m a second time: held through a chunk's products it would take 32 registers. How the cache is told to treat it
    keeps the compiler from taking both loads for one."""
    at = scale + chunk.to(tl.int64) * (2 * K) + columns
    return tl.load(at, mask=columns < K, other=0.0, eviction_policy="evict_first")[None, :]


@triton.jit(do_not_specialize=["N", "spans"])
def scan(
    reads,  # [B, T, H, K]
    erases,  # [B, T, H, K]
    writes,  # [B, T, H, K]
    scale,  # [B H N, 2, K]
    starts,  # [B N, 1 + C], or None
    v,  # [B, T, H, V]
    R,  # [B H N, C, C]
    attend,  # [B H N, C, C]
    first,  # [spans B H, K, V], or None: b and A of every span are asked for (models/kernels/spans.py), and no more
    o,  # out, [B, T, H, V], or None
    last,  # out, [spans B H, K, V], or [spans B H, K, V + K]: b and A
    errors,  # out, [B H N, V, C], or None
    states,  # out, [B H N, V, K], what every chunk begins with, times e^m, or None
    spans,  # how many a row is cut into, or None for 1
    T, N, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U = R (V - K' S), O = Q' S + attend U, and the memory S after them, diag(e^{c_C}) S + W^T U, of the keys K' that
    erase, the queries Q' that read and the keys W that write."""
    first_v, number = tl.program_id(0) * BV, tl.program_id(1)
    bh, begin, end = span_of(number, N, spans)
    t = tl.arange(0, C)
    rows, columns = first_v + tl.arange(0, BV), tl.arange(0, BK)
    TYPE: tl.constexpr = writes.dtype.element_ty
    if first is None:
        memory = tl.where(rows[:, None] == V + columns[None, :], 1.0, 0.0)
    else:
        at, inside = of_memory(first, number, rows, columns, V, K)
        memory = tl.load(at, mask=inside, other=0.0)
    one = tl.where(t[:, None] == t[None, :], 1.0, 0.0).to(TYPE)
    error_before, output_before = tl.zeros([BV, C], TYPE), tl.zeros([BV, C], TYPE)
    for i in tl.range(end - begin, disable_licm=True):
        n = begin + i
        chunk = bh * N + n
        if o is not None:
            leave(output_before, o, bh, n - 1, first_v, i > 0, T, H, V, C, BV)
        if errors is not None:
            at_u, inside_u = of_state(errors, chunk - 1, rows, t, V, C)
            tl.store(at_u, error_before, mask=inside_u & (i > 0))
        kept = tl.load(scale + chunk.to(tl.int64) * (2 * K) + columns, mask=columns < K, other=0.0)[None, :]
        if not TYPE.is_fp16():
            memory *= kept
        operand = memory.to(TYPE)
        if states is not None:
            at_states, inside = of_state(states, chunk, rows, columns, V, K)
            tl.store(at_states, operand, mask=inside)
        at_k, mask_k = of_tokens(erases, bh, n, 0, T, H, K, C, BK)
        erase = tl.load(at_k, mask=mask_k, other=0.0)
        at_k, mask_k = of_tokens(reads, bh, n, 0, T, H, K, C, BK)
        read = tl.load(at_k, mask=mask_k, other=0.0)
        at_k, mask_k = of_tokens(writes, bh, n, 0, T, H, K, C, BK)
        write = tl.load(at_k, mask=mask_k, other=0.0)
        at_v, mask_v = of_tokens(v, bh, n, first_v, T, H, V, C, BV)
        if first is None:
            mask_v = mask_v & (rows < V)[None, :]
        values = tl.load(at_v, mask=mask_v, other=0.0)
        inverse = tl.load(of_square(R, chunk, C))
        similar = tl.load(of_square(attend, chunk, C))
        until, since = C, 0
        if starts is not None:
            until, since = of_starts(starts, bh, n, N, H, C)
        if until < C:
            memory *= 0.0

        known = dot(operand, tl.trans(erase), PRECISION)
        if until < C:
            known = tl.where(t[None, :] < until, known, 0.0)
        error = dot(tl.trans(values), one, PRECISION) - known
        output = dot(operand, tl.trans(read), PRECISION)
        if until < C:
            output = tl.where(t[None, :] < until, output, 0.0)
        error += dot(error.to(TYPE), tl.trans(inverse), PRECISION)
        output = dot(error.to(TYPE), tl.trans(similar), PRECISION, output)
        rounded = error.to(TYPE)
        if since > 0:
            rounded = tl.where(t[None, :] >= since, rounded, 0.0).to(TYPE)
        if TYPE.is_fp16():
            memory = dot(rounded, write, PRECISION, memory * kept)
        else:
            memory = dot(rounded, write, PRECISION, memory)
            memory *= kept_again(scale, chunk, columns, K)
        error_before, output_before = error.to(TYPE), output.to(TYPE)
    if o is not None:
        leave(output_before, o, bh, end - 1, first_v, True, T, H, V, C, BV)
    if errors is not None:
        at_u, inside_u = of_state(errors, bh * N + end - 1, rows, t, V, C)
        tl.store(at_u, error_before, mask=inside_u)
    at, inside = of_memory(last, number, rows, columns, V + K if first is None else V, K)
    tl.store(at, memory, mask=inside)


@triton.jit(do_not_specialize=["N", "spans"])
def scan_gradient(
    reads,  # [B, T, H, K]
    erases,  # [B, T, H, K]
    writes,  # [B, T, H, K]
    scale,  # [B H N, 2, K]
    starts,  # [B N, 1 + C], or None
    R,  # [B H N, C, C]
    attend,  # [B H N, C, C]
    do,  # [B, T, H, V]
    dlast,  # [spans B H, K, V], or None
    dv,  # out, [B, T, H, V], or None: c of every span is asked for (models/kernels/spans.py), and no more
    dstates,  # out, [B H N, V, K]: by what every chunk ends with, times e^m, or None
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
    TYPE: tl.constexpr = writes.dtype.element_ty
    dmemory = tl.zeros([BV, BK], tl.float32)
    if dlast is not None:
        at, inside = of_memory(dlast, number, rows, columns, V, K)
        dmemory = tl.load(at, mask=inside, other=0.0)
    one = tl.where(t[:, None] == t[None, :], 1.0, 0.0).to(TYPE)
    derror_before = tl.zeros([BV, C], TYPE)
    for i in tl.range(end - begin, disable_licm=True):
        n = end - 1 - i
        chunk = bh * N + n
        if dv is not None:
            leave(derror_before, dv, bh, n + 1, first_v, i > 0, T, H, V, C, BV)
        kept = tl.load(scale + chunk.to(tl.int64) * (2 * K) + columns, mask=columns < K, other=0.0)[None, :]
        if not TYPE.is_fp16():
            dmemory *= kept
        operand = dmemory.to(TYPE)
        if dstates is not None:
            at_states, inside = of_state(dstates, chunk, rows, columns, V, K)
            tl.store(at_states, operand, mask=inside)
        at_k, mask_k = of_tokens(writes, bh, n, 0, T, H, K, C, BK)
        write = tl.load(at_k, mask=mask_k, other=0.0)
        at_v, mask_v = of_tokens(do, bh, n, first_v, T, H, V, C, BV)
        doutput = tl.load(at_v, mask=mask_v, other=0.0)
        similar = tl.load(of_square(attend, chunk, C))
        inverse = tl.load(of_square(R, chunk, C))
        at_k, mask_k = of_tokens(reads, bh, n, 0, T, H, K, C, BK)
        read = tl.load(at_k, mask=mask_k, other=0.0)
        at_k, mask_k = of_tokens(erases, bh, n, 0, T, H, K, C, BK)
        erase = tl.load(at_k, mask=mask_k, other=0.0)
        until, since = C, 0
        if starts is not None:
            until, since = of_starts(starts, bh, n, N, H, C)
        if until < C:
            dmemory *= 0.0

        derror = dot(operand, tl.trans(write), PRECISION)
        if since > 0:
            derror = tl.where(t[None, :] >= since, derror, 0.0)
        doutput = dot(tl.trans(doutput), one, PRECISION)
        rounded = doutput.to(TYPE)
        derror = dot(rounded, similar, PRECISION, derror)
        derror += dot(derror.to(TYPE), inverse, PRECISION)
        derror_before = derror.to(TYPE)
        if until < C:
            rounded = tl.where(t[None, :] < until, doutput, 0.0).to(TYPE)
            derror = tl.where(t[None, :] < until, derror, 0.0)
        if TYPE.is_fp16():
            dmemory *= kept
        dmemory = dot(rounded, read, PRECISION, dmemory)
        dmemory = dot((-derror).to(TYPE), erase, PRECISION, dmemory)
        if not TYPE.is_fp16():
            dmemory *= kept_again(scale, chunk, columns, K)
    if dv is not None:
        leave(derror_before, dv, bh, begin, first_v, True, T, H, V, C, BV)
    at, inside = of_memory(dfirst, number, rows, columns, V, K)
    tl.store(at, dmemory, mask=inside)
