"""What the queries read, and its gradients: every chunk for itself, all at once, tile by tile of the hidden layer.

z = y W + diag(A) y N + diag(f) y S + ((y X^T) * G) E    for both layers, with E what is written of the errors.
"""

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
    of_units,
    row_sum,
    scaled,
    silu,
    store_tokens,
    zeros,
)
from models.kernels.momentum import tiles as rows


@triton.jit
def _chunk(call, left, S: tl.constexpr):
    """A program's chunk and head, its first token and how many there are; its queries and keys, G, A and f, and the
    share that is written."""
    chunk, head, first, count, _ = of_program(call)
    t = tl.arange(0, S.C)
    gates = call.vectors + chunk * (rows.ROWS * S.C) + t[:, None]
    read_m = tl.load(gates + rows.A * S.C)
    read_s = read_m
    if S.MOMENTUM:
        read_s = tl.load(gates + rows.F * S.C)
    share = tl.load(left.limits + chunk * (3 * S.C) + t)[:, None]
    query, key = load_tokens(call.q, first, count, S.K, call, S), load_tokens(call.k, first, count, S.K, call, S)
    of_writes = tl.load(of_chunk(call.G, chunk, S.C, S))
    return chunk, head, first, count, query, key, of_writes, read_m, read_s, share


@triton.jit
def _first_layer(query, attend, share, read_m, read_s, chunk, head, j, call, left, S: tl.constexpr):
    """z of a tile of the hidden layer, with attend = (y X^T) * G."""
    u = scaled(tl.trans(share), tl.load(of_units(left.errors1, chunk, j, S)))
    at, _ = of_layers(left.states, chunk * S.size, j, S)
    z = dot(attend, tl.trans(u), S) + read_m * dot(query, tl.trans(tl.load(at)), S)
    if S.MOMENTUM:
        z += read_s * dot(query, tl.trans(tl.load(at + S.pair)), S)
    if call.base is not None:
        at, _ = of_layers(call.base, head * S.pair, j, S)
        z += dot(query, tl.trans(tl.load(at)), S)
    return z


@triton.jit
def outputs(call, left, o, S: tl.constexpr):
    """o [B, T, H, V], what the second layer gives to the queries."""
    chunk, head, first, count, query, key, of_writes, read_m, read_s, share = _chunk(call, left, S)
    TYPE: tl.constexpr = query.dtype
    attend = (dot(query, tl.trans(key), S) * of_writes).to(TYPE)
    scores, z = zeros(S.C, S.C), zeros(S.C, S.V)
    z_m, z_s = zeros(S.C, S.V), zeros(S.C, S.V)
    for j in range(0, S.split):
        y, _ = silu(_first_layer(query, attend, share, read_m, read_s, chunk, head, j, call, left, S))
        y = y.to(TYPE)
        scores += dot(y, tl.load(of_units(left.hidden, chunk, j, S)), S)
        _, at = of_layers(left.states, chunk * S.size, j, S)
        z_m += dot(y, tl.load(at), S)
        if S.MOMENTUM:
            z_s += dot(y, tl.load(at + S.pair), S)
        if call.base is not None:
            _, at = of_layers(call.base, head * S.pair, j, S)
            z += dot(y, tl.load(at), S)
    u2 = scaled(share, tl.load(of_chunk(left.errors2, chunk, S.V, S)))
    z += read_m * z_m + dot((scores * of_writes).to(TYPE), u2, S)
    if S.MOMENTUM:
        z += read_s * z_s
    store_tokens(o, first, count, z, S.V, call, S)


