"""The scan backwards, from the last mini-batch of a document to its first: the gradients D by N and E by S, in the
registers of SPLIT programs or in the L2 cache, as N and S are in the scan, tokens as columns.

Only what the gradients by earlier mini-batches wait for is here; what is left behind for every mini-batch, D and E
after it and the gradients by z and by E_2 W_2^T, is what the kernels of writes.py find the others from.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.deep.tiles import column_sum, dot, first_token, scaled, square, tile, turned
from models.kernels.exchange import meet, total
from models.kernels.momentum import tiles as rows


@triton.jit
def scan_gradient(
    q,  # [B, N C, H, K]
    k,  # [B, N C, H, K]
    vectors,  # [B H N, ROWS, C]
    runs,  # [P, 4]
    references,  # [B H N, PAIR]
    hidden,  # [B H N, C, F]
    errors1,  # [B H N, C, F]
    errors2,  # [B H N, C, V]
    limits,  # [B H N, 3, C]
    slopes,  # [B H N, C, F]
    curves,  # [B H N, C, F]
    inner,  # [B H N, C, F]: what the queries put to the second layer
    dinner,  # [B H N, C, F]: the gradient by what they got of the first
    do,  # [B, N C, H, V]
    dhidden,  # [B H N, C, F]: of the outputs, by X_2
    derrors1,  # [B H N, C, F]: by what is written of E_1
    derrors2,  # [B H N, C, V]: and of E_2
    dheld,  # [P H, PAIR]
    dfirst,  # in and out, [P H, SIZE]: by N and S
    dstates,  # out, [B H N, SIZE]: by N and S after every mini-batch
    dback,  # out, [B H N, C, F]: by E_2 W_2^T
    dz,  # out, [B H N, C, F]: by k W_1
    dv,  # out, [B, N C, H, V]: which is minus the one by X_2 W_2
    dlength,  # out, [B H N, C]: by |k|^2 of the limit
    dreference,  # out, [B H, PAIR]
    sums,  # [P H, SPLIT, C (2 V + 1)]: what programs exchange
    arrived,  # [P H], zeros at first
    N,
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
    SPLIT: tl.constexpr = F // BF
    program, part = (tl.program_id(0) // SPLIT).to(tl.int64), tl.program_id(0) % SPLIT
    run, head = program // H, program % H
    PAIR: tl.constexpr = K * F + F * V
    n_parts: tl.constexpr = 1 + MOMENTUM
    SIZE: tl.constexpr = n_parts * PAIR
    TYPE: tl.constexpr = k.dtype.element_ty
    bh = tl.load(runs + 4 * run).to(tl.int64) * H + head
    begin, end, final = tl.load(runs + 4 * run + 1), tl.load(runs + 4 * run + 2), tl.load(runs + 4 * run + 3)
    t = tl.arange(0, C)[None, :]
    first, second = part * BF, K * F + part * BF * V
    WIDTH: tl.constexpr = C * (2 * V + 1)
    sums += program * (SPLIT * WIDTH)
    at_share = sums + 2 * C * V + t

    at = program * SIZE
    D1, D2 = tl.load(turned(dfirst, at + first, BF, K, F)), tl.load(tile(dfirst, at + second, BF, V, V))
    at_E1, at_E2 = at + PAIR + first, at + PAIR + second
    for i in tl.range(0, end - begin, disable_licm=True):
        n = end - 1 - i
        chunk, tokens = bh * N + n, first_token(bh, n, N, H, C)
        gates = vectors + chunk * (rows.ROWS * C)
        of_hidden = chunk * (C * F) + first
        key, e = tl.load(turned(k, tokens * K, K, C, H * K)), tl.load(turned(errors2, chunk * (C * V), V, C, V))
        at_limits = limits + chunk * (3 * C) + t
        share, widths, sizes1 = tl.load(at_limits), tl.load(at_limits + C), tl.load(at_limits + 2 * C)
        write_m = tl.load(gates + rows.WRITE_M * C + t)
        x, e1 = tl.load(turned(hidden, of_hidden, BF, C, F)), tl.load(turned(errors1, of_hidden, BF, C, F))

        # what the writes hand back, by E_1 and E_2
        at = chunk * SIZE
        after1, after2 = D1.to(TYPE), D2.to(TYPE)
        de1 = tl.load(turned(derrors1, of_hidden, BF, C, F)).to(tl.float32)
        de1 += dot(after1, scaled(write_m, key), PRECISION)
        seen = dot(tl.trans(after2), scaled(write_m, x), PRECISION)
        if MOMENTUM:
            write_s = tl.load(gates + rows.WRITE_S * C + t)
            E1, E2 = tl.load(turned(dfirst, at_E1, BF, K, F)).to(TYPE), tl.load(tile(dfirst, at_E2, BF, V, V)).to(TYPE)
            de1 += dot(E1, scaled(write_s, key), PRECISION)
            seen += dot(tl.trans(E2), scaled(write_s, x), PRECISION)
            tl.store(turned(dstates, at + PAIR + first, BF, K, F), E1)
            tl.store(tile(dstates, at + PAIR + second, BF, V, V), E2)
        tl.store(turned(dstates, at + first, BF, K, F), after1)
        tl.store(tile(dstates, at + second, BF, V, V), after2)
        dshare = column_sum(de1 * e1.to(tl.float32))
        if SPLIT > 1:
            tl.store(tile(sums, part * WIDTH, V, C, C), seen)
            tl.store(at_share + part * WIDTH, dshare)
            meet(arrived + program, SPLIT * (2 * i + 1))
            seen, dshare = total(tile(sums, 0, V, C, C), SPLIT, WIDTH), total(at_share, SPLIT, WIDTH)
        de = tl.load(turned(derrors2, chunk * (C * V), V, C, V)).to(tl.float32) + seen
        dshare += column_sum(de * e.to(tl.float32))

        # through the limit and E_1, to E_2. Where nothing is held the share is one, whatever the errors
        size, length = square(e), square(key)
        moved = length * sizes1 + widths * size
        dsize = tl.where(moved > size, dshare / (tl.maximum(size, moved) + NOTHING), 0.0)
        dmoved = -share * dsize
        W2 = tl.load(tile(references, chunk * PAIR + second, BF, V, V))
        slope = tl.load(turned(slopes, of_hidden, BF, C, F)).to(tl.float32)
        de1 = share * de1 + 2 * dmoved * length * e1.to(tl.float32)
        by_back, by_z = (de1 * slope).to(TYPE), de1 * tl.load(turned(curves, of_hidden, BF, C, F)).to(tl.float32)
        seen = dot(tl.trans(W2), by_back, PRECISION)
        tl.store(turned(dback, of_hidden, BF, C, F), by_back)
        if SPLIT > 1:
            tl.store(tile(sums, part * WIDTH + C * V, V, C, C), seen)
            meet(arrived + program, SPLIT * (2 * i + 2))
            seen = total(tile(sums, C * V, V, C, C), SPLIT, WIDTH)
        de = (share * de + 2 * (dsize + dmoved * widths) * e.to(tl.float32) + seen).to(TYPE)
        if part == 0:
            tl.store(turned(dv, tokens * V, V, C, H * V), de)
            tl.store(dlength + chunk * C + t, dmoved * sizes1)

        # to X_2 and z
        dx = tl.load(turned(dhidden, of_hidden, BF, C, F)).to(tl.float32) + 2 * dmoved * size * x.to(tl.float32)
        dx -= dot(W2, de, PRECISION)
        dx += dot(after2, scaled(write_m * share, e), PRECISION)
        if MOMENTUM:
            E2 = tl.load(tile(dfirst, at_E2, BF, V, V))
            dx += dot(E2.to(TYPE), scaled(write_s * share, e), PRECISION)
        by_z = (by_z + dx * slope).to(TYPE)
        part1 = dot(by_z, tl.trans(key), PRECISION)
        part2 = dot(by_back, tl.trans(e), PRECISION) - dot(x, tl.trans(de), PRECISION)
        tl.store(turned(dz, of_hidden, BF, C, F), by_z)
        if REFERENCE:  # noqa: SIM102, decided when this is compiled
            if n == 0:
                tl.store(turned(dreference, bh * PAIR + first, BF, K, F), part1)
                tl.store(tile(dreference, bh * PAIR + second, BF, V, V), part2)
                part1, part2 = tl.zeros_like(part1), tl.zeros_like(part2)

        # to N and S before the mini-batch
        kept_m, read_m = tl.load(gates + rows.A * C + C - 1), tl.load(gates + rows.A * C + tl.trans(t))
        query, doutput = tl.load(tile(q, tokens * K, C, K, H * K)), tl.load(tile(do, tokens * V, C, V, H * V))
        by_query, y = tl.load(turned(dinner, of_hidden, BF, C, F)), tl.load(turned(inner, of_hidden, BF, C, F))
        part1 += kept_m * D1 + dot(by_query, scaled(read_m, query), PRECISION)
        part2 += kept_m * D2 + dot(y, scaled(read_m, doutput), PRECISION)
        if MOMENTUM:
            carried, kept_s = tl.load(gates + rows.F * C + C - 1), tl.load(gates + rows.M * C + C - 1)
            read_s = tl.load(gates + rows.F * C + tl.trans(t))
            E2 = kept_s * E2 + carried * D2 + dot(y, scaled(read_s, doutput), PRECISION)
            E1 = kept_s * tl.load(turned(dfirst, at_E1, BF, K, F)) + carried * D1
            E1 += dot(by_query, scaled(read_s, query), PRECISION)
            tl.store(tile(dfirst, at_E2, BF, V, V), E2)
            tl.store(turned(dfirst, at_E1, BF, K, F), E1)
            tl.debug_barrier()
        D1, D2 = part1, part2
        if n == final:
            D1 += tl.load(turned(dheld, program * PAIR + first, BF, K, F))
            D2 += tl.load(tile(dheld, program * PAIR + second, BF, V, V))
    at = program * SIZE
    tl.store(turned(dfirst, at + first, BF, K, F), D1)
    tl.store(tile(dfirst, at + second, BF, V, V), D2)
