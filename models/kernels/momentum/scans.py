"""The two scans over chunks, forward for the matrices and backward for their gradients: the only steps that wait for
one another. A program has some columns of the values, for which every matrix is [K, BV] in its registers.

A matrix is multiplied first and stored then. The other way about Triton puts the barrier of the store's shuffle between
the write of the operand to shared memory and the fence that lets the tensor cores see it, where one must follow: a warp
could then read what another had not made visible. (Configurations that were wrong by a third, or ended in an illegal
access, have been right since.)"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.momentum import tiles
from models.kernels.momentum.tiles import dot, of_matrix, of_square, of_tokens, wider_dot


@triton.jit(do_not_specialize=["N"])
def scan(
    k,  # [B, T, H, K]
    write_key,  # [B, T, H, K]
    v,  # [B, T, H, V]
    R,  # [B H N, C, C]: without its ones
    vectors,  # [B H N, ROWS, C]
    first,  # [B H, n, K, V]: M, S and R
    U,  # out, [B, T, H, V]: the errors
    states,  # out, [B H N, n, K, V]: what every chunk begins with
    last,  # out, [B H, n, K, V]
    T, N, H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    MOMENTUM: tl.constexpr, CARRIED: tl.constexpr,
    OUTSIDE: tl.constexpr,  # matrices of first and last: one more where the reference is the last chunk's first memory
    SOLVE: tl.constexpr,
    OWN_WRITES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U = R (V - diag(a) K M - diag(f) K S - diag(r) K R), and the matrices after it."""
    first_v, bh = tl.program_id(0) * BV, tl.program_id(1)
    n_matrices: tl.constexpr = 1 + MOMENTUM + CARRIED
    t = tl.arange(0, C)
    at_first, inside = of_matrix(first, bh * OUTSIDE, first_v, K, V, BK, BV)
    memory = tl.load(at_first, mask=inside, other=0.0)
    if MOMENTUM:
        momentum = tl.load(at_first + K * V, mask=inside, other=0.0)
    if CARRIED:
        reference = tl.load(at_first + (n_matrices - 1) * K * V, mask=inside, other=0.0)
    at_last, inside = of_matrix(last, bh * OUTSIDE, first_v, K, V, BK, BV)
    for n in range(N):
        chunk = bh * N + n
        at_k, mask_k = of_tokens(k, bh, n, 0, T, H, K, C, BK)
        keys = tl.load(at_k, mask=mask_k, other=0.0)
        at_v, mask_v = of_tokens(v, bh, n, first_v, T, H, V, C, BV)
        error = tl.load(at_v, mask=mask_v, other=0.0).to(tl.float32)
        row = vectors + chunk.to(tl.int64) * tiles.ROWS * C
        write_m = tl.load(row + tiles.WRITE_M * C + t)
        a = tl.load(row + tiles.A * C + C - 1)
        if MOMENTUM:  # numbers by themselves are not loaded ahead: all are asked for before the first product
            f, m = tl.load(row + tiles.F * C + C - 1), tl.load(row + tiles.M * C + C - 1)

        at_states, inside = of_matrix(states, chunk * n_matrices, first_v, K, V, BK, BV)
        operand = memory.to(keys.dtype)
        if MOMENTUM:
            operand_s = momentum.to(keys.dtype)
        predicted = dot(keys, operand, PRECISION)
        if SOLVE:
            predicted *= tl.load(row + tiles.REFER_A * C + t)[:, None]
            if MOMENTUM:
                predicted += tl.load(row + tiles.REFER_F * C + t)[:, None] * dot(keys, operand_s, PRECISION)
        error -= predicted
        tl.store(at_states, operand, mask=inside)
        if MOMENTUM:
            tl.store(at_states + K * V, operand_s, mask=inside)
        if CARRIED:
            operand = reference.to(keys.dtype)
            error -= tl.load(row + tiles.REFER_R * C + t)[:, None] * dot(keys, operand, PRECISION)
            tl.store(at_states + (n_matrices - 1) * K * V, operand, mask=inside)
        if SOLVE:
            error = wider_dot(tl.load(of_square(R, chunk, C)), error, error, keys.dtype, PRECISION)
        at_u, mask_v = of_tokens(U, bh, n, first_v, T, H, V, C, BV)
        tl.store(at_u, error.to(keys.dtype), mask=mask_v)

        if n_matrices < OUTSIDE and n == N - 1:
            tl.store(at_last + n_matrices * K * V, memory, mask=inside)
        written = tl.trans(keys)
        if OWN_WRITES:
            at_w, mask_k = of_tokens(write_key, bh, n, 0, T, H, K, C, BK)
            written = tl.trans(tl.load(at_w, mask=mask_k, other=0.0))
        if CARRIED:
            reference *= tl.load(row + tiles.REFER_R * C + C - 1)
            reference += tl.load(row + tiles.REFER_A * C + C - 1) * memory
            if MOMENTUM:
                reference += tl.load(row + tiles.REFER_F * C + C - 1) * momentum
            write = tl.load(row + tiles.WRITE_R * C + t)
            reference += dot(written, (write[:, None] * error).to(keys.dtype), PRECISION)
        memory *= a
        writes_m = (write_m[:, None] * error).to(keys.dtype)
        if MOMENTUM:
            writes_s = (tl.load(row + tiles.WRITE_S * C + t)[:, None] * error).to(keys.dtype)
            memory += f * momentum
            momentum = dot(written, writes_s, PRECISION, m * momentum)
        memory = dot(written, writes_m, PRECISION, memory)
    tl.store(at_last, memory, mask=inside)
    if MOMENTUM:
        tl.store(at_last + K * V, momentum, mask=inside)
    if CARRIED:
        tl.store(at_last + (n_matrices - 1) * K * V, reference, mask=inside)


