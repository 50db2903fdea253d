"""The Triton kernels of softmax over intervals of pairs; what they compute is in __init__.py.

Query kernels: one program per batch row, head and block of BM queries, the longest blocks of a head first. Key kernel:
one program per batch row, key-value head and block of BN keys, and all queries that may use one of them. How a program
goes through its blocks is in intervals.py.

q, o [B, T, H, *], k, v [B, S, G, *]: the heads of a token side by side, `*_row` numbers from one token to the next; o
and the gradients contiguous. age [B, H, S], level and delta [B, H, T] in float32. Logarithms are natural but for
`level`, which is to base 2. Products take operands of the dtype of v and add up in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.intervals import LOG2_E, NOTHING, block_at, hide, interval, load, num_blocks, product, spans, store


@triton.jit
def place(T, H: tl.constexpr, BM: tl.constexpr):
    """Of a program for queries: batch row, head, and its queries."""
    n = tl.cdiv(T, BM)
    head, block = tl.program_id(0) // n, n - 1 - tl.program_id(0) % n
    return head // H, head % H, block * BM + tl.arange(0, BM)


@triton.jit(do_not_specialize=["T", "S", "past", "window"])
def forward_kernel(
    q, k, v, age, start, o, level_out, T, S, past, window, q_row, k_row, v_row,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr, FADES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs, and of each query the logarithm of the sum of its weights."""
    DTYPE: tl.constexpr = v.dtype.element_ty
    b, h, rows = place(T, H, BM)
    k += b.to(tl.int64) * S * k_row + h // (H // G) * K
    v += b.to(tl.int64) * S * v_row + h // (H // G) * V
    low, high = interval(start, b, rows, T, S, past, window, DOCUMENTS)
    span = spans(tl.min(low, 0), tl.max(high, 0) + 1, tl.max(low, 0), tl.min(high, 0) + 1, BN)
    queries = load(q + b.to(tl.int64) * T * q_row + h * K, rows, T, q_row, K, BK)
    if FADES:
        age += (b * H + h).to(tl.int64) * S
        now = tl.load(age + tl.minimum(past + rows, S - 1))

    largest, total = tl.full([BM], NOTHING, tl.float32), tl.zeros([BM], tl.float32)
    result = tl.zeros([BM, BV], tl.float32)
    for EDGES in tl.static_range(2):
        for i in range(num_blocks(span, EDGES)):
            j = block_at(i, span, EDGES, BN) + tl.arange(0, BN)
            s = product(queries, tl.trans(load(k, j, S, k_row, K, BK)), None, PRECISION)
            if FADES:
                s += tl.load(age + j, mask=j < S, other=0.0)[None, :] - now[:, None]
            s = hide(s, NOTHING, j, low, high, EDGES)
            before, largest = largest, tl.maximum(largest, tl.max(s, 1) * LOG2_E)
            fade = tl.exp2(before - largest)
            w = tl.exp2(s * LOG2_E - largest[:, None])
            total = total * fade + tl.sum(w, 1)
            result = product(w.to(DTYPE), load(v, j, S, v_row, V, BV), result * fade[:, None], PRECISION)
    store(o + (b.to(tl.int64) * T * H + h) * V, rows, T, H * V, result / total[:, None], V, BV)
    tl.store(level_out + (b * H + h).to(tl.int64) * T + rows, largest + tl.log2(total), mask=rows < T)


