"""The scan backwards, from the last mini-batch of a document to its first: the gradients by N and S, which stay in
`dfirst` as N and S in the scan's `last`, and those by keys, values and what carries N and S on."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.deep.tiles import dot, row_sum, scaled, silu, silu_curve, square, tile


@triton.jit
def _errors_gradient(key, e, R1, R2, de1, share, pull, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Through E_1 = back * slope of a tile, de1 the gradient by what is written of it: by back = E_2 W_2^T, an operand;
    the part by z that is the slope's; and the slope."""
    z = dot(key, R1, PRECISION)
    _, slope = silu(z)
    back = dot(e, tl.trans(R2), PRECISION)
    de1 = share * de1 + pull * (back * slope)
    return (de1 * slope).to(TYPE), de1 * back * silu_curve(z), slope


@triton.jit
def _unmove(D, at, state, dheld, is_held, dbase, part, read, dz, read_m, read_s, kept_m, kept_s, carried,
            PAIR: tl.constexpr, MOMENTUM: tl.constexpr, BASE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The gradient by N and S of a tile before a mini-batch, from D and S's, at `at`, after it. part: the gradient by
    R; read: what the queries multiplied it with, transposed, and dz the gradient by the product. Returns the gradients
    by A, f and m."""
    if BASE:
        tl.store(dbase, tl.load(dbase) + part + dot(read, dz, PRECISION))
    N = tl.load(state).to(tl.float32)
    dkept_m, dcarried, dkept_s = tl.sum(D * N), 0.0, 0.0
    moved = kept_m * D + part + dot(read, scaled(read_m, dz), PRECISION)
    tl.store(at, moved + tl.load(dheld, mask=is_held, other=0.0))
    if MOMENTUM:
        S, E = tl.load(state + PAIR).to(tl.float32), tl.load(at + PAIR)
        dcarried, dkept_s = tl.sum(D * S), tl.sum(E * S)
        tl.store(at + PAIR, kept_s * E + carried * D + dot(read, scaled(read_s, dz), PRECISION))
    return dkept_m, dcarried, dkept_s


@triton.jit
def scan_gradient(
    q,  # [N B H, C, K]
    k,  # [N B H, C, K]
    read,  # [N B H, C, n]
    carry,  # [N B H, n, n]
    carry_writes,  # [N B H, n, C]
    runs,  # [P, 4]
    states,  # [N B H, SIZE]
    references,  # [N B H, PAIR]
    hidden,  # [N B H, C, F]
    errors1,  # [N B H, C, F]
    errors2,  # [N B H, C, V]
    limits,  # [N B H, 3, C]
    inner,  # [N B H, C, F]: what the queries put to the second layer
    dinner,  # [N B H, C, F]: the gradient by what they got of the first
    do,  # [N B H, C, V]
    dhidden,  # [N B H, C, F]: of the outputs, by X_2
    derrors1,  # [N B H, C, F]: by what is written of E_1
    derrors2,  # [N B H, C, V]: and of E_2
    dkeys,  # [N B H, C, K]
    dheld,  # [P H, PAIR]
    dfirst,  # in and out, [P H, SIZE]: by N and S
    dbase,  # in and out, [P H, PAIR], zeros at first
    scratch,  # [P H, C, F]
    dreference,  # out, [B H, PAIR]
    dk,  # out, [N B H, C, K]
    dv,  # out, [N B H, C, V]
    dcarry,  # out, [N B H, n, n]
    dcarry_writes,  # out, [N B H, n, C]
    rows,
    H,
    C: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    BF: tl.constexpr,
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
    one, t = tl.full([1, 1], 1, tl.int32), tl.arange(0, C)
    for i in range(0, end - begin):
        n = end - 1 - i
        chunk = n * rows + row
        key = tl.load(tile(k, chunk * (C * K), C, K, K))
        e = tl.load(tile(errors2, chunk * (C * V), C, V, V))
        at_limits = limits + chunk * (3 * C) + t[:, None]
        share, widths, sizes1 = tl.load(at_limits), tl.load(at_limits + C), tl.load(at_limits + 2 * C)
        at_writes = chunk * (n_parts * C) + t[:, None]
        write_m = tl.load(carry_writes + at_writes)
        write_s, kept_s, carried = write_m, 1.0, 0.0
        kept_m = tl.load(carry + chunk * (n_parts * n_parts))
        if MOMENTUM:
            write_s = tl.load(carry_writes + at_writes + C)
            carried, kept_s = tl.load(carry + chunk * 4 + 1), tl.load(carry + chunk * 4 + 3)

        # what the writes hand back: by E_1 (to the scratch), E_2, keys, and by their coefficients
        dkey = tl.load(tile(dkeys, chunk * (C * K), C, K, K)).to(tl.float32)
        seen_m, seen_s = tl.zeros([C, V], tl.float32), tl.zeros([C, V], tl.float32)
        dwrite_m, dwrite_s, dshare = (
            tl.zeros([C, 1], tl.float32), tl.zeros([C, 1], tl.float32), tl.zeros([C, 1], tl.float32)
        )  # fmt: skip
        for j in range(0, F // BF):
            at = tile(dfirst, program * SIZE + j * BF, K, BF, F)
            e1 = tl.load(tile(errors1, chunk * (C * F) + j * BF, C, BF, F))
            D, u1 = tl.load(at).to(TYPE), scaled(share, e1)
            seen = dot(key, D, PRECISION)
            dwrite_m += row_sum(u1.to(tl.float32) * seen)
            de1 = tl.load(tile(derrors1, chunk * (C * F) + j * BF, C, BF, F)).to(tl.float32) + write_m * seen
            dkey += write_m * dot(u1, tl.trans(D), PRECISION)
            if MOMENTUM:
                D = tl.load(at + PAIR).to(TYPE)
                seen = dot(key, D, PRECISION)
                dwrite_s += row_sum(u1.to(tl.float32) * seen)
                de1 += write_s * seen
                dkey += write_s * dot(u1, tl.trans(D), PRECISION)
            dshare += row_sum(de1 * e1.to(tl.float32))
            tl.store(tile(scratch, program * (C * F) + j * BF, C, BF, F), de1.to(TYPE))
            x = tl.load(tile(hidden, chunk * (C * F) + j * BF, C, BF, F))
            at = tile(dfirst, program * SIZE + K * F + j * BF * V, BF, V, V)
            seen_m += dot(x, tl.load(at).to(TYPE), PRECISION)
            if MOMENTUM:
                seen_s += dot(x, tl.load(at + PAIR).to(TYPE), PRECISION)
        u2 = scaled(share, e)
        de = tl.load(tile(derrors2, chunk * (C * V), C, V, V)).to(tl.float32) + write_m * seen_m
        tl.store(dcarry_writes + at_writes, dwrite_m + row_sum(u2.to(tl.float32) * seen_m))
        if MOMENTUM:
            de += write_s * seen_s
            tl.store(dcarry_writes + at_writes + C, dwrite_s + row_sum(u2.to(tl.float32) * seen_s))
        dshare += row_sum(de * e.to(tl.float32))
        tl.debug_barrier()

        # through the limit and E_1, to E_2. Where nothing is held the share is one, whatever the errors
        size, keys = square(e), square(key)
        moved = keys * sizes1 + widths * size
        dsize = tl.where(moved > size, dshare / (tl.maximum(size, moved) + NOTHING), 0.0)
        dmoved = -share * dsize
        dkey += 2 * dmoved * sizes1 * key.to(tl.float32)
        de = share * de + 2 * (dsize + dmoved * widths) * e.to(tl.float32)
        R1, R2 = tile(references, chunk * PAIR, K, BF, F), tile(references, chunk * PAIR + K * F, BF, V, V)
        for j in range(0, F // BF):
            W = tl.load(R2 + j * BF * V)
            de1 = tl.load(tile(scratch, program * (C * F) + j * BF, C, BF, F)).to(tl.float32)
            dback, _, _ = _errors_gradient(
                key, e, tl.load(R1 + j * BF), W, de1, share, 2 * dmoved * keys, TYPE, PRECISION
            )
            de += dot(dback, W, PRECISION)
        de = de.to(TYPE)
        tl.store(tile(dv, chunk * (C * V), C, V, V), de)

        # to X_2 and z, and the weights
        read_m = tl.load(read + chunk * (C * n_parts) + t[:, None] * n_parts)
        read_s = read_m
        if MOMENTUM:
            read_s = tl.load(read + chunk * (C * n_parts) + t[:, None] * n_parts + 1)
        query, doutput = tl.load(tile(q, chunk * (C * K), C, K, K)), tl.load(tile(do, chunk * (C * V), C, V, V))
        given, is_held = one * n == 0, one * n == final
        dkept_m, dcarried, dkept_s = 0.0, 0.0, 0.0
        for j in range(0, F // BF):
            first, second = j * BF, K * F + j * BF * V
            W1, W2 = tl.load(R1 + j * BF), tl.load(R2 + j * BF * V)
            de1 = tl.load(tile(scratch, program * (C * F) + first, C, BF, F)).to(tl.float32)
            dback, dz, slope = _errors_gradient(key, e, W1, W2, de1, share, 2 * dmoved * keys, TYPE, PRECISION)
            x = tl.load(tile(hidden, chunk * (C * F) + first, C, BF, F))
            dx = tl.load(tile(dhidden, chunk * (C * F) + first, C, BF, F)).to(tl.float32)
            dx += 2 * dmoved * size * x.to(tl.float32) - dot(de, tl.trans(W2), PRECISION)
            at = tile(dfirst, program * SIZE + second, BF, V, V)
            D = tl.load(at)
            dx += write_m * dot(u2, tl.trans(D.to(TYPE)), PRECISION)
            if MOMENTUM:
                dx += write_s * dot(u2, tl.trans(tl.load(at + PAIR).to(TYPE)), PRECISION)
            dz = (dz + dx * slope).to(TYPE)
            dkey += dot(dz, tl.trans(W1), PRECISION)
            part = dot(tl.trans(dback), e, PRECISION) - dot(tl.trans(x), de, PRECISION)
            if REFERENCE:
                tl.store(tile(dreference, row * PAIR + second, BF, V, V), part, mask=given)
                part = tl.where(given, 0.0, part)
            more_m, more_carried, more_s = _unmove(
                D, at, tile(states, chunk * SIZE + second, BF, V, V),
                tile(dheld, program * PAIR + second, BF, V, V), is_held,
                tile(dbase, program * PAIR + second, BF, V, V), part,
                tl.trans(tl.load(tile(inner, chunk * (C * F) + first, C, BF, F))), doutput,
                read_m, read_s, kept_m, kept_s, carried, PAIR, MOMENTUM, BASE, PRECISION,
            )  # fmt: skip
            dkept_m, dcarried, dkept_s = dkept_m + more_m, dcarried + more_carried, dkept_s + more_s
            part = dot(tl.trans(key), dz, PRECISION)
            if REFERENCE:
                tl.store(tile(dreference, row * PAIR + first, K, BF, F), part, mask=given)
                part = tl.where(given, 0.0, part)
            at = tile(dfirst, program * SIZE + first, K, BF, F)
            more_m, more_carried, more_s = _unmove(
                tl.load(at), at, tile(states, chunk * SIZE + first, K, BF, F),
                tile(dheld, program * PAIR + first, K, BF, F), is_held,
                tile(dbase, program * PAIR + first, K, BF, F), part,
                tl.trans(query), tl.load(tile(dinner, chunk * (C * F) + first, C, BF, F)),
                read_m, read_s, kept_m, kept_s, carried, PAIR, MOMENTUM, BASE, PRECISION,
            )  # fmt: skip
            dkept_m, dcarried, dkept_s = dkept_m + more_m, dcarried + more_carried, dkept_s + more_s
        tl.store(tile(dk, chunk * (C * K), C, K, K), dkey.to(TYPE))
        tl.store(dcarry + chunk * (n_parts * n_parts), dkept_m)
        if MOMENTUM:
            tl.store(dcarry + chunk * 4 + 1, dcarried)
            tl.store(dcarry + chunk * 4 + 2, 0.0)
            tl.store(dcarry + chunk * 4 + 3, dkept_s)
        tl.debug_barrier()
