"""The memory from chunk to chunk, and its gradient: delta/scans.py's, with keys and queries that have faded before."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.momentum.tiles import dot, of_matrix, of_square, of_tokens


@triton.jit
def scan(
    reads,  # [B, T, H, K]
    erases,  # [B, T, H, K]
    writes,  # [B, T, H, K]
    ended,  # [B H N, K]
    v,  # [B, T, H, V]
    R,  # [B H N, C, C]
    attend,  # [B H N, C, C]
    first,  # [B, H, K, V]
    o,  # out, [B, T, H, V]
    last,  # out, [B, H, K, V]
    errors,  # out, [B, T, H, V], or None
    states,  # out, [B H N, K, V], what every chunk begins with, or None
    T, N, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U = R (V - K' S), O = Q' S + attend U, and the memory S after them, diag(e^{c_C}) S + W^T U, of the keys K' that
    erase, the queries Q' that read and the keys W that write."""
    first_v, bh = tl.program_id(0) * BV, tl.program_id(1)
    rows = tl.arange(0, BK)
    at, inside = of_matrix(first, bh, first_v, K, V, BK, BV)
    memory = tl.load(at, mask=inside, other=0.0)
    for n in range(N):
        chunk = bh * N + n
        at_k, mask_k = of_tokens(erases, bh, n, 0, T, H, K, C, BK)
        erase = tl.load(at_k, mask=mask_k, other=0.0)
        at_k, mask_k = of_tokens(writes, bh, n, 0, T, H, K, C, BK)
        write = tl.load(at_k, mask=mask_k, other=0.0)
        at_v, mask_v = of_tokens(v, bh, n, first_v, T, H, V, C, BV)
        error = tl.load(at_v, mask=mask_v, other=0.0).to(tl.float32)
        inverse = tl.load(of_square(R, chunk, C))
        kept = tl.load(ended + chunk.to(tl.int64) * K + rows, mask=rows < K, other=0.0)

        operand = memory.to(erase.dtype)
        error -= dot(erase, operand, PRECISION)
        if states is not None:
            at_states, inside_states = of_matrix(states, chunk, first_v, K, V, BK, BV)
            tl.store(at_states, operand, mask=inside_states)
        at_q, mask_q = of_tokens(reads, bh, n, 0, T, H, K, C, BK)
        output = dot(tl.load(at_q, mask=mask_q, other=0.0), operand, PRECISION)
        error += dot(inverse, error.to(erase.dtype), PRECISION)
        rounded = error.to(erase.dtype)
        memory = dot(tl.trans(write), rounded, PRECISION, memory * kept[:, None])
        output = dot(tl.load(of_square(attend, chunk, C)), rounded, PRECISION, output)
        at_o, mask_v = of_tokens(o, bh, n, first_v, T, H, V, C, BV)
        tl.store(at_o, output.to(erase.dtype), mask=mask_v)
        if errors is not None:
            at_u, mask_v = of_tokens(errors, bh, n, first_v, T, H, V, C, BV)
            tl.store(at_u, rounded, mask=mask_v)
    at, inside = of_matrix(last, bh, first_v, K, V, BK, BV)
    tl.store(at, memory, mask=inside)


@triton.jit
def scan_gradient(
    reads,  # [B, T, H, K]
    erases,  # [B, T, H, K]
    writes,  # [B, T, H, K]
    ended,  # [B H N, K]
    R,  # [B H N, C, C]
    attend,  # [B H N, C, C]
    do,  # [B, T, H, V]
    dlast,  # [B, H, K, V], or None
    dv,  # out, [B, T, H, V]
    dstates,  # out, [B H N, K, V]: by what every chunk ends with
    dfirst,  # out, [B, H, K, V]
    T, N, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Each line is the transpose of one of scan's. The gradient by the right-hand side of a system is that by v."""
    first_v, bh = tl.program_id(0) * BV, tl.program_id(1)
    rows = tl.arange(0, BK)
    dmemory = tl.zeros([BK, BV], tl.float32)
    if dlast is not None:
        at, inside = of_matrix(dlast, bh, first_v, K, V, BK, BV)
        dmemory = tl.load(at, mask=inside, other=0.0)
    for i in range(N):
        n = N - 1 - i
        chunk = bh * N + n
        at_k, mask_k = of_tokens(writes, bh, n, 0, T, H, K, C, BK)
        write = tl.load(at_k, mask=mask_k, other=0.0)
        at_k, mask_k = of_tokens(erases, bh, n, 0, T, H, K, C, BK)
        erase = tl.load(at_k, mask=mask_k, other=0.0)
        at_q, mask_q = of_tokens(reads, bh, n, 0, T, H, K, C, BK)
        read = tl.load(at_q, mask=mask_q, other=0.0)
        at_v, mask_v = of_tokens(do, bh, n, first_v, T, H, V, C, BV)
        doutput = tl.load(at_v, mask=mask_v, other=0.0)
        inverse = tl.load(of_square(R, chunk, C))
        similar = tl.load(of_square(attend, chunk, C))
        kept = tl.load(ended + chunk.to(tl.int64) * K + rows, mask=rows < K, other=0.0)

        operand = dmemory.to(write.dtype)
        at_states, inside = of_matrix(dstates, chunk, first_v, K, V, BK, BV)
        tl.store(at_states, operand, mask=inside)
        derror = dot(write, operand, PRECISION)
        derror = dot(tl.trans(similar), doutput, PRECISION, derror)
        derror += dot(tl.trans(inverse), derror.to(write.dtype), PRECISION)
        dmemory = dot(tl.trans(read), doutput, PRECISION, dmemory * kept[:, None])
        dmemory -= dot(tl.trans(erase), derror.to(write.dtype), PRECISION)
        at_e, mask_v = of_tokens(dv, bh, n, first_v, T, H, V, C, BV)
        tl.store(at_e, derror.to(write.dtype), mask=mask_v)
    at, inside = of_matrix(dfirst, bh, first_v, K, V, BK, BV)
    tl.store(at, dmemory, mask=inside)
