"""The Triton kernels of local linear attention; what they compute is in local_linear.py.

Query kernels: one program per batch row, head and block of BM queries, the longest blocks first. It goes over the keys
that its queries may use, BN at a time, once for every product with C, and computes the weights anew each time. Key
kernel: one program per batch row, key-value head and block of BN keys. Either way blocks that no mask touches come
first, and then those at the edges: the mask is a quarter of a loop's instructions.

q, o [B, T, H, *], k, v [B, S, G, *], all contiguous; u and -z in two parts [2, B, T, H, K], in the dtype of k; mean
[B, T, H, K] and what is a number per query [B, H, T] in float32. Logarithms are to base 2. Query t is pair past + t and
uses those from `low` to `high`.

Rounding. Products take operands of the dtype of k, float32 ones as TF32 (PRECISION "tf32") or as they are ("ieee").
Weights are rounded before they are summed, so that what is rounded is still an average. p, u and z are taken in two
parts: what they have in directions that no key does is as large as 1 / lambda, and of a rounded vector the keys would
see some of it. (At lambda = 1e-3 outputs in bfloat16 are 6e-3 off this way, and 1e-1 with one part.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.intervals import (
    LOG2_E,
    NOTHING,
    block_at,
    hide,
    interval,
    load,
    num_blocks,
    product,
    spans,
    store,
)


@triton.jit
def rounded(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """float32 x to the nearest number that products can take, still float32; by its bits, as tensor cores cut off what
    they don't read, and converting to bfloat16 and back takes as long as an exponential."""
    if tl.bfloat16 == DTYPE:
        x = ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    elif PRECISION == "tf32":
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def operand(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """rounded(x) where no more is done with it than a product."""
    return x.to(DTYPE) if tl.bfloat16 == DTYPE else rounded(x, DTYPE, PRECISION)


@triton.jit
def in_parts(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Two operands that add up to x."""
    first = rounded(x, DTYPE, PRECISION)
    return first.to(DTYPE), (x - first).to(DTYPE)


@triton.jit
def product_of_parts(first, second, b, acc, PRECISION: tl.constexpr):
    acc = product(first, b, acc, PRECISION)
    return acc if PRECISION == "ieee" else product(second, b, acc, PRECISION)


@triton.jit
def weights(q, keys, level, scale, j, low, high, EDGES: tl.constexpr, PRECISION: tl.constexpr):
    """w [BM, BN], from each query's log sum."""
    s = product(q, tl.trans(keys), None, PRECISION) * scale
    return hide(tl.exp2(s - level[:, None]), 0.0, j, low, high, EDGES)


@triton.jit
def covariance(
    p, q, mean, level, scale, ridge, k, low, high, span, S, k_stride,
    K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(C + lambda I) p = sum_i w_i y_i k_i - (sum_i w_i y_i) m + lambda p with y_i = (k_i - m) . p, of every query."""
    first, second = in_parts(p, DTYPE, PRECISION)
    centre = tl.sum(p * mean, 1)
    total, result = tl.zeros_like(centre), tl.zeros_like(p)
    for EDGES in tl.static_range(2):
        for i in range(num_blocks(span, EDGES)):
            j = block_at(i, span, EDGES, BN) + tl.arange(0, BN)
            keys = load(k, j, S, k_stride, K, BK)
            y = product_of_parts(first, second, tl.trans(keys), None, PRECISION) - centre[:, None]
            y *= weights(q, keys, level, scale, j, low, high, EDGES, PRECISION)
            y = rounded(y, DTYPE, PRECISION)
            total += tl.sum(y, 1)
            result = product(y.to(DTYPE), keys, result, PRECISION)
    return result - total[:, None] * mean + ridge * p


@triton.jit
def solve(
    right, tolerance, q, mean, level, scale, ridge, k, low, high, span, S, k_stride,
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
            p, q, mean, level, scale, ridge, k, low, high, span, S, k_stride, K, BK, BN, DTYPE, PRECISION
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
    num_queries = tl.num_programs(0).to(tl.int64) * T
    k += k_base * K
    v += k_base * V
    low, high = interval(start, b, rows, T, S, past, window, DOCUMENTS)
    span = spans(tl.min(low, 0), tl.max(high, 0) + 1, tl.max(low, 0), tl.min(high, 0) + 1, BN)
    scale, penalty = tl.load(beta + h) * LOG2_E, tl.load(ridge + h)
    queries = load(q + q_base * K, rows, T, H * K, K, BK)

    largest, total = tl.full([BM], NOTHING, tl.float32), tl.zeros([BM], tl.float32)
    mean = tl.zeros([BM, BK], tl.float32)
    for EDGES in tl.static_range(2):
        for i in range(num_blocks(span, EDGES)):
            j = block_at(i, span, EDGES, BN) + tl.arange(0, BN)
            keys = load(k, j, S, G * K, K, BK)
            s = product(queries, tl.trans(keys), None, PRECISION) * scale
            s = hide(s, NOTHING, j, low, high, EDGES)
            before, largest = largest, tl.maximum(largest, tl.max(s, 1))
            fade = tl.exp2(before - largest)
            w = rounded(tl.exp2(s - largest[:, None]), DTYPE, PRECISION)
            total = total * fade + tl.sum(w, 1)
            mean = product(w.to(DTYPE), keys, mean * fade[:, None], PRECISION)
    mean, level = mean / total[:, None], largest + tl.log2(total)

    right = tl.where((rows < T)[:, None], queries.to(tl.float32) - mean, 0.0)
    u = solve(
        right, tolerance, queries, mean, level, scale, penalty,
        k, low, high, span, S, G * K, K, BK, BN, DTYPE, PRECISION,
    )  # fmt: skip

    first, second = in_parts(u, DTYPE, PRECISION)
    shift = 1 - tl.sum(u * mean, 1)
    total, result = tl.zeros([BM], tl.float32), tl.zeros([BM, BV], tl.float32)
    for EDGES in tl.static_range(2):
        for i in range(num_blocks(span, EDGES)):
            j = block_at(i, span, EDGES, BN) + tl.arange(0, BN)
            keys = load(k, j, S, G * K, K, BK)
            w = weights(queries, keys, level, scale, j, low, high, EDGES, PRECISION)
            w *= product_of_parts(first, second, tl.trans(keys), None, PRECISION) + shift[:, None]
            w = rounded(w, DTYPE, PRECISION)
            total += tl.sum(w, 1)  # one, but for the rounding
            result = product(w.to(DTYPE), load(v, j, S, G * V, V, BV), result, PRECISION)
    store(o + q_base * V, rows, T, H * V, result / total[:, None], V, BV)
    store(mean_out + q_base * K, rows, T, H * K, mean, K, BK)
    store(u_out + q_base * K, rows, T, H * K, first, K, BK)
    store(u_out + (num_queries + q_base) * K, rows, T, H * K, second, K, BK)
    tl.store(level_out + tl.program_id(0).to(tl.int64) * T + rows, level, mask=rows < T)


@triton.jit(do_not_specialize=["T", "S", "past", "window"])
def backward_queries_kernel(
    q, k, v, beta, ridge, start, mean, u, level, do, dq, z_out, numbers,
    T, S, past, window, tolerance,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """du, z, dq, and of each query the numbers 1 - u . m, z . m - a, c, d beta, d lambda."""
    DTYPE: tl.constexpr = k.dtype.element_ty
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    rows = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM + tl.arange(0, BM)
    q_base, k_base = b.to(tl.int64) * T * H + h, b.to(tl.int64) * S * G + h // (H // G)
    num_queries = tl.num_programs(0).to(tl.int64) * T
    row_base = tl.program_id(0).to(tl.int64) * T
    k += k_base * K
    v += k_base * V
    low, high = interval(start, b, rows, T, S, past, window, DOCUMENTS)
    span = spans(tl.min(low, 0), tl.max(high, 0) + 1, tl.max(low, 0), tl.min(high, 0) + 1, BN)
    slope, penalty = tl.load(beta + h), tl.load(ridge + h)
    scale = slope * LOG2_E
    queries = load(q + q_base * K, rows, T, H * K, K, BK)
    m = load(mean + q_base * K, rows, T, H * K, K, BK)
    gradient = load(do + q_base * V, rows, T, H * V, V, BV)
    log_sum = tl.load(level + row_base + rows, mask=rows < T, other=0.0)

    average, right = tl.zeros([BM], tl.float32), tl.zeros([BM, BK], tl.float32)
    for EDGES in tl.static_range(2):
        for i in range(num_blocks(span, EDGES)):
            j = block_at(i, span, EDGES, BN) + tl.arange(0, BN)
            keys = load(k, j, S, G * K, K, BK)
            w = weights(queries, keys, log_sum, scale, j, low, high, EDGES, PRECISION)
            w *= product(gradient, tl.trans(load(v, j, S, G * V, V, BV)), None, PRECISION)
            w = rounded(w, DTYPE, PRECISION)
            average += tl.sum(w, 1)
            right = product(w.to(DTYPE), keys, right, PRECISION)
    z = solve(
        right - average[:, None] * m, tolerance, queries, m, log_sum, scale, penalty,
        k, low, high, span, S, G * K, K, BK, BN, DTYPE, PRECISION,
    )  # fmt: skip

    u_first = load(u + q_base * K, rows, T, H * K, K, BK)
    u_second = load(u + (num_queries + q_base) * K, rows, T, H * K, K, BK)
    probe = u_first.to(tl.float32) + u_second.to(tl.float32)
    z_first, z_second = in_parts(-z, DTYPE, PRECISION)
    shift_f, shift_e = 1 - tl.sum(probe * m, 1), tl.sum(z * m, 1) - average
    total, result = tl.zeros([BM], tl.float32), tl.zeros([BM, BK], tl.float32)
    for EDGES in tl.static_range(2):
        for i in range(num_blocks(span, EDGES)):
            j = block_at(i, span, EDGES, BN) + tl.arange(0, BN)
            keys = load(k, j, S, G * K, K, BK)
            e = product(gradient, tl.trans(load(v, j, S, G * V, V, BV)), None, PRECISION)
            e = product_of_parts(z_first, z_second, tl.trans(keys), e, PRECISION) + shift_e[:, None]
            f = product_of_parts(u_first, u_second, tl.trans(keys), None, PRECISION) + shift_f[:, None]
            w = weights(queries, keys, log_sum, scale, j, low, high, EDGES, PRECISION)
            w = rounded(w * e * f, DTYPE, PRECISION)
            total += tl.sum(w, 1)
            result = product(w.to(DTYPE), keys, result, PRECISION)
    result -= total[:, None] * m
    store(dq + q_base * K, rows, T, H * K, z + slope * result, K, BK)
    store(z_out + q_base * K, rows, T, H * K, z_first, K, BK)
    store(z_out + (num_queries + q_base) * K, rows, T, H * K, z_second, K, BK)
    numbers += row_base + rows
    tl.store(numbers, shift_f, mask=rows < T)
    tl.store(numbers + num_queries, shift_e, mask=rows < T)
    tl.store(numbers + 2 * num_queries, total, mask=rows < T)
    tl.store(numbers + 3 * num_queries, tl.sum(queries.to(tl.float32) * result, 1), mask=rows < T)
    tl.store(numbers + 4 * num_queries, -tl.sum(z * probe, 1), mask=rows < T)


@triton.jit(do_not_specialize=["T", "S", "past", "window"])
def backward_keys_kernel(
    q, k, v, beta, start, stop, u, z, level, do, numbers, dk, dv,
    T, S, past, window,
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
    first, last = tl.program_id(1) * BN, tl.minimum(tl.program_id(1) * BN + BN, S) - 1
    end, inner_to = tl.minimum(T, last + window - past), tl.minimum(T, first + window - past)
    if DOCUMENTS:
        end = tl.minimum(end, tl.load(stop + b * S + last))
        inner_to = tl.minimum(inner_to, tl.load(stop + b * S + first))
    span = spans(tl.maximum(first - past, 0), end, tl.maximum(last - past, 0), inner_to, BM)
    num_queries = tl.num_programs(0).to(tl.int64) * GROUP * T

    d_keys, d_values = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BV], tl.float32)
    for EDGES in tl.static_range(2):
        n = num_blocks(span, EDGES)
        for i in range(GROUP * n):
            h, rows = g * GROUP + i // n, block_at(i % n, span, EDGES, BM) + tl.arange(0, BM)
            q_base, row = b.to(tl.int64) * T * H + h, (b * H + h).to(tl.int64) * T + rows
            slope = tl.load(beta + h)
            queries = load(q + q_base * K, rows, T, H * K, K, BK)
            gradient = load(do + q_base * V, rows, T, H * V, V, BV)
            u_first = load(u + q_base * K, rows, T, H * K, K, BK)
            z_first = load(z + q_base * K, rows, T, H * K, K, BK)
            log_sum = tl.load(level + row, mask=rows < T, other=0.0)
            shift_f = tl.load(numbers + row, mask=rows < T, other=0.0)
            shift_e = tl.load(numbers + num_queries + row, mask=rows < T, other=0.0)
            average = tl.load(numbers + 2 * num_queries + row, mask=rows < T, other=0.0)

            s = product(keys, tl.trans(queries), None, PRECISION) * (slope * LOG2_E)
            w = tl.exp2(s - log_sum[None, :])  # [BN, BM]
            if EDGES:
                low, high = interval(start, b, rows, T, S, past, window, DOCUMENTS)
                visible = (j[:, None] >= low[None, :]) & (j[:, None] <= high[None, :]) & (rows < T)[None, :]
                w = tl.where(visible, w, 0.0)
            f = product(keys, tl.trans(u_first), None, PRECISION)
            e = product(values, tl.trans(gradient), None, PRECISION)
            e = product(keys, tl.trans(z_first), e, PRECISION)
            if PRECISION != "ieee":
                u_second = load(u + (num_queries + q_base) * K, rows, T, H * K, K, BK)
                z_second = load(z + (num_queries + q_base) * K, rows, T, H * K, K, BK)
                f = product(keys, tl.trans(u_second), f, PRECISION)
                e = product(keys, tl.trans(z_second), e, PRECISION)
            f += shift_f[None, :]
            e += shift_e[None, :]
            wf = operand(w * f, DTYPE, PRECISION)
            d_values = product(wf, gradient, d_values, PRECISION)
            d_keys = product(wf, z_first, d_keys, PRECISION)
            d_keys = product(operand(w * e, DTYPE, PRECISION), u_first, d_keys, PRECISION)
            ds = slope * w * (e * f - average[None, :])
            d_keys = product(operand(ds, DTYPE, PRECISION), queries, d_keys, PRECISION)
    store(dk + k_base * K, j, S, G * K, d_keys, K, BK)
    store(dv + k_base * V, j, S, G * V, d_values, V, BV)