@triton.jit
def outputs_gradient(call, left, found, S: tl.constexpr):
    """Of do: from `inner` to `dvectors`."""
    chunk, head, first, count, query, key, of_writes, read_m, read_s, share = _chunk(call, left, S)
    TYPE: tl.constexpr = query.dtype
    scores2 = zeros(S.C, S.C)
    attend = (dot(query, tl.trans(key), S) * of_writes).to(TYPE)
    for j in range(0, S.split):
        z = _first_layer(query, attend, share, read_m, read_s, chunk, head, j, call, left, S)
        tl.store(of_queries(found.dinner, chunk, j, S), z)  # until the gradient takes its place
        y = silu(z)[0].to(TYPE)
        tl.store(of_queries(found.inner, chunk, j, S), y)
        scores2 = dot(y, tl.load(of_units(left.hidden, chunk, j, S)), S, scores2)
    u2 = scaled(share, tl.load(of_chunk(left.errors2, chunk, S.V, S)))
    doutput = load_tokens(found.do, first, count, S.V, call, S)
    dattend = dot(doutput, tl.trans(u2), S)
    of_writes = tl.load(of_chunk(call.G, chunk, S.C, S))  # once more, as below, rather than kept for a whole loop
    tl.store(of_chunk(found.dcoefficients, chunk, S.C, S), dattend * scores2)
    dscores = (dattend * of_writes).to(TYPE)
    du2 = dot(tl.trans((scores2 * of_writes).to(TYPE)), doutput, S)
    tl.store(of_chunk(found.derrors2, chunk, S.V, S), du2)
    tl.debug_barrier()

    dread_m, dread_s, dattend = zeros(S.C, 1), zeros(S.C, 1), zeros(S.C, S.C)
    seen_m, seen_s = zeros(S.C, S.K), zeros(S.C, S.K)
    dquery = zeros(S.C, S.K)
    for j in range(0, S.split):
        y, slope = silu(tl.load(of_queries(found.dinner, chunk, j, S)).to(tl.float32))
        tl.store(of_units(found.dhidden, chunk, j, S), dot(tl.trans(y.to(TYPE)), dscores, S))
        at1, at2 = of_layers(left.states, chunk * S.size, j, S)
        seen = dot(doutput, tl.trans(tl.load(at2)), S)
        dread_m += row_sum(y * seen)
        dy = dot(dscores, tl.trans(tl.load(of_units(left.hidden, chunk, j, S))), S, read_m * seen)
        if S.MOMENTUM:
            seen = dot(doutput, tl.trans(tl.load(at2 + S.pair)), S)
            dread_s += row_sum(y * seen)
            dy += read_s * seen
        if call.base is not None:
            base1, base2 = of_layers(call.base, head * S.pair, j, S)
            dy = dot(doutput, tl.trans(tl.load(base2)), S, dy)
        dz = (dy * slope).to(TYPE)
        tl.store(of_queries(found.dinner, chunk, j, S), dz)
        tl.store(of_units(found.derrors1, chunk, j, S), dot(tl.trans(dz), attend, S))
        u1 = scaled(tl.trans(share), tl.load(of_units(left.errors1, chunk, j, S)))
        dattend = dot(dz, u1, S, dattend)
        seen_m = dot(dz, tl.load(at1), S, seen_m)
        if S.MOMENTUM:
            seen_s = dot(dz, tl.load(at1 + S.pair), S, seen_s)
        if call.base is not None:
            dquery = dot(dz, tl.load(base1), S, dquery)
    query, key = load_tokens(call.q, first, count, S.K, call, S), load_tokens(call.k, first, count, S.K, call, S)
    at_coefficients = of_chunk(found.dcoefficients, chunk, S.C, S)
    tl.store(at_coefficients, tl.load(at_coefficients) + dattend * dot(query, tl.trans(key), S))
    dscores = (dattend * tl.load(of_chunk(call.G, chunk, S.C, S))).to(TYPE)
    store_tokens(found.dkeys, first, count, dot(tl.trans(dscores), query, S), S.K, call, S)
    dquery += read_m * seen_m
    dquery = dot(dscores, key, S, dquery)
    dgates = found.dvectors + chunk * (rows.ROWS * S.C) + tl.arange(0, S.C)[:, None]
    tl.store(dgates + rows.A * S.C, dread_m + row_sum(query.to(tl.float32) * seen_m))
    if S.MOMENTUM:
        dquery += read_s * seen_s
        tl.store(dgates + rows.F * S.C, dread_s + row_sum(query.to(tl.float32) * seen_s))
    store_tokens(found.dq, first, count, dquery, S.K, call, S)
