"""What waits for no other mini-batch once the scan has gone backwards: the gradients by keys, by what carries N and S
on, and by W."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.deep.tiles import dot, first_token, row_sum, scaled, tile
from models.kernels.momentum import tiles as rows


@triton.jit
def writes_gradient(
    k,  # [B, N C, H, K]
    vectors,  # [B H N, ROWS, C]
    states,  # [B H N, SIZE]
    references,  # [B H N, PAIR]
    hidden,  # [B H N, C, F]
    errors1,  # [B H N, C, F]
    errors2,  # [B H N, C, V]
    limits,  # [B H N, 3, C]
    dkeys,  # [B, N C, H, K]: of the outputs
    dstates,  # [B H N, SIZE]: D and E after the mini-batch
    dz,  # [B H N, C, F]
    dlength,  # [B H N, C]
    dk,  # out, [B, N C, H, K]
    dvectors,  # in and out, [B H N, ROWS, C]: A, F and what carries on
    N,
    H,
    C: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    BF: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BASE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK of k^T (c E_1), and dc = sum over k * (E_1 D^T) and over X_2 D * E_2, of D and E each; dA = sum of D N."""
    n, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunk, tokens = bh * N + n, first_token(bh, n, N, H, C)
    PAIR: tl.constexpr = K * F + F * V
    n_parts: tl.constexpr = 1 + MOMENTUM
    SIZE: tl.constexpr = n_parts * PAIR
    t = tl.arange(0, C)
    key, share = tl.load(tile(k, tokens * K, C, K, H * K)), tl.load(limits + chunk * (3 * C) + t)[:, None]
    dkey = tl.load(tile(dkeys, tokens * K, C, K, H * K)).to(tl.float32)
    dkey += 2 * tl.load(dlength + chunk * C + t)[:, None] * key.to(tl.float32)
    from_m, from_s = tl.zeros([C, K], tl.float32), tl.zeros([C, K], tl.float32)
    seen_m, seen_s = tl.zeros([C, V], tl.float32), tl.zeros([C, V], tl.float32)
    dkept_m, dcarried, dkept_s = 0.0, 0.0, 0.0
    for j in range(0, F // BF):
        first, second, of_tile = j * BF, K * F + j * BF * V, chunk * (C * F) + j * BF
        u1 = scaled(share, tl.load(tile(errors1, of_tile, C, BF, F)))
        x = tl.load(tile(hidden, of_tile, C, BF, F))
        dkey += dot(
            tl.load(tile(dz, of_tile, C, BF, F)), tl.trans(tl.load(tile(references, chunk * PAIR + first, K, BF, F))),
            PRECISION,
        )  # fmt: skip
        at1, at2 = tile(dstates, chunk * SIZE + first, K, BF, F), tile(dstates, chunk * SIZE + second, BF, V, V)
        before1, before2 = tile(states, chunk * SIZE + first, K, BF, F), tile(states, chunk * SIZE + second, BF, V, V)
        D1, D2 = tl.load(at1), tl.load(at2)
        from_m += dot(u1, tl.trans(D1), PRECISION)
        seen_m += dot(x, D2, PRECISION)
        N1, N2 = tl.load(before1), tl.load(before2)
        dkept_m += tl.sum(D1.to(tl.float32) * N1) + tl.sum(D2.to(tl.float32) * N2)
        if MOMENTUM:
            S1, S2 = tl.load(before1 + PAIR), tl.load(before2 + PAIR)
            dcarried += tl.sum(D1.to(tl.float32) * S1) + tl.sum(D2.to(tl.float32) * S2)
            E1, E2 = tl.load(at1 + PAIR), tl.load(at2 + PAIR)
            from_s += dot(u1, tl.trans(E1), PRECISION)
            seen_s += dot(x, E2, PRECISION)
            dkept_s += tl.sum(E1.to(tl.float32) * S1) + tl.sum(E2.to(tl.float32) * S2)
    u2 = share * tl.load(tile(errors2, chunk * (C * V), C, V, V)).to(tl.float32)
    gates, last = chunk * (rows.ROWS * C) + t[:, None], t[:, None] == C - 1
    dgates = dvectors + gates
    dkey += tl.load(vectors + gates + rows.WRITE_M * C) * from_m
    tl.store(dgates + rows.WRITE_M * C, row_sum(key.to(tl.float32) * from_m) + row_sum(u2 * seen_m))
    tl.store(dgates + rows.A * C, tl.load(dgates + rows.A * C) + tl.where(last, dkept_m, 0.0))
    if MOMENTUM:
        dkey += tl.load(vectors + gates + rows.WRITE_S * C) * from_s
        tl.store(dgates + rows.WRITE_S * C, row_sum(key.to(tl.float32) * from_s) + row_sum(u2 * seen_s))
        tl.store(dgates + rows.F * C, tl.load(dgates + rows.F * C) + tl.where(last, dcarried, 0.0))
        tl.store(dgates + rows.M * C, tl.where(last, dkept_s, 0.0))
    tl.store(tile(dk, tokens * K, C, K, H * K), dkey.to(key.dtype))


@triton.jit
def base_gradient(
    q,  # [B, N C, H, K]
    k,  # [B, N C, H, K]
    hidden,  # [B H N, C, F]
    errors2,  # [B H N, C, V]
    inner,  # [B H N, C, F]
    dinner,  # [B H N, C, F]
    do,  # [B, N C, H, V]
    dback,  # [B H N, C, F]
    dz,  # [B H N, C, F]
    dv,  # [B, N C, H, V]
    dbase,  # out, [G, H, PAIR]: of the chunks of a group
    B,
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
    PRECISION: tl.constexpr,
):
    """W is read by every query and, in R = W + N, by every key: k^T dz + q^T dz_q and dback^T E_2 - X_2^T dv + y^T do,
    summed over mini-batches. An R that was handed in does not hang on W."""
    j, head, group, groups = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    PAIR: tl.constexpr = K * F + F * V
    by1, by2 = tl.zeros([K, BF], tl.float32), tl.zeros([BF, V], tl.float32)
    for m in range(group, B * N, groups):
        n, bh = m % N, ((m // N) * H + head).to(tl.int64)
        chunk, tokens = bh * N + n, first_token(bh, n, N, H, C)
        of_tile, hangs = chunk * (C * F) + j * BF, 1.0
        if REFERENCE:
            hangs = tl.where(n == 0, 0.0, 1.0)
        key, query = tl.load(tile(k, tokens * K, C, K, H * K)), tl.load(tile(q, tokens * K, C, K, H * K))
        e, de = tl.load(tile(errors2, chunk * (C * V), C, V, V)), tl.load(tile(dv, tokens * V, C, V, H * V))
        by_key = dot(tl.trans(key), tl.load(tile(dz, of_tile, C, BF, F)), PRECISION)
        by1 += hangs * by_key + dot(tl.trans(query), tl.load(tile(dinner, of_tile, C, BF, F)), PRECISION)
        by_key = dot(tl.trans(tl.load(tile(dback, of_tile, C, BF, F))), e, PRECISION)
        by_key -= dot(tl.trans(tl.load(tile(hidden, of_tile, C, BF, F))), de, PRECISION)
        doutput = tl.load(tile(do, tokens * V, C, V, H * V))
        by2 += hangs * by_key + dot(tl.trans(tl.load(tile(inner, of_tile, C, BF, F))), doutput, PRECISION)
    at = (group * H + head).to(tl.int64) * PAIR
    tl.store(tile(dbase, at + j * BF, K, BF, F), by1)
    tl.store(tile(dbase, at + K * F + j * BF * V, BF, V, V), by2)
