"""The scan backwards, from the last mini-batch of a document to its first: the gradients D by N and E by S, in the
registers of SPLIT programs or in the L2 cache, as N and S are in the scan, tokens as columns.

Only what the gradients by earlier mini-batches wait for is here; what is left behind for every mini-batch, D and E
after it and the gradients by z and by E_2 W_2^T, is what the kernels of writes.py find the others from. While the
programs of a document exchange sums they do what waits for none: the queries' part of D and E, what is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.deep.tiles import (
    NOTHING,
    column_sum,
    dot,
    load_layers,
    load_layers_where,
    load_tokens,
    load_turned_tokens,
    of_document,
    of_layers,
    of_queries,
    of_slot,
    of_units,
    scaled,
    silu,
    silu_curve,
    square,
    store_layers,
    store_turned_tokens,
    tile,
    turned,
    zeros,
)
from models.kernels.exchange import arrive, total, wait
from models.kernels.momentum import tiles as rows


@triton.jit
def _last(of_row, ends, found, momenta, program, part, S: tl.constexpr):
    """D after a document, and E in its place."""
    D1, D2 = zeros(S.BF, S.K), zeros(S.BF, S.V)
    E1, E2 = D1, D2
    if found.dlast is not None:
        D1, D2 = load_layers_where(ends, found.dlast, of_row * S.size, part, S)
        if S.MOMENTUM:
            E1, E2 = load_layers_where(ends, found.dlast, of_row * S.size + S.pair, part, S)
    if S.MOMENTUM:
        store_layers(momenta, program * S.pair, part, E1, E2, S)
        tl.debug_barrier()
    return D1, D2


@triton.jit
def _second_layer(chunk, opens, head, of_row, part, call, left, TYPE: tl.constexpr, S: tl.constexpr):
    """R of W_2."""
    W2 = tl.load(of_layers(left.states, chunk * S.size, part, S)[1])
    if call.base is not None:
        base2 = tl.load(of_layers(call.base, head * S.pair, part, S)[1])
        W2 = (W2.to(tl.float32) + base2.to(tl.float32)).to(TYPE)
    if call.reference is not None:  # noqa: SIM102, decided when this is compiled
        if opens >= 0:
            W2 = tl.load(of_layers(call.reference, of_row * S.pair, part, S)[1]).to(TYPE)
    return W2


@triton.jit
def scan_gradient(call, left, found, momenta, sums, arrived, S: tl.constexpr):
    """From `dstates` to `dreference`, and dfirst. momenta [P H, PAIR] is E of every document; sums [P H, 2,
    SPLIT, C (3 V + 1)] and arrived as in the scan.

    What the limit says of E_1 is a number d for each token, which wants sums over the whole hidden layer, and its part
    of the gradient by E_2 d times what W_2 makes of s' * E_1. So both products with W_2 are summed at once, and d is
    put in later: the programs meet once for a mini-batch.
    """
    program, part, head, row, begin, end, ends = of_document(call, S)
    TYPE: tl.constexpr = call.k.dtype.element_ty
    t = tl.arange(0, S.C)[None, :]
    SUM: tl.constexpr = S.C * S.V
    WIDTH: tl.constexpr = 3 * SUM + S.C
    sums += program * (2 * S.split * WIDTH)
    of_row = row * call.H + head

    D1, D2 = _last(of_row, ends, found, momenta, program, part, S)
    for i in tl.range(0, end - begin, disable_licm=True):
        n = end - 1 - i
        chunk, first, count, opens = of_slot(call, n, head)
        given = sums + i % 2 * (S.split * WIDTH)  # one meeting later the other programs may not have read theirs
        own = given + part * WIDTH
        gates = call.vectors + chunk * (rows.ROWS * S.C)
        key = load_turned_tokens(call.k, first, count, S.K, call, S)
        write_m = tl.load(gates + rows.WRITE_M * S.C + t)
        x, e1 = tl.load(of_units(left.hidden, chunk, part, S)), tl.load(of_units(left.errors1, chunk, part, S))

        # what the writes hand back, by E_1 and E_2
        after1, after2 = D1.to(TYPE), D2.to(TYPE)
        at_E1, at_E2 = of_layers(momenta, program * S.pair, part, S)
        at_after1, at_after2 = of_layers(found.dstates, chunk * S.size, part, S)
        de1 = tl.load(of_units(found.derrors1, chunk, part, S)).to(tl.float32)
        de1 += write_m * dot(after1, key, S)
        seen = write_m * dot(tl.trans(after2), x, S)
        if S.MOMENTUM:
            write_s = tl.load(gates + rows.WRITE_S * S.C + t)
            E1, E2 = tl.load(at_E1).to(TYPE), tl.load(at_E2).to(TYPE)
            de1 += write_s * dot(E1, key, S)
            seen += write_s * dot(tl.trans(E2), x, S)
        dshare = column_sum(de1 * e1.to(tl.float32))
        slope = silu(tl.load(of_units(left.z, chunk, part, S)).to(tl.float32))[1]
        W2 = tl.trans(_second_layer(chunk, opens, head, of_row, part, call, left, TYPE, S))
        back, limited = dot(W2, (de1 * slope).to(TYPE), S), dot(W2, (e1.to(tl.float32) * slope).to(TYPE), S)
        if S.split > 1:
            tl.store(tile(own, 0, S.V, S.C, S.C), seen)
            tl.store(tile(own, SUM, S.V, S.C, S.C), back)
            tl.store(tile(own, 2 * SUM, S.V, S.C, S.C), limited)
            tl.store(own + 3 * SUM + t, dshare)
            arrive(arrived + program)
        tl.store(at_after1, after1)
        tl.store(at_after2, after2)
        if S.MOMENTUM:
            tl.store(at_after1 + S.pair, E1)
            tl.store(at_after2 + S.pair, E2)

        # what the queries say of N and S before the mini-batch, and what those hand on
        query = load_tokens(call.q, first, count, S.K, call, S)
        doutput = load_tokens(found.do, first, count, S.V, call, S)
        by_query = tl.trans(tl.load(of_queries(found.dinner, chunk, part, S)))
        y = tl.trans(tl.load(of_queries(found.inner, chunk, part, S)))
        kept_m, read_m = tl.load(gates + rows.A * S.C + S.C - 1), tl.load(gates + rows.A * S.C + tl.trans(t))
        if S.MOMENTUM:
            carried, kept_s = tl.load(gates + rows.F * S.C + S.C - 1), tl.load(gates + rows.M * S.C + S.C - 1)
            read_s = tl.load(gates + rows.F * S.C + tl.trans(t))
            E1 = dot(by_query, scaled(read_s, query), S, kept_s * tl.load(at_E1) + carried * D1)
            tl.store(at_E1, E1)
            E2 = dot(y, scaled(read_s, doutput), S, kept_s * tl.load(at_E2) + carried * D2)
            tl.store(at_E2, E2)
        D1 = dot(by_query, scaled(read_m, query), S, kept_m * D1)
        D2 = dot(y, scaled(read_m, doutput), S, kept_m * D2)

        # to X_2, but for what comes by E_2. Tiles are read again rather than kept in registers
        e = tl.load(turned(left.errors2, chunk * SUM, S.V, S.C, S.V))
        at_limits = left.limits + chunk * (3 * S.C) + t
        share = tl.load(at_limits)
        dx = tl.load(of_units(found.dhidden, chunk, part, S)).to(tl.float32)
        if S.split == 1:
            tl.debug_barrier()
        dx += write_m * share * dot(tl.load(at_after2), e, S)
        if S.MOMENTUM:
            dx += write_s * share * dot(tl.load(at_after2 + S.pair), e, S)
        if S.split > 1:
            wait(arrived + program, S.split * (i + 1))
            seen = total(tile(given, 0, S.V, S.C, S.C), S.split, WIDTH)
            back = total(tile(given, SUM, S.V, S.C, S.C), S.split, WIDTH)
            limited = total(tile(given, 2 * SUM, S.V, S.C, S.C), S.split, WIDTH)
            dshare = total(given + 3 * SUM + t, S.split, WIDTH)

        # through the limit to E_2. Where nothing is held the share is one, whatever the errors
        de = tl.load(turned(found.derrors2, chunk * SUM, S.V, S.C, S.V)).to(tl.float32) + seen
        dshare += column_sum(de * e.to(tl.float32))
        widths, sizes1 = tl.load(at_limits + S.C), tl.load(at_limits + 2 * S.C)
        size, length = square(e), square(key)
        moved = length * sizes1 + widths * size
        dsize = tl.where(moved > size, dshare / (tl.maximum(size, moved) + NOTHING), 0.0)
        dmoved = -share * dsize
        de = share * (de + back) + 2 * (dsize + dmoved * widths) * e.to(tl.float32) + 2 * dmoved * length * limited
        de = de.to(TYPE)

        # to E_1, z, and N before the mini-batch or R
        de1 = share * de1 + 2 * dmoved * length * tl.load(of_units(left.errors1, chunk, part, S)).to(tl.float32)
        z, x = tl.load(of_units(left.z, chunk, part, S)).to(tl.float32), tl.load(of_units(left.hidden, chunk, part, S))
        dx += 2 * dmoved * size * x.to(tl.float32)
        dx -= dot(_second_layer(chunk, opens, head, of_row, part, call, left, TYPE, S), de, S)
        slope = silu(z)[1]
        by_back = (de1 * slope).to(TYPE)
        by_z = de1 * silu_curve(z) * tl.load(of_units(left.back, chunk, part, S)).to(tl.float32)
        by_z = (by_z + dx * slope).to(TYPE)
        if call.reference is None:
            D1 = dot(by_z, tl.trans(key), S, D1)
            D2 = dot(by_back, tl.trans(e), S, D2)
            D2 -= dot(x, tl.trans(de), S)
        else:
            part1 = dot(by_z, tl.trans(key), S)
            part2 = dot(by_back, tl.trans(e), S) - dot(x, tl.trans(de), S)
            if opens >= 0:
                store_layers(found.dreference, of_row * S.pair, part, part1, part2, S)
                part1, part2 = tl.zeros_like(part1), tl.zeros_like(part2)
            D1, D2 = D1 + part1, D2 + part2
        tl.store(of_units(found.dback, chunk, part, S), by_back)
        tl.store(of_units(found.dz, chunk, part, S), by_z)
        if part == 0:
            store_turned_tokens(found.dv, first, count, de, S.V, call, S)
            tl.store(found.dlength + chunk * S.C + t, dmoved * sizes1)
        if found.dheld is not None:  # noqa: SIM102, decided when this is compiled
            if i == 0:
                held1, held2 = load_layers_where(ends, found.dheld, of_row * S.pair, part, S)
                D1, D2 = D1 + held1, D2 + held2
        tl.debug_barrier()
    if found.dfirst is not None:
        store_layers(found.dfirst, program * S.size, part, D1, D2, S)
        if S.MOMENTUM:
            E1, E2 = load_layers(momenta, program * S.pair, part, S)
            store_layers(found.dfirst, program * S.size + S.pair, part, E1, E2, S)
