"""What waits for no other mini-batch once the scan has gone backwards: the gradients by keys, by what carries N and S
on, and by W."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.deep.tiles import dot, first_token, of_chunk, of_layers, of_tokens, of_units, row_sum, scaled, zeros
from models.kernels.momentum import tiles as rows


@triton.jit
def writes_gradient(call, left, found, S: tl.constexpr):
    """dk, and the rest of dvectors: dK of k^T (c E_1), and dc = sum over k * (E_1 D^T) and over X_2 D * E_2, of D and E
    each; dA = sum of D N."""
    n, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunk, tokens = bh * call.N + n, first_token(bh, n, call, S)
    t = tl.arange(0, S.C)
    key = tl.load(of_tokens(call.k, tokens, S.K, call, S))
    share = tl.load(left.limits + chunk * (3 * S.C) + t)[:, None]
    dkey = tl.load(of_tokens(found.dkeys, tokens, S.K, call, S)).to(tl.float32)
    dkey += 2 * tl.load(found.dlength + chunk * S.C + t)[:, None] * key.to(tl.float32)
    from_m, from_s = zeros(S.C, S.K), zeros(S.C, S.K)
    seen_m, seen_s = zeros(S.C, S.V), zeros(S.C, S.V)
    dkept_m, dcarried, dkept_s = 0.0, 0.0, 0.0
    for j in range(0, S.split):
        u1 = scaled(share, tl.load(of_units(left.errors1, chunk, j, S)))
        x = tl.load(of_units(left.hidden, chunk, j, S))
        R1, _ = of_layers(left.references, chunk * S.pair, j, S)
        dkey += dot(tl.load(of_units(found.dz, chunk, j, S)), tl.trans(tl.load(R1)), S)
        at1, at2 = of_layers(found.dstates, chunk * S.size, j, S)
        before1, before2 = of_layers(left.states, chunk * S.size, j, S)
        D1, D2 = tl.load(at1), tl.load(at2)
        from_m += dot(u1, tl.trans(D1), S)
        seen_m += dot(x, D2, S)
        N1, N2 = tl.load(before1), tl.load(before2)
        dkept_m += tl.sum(D1.to(tl.float32) * N1) + tl.sum(D2.to(tl.float32) * N2)
        if S.MOMENTUM:
            S1, S2 = tl.load(before1 + S.pair), tl.load(before2 + S.pair)
            dcarried += tl.sum(D1.to(tl.float32) * S1) + tl.sum(D2.to(tl.float32) * S2)
            E1, E2 = tl.load(at1 + S.pair), tl.load(at2 + S.pair)
            from_s += dot(u1, tl.trans(E1), S)
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
    tl.store(of_tokens(found.dk, tokens, S.K, call, S), dkey)


@triton.jit
def base_gradient(call, left, found, dbase, S: tl.constexpr):
    """dbase [G, H, PAIR], of the chunks of a group. W is read by every query and, in R = W + N, by every key: k^T dz +
    q^T dz_q and dback^T E_2 - X_2^T dv + y^T do, summed over mini-batches. An R that was handed in does not hang on W.
    """
    j, head, group, groups = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    by1, by2 = zeros(S.K, S.BF), zeros(S.BF, S.V)
    for m in range(group, call.B * call.N, groups):
        n, bh = m % call.N, ((m // call.N) * call.H + head).to(tl.int64)
        chunk, tokens = bh * call.N + n, first_token(bh, n, call, S)
        hangs = 1.0
        if call.reference is not None:
            hangs = tl.where(n == 0, 0.0, 1.0)
        key, query = tl.load(of_tokens(call.k, tokens, S.K, call, S)), tl.load(of_tokens(call.q, tokens, S.K, call, S))
        e, de = tl.load(of_chunk(left.errors2, chunk, S.V, S)), tl.load(of_tokens(found.dv, tokens, S.V, call, S))
        by_key = dot(tl.trans(key), tl.load(of_units(found.dz, chunk, j, S)), S)
        by1 += hangs * by_key + dot(tl.trans(query), tl.load(of_units(found.dinner, chunk, j, S)), S)
        by_key = dot(tl.trans(tl.load(of_units(found.dback, chunk, j, S))), e, S)
        by_key -= dot(tl.trans(tl.load(of_units(left.hidden, chunk, j, S))), de, S)
        doutput = tl.load(of_tokens(found.do, tokens, S.V, call, S))
        by2 += hangs * by_key + dot(tl.trans(tl.load(of_units(found.inner, chunk, j, S))), doutput, S)
    at1, at2 = of_layers(dbase, (group * call.H + head).to(tl.int64) * S.pair, j, S)
    tl.store(at1, by1)
    tl.store(at2, by2)
