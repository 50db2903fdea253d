"""What waits for no other chunk: outputs, and a chunk's gradients by queries, keys and gates."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.momentum import tiles
from models.kernels.momentum.coefficients import places, store_gates_gradient
from models.kernels.momentum.tiles import dot, of_matrix, of_square, of_tokens, select_dot, wide_dot


@triton.jit
def outputs(
    q,  # [B, T, H, K]
    write_key,  # [B, T, H, K]
    U,  # [B, T, H, V]
    G,  # [B H N, C, C]
    vectors,  # [B H N, ROWS, C]
    states,  # [B H N, n, K, V]
    o,  # out, [B, T, H, V]
    attend,  # out, [B H N, C, C]: Q W^T * G, which the errors' gradient wants too
    T, N, H, K, V, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, MOMENTUM: tl.constexpr, CARRIED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """O = diag(a) Q M + diag(f) Q S + (Q W^T * G) U."""
    n, bh, first_v = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    chunk = bh * N + n
    t = tl.arange(0, C)
    at, mask = of_tokens(q, bh, n, 0, T, H, K, C, BK)
    queries = tl.load(at, mask=mask, other=0.0)
    at, mask = of_tokens(write_key, bh, n, 0, T, H, K, C, BK)
    written = tl.load(at, mask=mask, other=0.0)
    at, mask = of_tokens(U, bh, n, first_v, T, H, V, C, BV)
    errors = tl.load(at, mask=mask, other=0.0)
    row = vectors + chunk.to(tl.int64) * tiles.ROWS * C + t
    at, inside = of_matrix(states, chunk * (1 + MOMENTUM + CARRIED), first_v, K, V, BK, BV)
    weights = (dot(queries, tl.trans(written), PRECISION) * tl.load(of_square(G, chunk, C))).to(errors.dtype)
    if first_v == 0:
        tl.store(of_square(attend, chunk, C), weights)
    output = dot(weights, errors, PRECISION)
    memory = tl.load(at, mask=inside, other=0.0)
    output += tl.load(row + tiles.A * C)[:, None] * dot(queries, memory, PRECISION)
    if MOMENTUM:
        momentum = tl.load(at + K * V, mask=inside, other=0.0)
        output += tl.load(row + tiles.F * C)[:, None] * dot(queries, momentum, PRECISION)
    at, mask = of_tokens(o, bh, n, first_v, T, H, V, C, BV)
    tl.store(at, output.to(errors.dtype), mask=mask)


@triton.jit
def chunk_gradient(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    write_key,  # [B, T, H, K]
    step_size, log_momentum, log_decay,  # [B, T, H]
    source,  # [B, T]
    U,  # [B, T, H, V]
    E,  # [B, T, H, V]: the gradient by the errors' right-hand side
    do,  # [B, T, H, V]
    G,  # [B H N, C, C]
    vectors,  # [B H N, ROWS, C]
    states,  # [B H N, n, K, V]
    dstates,  # [B H N, n, K, V]
    dq,  # out, [B, T, H, K]
    dk,  # out, [B, T, H, K]
    dwrite_key,  # out, [B, T, H, K], if there are any
    dstep_size, dlog_momentum, dlog_decay,  # out, [B, T, H]
    T, N, H, K, V, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr, MOMENTUM: tl.constexpr,
    CARRIED: tl.constexpr, DECAY: tl.constexpr, SOURCES: tl.constexpr, DECAYED: tl.constexpr, SOLVE: tl.constexpr,
    OWN_WRITES: tl.constexpr, WRITES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """By the outputs, dQ = diag(a) dO M^T + diag(f) dO S^T + (dO U^T * G) W, then by the keys, some columns of them at
    a time, and last by the coefficients, whose gradient is the gates'. Those of M_ref go where they were taken from.
    Where writes have keys of their own dkey is by those that errors were taken with, and dwritten by these. TILES: how
    many tiles of BV columns the values have."""
    n, bh = tl.program_id(0), tl.program_id(1)
    chunk = bh * N + n
    TYPE: tl.constexpr = q.dtype.element_ty
    n_matrices: tl.constexpr = 1 + MOMENTUM + CARRIED
    t = tl.arange(0, C)
    last = t == C - 1
    row = vectors + chunk.to(tl.int64) * tiles.ROWS * C + t

    combined = tl.load(of_square(G, chunk, C))
    dattend = rows_dot(do, U, bh, n, T, H, V, C, BV, PRECISION)
    dcombined = dattend * rows_dot(q, write_key, bh, n, T, H, K, C, BK, PRECISION)
    weighted = dattend * combined
    da = tl.zeros([C], tl.float32)
    df = tl.zeros([C], tl.float32)
    doutput = tile_of(do, bh, n, 0, T, H, V, C, BV)
    for first_k in range(0, K, BK):
        queries = tile_of(q, bh, n, first_k, T, H, K, C, BK)
        dquery = wide_dot(weighted, tile_of(write_key, bh, n, first_k, T, H, K, C, BK), PRECISION)
        for i in tl.range(0, (1 + MOMENTUM) * TILES, disable_licm=True):
            j = i // TILES
            if TILES > 1:
                doutput = tile_of(do, bh, n, i % TILES * BV, T, H, V, C, BV)
            matrix = part_of(states, chunk * n_matrices + j, first_k, i % TILES * BV, K, V, BK, BV)
            product = dot(doutput, tl.trans(matrix), PRECISION)
            found = tl.sum(product * queries, 1)
            da += tl.where(j == 0, found, 0.0)
            df += tl.where(j == 1, found, 0.0)
            dquery += tl.load(row + (tiles.A + j) * C)[:, None] * product
        at, mask_k = of_tokens(dq, bh, n, first_k, T, H, K, C, BK)
        tl.store(at, dquery.to(queries.dtype), mask=mask_k)

    by_query = tl.trans(weighted.to(TYPE))
    if SOLVE:
        dsystem = -rows_dot(E, U, bh, n, T, H, V, C, BV, PRECISION)
        drefer = dsystem * rows_dot(k, write_key, bh, n, T, H, K, C, BK, PRECISION)
        if DECAYED:
            below = t[:, None] > t[None, :]
            weighted = tl.where(below, dsystem * combined, 0.0)
            dcombined += tl.where(below, drefer, 0.0)
        else:
            place = places(source, bh, n, T, H, C, SOURCES)
            at_g = G + chunk.to(tl.int64) * C * C + place[:, None] * C + t[None, :]
            weighted = dsystem * tl.load(at_g, mask=((place >= 0) & (place < C))[:, None], other=0.0)
            dcombined = select_dot(t[:, None] == place[None, :], drefer, TYPE, PRECISION, dcombined)
        both = weighted.to(TYPE) if OWN_WRITES else (weighted + tl.trans(weighted)).to(TYPE)
    drefer_a = tl.zeros([C], tl.float32)
    drefer_f = tl.zeros([C], tl.float32)
    dwrite_m = tl.zeros([C], tl.float32)
    dwrite_s = tl.zeros([C], tl.float32)
    dwrite_r = tl.zeros([C], tl.float32)
    da_last, df_last, dm_last = 0.0, 0.0, 0.0
    dreference_a, dreference_f = 0.0, 0.0
    dright = tile_of(E, bh, n, 0, T, H, V, C, BV)
    errors = tile_of(U, bh, n, 0, T, H, V, C, BV)
    for first_k in range(0, K, BK):
        keys = tile_of(k, bh, n, first_k, T, H, K, C, BK)
        dkey = dot(by_query, tile_of(q, bh, n, first_k, T, H, K, C, BK), PRECISION)
        written = keys
        if OWN_WRITES:
            written = tile_of(write_key, bh, n, first_k, T, H, K, C, BK)
            dwritten = dkey
            dkey = tl.zeros([C, BK], tl.float32)
            if SOLVE:  # rounded once, the first would give dk a tenth more of its error
                dkey = wide_dot(weighted, written, PRECISION)
                dwritten = dot(tl.trans(both), keys, PRECISION, dwritten)
        elif SOLVE:
            dkey = dot(both, keys, PRECISION, dkey)
        for i in tl.range(0, n_matrices * TILES, disable_licm=True):
            j = i // TILES
            if TILES > 1:
                dright = tile_of(E, bh, n, i % TILES * BV, T, H, V, C, BV)
                errors = tile_of(U, bh, n, i % TILES * BV, T, H, V, C, BV)
            matrix = part_of(states, chunk * n_matrices + j, first_k, i % TILES * BV, K, V, BK, BV)
            dmatrix = part_of(dstates, chunk * n_matrices + j, first_k, i % TILES * BV, K, V, BK, BV)
            product = dot(dright, tl.trans(matrix), PRECISION)
            if SOLVE:
                found = tl.sum(product * keys, 1)
                drefer_a -= tl.where(j == 0, found, 0.0)
                drefer_f -= tl.where(j == 1, found, 0.0)
                dkey -= tl.load(row + of_part(tiles.REFER_A, j, MOMENTUM) * C)[:, None] * product
            else:
                dkey -= tl.where(j == 0, 1.0, 0.0) * product
            product = dot(errors, tl.trans(dmatrix), PRECISION)
            found = tl.sum(product * written, 1)
            dwrite_m += tl.where(j == 0, found, 0.0)
            dwrite_s += tl.where(j == 1, found, 0.0)
            dwrite_r += tl.where(j == n_matrices - 1, found, 0.0)
            product *= tl.load(row + of_part(tiles.WRITE_M, j, MOMENTUM) * C)[:, None]
            if OWN_WRITES:
                dwritten += product
            else:
                dkey += product
            seen = tl.sum(dmatrix.to(tl.float32) * matrix)
            da_last += tl.where(j == 0, seen, 0.0)
            dm_last += tl.where(j == 1, seen, 0.0)
            if MOMENTUM:  # what the first matrix has of the second, and the third of both
                other = part_of(states, chunk * n_matrices + 1, first_k, i % TILES * BV, K, V, BK, BV, j != 1)
                seen = tl.sum(dmatrix.to(tl.float32) * other)
                df_last += tl.where(j == 0, seen, 0.0)
                dreference_f += tl.where(j == 2, seen, 0.0)
            if CARRIED:
                final = j == n_matrices - 1
                other = part_of(states, chunk * n_matrices, first_k, i % TILES * BV, K, V, BK, BV, final)
                dreference_a += tl.where(final, tl.sum(dmatrix.to(tl.float32) * other), 0.0)
        at, mask_k = of_tokens(dk, bh, n, first_k, T, H, K, C, BK)
        tl.store(at, dkey.to(keys.dtype), mask=mask_k)
        if OWN_WRITES:
            at, mask_k = of_tokens(dwrite_key, bh, n, first_k, T, H, K, C, BK)
            tl.store(at, dwritten.to(keys.dtype), mask=mask_k)

    da += tl.where(last, da_last, 0.0)
    df += tl.where(last, df_last, 0.0)
    dcombined += tl.where(last[:, None], dwrite_m[None, :], 0.0)
    if SOLVE:
        if DECAYED:
            da += drefer_a
        else:
            if CARRIED:  # its last row is G's at the place of the last token
                drefer_a += tl.where(last, dreference_a, 0.0)
                drefer_f += tl.where(last, dreference_f, 0.0)
                place_of_last = tl.sum(tl.where(last, place, 0), 0)
                dcombined += tl.where((t == place_of_last)[:, None], dwrite_r[None, :], 0.0)
            taken = t[:, None] == place[None, :]
            da += tl.sum(tl.where(taken, drefer_a[None, :], 0.0), 1)
            if MOMENTUM:
                df += tl.sum(tl.where(taken, drefer_f[None, :], 0.0), 1)
    store_gates_gradient(
        step_size, log_momentum, log_decay, None, dcombined, da, df, tl.where(last, dm_last, 0.0), dwrite_s, dstep_size,
        dlog_momentum, dlog_decay, bh, n, T, H, C, MOMENTUM, DECAY, WRITES, TYPE, PRECISION,
    )  # fmt: skip


@triton.jit
def tile_of(x, bh, n, first, T, H, X, C: tl.constexpr, BX: tl.constexpr):
    """[C, BX]: columns of a chunk's rows of x [B, T, H, X]."""
    at, mask = of_tokens(x, bh, n, first, T, H, X, C, BX)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def part_of(matrices, index, first_k, first_v, K, V, BK: tl.constexpr, BV: tl.constexpr, wanted=True):
    """[BK, BV] of a matrix of [*, K, V], zeros where it is not wanted."""
    at, mask = of_matrix(matrices, index, first_v, K, V, BK, BV, first_k)
    return tl.load(at, mask=mask & (tl.zeros([1, 1], tl.int32) + wanted != 0), other=0.0)


@triton.jit
def rows_dot(x, y, bh, n, T, H, X, C: tl.constexpr, BX: tl.constexpr, PRECISION: tl.constexpr):
    """[C, C]: X Y^T of a chunk's rows of x and y [B, T, H, X]."""
    product = tl.zeros([C, C], tl.float32)
    for first in range(0, X, BX):
        rows = tile_of(x, bh, n, first, T, H, X, C, BX)
        product = dot(rows, tl.trans(tile_of(y, bh, n, first, T, H, X, C, BX)), PRECISION, product)
    return product


@triton.jit
def of_part(first: tl.constexpr, j, MOMENTUM: tl.constexpr):
    """The row of matrix j's coefficients, of those that begin with M's: S's is there without momentum too."""
    return first + j if MOMENTUM else first + 2 * j
