"""The products of a chunk that wait for no other chunk: outputs, and gradients by queries, keys and coefficients."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.momentum import tiles
from models.kernels.momentum.coefficients import places
from models.kernels.momentum.tiles import dot, of_matrix, of_square, of_tokens, wide_dot


@triton.jit
def outputs(
    q,  # [B, T, H, K]
    write_key,  # [B, T, H, K]
    U,  # [B, T, H, V]
    G,  # [B H N, C, C]
    vectors,  # [B H N, ROWS, C]
    states,  # [B H N, n, K, V]
    o,  # out, [B, T, H, V]
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
    attend = dot(queries, tl.trans(written), PRECISION) * tl.load(of_square(G, chunk, C))
    output = dot(attend.to(errors.dtype), errors, PRECISION)
    memory = tl.load(at, mask=inside, other=0.0)
    output += tl.load(row + tiles.A * C)[:, None] * dot(queries, memory, PRECISION)
    if MOMENTUM:
        momentum = tl.load(at + K * V, mask=inside, other=0.0)
        output += tl.load(row + tiles.F * C)[:, None] * dot(queries, momentum, PRECISION)
    at, mask = of_tokens(o, bh, n, first_v, T, H, V, C, BV)
    tl.store(at, output.to(errors.dtype), mask=mask)


@triton.jit
def queries_gradient(
    q,  # [B, T, H, K]
    write_key,  # [B, T, H, K]
    U,  # [B, T, H, V]
    do,  # [B, T, H, V]
    G,  # [B H N, C, C]
    vectors,  # [B H N, ROWS, C]
    states,  # [B H N, n, K, V]
    dq,  # out, [B, T, H, K]
    dU,  # out, [B, T, H, V]: of the errors, by the outputs of their own chunk
    dsimilar,  # out, [B H N, C, C]: by Q W^T, dO U^T * G, which the keys want too
    dG,  # out, [B H N, C, C]
    dvectors,  # out, [B H N, ROWS, C]: A and F
    T, N, H, K, V, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, MOMENTUM: tl.constexpr, CARRIED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the outputs alone say: dQ = diag(a) dO M^T + diag(f) dO S^T + (dO U^T * G) W,
    dU = (Q W^T * G)^T dO, and by G."""
    n, bh = tl.program_id(0), tl.program_id(1)
    chunk = bh * N + n
    t = tl.arange(0, C)
    at_w, mask_k = of_tokens(write_key, bh, n, 0, T, H, K, C, BK)
    written = tl.load(at_w, mask=mask_k, other=0.0)
    at_q, mask_k = of_tokens(q, bh, n, 0, T, H, K, C, BK)
    queries = tl.load(at_q, mask=mask_k, other=0.0)
    row = vectors + chunk.to(tl.int64) * tiles.ROWS * C + t
    a = tl.load(row + tiles.A * C)
    combined = tl.load(of_square(G, chunk, C))
    similar = dot(queries, tl.trans(written), PRECISION)
    attend = tl.trans((similar * combined).to(queries.dtype))
    dattend = tl.zeros([C, C], tl.float32)
    dquery = tl.zeros([C, BK], tl.float32)
    da = tl.zeros([C], tl.float32)
    if MOMENTUM:
        f = tl.load(row + tiles.F * C)
        df = tl.zeros([C], tl.float32)
    for first_v in range(0, V, BV):
        at_do, mask_v = of_tokens(do, bh, n, first_v, T, H, V, C, BV)
        doutput = tl.load(at_do, mask=mask_v, other=0.0)
        at_u, mask_v = of_tokens(U, bh, n, first_v, T, H, V, C, BV)
        errors = tl.load(at_u, mask=mask_v, other=0.0)
        at_du, mask_v = of_tokens(dU, bh, n, first_v, T, H, V, C, BV)
        tl.store(at_du, dot(attend, doutput, PRECISION).to(queries.dtype), mask=mask_v)
        dattend += dot(doutput, tl.trans(errors), PRECISION)
        at_m, inside = of_matrix(states, chunk * (1 + MOMENTUM + CARRIED), first_v, K, V, BK, BV)
        memory = tl.load(at_m, mask=inside, other=0.0)
        product = dot(doutput, tl.trans(memory), PRECISION)
        da += tl.sum(product * queries, 1)
        dquery += a[:, None] * product
        if MOMENTUM:
            momentum = tl.load(at_m + K * V, mask=inside, other=0.0)
            product = dot(doutput, tl.trans(momentum), PRECISION)
            df += tl.sum(product * queries, 1)
            dquery += f[:, None] * product
    weighted = dattend * combined
    tl.store(of_square(dsimilar, chunk, C), weighted.to(queries.dtype))
    tl.store(of_square(dG, chunk, C), dattend * similar)
    dquery += wide_dot(weighted, written, PRECISION)
    at_dq, mask_k = of_tokens(dq, bh, n, 0, T, H, K, C, BK)
    tl.store(at_dq, dquery.to(queries.dtype), mask=mask_k)
    rows = dvectors + chunk.to(tl.int64) * tiles.ROWS * C + t
    tl.store(rows + tiles.A * C, da)
    if MOMENTUM:
        tl.store(rows + tiles.F * C, df)


