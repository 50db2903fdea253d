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
    T, N, H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    MOMENTUM: tl.constexpr, CARRIED: tl.constexpr, PRECISION: tl.constexpr,
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
def tokens_gradient(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    write_key,  # [B, T, H, K]
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
    dvectors,  # out, [B H N, PARTS, ROWS, C]: of these columns of the keys
    T, N, H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PARTS: tl.constexpr, TILES: tl.constexpr, MOMENTUM: tl.constexpr, CARRIED: tl.constexpr, SOURCES: tl.constexpr,
    DECAYED: tl.constexpr, SOLVE: tl.constexpr, OWN_WRITES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """By some columns of the queries and keys, dQ = diag(a) dO M^T + diag(f) dO S^T + (dO U^T * G) W, and what these
    columns have of the gradient by the vectors. Where writes have keys of their own dkey is by those that errors were
    taken with, and dwritten by these. PARTS of BK columns of the keys, TILES of BV of the values."""
    part, n, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    chunk = bh * N + n
    first_k = part * BK
    TYPE: tl.constexpr = q.dtype.element_ty
    n_matrices: tl.constexpr = 1 + MOMENTUM + CARRIED
    t = tl.arange(0, C)
    last = t == C - 1
    row = vectors + chunk.to(tl.int64) * tiles.ROWS * C + t

    # what waits for nothing is asked for first
    doutput = tile_of(do, bh, n, 0, T, H, V, C, BV)
    errors = tile_of(U, bh, n, 0, T, H, V, C, BV)
    dright = tile_of(E, bh, n, 0, T, H, V, C, BV)
    queries = tile_of(q, bh, n, first_k, T, H, K, C, BK)
    keys = tile_of(k, bh, n, first_k, T, H, K, C, BK)
    written = keys
    if OWN_WRITES:
        written = tile_of(write_key, bh, n, first_k, T, H, K, C, BK)
    if TILES == 1:
        dattend = dot(doutput, tl.trans(errors), PRECISION)
        dsystem = dot(dright, tl.trans(errors), PRECISION)
    else:
        dattend, dsystem = two_dots(do, E, U, bh, n, T, H, V, C, BV, TILES, PRECISION)
    combined = tl.load(of_square(G, chunk, C))
    weighted = dattend * combined
    dquery = wide_dot(weighted, written, PRECISION)
    dkey = dot(tl.trans(weighted.to(TYPE)), queries, PRECISION)
    if OWN_WRITES:
        dwritten = dkey
        dkey = tl.zeros([C, BK], tl.float32)
    if SOLVE:
        if DECAYED:
            weighted = tl.where(t[:, None] > t[None, :], -dsystem * combined, 0.0)
        else:
            place = places(source, bh, n, T, H, C, SOURCES)
            at_g = G + chunk.to(tl.int64) * (C * C) + (place[:, None] * C + t[None, :])
            weighted = -dsystem * tl.load(at_g, mask=((place >= 0) & (place < C))[:, None], other=0.0)
        if OWN_WRITES:  # rounded once, the first would give dk a tenth more of its error
            dkey = wide_dot(weighted, written, PRECISION)
            dwritten = dot(tl.trans(weighted.to(TYPE)), keys, PRECISION, dwritten)
        else:
            dkey = dot((weighted + tl.trans(weighted)).to(TYPE), keys, PRECISION, dkey)

    a = tl.load(row + tiles.A * C)
    if SOLVE:
        refer_a = tl.load(row + tiles.REFER_A * C)
    write_m = tl.load(row + tiles.WRITE_M * C)
    da = tl.zeros([C], tl.float32)
    drefer_a = tl.zeros([C], tl.float32)
    dwrite_m = tl.zeros([C], tl.float32)
    df = tl.zeros([C], tl.float32)
    dm = tl.zeros([C], tl.float32)
    drefer_f = tl.zeros([C], tl.float32)
    dwrite_s = tl.zeros([C], tl.float32)
    dwrite_r = tl.zeros([C], tl.float32)
    for i in range(0, TILES):
        first_v, index = i * BV, chunk * n_matrices
        if TILES > 1:
            doutput = tile_of(do, bh, n, first_v, T, H, V, C, BV)
            errors = tile_of(U, bh, n, first_v, T, H, V, C, BV)
            dright = tile_of(E, bh, n, first_v, T, H, V, C, BV)
        memory = part_of(states, index, first_k, first_v, K, V, BK, BV)
        dmemory = part_of(dstates, index, first_k, first_v, K, V, BK, BV)
        if MOMENTUM:
            momentum = part_of(states, index + 1, first_k, first_v, K, V, BK, BV)
            dmomentum = part_of(dstates, index + 1, first_k, first_v, K, V, BK, BV)
        if CARRIED:
            reference = part_of(states, index + n_matrices - 1, first_k, first_v, K, V, BK, BV)
            dreference = part_of(dstates, index + n_matrices - 1, first_k, first_v, K, V, BK, BV)

        product = dot(doutput, tl.trans(memory), PRECISION)
        da += tl.sum(product * queries, 1)
        dquery += a[:, None] * product
        product = dot(dright, tl.trans(memory), PRECISION)
        if SOLVE:
            drefer_a -= tl.sum(product * keys, 1)
            product *= refer_a[:, None]
        dkey -= product
        product = dot(errors, tl.trans(dmemory), PRECISION)
        dwrite_m += tl.sum(product * written, 1)
        product *= write_m[:, None]
        if OWN_WRITES:
            dwritten += product
        else:
            dkey += product
        # by what the matrices are multiplied with, which is in the chunk's last places
        da += tl.where(last, tl.sum(dmemory.to(tl.float32) * memory), 0.0)
        if MOMENTUM:
            product = dot(doutput, tl.trans(momentum), PRECISION)
            df += tl.sum(product * queries, 1)
            dquery += tl.load(row + tiles.F * C)[:, None] * product
            if SOLVE:
                product = dot(dright, tl.trans(momentum), PRECISION)
                drefer_f -= tl.sum(product * keys, 1)
                dkey -= tl.load(row + tiles.REFER_F * C)[:, None] * product
            product = dot(errors, tl.trans(dmomentum), PRECISION)
            dwrite_s += tl.sum(product * keys, 1)
            dkey += tl.load(row + tiles.WRITE_S * C)[:, None] * product
            df += tl.where(last, tl.sum(dmemory.to(tl.float32) * momentum), 0.0)
            dm += tl.where(last, tl.sum(dmomentum.to(tl.float32) * momentum), 0.0)
        if CARRIED:
            dkey -= tl.load(row + tiles.REFER_R * C)[:, None] * dot(dright, tl.trans(reference), PRECISION)
            product = dot(errors, tl.trans(dreference), PRECISION)
            dwrite_r += tl.sum(product * keys, 1)
            dkey += tl.load(row + tiles.WRITE_R * C)[:, None] * product
            drefer_a += tl.where(last, tl.sum(dreference.to(tl.float32) * memory), 0.0)
            if MOMENTUM:
                drefer_f += tl.where(last, tl.sum(dreference.to(tl.float32) * momentum), 0.0)

    at, mask_k = of_tokens(dq, bh, n, first_k, T, H, K, C, BK)
    tl.store(at, dquery.to(TYPE), mask=mask_k)
    at, mask_k = of_tokens(dk, bh, n, first_k, T, H, K, C, BK)
    tl.store(at, dkey.to(TYPE), mask=mask_k)
    if OWN_WRITES:
        at, mask_k = of_tokens(dwrite_key, bh, n, first_k, T, H, K, C, BK)
        tl.store(at, dwritten.to(TYPE), mask=mask_k)
    rows = dvectors + (chunk.to(tl.int64) * PARTS + part) * tiles.ROWS * C + t
    tl.store(rows + tiles.A * C, da)
    tl.store(rows + tiles.WRITE_M * C, dwrite_m)
    tl.store(rows + tiles.REFER_A * C, drefer_a)
    if MOMENTUM:
        tl.store(rows + tiles.F * C, df)
        tl.store(rows + tiles.M * C, dm)
        tl.store(rows + tiles.REFER_F * C, drefer_f)
        tl.store(rows + tiles.WRITE_S * C, dwrite_s)
    if CARRIED:
        tl.store(rows + tiles.WRITE_R * C, dwrite_r)


@triton.jit
def gates_gradient(
    q, k, write_key, step_size, log_momentum, log_decay, source, U, E, do,  # as above
    dvectors,  # [B H N, PARTS, ROWS, C]
    dstep_size, dlog_momentum, dlog_decay,  # out, [B, T, H]
    T, N, H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PARTS: tl.constexpr, KEY_TILES: tl.constexpr, TILES: tl.constexpr, MOMENTUM: tl.constexpr, CARRIED: tl.constexpr,
    DECAY: tl.constexpr, SOURCES: tl.constexpr, DECAYED: tl.constexpr, SOLVE: tl.constexpr, WRITES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """By the coefficients, and so by the gates. Those of M_ref go where they were taken from."""
    n, bh = tl.program_id(0), tl.program_id(1)
    chunk = bh * N + n
    TYPE: tl.constexpr = q.dtype.element_ty
    t = tl.arange(0, C)
    rows = dvectors + chunk.to(tl.int64) * PARTS * tiles.ROWS * C
    da = summed(rows + tiles.A * C, PARTS, C)
    df, dm, dwrite_s = da, da, da
    if MOMENTUM:
        df = summed(rows + tiles.F * C, PARTS, C)
        dm = summed(rows + tiles.M * C, PARTS, C)
        dwrite_s = summed(rows + tiles.WRITE_S * C, PARTS, C)
    dcombined = tl.where((t == C - 1)[:, None], summed(rows + tiles.WRITE_M * C, PARTS, C)[None, :], 0.0)
    dattend, dsystem = two_dots(do, E, U, bh, n, T, H, V, C, BV, TILES, PRECISION)
    similar, system = two_dots(q, k, write_key, bh, n, T, H, K, C, BK, KEY_TILES, PRECISION)
    dcombined += dattend * similar
    if SOLVE:
        drefer_a = summed(rows + tiles.REFER_A * C, PARTS, C)
        drefer = -dsystem * system
        if DECAYED:
            dcombined += tl.where(t[:, None] > t[None, :], drefer, 0.0)
            da += drefer_a
        else:
            place = places(source, bh, n, T, H, C, SOURCES)
            if CARRIED:  # its last row is G's at the place of the last token
                place_of_last = tl.sum(tl.where(t == C - 1, place, 0), 0)
                dwrite_r = summed(rows + tiles.WRITE_R * C, PARTS, C)
                dcombined += tl.where((t == place_of_last)[:, None], dwrite_r[None, :], 0.0)
            taken = t[:, None] == place[None, :]
            dcombined = select_dot(taken, drefer, TYPE, PRECISION, dcombined)
            drefer_f = drefer_a
            if MOMENTUM:
                drefer_f = summed(rows + tiles.REFER_F * C, PARTS, C)
            dtaken_a, dtaken_f = select_two(taken, drefer_a, drefer_f, C, TYPE, PRECISION)
            da += dtaken_a
            df += dtaken_f
    store_gates_gradient(
        step_size, log_momentum, log_decay, None, dcombined, da, df, dm, dwrite_s, dstep_size, dlog_momentum,
        dlog_decay, bh, n, T, H, C, MOMENTUM, DECAY, WRITES, TYPE, PRECISION,
    )  # fmt: skip


@triton.jit
def summed(row, PARTS: tl.constexpr, C: tl.constexpr):
    """[C]: one row of a chunk's vectors [PARTS, ROWS, C], of all parts."""
    at = row + tl.arange(0, PARTS)[:, None] * (tiles.ROWS * C) + tl.arange(0, C)[None, :]
    return tl.sum(tl.load(at), 0)


@triton.jit
def select_two(chosen, x, y, C: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """chosen x and chosen y, of a tile of zeros and ones and two vectors [C]: a product of a narrow tile. (Sums along
    the rows of [C, C] would be 160 shuffles each.)"""
    column = tl.arange(0, 16)[None, :]
    both = tl.where(column == 0, x[:, None], tl.where(column == 1, y[:, None], 0.0))
    found = select_dot(chosen, both, TYPE, PRECISION)
    return tl.sum(tl.where(column == 0, found, 0.0), 1), tl.sum(tl.where(column == 1, found, 0.0), 1)


@triton.jit
def tile_of(x, bh, n, first, T, H, X, C: tl.constexpr, BX: tl.constexpr):
    """[C, BX]: columns of a chunk's rows of x [B, T, H, X]."""
    at, mask = of_tokens(x, bh, n, first, T, H, X, C, BX)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def part_of(matrices, index, first_k, first_v, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """[BK, BV] of a matrix of [*, K, V]."""
    at, mask = of_matrix(matrices, index, first_v, K, V, BK, BV, first_k)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def two_dots(
    x, y, z, bh, n, T, H, X, C: tl.constexpr, BX: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """[C, C] each: X Z^T and Y Z^T of a chunk's rows of x, y and z [B, T, H, X]."""
    first = tl.zeros([C, C], tl.float32)
    second = tl.zeros([C, C], tl.float32)
    for i in range(0, TILES):
        rows_x = tile_of(x, bh, n, i * BX, T, H, X, C, BX)
        rows_y = tile_of(y, bh, n, i * BX, T, H, X, C, BX)
        rows_z = tl.trans(tile_of(z, bh, n, i * BX, T, H, X, C, BX))
        first = dot(rows_x, rows_z, PRECISION, first)
        second = dot(rows_y, rows_z, PRECISION, second)
    return first, second
