"""What waits for no other chunk: the system of its errors, outputs, and gradients by queries, keys and coefficients."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.momentum import tiles
from models.kernels.momentum.tiles import (
    dot,
    halves,
    leave_lower,
    lower,
    of_matrix,
    of_square,
    of_states,
    of_tokens,
    select_dot,
    unit_inverse,
    wide_dot,
)


@triton.jit
def places(source, bh, n, T, H, C: tl.constexpr, SOURCES: tl.constexpr):
    """[C]: where a token's gradient is taken, as in coefficients.py."""
    if SOURCES:
        at = source + (bh // H).to(tl.int64) * T + tl.minimum(n * C + tl.arange(0, C), T - 1)
        return tl.load(at) - n * C
    return tl.arange(0, C) - 1


@triton.jit
def referred(G, chunk, place, C: tl.constexpr):
    """[C, C]: what M_ref has of a chunk's writes, rows of G."""
    i = tl.arange(0, C)[None, :]
    at = G + chunk.to(tl.int64) * (C * C) + (place[:, None] * C + i)
    known = ((place >= 0) & (place < C))[:, None] & (i // tiles.SECTOR <= (place // tiles.SECTOR)[:, None])
    return tl.load(at, mask=known, other=0.0)


@triton.jit
def systems(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    write_key,  # [B, T, H, K]
    source,  # [B, T]
    G,  # [B H N, C, C]
    R,  # out, [B H N, HALVES, C, C]: the inverse of the system of the errors, without its diagonal of ones
    similar,  # out, [B H N, C, C]: Q W^T
    attend,  # out, [B H N, C, C]: Q W^T * G, what the outputs have of the errors
    system,  # out, [B H N, C, C]: K W^T
    T, N, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, LOG_C: tl.constexpr,
    SOURCES: tl.constexpr, DECAYED: tl.constexpr, SOLVE: tl.constexpr, OWN_WRITES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """R = (I + K W^T * G_ref)^-1, and what queries and keys have to do with writes."""
    bh, n = tl.program_id(2) * H + tl.program_id(0), tl.program_id(1)
    chunk = bh * N + n
    TYPE: tl.constexpr = k.dtype.element_ty
    t = tl.arange(0, C)
    queries = tile_of(q, bh, n, 0, T, H, K, C, BK)
    keys = tile_of(k, bh, n, 0, T, H, K, C, BK)
    written = keys
    if OWN_WRITES:
        written = tile_of(write_key, bh, n, 0, T, H, K, C, BK)
    combined = lower(G, chunk, C)
    below = t[:, None] > t[None, :]
    refer = combined
    if SOLVE and not DECAYED:
        refer = referred(G, chunk, places(source, bh, n, T, H, C, SOURCES), C)
    product = dot(queries, tl.trans(written), PRECISION)
    leave_lower(similar, chunk, product.to(similar.dtype.element_ty), C)
    tl.store(of_square(attend, chunk, C), (product * combined).to(TYPE))
    if SOLVE:
        product = dot(keys, tl.trans(written), PRECISION)
        leave_lower(system, chunk, product.to(system.dtype.element_ty), C)
        inverse = unit_inverse(tl.where(below, product * refer, 0.0), C, LOG_C, TYPE, PRECISION)
        high, low = halves(tl.where(below, inverse, 0.0), TYPE)
        HALVES: tl.constexpr = 1 if TYPE.is_fp32() else 2
        tl.store(of_square(R, chunk * HALVES, C), high)
        if HALVES == 2:
            tl.store(of_square(R, chunk * HALVES + 1, C), low)


@triton.jit
def outputs(
    q,  # [B, T, H, K]
    U,  # [B H N, V, C]
    attend,  # [B H N, C, C]
    vectors,  # [B H N, ROWS, C]
    states,  # as in rule.py
    o,  # out, [B, T, H, V]
    T, N, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    MOMENTUM: tl.constexpr, CARRIED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O = diag(a) Q M + diag(f) Q S + (Q W^T * G) U."""
    h, n, part = tl.program_id(0) % H, tl.program_id(1), tl.program_id(0) // H
    bh, first_v = tl.program_id(2) * H + h, part * BV
    chunk = bh * N + n
    t = tl.arange(0, C)
    at, mask = of_tokens(q, bh, n, 0, T, H, K, C, BK)
    queries = tl.load(at, mask=mask, other=0.0)
    at, inside = of_states(states, chunk, first_v, 0, V, K, BV, BK, 1 + MOMENTUM + CARRIED)
    memory = tl.load(at, mask=inside, other=0.0)
    row = vectors + chunk.to(tl.int64) * tiles.ROWS * C + t
    output = tl.load(row + tiles.A * C)[:, None] * dot(queries, tl.trans(memory), PRECISION)
    if MOMENTUM:
        momentum = tl.load(at + tiles.PART, mask=inside, other=0.0)
        output += tl.load(row + tiles.F * C)[:, None] * dot(queries, tl.trans(momentum), PRECISION)
    at, inside = of_matrix(U, chunk, 0, V, C, BV, C, first_v)
    errors = tl.load(at, mask=inside, other=0.0)
    output = dot(tl.load(of_square(attend, chunk, C)), tl.trans(errors), PRECISION, output)
    at, mask = of_tokens(o, bh, n, first_v, T, H, V, C, BV)
    tl.store(at, output.to(errors.dtype), mask=mask)


@triton.jit
def tokens_gradient(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    write_key,  # [B, T, H, K]
    source,  # [B, T]
    U,  # [B H N, V, C]
    E,  # [B, T, H, V]: the gradient by the errors' right-hand side
    do,  # [B, T, H, V]
    G,  # [B H N, C, C]
    similar,  # [B H N, C, C]
    system,  # [B H N, C, C]
    vectors,  # [B H N, ROWS, C]
    states,  # as in rule.py
    dstates,  # as in rule.py
    dq,  # out, [B, T, H, K]
    dk,  # out, [B, T, H, K]
    dwrite_key,  # out, [B, T, H, K], if there are any
    dG,  # out, [B H N, C, C]
    dvectors,  # out, [B H N, ROWS, C]
    T, N, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PARTS: tl.constexpr, TILES: tl.constexpr, MOMENTUM: tl.constexpr, CARRIED: tl.constexpr, SOURCES: tl.constexpr,
    DECAYED: tl.constexpr, SOLVE: tl.constexpr, OWN_WRITES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """By queries and keys, dQ = diag(a) dO M^T + diag(f) dO S^T + (dO U^T * G) W, and by coefficients. Where writes
    have keys of their own dkey is by those that errors were taken with, and dwritten by these. PARTS of BK columns of
    the keys, so that sums over values are whole products; TILES of BV of the values."""
    bh, n = tl.program_id(2) * H + tl.program_id(0), tl.program_id(1)
    chunk = bh * N + n
    TYPE: tl.constexpr = q.dtype.element_ty
    n_matrices: tl.constexpr = 1 + MOMENTUM + CARRIED
    J: tl.constexpr = 1 + MOMENTUM
    t = tl.arange(0, C)
    last = t == C - 1
    row = vectors + chunk.to(tl.int64) * tiles.ROWS * C + t

    # what waits for nothing is asked for first
    doutput = tile_of(do, bh, n, 0, T, H, V, C, BV)
    errors = part_of(U, chunk, 0, 0, V, C, BV, C)
    dright = tile_of(E, bh, n, 0, T, H, V, C, BV)
    combined = lower(G, chunk, C)
    alike = lower(similar, chunk, C)
    if TILES == 1:
        dattend = dot(doutput, errors, PRECISION)
        dsystem = -dot(dright, errors, PRECISION)
    else:
        dattend, dsystem = two_dots(do, E, U, bh, n, chunk, T, H, V, C, BV, TILES, PRECISION)
        dsystem = -dsystem
    dcombined = dattend * alike.to(tl.float32)
    by_reads = dattend * combined
    by_writes = by_reads.to(TYPE)  # of both the part that is by keys
    if SOLVE:
        by_coefficients = dsystem * lower(system, chunk, C).to(tl.float32)
        if DECAYED:
            below = t[:, None] > t[None, :]
            by_errors = tl.where(below, dsystem * combined, 0.0)
            dcombined += tl.where(below, by_coefficients, 0.0)
        else:
            place = places(source, bh, n, T, H, C, SOURCES)
            taken = t[:, None] == place[None, :]
            by_errors = dsystem * referred(G, chunk, place, C)
            dcombined = select_dot(taken, by_coefficients, TYPE, PRECISION, dcombined)
        if not OWN_WRITES:
            by_both = by_errors.to(TYPE)
            by_both += tl.trans(by_both)  # of which one is always 0
    tl.store(of_square(dG, chunk, C), dcombined)

    # of M and S side by side, [C, J]: their rows of a chunk's vectors follow each other
    j = tl.arange(0, J) * C
    reads = tl.load(row[:, None] + tiles.A * C + j[None, :])
    writes = tl.load(row[:, None] + tiles.WRITE_M * C + j[None, :])
    dreads = tl.zeros([C * J, 4], tl.float32)
    drefers, dwrites = dreads, dreads
    refers = tl.where(j[None, :] == 0, 1.0, 0.0)  # errors refer to the chunk's first memory
    if SOLVE:
        refers = tl.load(row[:, None] + tiles.REFER_A * C + j[None, :])
    zeros = tl.zeros([C], tl.float32)
    if CARRIED:
        refer_r = tl.load(row + tiles.REFER_R * C)
        write_r = tl.load(row + tiles.WRITE_R * C)
    dwrite_r = zeros
    none = tl.zeros([BV], tl.float32)
    # what the matrices are multiplied with: in the chunk's last places
    kept_last = tl.zeros([BV, J, BK // 8], tl.float32)
    crossed_last = kept_last
    refer_a_last, refer_f_last = none, none
    for part in range(0, PARTS):
        first_k = part * BK
        queries = tile_of(q, bh, n, first_k, T, H, K, C, BK)
        keys = tile_of(k, bh, n, first_k, T, H, K, C, BK)
        written = keys
        if OWN_WRITES:
            written = tile_of(write_key, bh, n, first_k, T, H, K, C, BK)
        dquery = wide_dot(by_reads, written, PRECISION)
        dwritten = dot(tl.trans(by_writes), queries, PRECISION)
        if OWN_WRITES:
            dkey = tl.zeros([C, BK], tl.float32)
            if SOLVE:  # rounded once, it would give dk a tenth more of its error
                dkey = wide_dot(by_errors, written, PRECISION)
                dwritten = dot(tl.trans(by_errors.to(TYPE)), keys, PRECISION, dwritten)
        elif SOLVE:
            dwritten = dot(by_both, keys, PRECISION, dwritten)
        for i in range(0, TILES):
            first_v = i * BV
            if TILES > 1:
                doutput = tile_of(do, bh, n, first_v, T, H, V, C, BV)
                errors = part_of(U, chunk, first_v, 0, V, C, BV, C)
                dright = tile_of(E, bh, n, first_v, T, H, V, C, BV)
            memories = parts_of(states, chunk, first_v, first_k, V, K, BV, BK, n_matrices, 0, J)
            dmemories = parts_of(dstates, chunk, first_v, first_k, V, K, BV, BK, n_matrices, 0, J)

            product = tl.reshape(dot(doutput, memories, PRECISION), [C, J, BK])
            dreads += by_lanes(product * queries[:, None, :], C * J, BK)
            dquery += tl.sum(product * reads[:, :, None], 1)
            product = tl.reshape(dot(dright, memories, PRECISION), [C, J, BK])
            if SOLVE:
                drefers -= by_lanes(product * keys[:, None, :], C * J, BK)
            if OWN_WRITES:
                dkey -= tl.sum(product * refers[:, :, None], 1)
            else:
                dwritten -= tl.sum(product * refers[:, :, None], 1)
            product = tl.reshape(dot(tl.trans(errors), dmemories, PRECISION), [C, J, BK])
            dwrites += by_lanes(product * written[:, None, :], C * J, BK)
            dwritten += tl.sum(product * writes[:, :, None], 1)
            kept = tl.reshape(memories.to(tl.float32), [BV, J, BK])
            dkept = tl.reshape(dmemories.to(tl.float32), [BV, J, BK])
            kept_last += by_eights(dkept * kept, BV, J, BK)
            if MOMENTUM:
                ended = one_of(kept, 1, J)[:, None, :] * dkept
                crossed_last += by_eights(ended, BV, J, BK)
            if CARRIED:
                reference = parts_of(states, chunk, first_v, first_k, V, K, BV, BK, n_matrices, n_matrices - 1, 1)
                dreference = parts_of(dstates, chunk, first_v, first_k, V, K, BV, BK, n_matrices, n_matrices - 1, 1)
                dwritten -= refer_r[:, None] * dot(dright, reference, PRECISION)
                product = dot(tl.trans(errors), dreference, PRECISION)
                dwrite_r += tl.sum(product * keys, 1)
                dwritten += write_r[:, None] * product
                refer_a_last += tl.sum(dreference.to(tl.float32) * one_of(kept, 0, J), 1)
                if MOMENTUM:
                    refer_f_last += tl.sum(dreference.to(tl.float32) * one_of(kept, 1, J), 1)
        at, mask_k = of_tokens(dq, bh, n, first_k, T, H, K, C, BK)
        tl.store(at, dquery.to(TYPE), mask=mask_k)
        at, mask_k = of_tokens(dk, bh, n, first_k, T, H, K, C, BK)
        if OWN_WRITES:
            tl.store(at, dkey.to(TYPE), mask=mask_k)
            at, mask_k = of_tokens(dwrite_key, bh, n, first_k, T, H, K, C, BK)
            tl.store(at, dwritten.to(TYPE), mask=mask_k)
        else:
            tl.store(at, dwritten.to(TYPE), mask=mask_k)

    rows = dvectors + chunk.to(tl.int64) * tiles.ROWS * C + t
    dreads, drefers, dwrites = tl.sum(dreads, 1), tl.sum(drefers, 1), tl.sum(dwrites, 1)
    dreads, drefers = tl.reshape(dreads, [C, J]), tl.reshape(drefers, [C, J])
    dwrites = tl.reshape(dwrites, [C, J])
    kept_last, crossed_last = tl.sum(kept_last, 2), tl.sum(crossed_last, 2)
    lasts = tl.sum(kept_last, 0)[None, :]  # by what M was multiplied with, and S
    of_memory = j[None, :] == 0
    f_last = tl.sum(tl.where(of_memory, crossed_last, 0.0))
    ends = tl.where(last[:, None], tl.where(of_memory, lasts, f_last), 0.0)
    tl.store(rows[:, None] + tiles.A * C + j[None, :], dreads + ends)
    tl.store(rows[:, None] + tiles.WRITE_M * C + j[None, :], dwrites)
    if MOMENTUM:
        m_last = tl.sum(tl.where(of_memory, 0.0, lasts), 1)
        tl.store(rows + tiles.M * C, tl.where(last, m_last, 0.0))
    if SOLVE:
        of_first = tl.where(of_memory, tl.sum(refer_a_last, 0), tl.sum(refer_f_last, 0))
        tl.store(rows[:, None] + tiles.REFER_A * C + j[None, :], drefers + tl.where(last[:, None], of_first, 0.0))
    if CARRIED:
        tl.store(rows + tiles.WRITE_R * C, dwrite_r)


@triton.jit
def tile_of(x, bh, n, first, T, H, X: tl.constexpr, C: tl.constexpr, BX: tl.constexpr):
    """[C, BX]: columns of a chunk's rows of x [B, T, H, X]."""
    at, mask = of_tokens(x, bh, n, first, T, H, X, C, BX)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def part_of(matrices, index, first_v, first_k, V, K, BV: tl.constexpr, BK: tl.constexpr):
    """[BV, BK] of a matrix of [*, V, K]."""
    at, mask = of_matrix(matrices, index, first_k, V, K, BV, BK, first_v)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def by_lanes(x, N: tl.constexpr, BK: tl.constexpr):
    """[N, 4]: rows of x [*, BK], N in all, summed up over what one thread has of a product's row. What four threads
    have is added when all is done: in the loop it would be a shuffle a number."""
    return tl.sum(tl.sum(tl.reshape(x, [N, BK // 8, 4, 2]), 3), 1)


@triton.jit
def by_eights(x, BV: tl.constexpr, J: tl.constexpr, BK: tl.constexpr):
    """[BV, J, BK / 8]: the same of a tile [BV, J, BK] as it was loaded, eight numbers a thread."""
    return tl.sum(tl.reshape(x, [BV, J, BK // 8, 8]), 3)


@triton.jit
def parts_of(
    matrices, chunk, first_v, first_k, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    N_MATRICES: tl.constexpr, FIRST: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """[BV, J BK]: columns of J of a chunk's matrices, side by side."""
    at, inside = of_states(matrices, chunk, first_v, first_k, V, K, BV, BK, N_MATRICES, FIRST, J)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def one_of(x, which: tl.constexpr, J: tl.constexpr):
    """[BV, BK]: one of the J tiles of x [BV, J, BK]."""
    return tl.sum(tl.where(tl.arange(0, J)[None, :, None] == which, x, 0.0), 1)


@triton.jit
def two_dots(
    do, E, U, bh, n, chunk, T, H, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[C, C] each: dO U^T and E U^T of a chunk."""
    first = tl.zeros([C, C], tl.float32)
    second = tl.zeros([C, C], tl.float32)
    for i in range(0, TILES):
        errors = part_of(U, chunk, i * BV, 0, V, C, BV, C)
        first = dot(tile_of(do, bh, n, i * BV, T, H, V, C, BV), errors, PRECISION, first)
        second = dot(tile_of(E, bh, n, i * BV, T, H, V, C, BV), errors, PRECISION, second)
    return first, second