@triton.jit
def keys_gradient(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    write_key,  # [B, T, H, K]
    source,  # [B, T]
    U,  # [B, T, H, V]
    E,  # [B, T, H, V]
    G,  # [B H N, C, C]
    dsimilar,  # [B H N, C, C]
    vectors,  # [B H N, ROWS, C]
    states,  # [B H N, n, K, V]
    dstates,  # [B H N, n, K, V]
    dk,  # out, [B, T, H, K]
    dwrite_key,  # out, [B, T, H, K], if there are any
    dG,  # in and out, [B H N, C, C]
    dvectors,  # in and out, [B H N, ROWS, C]: A, F, and all that end in the last matrices
    T, N, H, K, V, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, MOMENTUM: tl.constexpr, CARRIED: tl.constexpr,
    SOURCES: tl.constexpr, DECAYED: tl.constexpr, SOLVE: tl.constexpr, OWN_WRITES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """By the keys, and the rest of what there is by the coefficients: those of M_ref go where they were taken from.
    Where writes have keys of their own dkey is by those that errors were taken with, and dwritten by these."""
    n, bh = tl.program_id(0), tl.program_id(1)
    chunk = bh * N + n
    n_matrices: tl.constexpr = 1 + MOMENTUM + CARRIED
    t = tl.arange(0, C)
    last = t == C - 1
    at_k, mask_k = of_tokens(k, bh, n, 0, T, H, K, C, BK)
    keys = tl.load(at_k, mask=mask_k, other=0.0)
    written = keys
    if OWN_WRITES:
        at_w, mask_k = of_tokens(write_key, bh, n, 0, T, H, K, C, BK)
        written = tl.load(at_w, mask=mask_k, other=0.0)
    row = vectors + chunk.to(tl.int64) * tiles.ROWS * C + t
    rows = dvectors + chunk.to(tl.int64) * tiles.ROWS * C + t
    at_q, mask_k = of_tokens(q, bh, n, 0, T, H, K, C, BK)
    queries = tl.load(at_q, mask=mask_k, other=0.0)
    dkey = dot(tl.trans(tl.load(of_square(dsimilar, chunk, C))), queries, PRECISION)
    if OWN_WRITES:
        dwritten = dkey
        dkey = tl.zeros([C, BK], tl.float32)
    if SOLVE:
        dsystem = tl.zeros([C, C], tl.float32)
        for first_v in range(0, V, BV):
            at_u, mask_v = of_tokens(U, bh, n, first_v, T, H, V, C, BV)
            errors = tl.load(at_u, mask=mask_v, other=0.0)
            at_e, mask_v = of_tokens(E, bh, n, first_v, T, H, V, C, BV)
            dright = tl.load(at_e, mask=mask_v, other=0.0)
            dsystem -= dot(dright, tl.trans(errors), PRECISION)
        combined = tl.load(of_square(G, chunk, C))
        drefer = dsystem * dot(keys, tl.trans(written), PRECISION)
        if DECAYED:
            below = t[:, None] > t[None, :]
            weighted = tl.where(below, dsystem * combined, 0.0)
            dcombined = tl.where(below, drefer, 0.0)
        else:
            place = places(source, bh, n, T, H, C, SOURCES)
            chosen = tl.where(place[:, None] == t[None, :], 1.0, 0.0)
            weighted = dsystem * dot(chosen, combined, PRECISION)
            dcombined = dot(tl.trans(chosen), drefer, PRECISION)
        dcombined += tl.load(of_square(dG, chunk, C))
        tl.store(of_square(dG, chunk, C), dcombined)
        if OWN_WRITES:  # rounded once, the first would give dk a tenth more of its error
            dkey += wide_dot(weighted, written, PRECISION)
            dwritten += dot(tl.trans(weighted).to(keys.dtype), keys, PRECISION)
        else:
            dkey += dot((weighted + tl.trans(weighted)).to(keys.dtype), keys, PRECISION)

    write_m = tl.load(row + tiles.WRITE_M * C)
    dwrite_m = tl.zeros([C], tl.float32)
    da_last = 0.0
    if SOLVE:
        refer_a = tl.load(row + tiles.REFER_A * C)
        drefer_a = tl.zeros([C], tl.float32)
    if MOMENTUM:
        write_s = tl.load(row + tiles.WRITE_S * C)
        dwrite_s = tl.zeros([C], tl.float32)
        df_last, dm_last = 0.0, 0.0
        if SOLVE:
            refer_f = tl.load(row + tiles.REFER_F * C)
            drefer_f = tl.zeros([C], tl.float32)
    if CARRIED:
        refer_r = tl.load(row + tiles.REFER_R * C)
        write_r = tl.load(row + tiles.WRITE_R * C)
        dwrite_r = tl.zeros([C], tl.float32)
    for first_v in range(0, V, BV):
        at_u, mask_v = of_tokens(U, bh, n, first_v, T, H, V, C, BV)
        errors = tl.load(at_u, mask=mask_v, other=0.0)
        at_e, mask_v = of_tokens(E, bh, n, first_v, T, H, V, C, BV)
        dright = tl.load(at_e, mask=mask_v, other=0.0)
        at_m, inside = of_matrix(states, chunk * n_matrices, first_v, K, V, BK, BV)
        memory = tl.load(at_m, mask=inside, other=0.0)
        at_d, inside = of_matrix(dstates, chunk * n_matrices, first_v, K, V, BK, BV)
        dmemory = tl.load(at_d, mask=inside, other=0.0)
        product = dot(dright, tl.trans(memory), PRECISION)
        if SOLVE:
            drefer_a -= tl.sum(product * keys, 1)
            product *= refer_a[:, None]
        dkey -= product
        product = dot(errors, tl.trans(dmemory), PRECISION)
        dwrite_m += tl.sum(product * written, 1)
        if OWN_WRITES:
            dwritten += write_m[:, None] * product
        else:
            dkey += write_m[:, None] * product
        da_last += tl.sum(dmemory.to(tl.float32) * memory)
        if MOMENTUM:
            momentum = tl.load(at_m + K * V, mask=inside, other=0.0)
            df_last += tl.sum(dmemory.to(tl.float32) * momentum)
            if SOLVE:
                product = dot(dright, tl.trans(momentum), PRECISION)
                drefer_f -= tl.sum(product * keys, 1)
                dkey -= refer_f[:, None] * product
            dmomentum = tl.load(at_d + K * V, mask=inside, other=0.0)
            dm_last += tl.sum(dmomentum.to(tl.float32) * momentum)
            product = dot(errors, tl.trans(dmomentum), PRECISION)
            dwrite_s += tl.sum(product * keys, 1)
            dkey += write_s[:, None] * product
        if CARRIED:
            reference = tl.load(at_m + (n_matrices - 1) * K * V, mask=inside, other=0.0)
            dkey -= refer_r[:, None] * dot(dright, tl.trans(reference), PRECISION)
            dreference = tl.load(at_d + (n_matrices - 1) * K * V, mask=inside, other=0.0)
            product = dot(errors, tl.trans(dreference), PRECISION)
            dwrite_r += tl.sum(product * keys, 1)
            dkey += write_r[:, None] * product
            drefer_a += tl.where(last, tl.sum(dreference.to(tl.float32) * memory), 0.0)
            if MOMENTUM:
                drefer_f += tl.where(last, tl.sum(dreference.to(tl.float32) * momentum), 0.0)

    da = tl.load(rows + tiles.A * C) + tl.where(last, da_last, 0.0)
    if MOMENTUM:
        df = tl.load(rows + tiles.F * C) + tl.where(last, df_last, 0.0)
    if SOLVE:
        if DECAYED:
            da += drefer_a
        else:
            place = places(source, bh, n, T, H, C, SOURCES)
            chosen = tl.where(place[:, None] == t[None, :], 1.0, 0.0)
            da += tl.sum(chosen * drefer_a[:, None], 0)
            if MOMENTUM:
                df += tl.sum(chosen * drefer_f[:, None], 0)
    tl.store(rows + tiles.A * C, da)
    tl.store(rows + tiles.WRITE_M * C, dwrite_m)
    if CARRIED:
        tl.store(rows + tiles.WRITE_R * C, dwrite_r)
    if MOMENTUM:
        tl.store(rows + tiles.F * C, df)
        tl.store(rows + tiles.M * C, tl.where(last, dm_last, 0.0))
        tl.store(rows + tiles.WRITE_S * C, dwrite_s)
    at_dk, mask_k = of_tokens(dk, bh, n, 0, T, H, K, C, BK)
    tl.store(at_dk, dkey.to(keys.dtype), mask=mask_k)
    if OWN_WRITES:
        at_dw, mask_k = of_tokens(dwrite_key, bh, n, 0, T, H, K, C, BK)
        tl.store(at_dw, dwritten.to(keys.dtype), mask=mask_k)
