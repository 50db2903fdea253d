"""What the queries read, and its gradients: every chunk for itself, all at once, tile by tile of the hidden layer.

z = y W + diag(A) y N + diag(f) y S + ((y X^T) * G) E    for both layers, with E what is written of the errors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.deep.tiles import dot, first_token, row_sum, scaled, silu, tile
from models.kernels.momentum import tiles as rows


@triton.jit
def _first_layer(query, attend, u, at, base, read_m, read_s, PAIR: tl.constexpr, MOMENTUM: tl.constexpr,
                 BASE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """z of a tile of the hidden layer, with attend = (y X^T) * G."""
    z = dot(attend, u, PRECISION) + read_m * dot(query, tl.load(at), PRECISION)
    if MOMENTUM:
        z += read_s * dot(query, tl.load(at + PAIR), PRECISION)
    if BASE:
        z += dot(query, tl.load(base), PRECISION)
    return z


@triton.jit
def outputs(
    q,  # [B, N C, H, K]
    k,  # [B, N C, H, K]
    G,  # [B H N, C, C]
    vectors,  # [B H N, ROWS, C]
    base,  # [H, PAIR], in the dtype of q
    states,  # [B H N, SIZE]
    hidden,  # [B H N, C, F]: X_2
    errors1,  # [B H N, C, F]
    errors2,  # [B H N, C, V]
    limits,  # [B H N, 3, C]
    o,  # out, [B, N C, H, V]
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
    n, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunk, head, tokens = bh * N + n, bh % H, first_token(bh, n, N, H, C)
    gates = vectors + chunk * (rows.ROWS * C) + tl.arange(0, C)[:, None]
    PAIR: tl.constexpr = K * F + F * V
    n_parts: tl.constexpr = 1 + MOMENTUM
    SIZE: tl.constexpr = n_parts * PAIR
    TYPE: tl.constexpr = q.dtype.element_ty
    t = tl.arange(0, C)
    read_m = tl.load(gates + rows.A * C)
    read_s = read_m
    if MOMENTUM:
        read_s = tl.load(gates + rows.F * C)
    share = tl.load(limits + chunk * (3 * C) + t)[:, None]
    query, key = tl.load(tile(q, tokens * K, C, K, H * K)), tl.load(tile(k, tokens * K, C, K, H * K))
    of_writes = tl.load(tile(G, chunk * (C * C), C, C, C))
    attend = (dot(query, tl.trans(key), PRECISION) * of_writes).to(TYPE)
    scores, z = tl.zeros([C, C], tl.float32), tl.zeros([C, V], tl.float32)
    z_m, z_s = tl.zeros([C, V], tl.float32), tl.zeros([C, V], tl.float32)
    for j in range(0, F // BF):
        u1 = scaled(share, tl.load(tile(errors1, chunk * (C * F) + j * BF, C, BF, F)))
        at, at_base = tile(states, chunk * SIZE + j * BF, K, BF, F), tile(base, head * PAIR + j * BF, K, BF, F)
        y, _ = silu(_first_layer(query, attend, u1, at, at_base, read_m, read_s, PAIR, MOMENTUM, BASE, PRECISION))
        y, second = y.to(TYPE), K * F + j * BF * V
        scores += dot(y, tl.trans(tl.load(tile(hidden, chunk * (C * F) + j * BF, C, BF, F))), PRECISION)
        at = tile(states, chunk * SIZE + second, BF, V, V)
        z_m += dot(y, tl.load(at), PRECISION)
        if MOMENTUM:
            z_s += dot(y, tl.load(at + PAIR), PRECISION)
        if BASE:
            z += dot(y, tl.load(tile(base, head * PAIR + second, BF, V, V)), PRECISION)
    u2 = scaled(share, tl.load(tile(errors2, chunk * (C * V), C, V, V)))
    z += read_m * z_m + dot((scores * of_writes).to(TYPE), u2, PRECISION)
    if MOMENTUM:
        z += read_s * z_s
    tl.store(tile(o, tokens * V, C, V, H * V), z.to(TYPE))


@triton.jit
def outputs_gradient(
    q,  # [B, N C, H, K]
    k,  # [B, N C, H, K]
    G,  # [B H N, C, C]
    vectors,  # [B H N, ROWS, C]
    base,  # [H, PAIR], in the dtype of q
    states,  # [B H N, SIZE]
    hidden,  # [B H N, C, F]
    errors1,  # [B H N, C, F]
    errors2,  # [B H N, C, V]
    limits,  # [B H N, 3, C]
    do,  # [B, N C, H, V]
    inner,  # out, [B H N, C, F]: y of the second layer
    dinner,  # out, [B H N, C, F]: the gradient by z of the first
    dq,  # out, [B, N C, H, K]
    dkeys,  # out, [B, N C, H, K]
    dhidden,  # out, [B H N, C, F]
    derrors1,  # out, [B H N, C, F]: by what is written of E_1
    derrors2,  # out, [B H N, C, V]: and of E_2
    dG,  # out, [B H N, C, C]
    dvectors,  # out, [B H N, ROWS, C]: A and F
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
    n, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunk, head, tokens = bh * N + n, bh % H, first_token(bh, n, N, H, C)
    gates = vectors + chunk * (rows.ROWS * C) + tl.arange(0, C)[:, None]
    PAIR: tl.constexpr = K * F + F * V
    n_parts: tl.constexpr = 1 + MOMENTUM
    SIZE: tl.constexpr = n_parts * PAIR
    TYPE: tl.constexpr = q.dtype.element_ty
    t = tl.arange(0, C)
    read_m = tl.load(gates + rows.A * C)
    read_s = read_m
    if MOMENTUM:
        read_s = tl.load(gates + rows.F * C)
    share = tl.load(limits + chunk * (3 * C) + t)[:, None]
    query, key = tl.load(tile(q, tokens * K, C, K, H * K)), tl.load(tile(k, tokens * K, C, K, H * K))
    of_writes = tl.load(tile(G, chunk * (C * C), C, C, C))
    scores1, scores2 = dot(query, tl.trans(key), PRECISION), tl.zeros([C, C], tl.float32)
    attend = (scores1 * of_writes).to(TYPE)
    for j in range(0, F // BF):
        u1 = scaled(share, tl.load(tile(errors1, chunk * (C * F) + j * BF, C, BF, F)))
        at, at_base = tile(states, chunk * SIZE + j * BF, K, BF, F), tile(base, head * PAIR + j * BF, K, BF, F)
        y, _ = silu(_first_layer(query, attend, u1, at, at_base, read_m, read_s, PAIR, MOMENTUM, BASE, PRECISION))
        y = y.to(TYPE)
        tl.store(tile(inner, chunk * (C * F) + j * BF, C, BF, F), y)
        scores2 += dot(y, tl.trans(tl.load(tile(hidden, chunk * (C * F) + j * BF, C, BF, F))), PRECISION)
    u2 = scaled(share, tl.load(tile(errors2, chunk * (C * V), C, V, V)))
    doutput = tl.load(tile(do, tokens * V, C, V, H * V))
    dattend = dot(doutput, tl.trans(u2), PRECISION)
    dwrites, dscores = dattend * scores2, (dattend * of_writes).to(TYPE)
    du2 = dot(tl.trans((scores2 * of_writes).to(TYPE)), doutput, PRECISION)
    tl.store(tile(derrors2, chunk * (C * V), C, V, V), du2.to(TYPE))

    dread_m, dread_s, dattend = tl.zeros([C, 1], tl.float32), tl.zeros([C, 1], tl.float32), tl.zeros_like(dattend)
    seen_m, seen_s = tl.zeros([C, K], tl.float32), tl.zeros([C, K], tl.float32)
    dquery = tl.zeros([C, K], tl.float32)
    for j in range(0, F // BF):
        second, of_tile = K * F + j * BF * V, chunk * (C * F) + j * BF
        u1 = scaled(share, tl.load(tile(errors1, of_tile, C, BF, F)))
        at1, base1 = tile(states, chunk * SIZE + j * BF, K, BF, F), tile(base, head * PAIR + j * BF, K, BF, F)
        z = _first_layer(query, attend, u1, at1, base1, read_m, read_s, PAIR, MOMENTUM, BASE, PRECISION)
        y, slope = silu(z)
        at = tile(states, chunk * SIZE + second, BF, V, V)
        seen = dot(doutput, tl.trans(tl.load(at)), PRECISION)
        dread_m += row_sum(y * seen)
        dy = read_m * seen + dot(dscores, tl.load(tile(hidden, of_tile, C, BF, F)), PRECISION)
        if MOMENTUM:
            seen = dot(doutput, tl.trans(tl.load(at + PAIR)), PRECISION)
            dread_s += row_sum(y * seen)
            dy += read_s * seen
        if BASE:
            dy += dot(doutput, tl.trans(tl.load(tile(base, head * PAIR + second, BF, V, V))), PRECISION)
        tl.store(tile(dhidden, of_tile, C, BF, F), dot(tl.trans(dscores), y.to(TYPE), PRECISION).to(TYPE))
        dz = (dy * slope).to(TYPE)
        tl.store(tile(dinner, of_tile, C, BF, F), dz)
        tl.store(tile(derrors1, of_tile, C, BF, F), dot(tl.trans(attend), dz, PRECISION).to(TYPE))
        dattend += dot(dz, tl.trans(u1), PRECISION)
        seen_m += dot(dz, tl.trans(tl.load(at1)), PRECISION)
        if MOMENTUM:
            seen_s += dot(dz, tl.trans(tl.load(at1 + PAIR)), PRECISION)
        if BASE:
            dquery += dot(dz, tl.trans(tl.load(base1)), PRECISION)
    tl.store(tile(dG, chunk * (C * C), C, C, C), dwrites + dattend * scores1)
    dscores = (dattend * of_writes).to(TYPE)
    tl.store(tile(dkeys, tokens * K, C, K, H * K), dot(tl.trans(dscores), query, PRECISION).to(TYPE))
    dquery += read_m * seen_m + dot(dscores, key, PRECISION)
    dgates = dvectors + chunk * (rows.ROWS * C) + tl.arange(0, C)[:, None]
    tl.store(dgates + rows.A * C, dread_m + row_sum(query.to(tl.float32) * seen_m))
    if MOMENTUM:
        dquery += read_s * seen_s
        tl.store(dgates + rows.F * C, dread_s + row_sum(query.to(tl.float32) * seen_s))
    tl.store(tile(dq, tokens * K, C, K, H * K), dquery.to(TYPE))
