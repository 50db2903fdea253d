"""What the queries read, and its gradients: every chunk for itself, all at once."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.deep.tiles import column, dot, first, second, silu, tile


@triton.jit
def _read(y, attend, e, at, base, read_m, read_s, PAIR: tl.constexpr, MOMENTUM: tl.constexpr, BASE: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """What a layer makes of its input y: y W + diag(A) y N + diag(f) y S + ((y X^T) * G) E."""
    z = dot(attend, e, PRECISION) + read_m * dot(y, tl.load(at), PRECISION)
    if MOMENTUM:
        z += read_s * dot(y, tl.load(at + PAIR), PRECISION)
    if BASE:
        z += dot(y, tl.load(base), PRECISION)
    return z


@triton.jit
def outputs(
    q,  # [N B H, C, K]
    k,  # [N B H, C, K]
    read,  # [N B H, C, n]: A and f
    read_writes,  # [N B H, C, C]: G
    base,  # [H, PAIR], in the dtype of q
    states,  # [N B H, n PAIR]
    hidden,  # [N B H, C, F]: X_2
    errors1,  # [N B H, C, F]
    errors2,  # [N B H, C, V]
    o,  # out, [N B H, C, V]
    H,
    C: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BASE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    head = chunk % H
    PAIR: tl.constexpr = K * F + F * V
    n_parts: tl.constexpr = 1 + MOMENTUM
    SIZE: tl.constexpr = n_parts * PAIR
    TYPE: tl.constexpr = q.dtype.element_ty
    read_m = tl.load(column(read, chunk, 0, C, n_parts))
    read_s = read_m
    if MOMENTUM:
        read_s = tl.load(column(read, chunk, 1, C, n_parts))
    query, key, G = (
        tl.load(tile(q, chunk, C, K)),
        tl.load(tile(k, chunk, C, K)),
        tl.load(tile(read_writes, chunk, C, C)),
    )
    attend = (dot(query, tl.trans(key), PRECISION) * G).to(TYPE)
    e = tl.load(tile(errors1, chunk, C, F))
    at, at_base = first(states, chunk, K, F, SIZE), first(base, head, K, F, PAIR)
    z = _read(query, attend, e, at, at_base, read_m, read_s, PAIR, MOMENTUM, BASE, PRECISION)
    y, _ = silu(z)
    y = y.to(TYPE)
    attend = (dot(y, tl.trans(tl.load(tile(hidden, chunk, C, F))), PRECISION) * G).to(TYPE)
    e = tl.load(tile(errors2, chunk, C, V))
    at, at_base = second(states, chunk, K, F, V, SIZE), second(base, head, K, F, V, PAIR)
    z = _read(y, attend, e, at, at_base, read_m, read_s, PAIR, MOMENTUM, BASE, PRECISION)
    tl.store(tile(o, chunk, C, V), z.to(TYPE))


@triton.jit
def _unread(y, x, e, dz, scores, G, at, base, read_m, read_s, PAIR: tl.constexpr, MOMENTUM: tl.constexpr,
            BASE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """From the gradient dz by what a layer makes of y, with scores = y X^T: those by y, X, E, A, f and G."""
    dattend = dot(dz, tl.trans(e), PRECISION)
    dG = dattend * scores
    dscores = (dattend * G).to(y.dtype)
    dx = dot(tl.trans(dscores), y, PRECISION)
    de = dot(tl.trans((scores * G).to(y.dtype)), dz, PRECISION)
    dy = dot(dscores, x, PRECISION)
    seen = dot(dz, tl.trans(tl.load(at)), PRECISION)
    dread_m = tl.sum(y.to(tl.float32) * seen, 1)[:, None]
    dread_s = dread_m
    dy += read_m * seen
    if MOMENTUM:
        seen = dot(dz, tl.trans(tl.load(at + PAIR)), PRECISION)
        dread_s = tl.sum(y.to(tl.float32) * seen, 1)[:, None]
        dy += read_s * seen
    if BASE:
        dy += dot(dz, tl.trans(tl.load(base)), PRECISION)
    return dy, dx, de, dread_m, dread_s, dG


@triton.jit
def outputs_gradient(
    q,  # [N B H, C, K]
    k,  # [N B H, C, K]
    read,  # [N B H, C, n]
    read_writes,  # [N B H, C, C]
    base,  # [H, PAIR], in the dtype of q
    states,  # [N B H, n PAIR]
    hidden,  # [N B H, C, F]
    errors1,  # [N B H, C, F]
    errors2,  # [N B H, C, V]
    do,  # [N B H, C, V]
    inner,  # out, [N B H, C, F]: what the queries put to the second layer
    dinner,  # out, [N B H, C, F]: the gradient by what they got of the first
    dq,  # out, [N B H, C, K]
    dkeys,  # out, [N B H, C, K]: by k, of the outputs
    dhidden,  # out, [N B H, C, F]
    derrors1,  # out, [N B H, C, F]
    derrors2,  # out, [N B H, C, V]
    dread,  # out, [N B H, C, n]
    dread_writes,  # out, [N B H, C, C]
    H,
    C: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BASE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    head = chunk % H
    PAIR: tl.constexpr = K * F + F * V
    n_parts: tl.constexpr = 1 + MOMENTUM
    SIZE: tl.constexpr = n_parts * PAIR
    TYPE: tl.constexpr = q.dtype.element_ty
    read_m = tl.load(column(read, chunk, 0, C, n_parts))
    read_s = read_m
    if MOMENTUM:
        read_s = tl.load(column(read, chunk, 1, C, n_parts))
    query, key, G = (
        tl.load(tile(q, chunk, C, K)),
        tl.load(tile(k, chunk, C, K)),
        tl.load(tile(read_writes, chunk, C, C)),
    )
    at1, base1 = first(states, chunk, K, F, SIZE), first(base, head, K, F, PAIR)
    at2, base2 = second(states, chunk, K, F, V, SIZE), second(base, head, K, F, V, PAIR)
    e1 = tl.load(tile(errors1, chunk, C, F))
    scores = dot(query, tl.trans(key), PRECISION)
    attend = (scores * G).to(TYPE)
    y, slope = silu(_read(query, attend, e1, at1, base1, read_m, read_s, PAIR, MOMENTUM, BASE, PRECISION))
    y = y.to(TYPE)
    tl.store(tile(inner, chunk, C, F), y)

    x, e2, dz = tl.load(tile(hidden, chunk, C, F)), tl.load(tile(errors2, chunk, C, V)), tl.load(tile(do, chunk, C, V))
    scores2 = dot(y, tl.trans(x), PRECISION)
    dy, dx, de, dread_m, dread_s, dG = _unread(
        y, x, e2, dz, scores2, G, at2, base2, read_m, read_s, PAIR, MOMENTUM, BASE, PRECISION
    )
    tl.store(tile(dhidden, chunk, C, F), dx.to(TYPE))
    tl.store(tile(derrors2, chunk, C, V), de.to(TYPE))
    dz = (dy * slope).to(TYPE)
    tl.store(tile(dinner, chunk, C, F), dz)
    dquery, dkey, de, more_m, more_s, more_G = _unread(
        query, key, e1, dz, scores, G, at1, base1, read_m, read_s, PAIR, MOMENTUM, BASE, PRECISION
    )
    tl.store(tile(derrors1, chunk, C, F), de.to(TYPE))
    tl.store(tile(dq, chunk, C, K), dquery.to(TYPE))
    tl.store(tile(dkeys, chunk, C, K), dkey.to(TYPE))
    tl.store(tile(dread_writes, chunk, C, C), dG + more_G)
    tl.store(column(dread, chunk, 0, C, n_parts), dread_m + more_m)
    if MOMENTUM:
        tl.store(column(dread, chunk, 1, C, n_parts), dread_s + more_s)
