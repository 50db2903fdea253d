"""The Triton kernels of local linear attention; what they compute is in local_linear.py.

Query kernels: one program per batch row, head and block of BM queries, the longest blocks first. It goes over the keys
that its queries may use, BN at a time, once for every product with C, and keeps q and what it multiplies the keys with;
weights are computed anew each time. Key kernel: one program per batch row, key-value head and block of BN keys.

q, o [B, T, H, *], k, v [B, S, G, *], all contiguous; mean, u, z [B, T, H, K] and what is a number per query [B, H, T]
in float32. Logarithms are to base 2. Query t is pair past + t and uses those from `low` to `high`.

Rounding. Products take operands of the dtype of k, float32 ones as TF32 (PRECISION "tf32") or as they are ("ieee").
The weights are rounded before they are summed, and their sums are those of the rounded ones, so that what is rounded is
still an average. p, u and z are taken in two parts: their components that no key shares are as large as 1 / lambda, and
rounded they would not be orthogonal to the keys any more.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(-1e30)  # the logarithm of the weight of what can't be seen, before the largest is known
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def rounded(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """float32 x as the products take it. TF32 by hand: tensor cores cut off what they don't read."""
    if tl.bfloat16 == DTYPE:
        y = x.to(DTYPE)
    elif PRECISION == "tf32":
        y = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        y = x
    return y


@triton.jit
def in_parts(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Two operands that add up to x."""
    first = rounded(x, DTYPE, PRECISION)
    return first, rounded(x - first.to(tl.float32), DTYPE, PRECISION)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def product_of_parts(first, second, b, acc, PRECISION: tl.constexpr):
    acc = product(first, b, acc, PRECISION)
    return acc if PRECISION == "ieee" else product(second, b, acc, PRECISION)


@triton.jit
def load(base, rows, num_rows, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK], zero beyond the last row and column."""
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store(base, rows, num_rows, stride, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], x, mask=inside)


@triton.jit
def interval(start, b, rows, T, S, past, window, DOCUMENTS: tl.constexpr):
    """The first and the last pair of each query."""
    high = tl.minimum(past + rows, S - 1)
    low = tl.maximum(past + rows + 1 - window, 0)
    if DOCUMENTS:
        low = tl.maximum(low, tl.load(start + b * T + rows, mask=rows < T, other=S))
    return tl.minimum(low, high), high


@triton.jit
def weights(q, keys, j, low, high, scale, level, PRECISION: tl.constexpr):
    """w [BM, BN], from each query's log sum."""
    s = product(q, tl.trans(keys), None, PRECISION) * scale
    visible = (j[None, :] >= low[:, None]) & (j[None, :] <= high[:, None])
    return tl.where(visible, tl.exp2(s - level[:, None]), 0.0)