@triton.jit(do_not_specialize=["N"])
def scan_gradient(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    write_key,  # [B, T, H, K]
    R,  # [B H N, C, C]: without its ones
    vectors,  # [B H N, ROWS, C]
    do,  # [B, T, H, V]
    attend,  # [B H N, C, C]: what the outputs of a chunk have of its errors
    dlast,  # [B H, n, K, V]
    E,  # out, [B, T, H, V]: the gradient by the right-hand side of the errors' system, which is the one by v
    dstates,  # out, [B H N, n, K, V]: by what every chunk ends with
    dfirst,  # out, [B H, n, K, V]
    T, N, H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    MOMENTUM: tl.constexpr, CARRIED: tl.constexpr,
    OUTSIDE: tl.constexpr, SOLVE: tl.constexpr, OWN_WRITES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each line is the transpose of one of scan's, and of the outputs' O = diag(a) Q M + diag(f) Q S + ..."""
    first_v, bh = tl.program_id(0) * BV, tl.program_id(1)
    n_matrices: tl.constexpr = 1 + MOMENTUM + CARRIED
    t = tl.arange(0, C)
    at_last, inside = of_matrix(dlast, bh * OUTSIDE, first_v, K, V, BK, BV)
    dmemory = tl.load(at_last, mask=inside, other=0.0)
    if MOMENTUM:
        dmomentum = tl.load(at_last + K * V, mask=inside, other=0.0)
    if CARRIED:
        dreference = tl.load(at_last + (n_matrices - 1) * K * V, mask=inside, other=0.0)
    for i in range(N):
        n = N - 1 - i
        chunk = bh * N + n
        at_k, mask_k = of_tokens(k, bh, n, 0, T, H, K, C, BK)
        keys = tl.load(at_k, mask=mask_k, other=0.0)
        written = keys
        if OWN_WRITES:
            at_w, mask_k = of_tokens(write_key, bh, n, 0, T, H, K, C, BK)
            written = tl.load(at_w, mask=mask_k, other=0.0)
        at_q, mask_k = of_tokens(q, bh, n, 0, T, H, K, C, BK)
        queries = tl.trans(tl.load(at_q, mask=mask_k, other=0.0))
        at_v, mask_v = of_tokens(do, bh, n, first_v, T, H, V, C, BV)
        doutput = tl.load(at_v, mask=mask_v, other=0.0)
        derror = dot(tl.trans(tl.load(of_square(attend, chunk, C))), doutput, PRECISION)
        row = vectors + chunk.to(tl.int64) * tiles.ROWS * C
        if SOLVE:
            refer_a = tl.load(row + tiles.REFER_A * C + t)
        write_m = tl.load(row + tiles.WRITE_M * C + t)
        a = tl.load(row + tiles.A * C + t)
        a_last = tl.load(row + tiles.A * C + C - 1)
        if MOMENTUM:
            f_last, m_last = tl.load(row + tiles.F * C + C - 1), tl.load(row + tiles.M * C + C - 1)

        at_states, inside = of_matrix(dstates, chunk * n_matrices, first_v, K, V, BK, BV)
        operand = dmemory.to(keys.dtype)
        derror += write_m[:, None] * dot(written, operand, PRECISION)
        tl.store(at_states, operand, mask=inside)
        if MOMENTUM:
            operand = dmomentum.to(keys.dtype)
            derror += tl.load(row + tiles.WRITE_S * C + t)[:, None] * dot(written, operand, PRECISION)
            tl.store(at_states + K * V, operand, mask=inside)
        if CARRIED:
            operand = dreference.to(keys.dtype)
            derror += tl.load(row + tiles.WRITE_R * C + t)[:, None] * dot(written, operand, PRECISION)
            tl.store(at_states + (n_matrices - 1) * K * V, operand, mask=inside)
        if SOLVE:
            derror = wider_dot(tl.trans(tl.load(of_square(R, chunk, C))), derror, derror, keys.dtype, PRECISION)
        at_e, mask_v = of_tokens(E, bh, n, first_v, T, H, V, C, BV)
        tl.store(at_e, derror.to(keys.dtype), mask=mask_v)

        erased = tl.trans(keys)
        if MOMENTUM:
            reads = (tl.load(row + tiles.F * C + t)[:, None] * doutput).to(keys.dtype)
            dmomentum = dot(queries, reads, PRECISION, m_last * dmomentum + f_last * dmemory)
            if SOLVE:
                seen = (-tl.load(row + tiles.REFER_F * C + t)[:, None] * derror).to(keys.dtype)
                dmomentum = dot(erased, seen, PRECISION, dmomentum)
        reads = (a[:, None] * doutput).to(keys.dtype)
        dmemory = dot(queries, reads, PRECISION, a_last * dmemory)
        seen = (-refer_a[:, None] * derror if SOLVE else -derror).to(keys.dtype)
        dmemory = dot(erased, seen, PRECISION, dmemory)
        if n_matrices < OUTSIDE and i == 0:
            dmemory += tl.load(at_last + n_matrices * K * V, mask=inside, other=0.0)
        if CARRIED:
            dmemory += tl.load(row + tiles.REFER_A * C + C - 1) * dreference
            if MOMENTUM:
                dmomentum += tl.load(row + tiles.REFER_F * C + C - 1) * dreference
            refer_r = tl.load(row + tiles.REFER_R * C + t)
            dreference *= tl.load(row + tiles.REFER_R * C + C - 1)
            dreference -= dot(erased, (refer_r[:, None] * derror).to(keys.dtype), PRECISION)
    at, _ = of_matrix(dfirst, bh * OUTSIDE, first_v, K, V, BK, BV)
    tl.store(at, dmemory, mask=inside)
    if MOMENTUM:
        tl.store(at + K * V, dmomentum, mask=inside)
    if CARRIED:
        tl.store(at + (n_matrices - 1) * K * V, dreference, mask=inside)
    if n_matrices < OUTSIDE:
        tl.store(at + n_matrices * K * V, tl.zeros([BK, BV], tl.float32), mask=inside)
