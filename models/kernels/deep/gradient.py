"""The scan backwards, from the last mini-batch of a document to its first: the gradients D by N and E by S, in the
registers of SPLIT programs or in the L2 cache, as N and S are in the scan, tokens as columns.

Only what the gradients by earlier mini-batches wait for is here; what is left behind for every mini-batch, D and E
after it and the gradients by z and by E_2 W_2^T, is what the kernels of writes.py find the others from.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.deep.tiles import (
    NOTHING,
    column_sum,
    dot,
    first_token,
    load_layers,
    of_document,
    of_tokens,
    scaled,
    square,
    store_layers,
    tile,
    turned,
    turned_layers,
    turned_units,
)
from models.kernels.exchange import meet, total
from models.kernels.momentum import tiles as rows


@triton.jit
def scan_gradient(call, left, found, sums, arrived, S: tl.constexpr):
    """From `dstates` to `dreference`, and dfirst. sums [P H, SPLIT, C (2 V + 1)] and arrived as in the scan."""
    program, part, bh, begin, end, final = of_document(call, S)
    TYPE: tl.constexpr = call.k.dtype.element_ty
    t = tl.arange(0, S.C)[None, :]
    WIDTH: tl.constexpr = S.C * (2 * S.V + 1)
    sums += program * (S.split * WIDTH)
    at_share = sums + 2 * S.C * S.V + t

    D1, D2 = load_layers(found.dfirst, program * S.size, part, S)
    for i in tl.range(0, end - begin, disable_licm=True):
        n = end - 1 - i
        chunk, tokens = bh * call.N + n, first_token(bh, n, call, S)
        gates = call.vectors + chunk * (rows.ROWS * S.C)
        key = tl.load(turned(call.k, tokens * S.K, S.K, S.C, call.H * S.K))
        e = tl.load(turned(left.errors2, chunk * (S.C * S.V), S.V, S.C, S.V))
        at_limits = left.limits + chunk * (3 * S.C) + t
        share, widths, sizes1 = tl.load(at_limits), tl.load(at_limits + S.C), tl.load(at_limits + 2 * S.C)
        write_m = tl.load(gates + rows.WRITE_M * S.C + t)
        x, e1 = tl.load(turned_units(left.hidden, chunk, part, S)), tl.load(turned_units(left.errors1, chunk, part, S))

        # what the writes hand back, by E_1 and E_2
        after1, after2 = D1.to(TYPE), D2.to(TYPE)
        at_E1, at_E2 = turned_layers(found.dfirst, program * S.size + S.pair, part, S)
        de1 = tl.load(turned_units(found.derrors1, chunk, part, S)).to(tl.float32)
        de1 += dot(after1, scaled(write_m, key), S)
        seen = dot(tl.trans(after2), scaled(write_m, x), S)
        if S.MOMENTUM:
            write_s = tl.load(gates + rows.WRITE_S * S.C + t)
            E1, E2 = tl.load(at_E1).to(TYPE), tl.load(at_E2).to(TYPE)
            de1 += dot(E1, scaled(write_s, key), S)
            seen += dot(tl.trans(E2), scaled(write_s, x), S)
            store_layers(found.dstates, chunk * S.size + S.pair, part, E1, E2, S)
        store_layers(found.dstates, chunk * S.size, part, after1, after2, S)
        dshare = column_sum(de1 * e1.to(tl.float32))
        if S.split > 1:
            tl.store(tile(sums, part * WIDTH, S.V, S.C, S.C), seen)
            tl.store(at_share + part * WIDTH, dshare)
            meet(arrived + program, S.split * (2 * i + 1))
            seen, dshare = total(tile(sums, 0, S.V, S.C, S.C), S.split, WIDTH), total(at_share, S.split, WIDTH)
        de = tl.load(turned(found.derrors2, chunk * (S.C * S.V), S.V, S.C, S.V)).to(tl.float32) + seen
        dshare += column_sum(de * e.to(tl.float32))

        # through the limit and E_1, to E_2. Where nothing is held the share is one, whatever the errors
        size, length = square(e), square(key)
        moved = length * sizes1 + widths * size
        dsize = tl.where(moved > size, dshare / (tl.maximum(size, moved) + NOTHING), 0.0)
        dmoved = -share * dsize
        W2 = tl.load(turned_layers(left.references, chunk * S.pair, part, S)[1])
        slope = tl.load(turned_units(left.slopes, chunk, part, S)).to(tl.float32)
        de1 = share * de1 + 2 * dmoved * length * e1.to(tl.float32)
        by_back = (de1 * slope).to(TYPE)
        by_z = de1 * tl.load(turned_units(left.curves, chunk, part, S)).to(tl.float32)
        seen = dot(tl.trans(W2), by_back, S)
        tl.store(turned_units(found.dback, chunk, part, S), by_back)
        if S.split > 1:
            tl.store(tile(sums, part * WIDTH + S.C * S.V, S.V, S.C, S.C), seen)
            meet(arrived + program, S.split * (2 * i + 2))
            seen = total(tile(sums, S.C * S.V, S.V, S.C, S.C), S.split, WIDTH)
        de = (share * de + 2 * (dsize + dmoved * widths) * e.to(tl.float32) + seen).to(TYPE)
        if part == 0:
            tl.store(turned(found.dv, tokens * S.V, S.V, S.C, call.H * S.V), de)
            tl.store(found.dlength + chunk * S.C + t, dmoved * sizes1)

        # to X_2 and z
        dx = tl.load(turned_units(found.dhidden, chunk, part, S)).to(tl.float32)
        dx += 2 * dmoved * size * x.to(tl.float32)
        dx -= dot(W2, de, S)
        dx += dot(after2, scaled(write_m * share, e), S)
        if S.MOMENTUM:
            E2 = tl.load(at_E2)
            dx += dot(E2.to(TYPE), scaled(write_s * share, e), S)
        by_z = (by_z + dx * slope).to(TYPE)
        part1 = dot(by_z, tl.trans(key), S)
        part2 = dot(by_back, tl.trans(e), S) - dot(x, tl.trans(de), S)
        tl.store(turned_units(found.dz, chunk, part, S), by_z)
        if call.reference is not None:  # noqa: SIM102, decided when this is compiled
            if n == 0:
                store_layers(found.dreference, bh * S.pair, part, part1, part2, S)
                part1, part2 = tl.zeros_like(part1), tl.zeros_like(part2)

        # to N and S before the mini-batch
        kept_m, read_m = tl.load(gates + rows.A * S.C + S.C - 1), tl.load(gates + rows.A * S.C + tl.trans(t))
        query = tl.load(of_tokens(call.q, tokens, S.K, call, S))
        doutput = tl.load(of_tokens(found.do, tokens, S.V, call, S))
        by_query = tl.load(turned_units(found.dinner, chunk, part, S))
        y = tl.load(turned_units(found.inner, chunk, part, S))
        part1 += kept_m * D1 + dot(by_query, scaled(read_m, query), S)
        part2 += kept_m * D2 + dot(y, scaled(read_m, doutput), S)
        if S.MOMENTUM:
            carried, kept_s = tl.load(gates + rows.F * S.C + S.C - 1), tl.load(gates + rows.M * S.C + S.C - 1)
            read_s = tl.load(gates + rows.F * S.C + tl.trans(t))
            E2 = kept_s * E2 + carried * D2 + dot(y, scaled(read_s, doutput), S)
            E1 = kept_s * tl.load(at_E1) + carried * D1
            E1 += dot(by_query, scaled(read_s, query), S)
            tl.store(at_E2, E2)
            tl.store(at_E1, E1)
            tl.debug_barrier()
        D1, D2 = part1, part2
        if n == final:
            held1, held2 = load_layers(found.dheld, program * S.pair, part, S)
            D1, D2 = D1 + held1, D2 + held2
    store_layers(found.dfirst, program * S.size, part, D1, D2, S)