@triton.jit
def covariance(
    p, q, mean, level, scale, ridge, k, low, high, begin, end, S, k_stride,
    K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(C + lambda I) p = sum_i w_i y_i k_i - (sum_i w_i y_i) m + lambda p with y_i = (k_i - m) . p, of every query."""
    first, second = in_parts(p, DTYPE, PRECISION)
    centre = tl.sum(p * mean, 1)
    total, result = tl.zeros_like(centre), tl.zeros_like(p)
    for block in range(begin, end, BN):
        j = block + tl.arange(0, BN)
        keys = load(k, j, S, k_stride, K, BK)
        w = weights(q, keys, j, low, high, scale, level, PRECISION)
        y = product_of_parts(first, second, tl.trans(keys), None, PRECISION) - centre[:, None]
        y = rounded(w * y, DTYPE, PRECISION)
        total += tl.sum(y.to(tl.float32), 1)
        result = product(y, keys, result, PRECISION)
    return result - total[:, None] * mean + ridge * p


@triton.jit
def solve(
    right, tolerance, q, mean, level, scale, ridge, k, low, high, begin, end, S, k_stride,
    K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(C + lambda I)^-1 right by conjugate gradients, each query until its residual has fallen to tolerance; at most
    2 K iterations."""
    x, r, p = tl.zeros_like(right), right, right
    square = tl.sum(r * r, 1)
    enough = tolerance * tolerance * square
    n, busy = 0, tl.max((square > enough).to(tl.int32), 0)
    while busy > 0:
        active = square > enough
        moved = covariance(
            p, q, mean, level, scale, ridge, k, low, high, begin, end, S, k_stride, K, BK, BN, DTYPE, PRECISION
        )
        step = tl.where(active, square / tl.sum(p * moved, 1), 0.0)
        x += step[:, None] * p
        r -= step[:, None] * moved
        before, square = square, tl.sum(r * r, 1)
        p = r + tl.where(active, square / before, 0.0)[:, None] * p
        n += 1
        busy = tl.where(n < 2 * K, tl.max((square > enough).to(tl.int32), 0), 0)
    return x


@triton.jit(do_not_specialize=["T", "S", "past", "window"])
def forward_kernel(
    q, k, v, beta, ridge, start, o, mean_out, u_out, level_out, T, S, past, window, tolerance,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log sums and mean keys; u; the read."""
    DTYPE: tl.constexpr = k.dtype.element_ty
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    rows = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM + tl.arange(0, BM)
    q_base, k_base = b.to(tl.int64) * T * H + h, b.to(tl.int64) * S * G + h // (H // G)
    k += k_base * K
    v += k_base * V
    low, high = interval(start, b, rows, T, S, past, window, DOCUMENTS)
    begin, end = tl.min(low, 0) // BN * BN, tl.max(high, 0) + 1
    scale, penalty = tl.load(beta + h) * LOG2_E, tl.load(ridge + h)
    queries = load(q + q_base * K, rows, T, H * K, K, BK)

    largest, total = tl.full([BM], NOTHING, tl.float32), tl.zeros([BM], tl.float32)
    mean = tl.zeros([BM, BK], tl.float32)
    for block in range(begin, end, BN):
        j = block + tl.arange(0, BN)
        keys = load(k, j, S, G * K, K, BK)
        s = product(queries, tl.trans(keys), None, PRECISION) * scale
        s = tl.where((j[None, :] >= low[:, None]) & (j[None, :] <= high[:, None]), s, NOTHING)
        before, largest = largest, tl.maximum(largest, tl.max(s, 1))
        fade = tl.exp2(before - largest)
        w = rounded(tl.exp2(s - largest[:, None]), DTYPE, PRECISION)
        total = total * fade + tl.sum(w.to(tl.float32), 1)
        mean = product(w, keys, mean * fade[:, None], PRECISION)
    mean, level = mean / total[:, None], largest + tl.log2(total)

    right = tl.where((rows < T)[:, None], queries.to(tl.float32) - mean, 0.0)
    u = solve(
        right, tolerance, queries, mean, level, scale, penalty,
        k, low, high, begin, end, S, G * K, K, BK, BN, DTYPE, PRECISION,
    )  # fmt: skip

    first, second = in_parts(u, DTYPE, PRECISION)
    shift = 1 - tl.sum(u * mean, 1)
    total, result = tl.zeros([BM], tl.float32), tl.zeros([BM, BV], tl.float32)
    for block in range(begin, end, BN):
        j = block + tl.arange(0, BN)
        keys = load(k, j, S, G * K, K, BK)
        w = weights(queries, keys, j, low, high, scale, level, PRECISION)
        w *= product_of_parts(first, second, tl.trans(keys), None, PRECISION) + shift[:, None]
        w = rounded(w, DTYPE, PRECISION)
        total += tl.sum(w.to(tl.float32), 1)  # one, but for the rounding
        result = product(w, load(v, j, S, G * V, V, BV), result, PRECISION)
    store(o + q_base * V, rows, T, H * V, result / total[:, None], V, BV)
    store(mean_out + q_base * K, rows, T, H * K, mean, K, BK)
    store(u_out + q_base * K, rows, T, H * K, u, K, BK)
    tl.store(level_out + tl.program_id(0).to(tl.int64) * T + rows, level, mask=rows < T)


@triton.jit(do_not_specialize=["T", "S", "past", "window", "per_number"])
def backward_queries_kernel(
    q, k, v, beta, ridge, start, mean, u, level, do, dq, z_out, numbers,
    T, S, past, window, per_number, tolerance,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """du, z, dq, and of each query the numbers 1 - u . m, z . m - a, c, d beta, d lambda."""
    DTYPE: tl.constexpr = k.dtype.element_ty
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    rows = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM + tl.arange(0, BM)
    q_base, k_base = b.to(tl.int64) * T * H + h, b.to(tl.int64) * S * G + h // (H // G)
    row_base = tl.program_id(0).to(tl.int64) * T
    k += k_base * K
    v += k_base * V
    low, high = interval(start, b, rows, T, S, past, window, DOCUMENTS)
    begin, end = tl.min(low, 0) // BN * BN, tl.max(high, 0) + 1
    slope, penalty = tl.load(beta + h), tl.load(ridge + h)
    scale = slope * LOG2_E
    queries = load(q + q_base * K, rows, T, H * K, K, BK)
    m = load(mean + q_base * K, rows, T, H * K, K, BK)
    gradient = load(do + q_base * V, rows, T, H * V, V, BV)
    log_sum = tl.load(level + row_base + rows, mask=rows < T, other=0.0)

    average, right = tl.zeros([BM], tl.float32), tl.zeros([BM, BK], tl.float32)
    for block in range(begin, end, BN):
        j = block + tl.arange(0, BN)
        keys = load(k, j, S, G * K, K, BK)
        w = weights(queries, keys, j, low, high, scale, log_sum, PRECISION)
        w *= product(gradient, tl.trans(load(v, j, S, G * V, V, BV)), None, PRECISION)
        w = rounded(w, DTYPE, PRECISION)
        average += tl.sum(w.to(tl.float32), 1)
        right = product(w, keys, right, PRECISION)
    z = solve(
        right - average[:, None] * m, tolerance, queries, m, log_sum, scale, penalty,
        k, low, high, begin, end, S, G * K, K, BK, BN, DTYPE, PRECISION,
    )  # fmt: skip

    probe = load(u + q_base * K, rows, T, H * K, K, BK)
    u_first, u_second = in_parts(probe, DTYPE, PRECISION)
    z_first, z_second = in_parts(-z, DTYPE, PRECISION)
    shift_f, shift_e = 1 - tl.sum(probe * m, 1), tl.sum(z * m, 1) - average
    total, result = tl.zeros([BM], tl.float32), tl.zeros([BM, BK], tl.float32)
    for block in range(begin, end, BN):
        j = block + tl.arange(0, BN)
        keys = load(k, j, S, G * K, K, BK)
        e = product(gradient, tl.trans(load(v, j, S, G * V, V, BV)), None, PRECISION)
        e = product_of_parts(z_first, z_second, tl.trans(keys), e, PRECISION) + shift_e[:, None]
        f = product_of_parts(u_first, u_second, tl.trans(keys), None, PRECISION) + shift_f[:, None]
        w = weights(queries, keys, j, low, high, scale, log_sum, PRECISION)
        w = rounded(w * e * f, DTYPE, PRECISION)
        total += tl.sum(w.to(tl.float32), 1)
        result = product(w, keys, result, PRECISION)
    result -= total[:, None] * m
    store(dq + q_base * K, rows, T, H * K, z + slope * result, K, BK)
    store(z_out + q_base * K, rows, T, H * K, z, K, BK)
    numbers += row_base + rows
    tl.store(numbers, shift_f, mask=rows < T)
    tl.store(numbers + per_number, shift_e, mask=rows < T)
    tl.store(numbers + 2 * per_number, total, mask=rows < T)
    tl.store(numbers + 3 * per_number, tl.sum(queries.to(tl.float32) * result, 1), mask=rows < T)
    tl.store(numbers + 4 * per_number, -tl.sum(z * probe, 1), mask=rows < T)


@triton.jit(do_not_specialize=["T", "S", "past", "window", "per_number"])
def backward_keys_kernel(
    q, k, v, beta, start, stop, u, z, level, do, numbers, dk, dv,
    T, S, past, window, per_number,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv. stop: of each key, the first query whose document begins behind it."""
    DTYPE: tl.constexpr = k.dtype.element_ty
    GROUP: tl.constexpr = H // G
    b, g = tl.program_id(0) // G, tl.program_id(0) % G
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    k_base = b.to(tl.int64) * S * G + g
    keys, values = load(k + k_base * K, j, S, G * K, K, BK), load(v + k_base * V, j, S, G * V, V, BV)
    last = tl.minimum(tl.program_id(1) * BN + BN, S) - 1
    begin = tl.maximum(tl.program_id(1) * BN - past, 0) // BM * BM
    end = tl.minimum(T, last + window - past)
    if DOCUMENTS:
        end = tl.minimum(end, tl.load(stop + b * S + last))
    num_blocks = tl.maximum(tl.cdiv(end - begin, BM), 0)

    d_keys, d_values = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BV], tl.float32)
    for i in range(0, GROUP * num_blocks):
        h = g * GROUP + i // num_blocks
        rows = begin + (i % num_blocks) * BM + tl.arange(0, BM)
        q_base, row = b.to(tl.int64) * T * H + h, (b * H + h).to(tl.int64) * T + rows
        real = rows < T
        low, high = interval(start, b, rows, T, S, past, window, DOCUMENTS)
        slope = tl.load(beta + h)
        queries = load(q + q_base * K, rows, T, H * K, K, BK)
        gradient = load(do + q_base * V, rows, T, H * V, V, BV)
        u_first, u_second = in_parts(load(u + q_base * K, rows, T, H * K, K, BK), DTYPE, PRECISION)
        z_first, z_second = in_parts(-load(z + q_base * K, rows, T, H * K, K, BK), DTYPE, PRECISION)
        log_sum = tl.load(level + row, mask=real, other=0.0)
        shift_f = tl.load(numbers + row, mask=real, other=0.0)
        shift_e = tl.load(numbers + per_number + row, mask=real, other=0.0)
        average = tl.load(numbers + 2 * per_number + row, mask=real, other=0.0)

        s = product(keys, tl.trans(queries), None, PRECISION) * (slope * LOG2_E)  # [BN, BM]
        visible = (j[:, None] >= low[None, :]) & (j[:, None] <= high[None, :]) & real[None, :]
        w = tl.where(visible, tl.exp2(s - log_sum[None, :]), 0.0)
        f = product(keys, tl.trans(u_first), None, PRECISION)
        e = product(values, tl.trans(gradient), None, PRECISION)
        e = product(keys, tl.trans(z_first), e, PRECISION)
        if PRECISION != "ieee":
            f = product(keys, tl.trans(u_second), f, PRECISION)
            e = product(keys, tl.trans(z_second), e, PRECISION)
        f += shift_f[None, :]
        e += shift_e[None, :]
        d_values = product(rounded(w * f, DTYPE, PRECISION), gradient, d_values, PRECISION)
        d_keys = product(rounded(w * f, DTYPE, PRECISION), z_first, d_keys, PRECISION)
        d_keys = product(rounded(w * e, DTYPE, PRECISION), u_first, d_keys, PRECISION)
        ds = slope * w * (e * f - average[None, :])
        d_keys = product(rounded(ds, DTYPE, PRECISION), queries, d_keys, PRECISION)
    store(dk + k_base * K, j, S, G * K, d_keys, K, BK)
    store(dv + k_base * V, j, S, G * V, d_values, V, BV)