@triton.jit(do_not_specialize=["T", "S", "past", "window"])
def backward_queries_kernel(
    q, k, v, age, start, o, level, do, d_level, dq, delta_out, T, S, past, window, q_row, k_row, v_row,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr, FADES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and delta."""
    DTYPE: tl.constexpr = v.dtype.element_ty
    b, h, rows = place(T, H, BM)
    base, row = b.to(tl.int64) * T * H + h, (b * H + h).to(tl.int64) * T + rows
    k += b.to(tl.int64) * S * k_row + h // (H // G) * K
    v += b.to(tl.int64) * S * v_row + h // (H // G) * V
    low, high = interval(start, b, rows, T, S, past, window, DOCUMENTS)
    span = spans(tl.min(low, 0), tl.max(high, 0) + 1, tl.max(low, 0), tl.min(high, 0) + 1, BN)
    queries = load(q + b.to(tl.int64) * T * q_row + h * K, rows, T, q_row, K, BK)
    gradient = load(do + base * V, rows, T, H * V, V, BV)
    delta = tl.sum(gradient.to(tl.float32) * load(o + base * V, rows, T, H * V, V, BV).to(tl.float32), 1)
    delta -= tl.load(d_level + row, mask=rows < T, other=0.0)
    log_sum = tl.load(level + row, mask=rows < T, other=0.0)
    if FADES:
        age += (b * H + h).to(tl.int64) * S
        now = tl.load(age + tl.minimum(past + rows, S - 1))

    result = tl.zeros([BM, BK], tl.float32)
    for EDGES in tl.static_range(2):
        for i in range(num_blocks(span, EDGES)):
            j = block_at(i, span, EDGES, BN) + tl.arange(0, BN)
            keys = load(k, j, S, k_row, K, BK)
            s = product(queries, tl.trans(keys), None, PRECISION)
            if FADES:
                s += tl.load(age + j, mask=j < S, other=0.0)[None, :] - now[:, None]
            w = hide(tl.exp2(s * LOG2_E - log_sum[:, None]), 0.0, j, low, high, EDGES)
            a = product(gradient, tl.trans(load(v, j, S, v_row, V, BV)), None, PRECISION)
            result = product((w * (a - delta[:, None])).to(DTYPE), keys, result, PRECISION)
    store(dq + base * K, rows, T, H * K, result, K, BK)
    tl.store(delta_out + row, delta, mask=rows < T)


@triton.jit(do_not_specialize=["T", "S", "past", "window"])
def backward_keys_kernel(
    q, k, v, age, start, stop, level, delta, do, dk, dv, d_age, T, S, past, window, q_row, k_row, v_row,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr, FADES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv and the gradient by the ages, of which there is one a key where weights fade: G = H. stop: of each key,
    the first query whose document begins behind it."""
    DTYPE: tl.constexpr = v.dtype.element_ty
    GROUP: tl.constexpr = H // G
    num_programs = tl.cdiv(S, BN)
    head, first = tl.program_id(0) // num_programs, tl.program_id(0) % num_programs * BN
    b, g = head // G, head % G
    j, last = first + tl.arange(0, BN), tl.minimum(first + BN, S) - 1
    keys = load(k + b.to(tl.int64) * S * k_row + g * K, j, S, k_row, K, BK)
    values = load(v + b.to(tl.int64) * S * v_row + g * V, j, S, v_row, V, BV)
    end, inner_to = tl.minimum(T, last + window - past), tl.minimum(T, first + window - past)
    if DOCUMENTS:  # the last key's own query uses it, wherever its document begins
        end = tl.minimum(end, tl.maximum(tl.load(stop + b * S + last), last - past + 1))
        inner_to = tl.minimum(inner_to, tl.load(stop + b * S + first))
    span = spans(tl.maximum(first - past, 0), end, tl.maximum(last - past, 0), inner_to, BM)
    if FADES:
        age += (b * H + g).to(tl.int64) * S
        ages = tl.load(age + j, mask=j < S, other=0.0)

    d_keys, d_values = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BV], tl.float32)
    d_ages = tl.zeros([BN], tl.float32)
    for EDGES in tl.static_range(2):
        n = num_blocks(span, EDGES)
        for i in range(GROUP * n):
            h, rows = g * GROUP + i // n, block_at(i % n, span, EDGES, BM) + tl.arange(0, BM)
            row = (b * H + h).to(tl.int64) * T + rows
            queries = load(q + b.to(tl.int64) * T * q_row + h * K, rows, T, q_row, K, BK)
            gradient = load(do + (b.to(tl.int64) * T * H + h) * V, rows, T, H * V, V, BV)
            s = product(keys, tl.trans(queries), None, PRECISION)  # [BN, BM]
            if FADES:
                s += ages[:, None] - tl.load(age + tl.minimum(past + rows, S - 1))[None, :]
            w = tl.exp2(s * LOG2_E - tl.load(level + row, mask=rows < T, other=0.0)[None, :])
            if EDGES:
                low, high = interval(start, b, rows, T, S, past, window, DOCUMENTS)
                visible = (j[:, None] >= low[None, :]) & (j[:, None] <= high[None, :]) & (rows < T)[None, :]
                w = tl.where(visible, w, 0.0)
            d_values = product(w.to(DTYPE), gradient, d_values, PRECISION)
            a = product(values, tl.trans(gradient), None, PRECISION)
            ds = w * (a - tl.load(delta + row, mask=rows < T, other=0.0)[None, :])
            d_keys = product(ds.to(DTYPE), queries, d_keys, PRECISION)
            if FADES:
                d_ages += tl.sum(ds, 1)
    base = b.to(tl.int64) * S * G + g
    store(dk + base * K, j, S, G * K, d_keys, K, BK)
    store(dv + base * V, j, S, G * V, d_values, V, BV)
    if FADES:
        tl.store(d_age + (b * H + g).to(tl.int64) * S + j, d_ages, mask=j < S)
