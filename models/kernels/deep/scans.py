"""The two scans over mini-batches, forward for the weights and backward for their gradients: the only steps that wait
for one another. One program has a document of a head.

Weights in float32 are too many for a multiprocessor's registers (256 KB of N and S at K = V = 64 and F = 256). They
stay in `last`, and their gradients in `dfirst`, which the L2 cache holds; a program is alone with its own. Between the
loads of a phase and the stores of the next stands a barrier: other threads load what one stores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.deep.tiles import column, dot, errors, first, limit, second, silu_curve, tile


@triton.jit
def references(
    N1,
    N2,
    base,
    reference,
    n,
    row,
    head,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    BASE: tl.constexpr,
    REFERENCE: tl.constexpr,
    TYPE: tl.constexpr,
):
    """R of both layers as operands: W + N of the mini-batch, or what was handed in for the first one."""
    PAIR: tl.constexpr = K * F + F * V
    R1, R2 = N1.to(TYPE).to(tl.float32), N2.to(TYPE).to(tl.float32)
    if BASE:
        R1 += tl.load(first(base, head, K, F, PAIR))
        R2 += tl.load(second(base, head, K, F, V, PAIR))
    if REFERENCE:
        given = tl.full([1, 1], 0, tl.int32) == n
        R1 = tl.where(given, tl.load(first(reference, row, K, F, PAIR), mask=given, other=0.0), R1)
        R2 = tl.where(given, tl.load(second(reference, row, K, F, V, PAIR), mask=given, other=0.0), R2)
    return R1.to(TYPE), R2.to(TYPE)


@triton.jit
def _move(at, there, written, e, write_m, write_s, kept_m, kept_s, carried, PAIR: tl.constexpr, MOMENTUM: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """N <- A N + f S + X^T diag(c) E and S <- m S + X^T diag(c') E of a layer at `at`, with written = X^T. What they
    were goes to `there`."""
    N = tl.load(at)
    tl.store(there, N.to(written.dtype))
    moved = kept_m * N + dot(written, (write_m * e).to(written.dtype), PRECISION)
    if MOMENTUM:
        S = tl.load(at + PAIR)
        tl.store(there + PAIR, S.to(written.dtype))
        moved += carried * S
        tl.store(at + PAIR, kept_s * S + dot(written, (write_s * e).to(written.dtype), PRECISION))
    tl.store(at, moved)


@triton.jit
def scan(
    k,  # [N B H, C, K]
    v,  # [N B H, C, V]
    carry,  # [N B H, n, n]
    carry_writes,  # [N B H, n, C]
    base,  # [H, PAIR]: W
    reference,  # [B H, PAIR]: R of the first mini-batch of a row
    runs,  # [P, 4]: of a document its row, its first and last mini-batch, and the last one that has tokens
    last,  # in and out, [P H, n PAIR]: N and S
    held,  # out, [P H, PAIR]: N at the last mini-batch that has tokens
    states,  # out, [N B H, n PAIR]: what every mini-batch begins with
    hidden,  # out, [N B H, C, F]: X_2
    errors1,  # out, [N B H, C, F]: E_1
    errors2,  # out, [N B H, C, V]: E_2
    rows,  # B H
    H,
    C: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BASE: tl.constexpr,
    REFERENCE: tl.constexpr,
    NOTHING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    run, head = program // H, program % H
    PAIR: tl.constexpr = K * F + F * V
    n_parts: tl.constexpr = 1 + MOMENTUM
    SIZE: tl.constexpr = n_parts * PAIR
    TYPE: tl.constexpr = k.dtype.element_ty
    row = tl.load(runs + 4 * run).to(tl.int64) * H + head
    begin, end, final = tl.load(runs + 4 * run + 1), tl.load(runs + 4 * run + 2), tl.load(runs + 4 * run + 3)
    at1, at2 = first(last, program, K, F, SIZE), second(last, program, K, F, V, SIZE)
    for n in range(begin, end):
        chunk = n * rows + row
        key, value = tl.load(tile(k, chunk, C, K)), tl.load(tile(v, chunk, C, V))
        N1, N2 = tl.load(at1), tl.load(at2)
        if n == final:
            tl.store(first(held, program, K, F, PAIR), N1)
            tl.store(second(held, program, K, F, V, PAIR), N2)
        R1, R2 = references(N1, N2, base, reference, n, row, head, K, F, V, BASE, REFERENCE, TYPE)
        _, x, slope, e, _, back = errors(key, value, R1, R2, PRECISION)
        e1 = back * slope
        share, _, _, _, _, _, _ = limit(key, x, e1, e, NOTHING)
        e1, e2 = (share * e1).to(TYPE), (share * e).to(TYPE)
        tl.store(tile(hidden, chunk, C, F), x)
        tl.store(tile(errors1, chunk, C, F), e1)
        tl.store(tile(errors2, chunk, C, V), e2)
        write_m = tl.load(column(carry_writes, chunk * n_parts, 0, C, 1))
        write_s, kept_s, carried = write_m, 1.0, 0.0
        kept_m = tl.load(carry + chunk * (n_parts * n_parts))
        if MOMENTUM:
            write_s = tl.load(column(carry_writes, chunk * n_parts + 1, 0, C, 1))
            carried, kept_s = tl.load(carry + chunk * 4 + 1), tl.load(carry + chunk * 4 + 3)
        tl.debug_barrier()
        there = first(states, chunk, K, F, SIZE)
        _move(at1, there, tl.trans(key), e1, write_m, write_s, kept_m, kept_s, carried, PAIR, MOMENTUM, PRECISION)
        there = second(states, chunk, K, F, V, SIZE)
        _move(at2, there, tl.trans(x), e2, write_m, write_s, kept_m, kept_s, carried, PAIR, MOMENTUM, PRECISION)
        tl.debug_barrier()


@triton.jit
def _unwrite(at, x, e, write_m, write_s, PAIR: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr):
    """What a layer's writes X^T diag(c) E hand back from the gradient by the weights after them, at `at`: by E, by X,
    and by c for both."""
    D = tl.load(at).to(x.dtype)
    seen = dot(x, D, PRECISION)
    dwrite_m, dwrite_s = tl.sum(e.to(tl.float32) * seen, 1), tl.zeros([x.shape[0]], tl.float32)
    de, dx = write_m * seen, write_m * dot(e, tl.trans(D), PRECISION)
    if MOMENTUM:
        D = tl.load(at + PAIR).to(x.dtype)
        seen = dot(x, D, PRECISION)
        dwrite_s = tl.sum(e.to(tl.float32) * seen, 1)
        de += write_s * seen
        dx += write_s * dot(e, tl.trans(D), PRECISION)
    return de, dx, dwrite_m, dwrite_s


@triton.jit
def _unmove(at, there, dheld, is_held, dbase, part, read, dz, read_m, read_s, kept_m, kept_s, carried,
            PAIR: tl.constexpr, MOMENTUM: tl.constexpr, BASE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The gradient by N and S of a layer before a mini-batch, from the one after it, at `at`. part: the gradient by R;
    read: what the queries multiplied it with, transposed, and dz the gradient by the product. Returns the gradients by
    A, f and m."""
    if BASE:
        tl.store(dbase, tl.load(dbase) + part + dot(read, dz, PRECISION))
    D, N = tl.load(at), tl.load(there).to(tl.float32)
    dkept_m, dcarried, dkept_s = tl.sum(D * N), 0.0, 0.0
    moved = kept_m * D + part + dot(read, (read_m * dz).to(read.dtype), PRECISION)
    moved += tl.load(dheld, mask=is_held, other=0.0)
    if MOMENTUM:
        S, E = tl.load(there + PAIR).to(tl.float32), tl.load(at + PAIR)
        dcarried, dkept_s = tl.sum(D * S), tl.sum(E * S)
        tl.store(at + PAIR, kept_s * E + carried * D + dot(read, (read_s * dz).to(read.dtype), PRECISION))
    tl.store(at, moved)
    return dkept_m, dcarried, dkept_s


@triton.jit
def scan_gradient(
    q,  # [N B H, C, K]
    k,  # [N B H, C, K]
    v,  # [N B H, C, V]
    read,  # [N B H, C, n]
    carry,  # [N B H, n, n]
    carry_writes,  # [N B H, n, C]
    base,  # [H, PAIR]
    reference,  # [B H, PAIR]
    runs,  # [P, 4]
    states,  # [N B H, n PAIR]
    errors1,  # [N B H, C, F]
    errors2,  # [N B H, C, V]
    inner,  # [N B H, C, F]: what the queries put to the second layer
    dinner,  # [N B H, C, F]: the gradient by what they got of the first
    do,  # [N B H, C, V]
    dhidden,  # [N B H, C, F]: by X_2, E_1 and E_2, of the outputs
    derrors1,  # [N B H, C, F]
    derrors2,  # [N B H, C, V]
    dkeys,  # [N B H, C, K]
    dheld,  # [P H, PAIR]
    dfirst,  # in and out, [P H, n PAIR]: by N and S
    dbase,  # in and out, [P H, PAIR], zeros at first
    dreference,  # out, [B H, PAIR]
    dk,  # out
    dv,  # out
    dcarry,  # out
    dcarry_writes,  # out
    rows,  # B H
    H,
    C: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BASE: tl.constexpr,
    REFERENCE: tl.constexpr,
    NOTHING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The transpose of every line above, and of what the outputs take of N and S."""
    program = tl.program_id(0).to(tl.int64)
    run, head = program // H, program % H
    PAIR: tl.constexpr = K * F + F * V
    n_parts: tl.constexpr = 1 + MOMENTUM
    SIZE: tl.constexpr = n_parts * PAIR
    TYPE: tl.constexpr = k.dtype.element_ty
    row = tl.load(runs + 4 * run).to(tl.int64) * H + head
    begin, end, final = tl.load(runs + 4 * run + 1), tl.load(runs + 4 * run + 2), tl.load(runs + 4 * run + 3)
    at1, at2 = first(dfirst, program, K, F, SIZE), second(dfirst, program, K, F, V, SIZE)
    for i in range(0, end - begin):
        n = end - 1 - i
        chunk = n * rows + row
        key, value = tl.load(tile(k, chunk, C, K)), tl.load(tile(v, chunk, C, V))
        there1, there2 = first(states, chunk, K, F, SIZE), second(states, chunk, K, F, V, SIZE)
        R1, R2 = references(
            tl.load(there1), tl.load(there2), base, reference, n, row, head, K, F, V, BASE, REFERENCE, TYPE
        )
        z, x, slope, e, rounded, back = errors(key, value, R1, R2, PRECISION)
        e1 = back * slope
        share, keys, widths, size1, size, moved, most = limit(key, x, e1, e, NOTHING)

        write_m = tl.load(column(carry_writes, chunk * n_parts, 0, C, 1))
        write_s, kept_s, carried = write_m, 1.0, 0.0
        kept_m = tl.load(carry + chunk * (n_parts * n_parts))
        if MOMENTUM:
            write_s = tl.load(column(carry_writes, chunk * n_parts + 1, 0, C, 1))
            carried, kept_s = tl.load(carry + chunk * 4 + 1), tl.load(carry + chunk * 4 + 3)
        written = tl.load(tile(errors2, chunk, C, V))
        de, dx, dwrite_m, dwrite_s = _unwrite(at2, x, written, write_m, write_s, PAIR, MOMENTUM, PRECISION)
        de += tl.load(tile(derrors2, chunk, C, V)).to(tl.float32)
        dx += tl.load(tile(dhidden, chunk, C, F)).to(tl.float32)
        written = tl.load(tile(errors1, chunk, C, F))
        de1, dkey, more_m, more_s = _unwrite(at1, key, written, write_m, write_s, PAIR, MOMENTUM, PRECISION)
        de1 += tl.load(tile(derrors1, chunk, C, F)).to(tl.float32)
        dkey += tl.load(tile(dkeys, chunk, C, K)).to(tl.float32)
        t = tl.arange(0, C)
        tl.store(dcarry_writes + chunk * (n_parts * C) + t, dwrite_m + more_m)
        if MOMENTUM:
            tl.store(dcarry_writes + chunk * (n_parts * C) + C + t, dwrite_s + more_s)

        dshare = (tl.sum(de1 * e1, 1) + tl.sum(de * e, 1))[:, None] / most
        dsize = tl.where(moved > size, dshare, 0.0)  # where nothing is held the share is one, whatever the errors
        dmoved = -share * dsize
        dkey += 2 * dmoved * size1 * key.to(tl.float32)
        de1 = share * de1 + 2 * dmoved * keys * e1
        de = share * de + 2 * (dsize + dmoved * widths) * e
        dx += 2 * dmoved * size * x.to(tl.float32)
        dback = (de1 * slope).to(TYPE)
        de += dot(dback, R2, PRECISION)
        tl.store(tile(dv, chunk, C, V), de.to(TYPE))
        de = de.to(TYPE)
        dz = (dx - dot(de, tl.trans(R2), PRECISION)) * slope + de1 * back * silu_curve(z)
        dz = dz.to(TYPE)
        dkey += dot(dz, tl.trans(R1), PRECISION)
        tl.store(tile(dk, chunk, C, K), dkey.to(TYPE))

        read_m = tl.load(column(read, chunk, 0, C, n_parts))
        read_s = read_m
        if MOMENTUM:
            read_s = tl.load(column(read, chunk, 1, C, n_parts))
        given, is_held = tl.full([1, 1], 0, tl.int32) == n, tl.full([1, 1], 0, tl.int32) + n == final
        tl.debug_barrier()
        part = dot(tl.trans(key), dz, PRECISION)
        if REFERENCE:
            tl.store(first(dreference, row, K, F, PAIR), part, mask=given)
            part = tl.where(given, 0.0, part)
        queries, dproduct = tl.trans(tl.load(tile(q, chunk, C, K))), tl.load(tile(dinner, chunk, C, F))
        dkept_m, dcarried, dkept_s = _unmove(
            at1, there1, first(dheld, program, K, F, PAIR), is_held, first(dbase, program, K, F, PAIR), part, queries,
            dproduct, read_m, read_s, kept_m, kept_s, carried, PAIR, MOMENTUM, BASE, PRECISION,
        )  # fmt: skip
        part = dot(tl.trans(dback), rounded, PRECISION) - dot(tl.trans(x), de, PRECISION)
        if REFERENCE:
            tl.store(second(dreference, row, K, F, V, PAIR), part, mask=given)
            part = tl.where(given, 0.0, part)
        queries, dproduct = tl.trans(tl.load(tile(inner, chunk, C, F))), tl.load(tile(do, chunk, C, V))
        more_m, more_carried, more_s = _unmove(
            at2, there2, second(dheld, program, K, F, V, PAIR), is_held, second(dbase, program, K, F, V, PAIR), part,
            queries, dproduct, read_m, read_s, kept_m, kept_s, carried, PAIR, MOMENTUM, BASE, PRECISION,
        )  # fmt: skip
        tl.store(dcarry + chunk * (n_parts * n_parts), dkept_m + more_m)
        if MOMENTUM:
            tl.store(dcarry + chunk * 4 + 1, dcarried + more_carried)
            tl.store(dcarry + chunk * 4 + 2, 0.0)
            tl.store(dcarry + chunk * 4 + 3, dkept_s + more_s)
        tl.debug_barrier()
