"""The two scans over chunks, forward for the matrices and backward for their gradients: the only steps that wait for
one another.

A program has some columns of the values, for which every matrix is in its registers, turned around, [BV, K], as are a
chunk's errors, [BV, C]: a product of warp groups takes its left operand from the registers in which it was summed up,
and only what was loaded comes from shared memory. What a chunk has found is carried over, and stored while the next
one's tiles are on their way.

No operand that a program has worked out goes through shared memory. Where one did Triton could put the barrier of a
store's shuffle between the write of the operand and the fence that lets the tensor cores see it, where one must follow:
a warp could then read what another had not made visible. docs/kernels.md tells of it."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.delta.scans import leave
from models.kernels.delta.tiles import of_tokens
from models.kernels.momentum import tiles
from models.kernels.momentum.tiles import dot, of_matrix, of_square, of_states, of_turned, unit_dot
from models.kernels.spans import span_of


@triton.jit
def vector(row, which, C: tl.constexpr):
    """One row of a chunk's vectors, beside the columns of a tile [*, C]."""
    return tl.load(row + which * C + tl.arange(0, C))[None, :]


@triton.jit(do_not_specialize=["N", "spans"])
def scan(
    k,  # [B, T, H, K]
    write_key,  # [B, T, H, K]
    v,  # [B, T, H, V]
    R,  # [B H N, HALVES, C, C]: without its ones
    vectors,  # [B H N, ROWS, C]
    first,  # [spans B H, n, K, V]: M, S and R; or None: b and A of every span are asked for (models/kernels/spans.py)
    U,  # out, [B H N, V, C]: the errors, or None
    states,  # out: what every chunk begins with, kept by PART columns (rule.py), or None
    last,  # out, [spans B H, n, K, V]; or b and A, [spans B H, n, K, V + n K]
    spans,  # how many a row is cut into, or None for 1
    T, N, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    MOMENTUM: tl.constexpr, CARRIED: tl.constexpr,
    OUTSIDE: tl.constexpr,  # matrices of first and last: one more where the reference is the last chunk's first memory
    SOLVE: tl.constexpr,
    OWN_WRITES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U = R (V - diag(a) K M - diag(f) K S - diag(r) K R), and the matrices after it."""
    first_v, number = tl.program_id(0) * BV, tl.program_id(1)
    bh, begin, end = span_of(number, N, spans)
    n_matrices: tl.constexpr = 1 + MOMENTUM + CARRIED
    WIDTH: tl.constexpr = V + n_matrices * K if first is None else V
    TYPE: tl.constexpr = k.dtype.element_ty
    HALVES: tl.constexpr = 1 if TYPE.is_fp32() else 2
    t = tl.arange(0, C)
    if first is None:
        own = first_v + tl.arange(0, BV)[:, None] - V - tl.arange(0, BK)[None, :]  # 0 in the identity's columns
        memory = tl.where(own == 0, 1.0, 0.0)
        if MOMENTUM:
            momentum = tl.where(own == K, 1.0, 0.0)
    else:
        at_first, inside = of_turned(first, number * OUTSIDE, first_v, K, V, BK, BV)
        memory = tl.load(at_first, mask=inside, other=0.0)
        if MOMENTUM:
            momentum = tl.load(at_first + K * V, mask=inside, other=0.0)
        if CARRIED:
            reference = tl.load(at_first + (n_matrices - 1) * K * V, mask=inside, other=0.0)
    at_last, inside = of_turned(last, number * OUTSIDE, first_v, K, WIDTH, BK, BV)
    one = tl.where(t[:, None] == t[None, :], 1.0, 0.0).to(TYPE)
    error_before = tl.zeros([BV, C], TYPE)
    for i in tl.range(end - begin, disable_licm=True):
        n = begin + i
        chunk = bh * N + n
        row = vectors + chunk.to(tl.int64) * tiles.ROWS * C
        a = tl.load(row + tiles.A * C + C - 1)
        if MOMENTUM:  # numbers by themselves are not loaded ahead: they come while the last chunk's tiles are stored
            f, m = tl.load(row + tiles.F * C + C - 1), tl.load(row + tiles.M * C + C - 1)
        if U is not None:
            at_u, inside_u = of_matrix(U, chunk - 1, 0, V, C, BV, C, first_v)
            tl.store(at_u, error_before, mask=inside_u & (i > 0))
        operand = memory.to(TYPE)
        if MOMENTUM:
            operand_s = momentum.to(TYPE)
        if CARRIED:
            operand_r = reference.to(TYPE)
        if states is not None:
            at_states, inside_s = of_states(states, chunk, first_v, 0, V, K, BV, BK, n_matrices)
            tl.store(at_states, operand, mask=inside_s)
            if MOMENTUM:
                tl.store(at_states + tiles.PART, operand_s, mask=inside_s)
            if CARRIED:
                tl.store(at_states + (n_matrices - 1) * tiles.PART, operand_r, mask=inside_s)
        at_k, mask_k = of_tokens(k, bh, n, 0, T, H, K, C, BK)
        keys = tl.load(at_k, mask=mask_k, other=0.0)
        written = keys
        if OWN_WRITES:
            at_w, mask_k = of_tokens(write_key, bh, n, 0, T, H, K, C, BK)
            written = tl.load(at_w, mask=mask_k, other=0.0)
        at_v, mask_v = of_tokens(v, bh, n, first_v, T, H, V, C, BV)
        if first is None:
            mask_v = mask_v & (tl.arange(0, BV) < V - first_v)[None, :]
        values = tl.load(at_v, mask=mask_v, other=0.0)
        if SOLVE:
            inverse = tl.trans(tl.load(of_square(R, chunk * HALVES, C)))
            inverse_low = inverse
            if HALVES == 2:
                inverse_low = tl.trans(tl.load(of_square(R, chunk * HALVES + 1, C)))

        error = dot(tl.trans(values), one, PRECISION)
        predicted = dot(operand, tl.trans(keys), PRECISION)
        if SOLVE:
            predicted *= vector(row, tiles.REFER_A, C)
        error -= predicted
        if SOLVE and MOMENTUM:
            error -= vector(row, tiles.REFER_F, C) * dot(operand_s, tl.trans(keys), PRECISION)
        if CARRIED:
            error -= vector(row, tiles.REFER_R, C) * dot(operand_r, tl.trans(keys), PRECISION)
        if SOLVE:
            error = unit_dot(error, inverse, inverse_low, PRECISION)

        if n_matrices < OUTSIDE and n == N - 1:
            tl.store(at_last + n_matrices * K * V, memory, mask=inside)
        if CARRIED:
            reference *= tl.load(row + tiles.REFER_R * C + C - 1)
            reference += tl.load(row + tiles.REFER_A * C + C - 1) * memory
            if MOMENTUM:
                reference += tl.load(row + tiles.REFER_F * C + C - 1) * momentum
            write = (vector(row, tiles.WRITE_R, C) * error).to(TYPE)
            reference = dot(write, written, PRECISION, reference)
        memory *= a
        write = (vector(row, tiles.WRITE_M, C) * error).to(TYPE)
        if MOMENTUM:
            memory += f * momentum
            write_s = (vector(row, tiles.WRITE_S, C) * error).to(TYPE)
            momentum = dot(write_s, written, PRECISION, m * momentum)
        memory = dot(write, written, PRECISION, memory)
        error_before = error.to(TYPE)
    if U is not None:
        at_u, inside_u = of_matrix(U, bh * N + end - 1, 0, V, C, BV, C, first_v)
        tl.store(at_u, error_before, mask=inside_u)
    tl.store(at_last, memory, mask=inside)
    if MOMENTUM:
        tl.store(at_last + K * WIDTH, momentum, mask=inside)
    if CARRIED:
        tl.store(at_last + (n_matrices - 1) * K * V, reference, mask=inside)


@triton.jit(do_not_specialize=["N", "spans"])
def scan_gradient(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    write_key,  # [B, T, H, K]
    R,  # [B H N, HALVES, C, C]: without its ones
    vectors,  # [B H N, ROWS, C]
    do,  # [B, T, H, V]
    attend,  # [B H N, C, C]: what the outputs of a chunk have of its errors
    dlast,  # [spans B H, n, K, V], or None
    E,  # out, [B, T, H, V]: the gradient by the right-hand side of the errors' system, which is the one by v; or None:
    # c of every span is asked for (models/kernels/spans.py), and no more
    dstates,  # out, as states: by what every chunk ends with, or None
    dfirst,  # out, [spans B H, n, K, V]; or c
    spans,  # how many a row is cut into, or None for 1
    T, N, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    MOMENTUM: tl.constexpr, CARRIED: tl.constexpr,
    OUTSIDE: tl.constexpr, SOLVE: tl.constexpr, OWN_WRITES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each line is the transpose of one of scan's, and of the outputs' O = diag(a) Q M + diag(f) Q S + ..."""
    first_v, number = tl.program_id(0) * BV, tl.program_id(1)
    bh, begin, end = span_of(number, N, spans)
    n_matrices: tl.constexpr = 1 + MOMENTUM + CARRIED
    TYPE: tl.constexpr = k.dtype.element_ty
    HALVES: tl.constexpr = 1 if TYPE.is_fp32() else 2
    t = tl.arange(0, C)
    if dlast is None:
        dmemory = tl.zeros([BV, BK], tl.float32)
        dmomentum = dmemory
    else:
        at_last, inside = of_turned(dlast, number * OUTSIDE, first_v, K, V, BK, BV)
        dmemory = tl.load(at_last, mask=inside, other=0.0)
        if MOMENTUM:
            dmomentum = tl.load(at_last + K * V, mask=inside, other=0.0)
        if CARRIED:
            dreference = tl.load(at_last + (n_matrices - 1) * K * V, mask=inside, other=0.0)
    one = tl.where(t[:, None] == t[None, :], 1.0, 0.0).to(TYPE)
    derror_before = tl.zeros([BV, C], TYPE)
    for i in tl.range(end - begin, disable_licm=True):
        n = end - 1 - i
        chunk = bh * N + n
        row = vectors + chunk.to(tl.int64) * tiles.ROWS * C
        a_last = tl.load(row + tiles.A * C + C - 1)
        if MOMENTUM:
            f_last, m_last = tl.load(row + tiles.F * C + C - 1), tl.load(row + tiles.M * C + C - 1)
        if E is not None:
            leave(derror_before, E, bh, n + 1, first_v, i > 0, T, H, V, C, BV)
        operand = dmemory.to(TYPE)
        if MOMENTUM:
            operand_s = dmomentum.to(TYPE)
        if CARRIED:
            operand_r = dreference.to(TYPE)
        if dstates is not None:
            at_states, inside_s = of_states(dstates, chunk, first_v, 0, V, K, BV, BK, n_matrices)
            tl.store(at_states, operand, mask=inside_s)
            if MOMENTUM:
                tl.store(at_states + tiles.PART, operand_s, mask=inside_s)
            if CARRIED:
                tl.store(at_states + (n_matrices - 1) * tiles.PART, operand_r, mask=inside_s)
        at_k, mask_k = of_tokens(k, bh, n, 0, T, H, K, C, BK)
        keys = tl.load(at_k, mask=mask_k, other=0.0)
        written = keys
        if OWN_WRITES:
            at_w, mask_k = of_tokens(write_key, bh, n, 0, T, H, K, C, BK)
            written = tl.load(at_w, mask=mask_k, other=0.0)
        at_q, mask_k = of_tokens(q, bh, n, 0, T, H, K, C, BK)
        queries = tl.load(at_q, mask=mask_k, other=0.0)
        at_v, mask_v = of_tokens(do, bh, n, first_v, T, H, V, C, BV)
        doutput = tl.trans(tl.load(at_v, mask=mask_v, other=0.0))
        similar = tl.load(of_square(attend, chunk, C))
        if SOLVE:
            inverse = tl.load(of_square(R, chunk * HALVES, C))
            inverse_low = inverse
            if HALVES == 2:
                inverse_low = tl.load(of_square(R, chunk * HALVES + 1, C))

        minus = -vector(row, tiles.WRITE_M, C) * dot(operand, tl.trans(written), PRECISION)
        if MOMENTUM:
            minus -= vector(row, tiles.WRITE_S, C) * dot(operand_s, tl.trans(written), PRECISION)
        if CARRIED:
            minus -= vector(row, tiles.WRITE_R, C) * dot(operand_r, tl.trans(written), PRECISION)
        derror = dot(doutput, similar, PRECISION) - minus
        if SOLVE:
            derror = unit_dot(derror, inverse, inverse_low, PRECISION)
        derror_before = derror.to(TYPE)

        doutput = dot(doutput, one, PRECISION)  # as it is, in the registers of a left operand
        if MOMENTUM:
            dmomentum = m_last * dmomentum + f_last * dmemory
            reads = (vector(row, tiles.F, C) * doutput).to(TYPE)
            dmomentum = dot(reads, queries, PRECISION, dmomentum)
            if SOLVE:
                seen = (-vector(row, tiles.REFER_F, C) * derror).to(TYPE)
                dmomentum = dot(seen, keys, PRECISION, dmomentum)
        reads = (vector(row, tiles.A, C) * doutput).to(TYPE)
        dmemory = dot(reads, queries, PRECISION, a_last * dmemory)
        seen = (-vector(row, tiles.REFER_A, C) * derror if SOLVE else -derror).to(TYPE)
        dmemory = dot(seen, keys, PRECISION, dmemory)
        if n_matrices < OUTSIDE and i == 0:
            dmemory += tl.load(at_last + n_matrices * K * V, mask=inside, other=0.0)
        if CARRIED:
            dmemory += tl.load(row + tiles.REFER_A * C + C - 1) * dreference
            if MOMENTUM:
                dmomentum += tl.load(row + tiles.REFER_F * C + C - 1) * dreference
            dreference *= tl.load(row + tiles.REFER_R * C + C - 1)
            seen = (-vector(row, tiles.REFER_R, C) * derror).to(TYPE)
            dreference = dot(seen, keys, PRECISION, dreference)
    if E is not None:
        leave(derror_before, E, bh, begin, first_v, True, T, H, V, C, BV)
    at, inside = of_turned(dfirst, number * OUTSIDE, first_v, K, V, BK, BV)
    tl.store(at, dmemory, mask=inside)
    if MOMENTUM:
        tl.store(at + K * V, dmomentum, mask=inside)
    if CARRIED:
        tl.store(at + (n_matrices - 1) * K * V, dreference, mask=inside)
    if n_matrices < OUTSIDE:
        tl.store(at + n_matrices * K * V, tl.zeros([BV, BK], tl.float32), mask=inside)
