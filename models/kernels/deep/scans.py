"""The scan over mini-batches, one after another: a program has a document of a head.

Weights in float32 are too many for a multiprocessor's registers (256 KB of N and S at K = V = 64 and F = 256). They
stay in `last`, which the L2 cache holds, and a program is alone with its own; it takes them tile by tile of the hidden
layer. Between the loads of a phase and the stores of the next stands a barrier: other threads load what one stores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.deep.tiles import dot, scaled, silu, square, tile


@triton.jit
def _begin(at, base, there, reference, given, TYPE: tl.constexpr, BASE: tl.constexpr, REFERENCE: tl.constexpr):
    """R of a document's first mini-batch: W + N, or what was handed in where the call goes on with one."""
    R = tl.load(at)
    if BASE:
        R += tl.load(base)
    if REFERENCE:
        R = tl.where(given, tl.load(reference, mask=given, other=0.0), R)
    tl.store(there, R.to(TYPE))


@triton.jit
def _move(at, base, state, following, goes_on, held, is_held, written, e, write_m, write_s, kept_m, kept_s, carried,
          PAIR: tl.constexpr, MOMENTUM: tl.constexpr, BASE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """N <- A N + f S + X^T diag(c) E and S <- m S + X^T diag(c') E of a tile at `at`, written = X^T. What they were
    goes to `state`, and the R that the next mini-batch has to `following`."""
    N = tl.load(at)
    tl.store(state, N.to(e.dtype))
    tl.store(held, N, mask=is_held)
    moved = kept_m * N + dot(written, scaled(write_m, e), PRECISION)
    if MOMENTUM:
        S = tl.load(at + PAIR)
        tl.store(state + PAIR, S.to(e.dtype))
        moved += carried * S
        tl.store(at + PAIR, kept_s * S + dot(written, scaled(write_s, e), PRECISION))
    tl.store(at, moved)
    if BASE:
        moved += tl.load(base)
    tl.store(following, moved.to(e.dtype), mask=goes_on)


@triton.jit
def scan(
    k,  # [N B H, C, K]
    v,  # [N B H, C, V]
    carry,  # [N B H, n, n]
    carry_writes,  # [N B H, n, C]
    base,  # [H, PAIR]: W
    reference,  # [B H, PAIR]: R of the first mini-batch of a row
    runs,  # [P, 4]: of a document its row, its first and last mini-batch, and the last one that has tokens
    last,  # in and out, [P H, SIZE]: N and S
    held,  # out, [P H, PAIR]: N at the last mini-batch that has tokens
    states,  # out, [N B H, SIZE]: N and S before every mini-batch
    references,  # out, [N B H, PAIR]: R
    hidden,  # out, [N B H, C, F]: X_2
    errors1,  # out, [N B H, C, F]: E_1 without the limit
    errors2,  # out, [N B H, C, V]: E_2 without it
    limits,  # out, [N B H, 3, C]: the share of both that is written, |X_2|^2 and |E_1|^2
    rows,  # B H
    H,
    C: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    BF: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BASE: tl.constexpr,
    REFERENCE: tl.constexpr,
    NOTHING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    run, head = program // H, program % H
    PAIR: tl.constexpr = K * F + F * V
    n_parts: tl.constexpr = 1 + MOMENTUM
    SIZE: tl.constexpr = n_parts * PAIR
    TYPE: tl.constexpr = k.dtype.element_ty
    row = tl.load(runs + 4 * run).to(tl.int64) * H + head
    begin, end, final = tl.load(runs + 4 * run + 1), tl.load(runs + 4 * run + 2), tl.load(runs + 4 * run + 3)
    one, t = tl.full([1, 1], 1, tl.int32), tl.arange(0, C)
    chunk = begin * rows + row
    for j in range(0, F // BF):
        first, second = j * BF, K * F + j * BF * V
        _begin(
            tile(last, program * SIZE + first, K, BF, F),
            tile(base, head * PAIR + first, K, BF, F),
            tile(references, chunk * PAIR + first, K, BF, F),
            tile(reference, row * PAIR + first, K, BF, F) if REFERENCE else None,
            one * begin == 0, TYPE, BASE, REFERENCE,
        )  # fmt: skip
        _begin(
            tile(last, program * SIZE + second, BF, V, V),
            tile(base, head * PAIR + second, BF, V, V),
            tile(references, chunk * PAIR + second, BF, V, V),
            tile(reference, row * PAIR + second, BF, V, V) if REFERENCE else None,
            one * begin == 0, TYPE, BASE, REFERENCE,
        )  # fmt: skip
    tl.debug_barrier()
    for n in range(begin, end):
        chunk = n * rows + row
        key = tl.load(tile(k, chunk * (C * K), C, K, K))
        R1, R2 = tile(references, chunk * PAIR, K, BF, F), tile(references, chunk * PAIR + K * F, BF, V, V)
        y, widths, sizes1 = tl.zeros([C, V], tl.float32), tl.zeros([C, 1], tl.float32), tl.zeros([C, 1], tl.float32)
        for j in range(0, F // BF):
            x, _ = silu(dot(key, tl.load(R1 + j * BF), PRECISION))
            x = x.to(TYPE)
            tl.store(tile(hidden, chunk * (C * F) + j * BF, C, BF, F), x)
            widths += square(x)
            y += dot(x, tl.load(R2 + j * BF * V), PRECISION)
        e = (tl.load(tile(v, chunk * (C * V), C, V, V)).to(tl.float32) - y).to(TYPE)
        tl.store(tile(errors2, chunk * (C * V), C, V, V), e)
        for j in range(0, F // BF):
            _, slope = silu(dot(key, tl.load(R1 + j * BF), PRECISION))
            e1 = (dot(e, tl.trans(tl.load(R2 + j * BF * V)), PRECISION) * slope).to(TYPE)
            tl.store(tile(errors1, chunk * (C * F) + j * BF, C, BF, F), e1)
            sizes1 += square(e1)
        size = square(e)
        share = (size + NOTHING) / (tl.maximum(size, square(key) * sizes1 + widths * size) + NOTHING)
        at_limits = limits + chunk * (3 * C) + t[:, None]
        tl.store(at_limits, share)
        tl.store(at_limits + C, widths)
        tl.store(at_limits + 2 * C, sizes1)
        tl.debug_barrier()

        write_m = share * tl.load(carry_writes + chunk * (n_parts * C) + t)[:, None]
        write_s, kept_s, carried = write_m, 1.0, 0.0
        kept_m = tl.load(carry + chunk * (n_parts * n_parts))
        if MOMENTUM:
            write_s = share * tl.load(carry_writes + chunk * (n_parts * C) + C + t)[:, None]
            carried, kept_s = tl.load(carry + chunk * 4 + 1), tl.load(carry + chunk * 4 + 3)
        goes_on, is_held, following = one + n < end, one * n == final, (chunk + rows) * PAIR
        for j in range(0, F // BF):
            first, second = j * BF, K * F + j * BF * V
            e1 = tl.load(tile(errors1, chunk * (C * F) + first, C, BF, F))
            _move(
                tile(last, program * SIZE + first, K, BF, F),
                tile(base, head * PAIR + first, K, BF, F),
                tile(states, chunk * SIZE + first, K, BF, F),
                tile(references, following + first, K, BF, F), goes_on,
                tile(held, program * PAIR + first, K, BF, F), is_held,
                tl.trans(key), e1, write_m, write_s, kept_m, kept_s, carried, PAIR, MOMENTUM, BASE, PRECISION,
            )  # fmt: skip
            x = tl.load(tile(hidden, chunk * (C * F) + first, C, BF, F))
            _move(
                tile(last, program * SIZE + second, BF, V, V),
                tile(base, head * PAIR + second, BF, V, V),
                tile(states, chunk * SIZE + second, BF, V, V),
                tile(references, following + second, BF, V, V), goes_on,
                tile(held, program * PAIR + second, BF, V, V), is_held,
                tl.trans(x), e, write_m, write_s, kept_m, kept_s, carried, PAIR, MOMENTUM, BASE, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()
