"""What waits for no other mini-batch once the scan has gone backwards: the gradients by keys, by what carries N and S
on, and by W."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.deep.tiles import (
    dot,
    load_tokens,
    of_chunk,
    of_layers,
    of_program,
    of_queries,
    of_slot,
    of_units,
    row_sum,
    scaled,
    store_tokens,
    zeros,
)
from models.kernels.momentum import tiles as rows


@triton.jit
def writes_gradient(call, left, found, S: tl.constexpr):
    """dk, and the rest of dvectors: dK of k^T (c E_1), and dc = sum over k * (E_1 D^T) and over X_2 D * E_2, of D and E
    each; dA = sum of D N."""
    chunk, head, first, count, opens = of_program(call)
    t = tl.arange(0, S.C)
    key = load_tokens(call.k, first, count, S.K, call, S)
    TYPE: tl.constexpr = key.dtype
    share = tl.load(left.limits + chunk * (3 * S.C) + t)[:, None]
    dkey = load_tokens(found.dkeys, first, count, S.K, call, S).to(tl.float32)
    dkey += 2 * tl.load(found.dlength + chunk * S.C + t)[:, None] * key.to(tl.float32)
    from_m, from_s = zeros(S.C, S.K), zeros(S.C, S.K)
    seen_m, seen_s = zeros(S.C, S.V), zeros(S.C, S.V)
    dkept_m, dcarried, dkept_s = 0.0, 0.0, 0.0
    for j in range(0, S.split):
        u1 = tl.trans(scaled(tl.trans(share), tl.load(of_units(left.errors1, chunk, j, S))))
        x = tl.trans(tl.load(of_units(left.hidden, chunk, j, S)))
        at1, at2 = of_layers(found.dstates, chunk * S.size, j, S)
        before1, before2 = of_layers(left.states, chunk * S.size, j, S)
        D1, D2 = tl.load(at1), tl.load(at2)
        from_m += dot(u1, D1, S)
        seen_m += dot(x, D2, S)
        N1, N2 = tl.load(before1), tl.load(before2)
        R1 = N1
        if call.base is not None:
            R1 = (N1.to(tl.float32) + tl.load(of_layers(call.base, head * S.pair, j, S)[0]).to(tl.float32)).to(TYPE)
        if call.reference is not None:  # noqa: SIM102, decided when this is compiled
            if opens >= 0:
                of_row = opens.to(tl.int64) * call.H + head
                R1 = tl.load(of_layers(call.reference, of_row * S.pair, j, S)[0]).to(TYPE)
        dkey += dot(tl.trans(tl.load(of_units(found.dz, chunk, j, S))), R1, S)
        dkept_m += tl.sum(D1.to(tl.float32) * N1) + tl.sum(D2.to(tl.float32) * N2)
        if S.MOMENTUM:
            S1, S2 = tl.load(before1 + S.pair), tl.load(before2 + S.pair)
            dcarried += tl.sum(D1.to(tl.float32) * S1) + tl.sum(D2.to(tl.float32) * S2)
            E1, E2 = tl.load(at1 + S.pair), tl.load(at2 + S.pair)
            from_s += dot(u1, E1, S)
            seen_s += dot(x, E2, S)
            dkept_s += tl.sum(E1.to(tl.float32) * S1) + tl.sum(E2.to(tl.float32) * S2)
    u2 = share * tl.load(of_chunk(left.errors2, chunk, S.V, S)).to(tl.float32)
    gates, last = chunk * (rows.ROWS * S.C) + t[:, None], t[:, None] == S.C - 1
    dgates = found.dvectors + gates
    dkey += tl.load(call.vectors + gates + rows.WRITE_M * S.C) * from_m
    tl.store(dgates + rows.WRITE_M * S.C, row_sum(key.to(tl.float32) * from_m) + row_sum(u2 * seen_m))
    tl.store(dgates + rows.A * S.C, tl.load(dgates + rows.A * S.C) + tl.where(last, dkept_m, 0.0))
    if S.MOMENTUM:
        dkey += tl.load(call.vectors + gates + rows.WRITE_S * S.C) * from_s
        tl.store(dgates + rows.WRITE_S * S.C, row_sum(key.to(tl.float32) * from_s) + row_sum(u2 * seen_s))
        tl.store(dgates + rows.F * S.C, tl.load(dgates + rows.F * S.C) + tl.where(last, dcarried, 0.0))
        tl.store(dgates + rows.M * S.C, tl.where(last, dkept_s, 0.0))
    store_tokens(found.dk, first, count, dkey, S.K, call, S)


@triton.jit(do_not_specialize=["L"])
def base_gradient(call, left, found, dbase, L, S: tl.constexpr):
    """dbase [G, H, PAIR], of the slots of a group. W is read by every query and, in R = W + N, by every key: k^T dz +
    q^T dz_q and dback^T E_2 - X_2^T dv + y^T do, summed over mini-batches. An R that was handed in does not hang on W.
    """
    j, head, group, groups = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    by1, by2 = zeros(S.BF, S.K), zeros(S.BF, S.V)
    for n in range(group, L, groups):
        chunk, first, count, opens = of_slot(call, n, head)
        hangs = 1.0
        if call.reference is not None:
            hangs = tl.where(opens >= 0, 0.0, 1.0)
        key, query = load_tokens(call.k, first, count, S.K, call, S), load_tokens(call.q, first, count, S.K, call, S)
        e = tl.load(of_chunk(left.errors2, chunk, S.V, S))
        de = load_tokens(found.dv, first, count, S.V, call, S)
        by_key = dot(tl.load(of_units(found.dz, chunk, j, S)), key, S)
        by1 += hangs * by_key + dot(tl.trans(tl.load(of_queries(found.dinner, chunk, j, S))), query, S)
        by_key = dot(tl.load(of_units(found.dback, chunk, j, S)), e, S)
        by_key -= dot(tl.load(of_units(left.hidden, chunk, j, S)), de, S)
        doutput = load_tokens(found.do, first, count, S.V, call, S)
        by2 += hangs * by_key + dot(tl.trans(tl.load(of_queries(found.inner, chunk, j, S))), doutput, S)
    at1, at2 = of_layers(dbase, (group * call.H + head) * S.pair, j, S)
    tl.store(at1, by1)
    tl.store(at2, by2)
