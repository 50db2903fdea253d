"""The scan over mini-batches, one after another: a document of a head has SPLIT programs, each with BF units of its
hidden layer. N of these units stays in a program's registers (64 KB of float32 for BF = 128 and K = V = 64), S, which
a mini-batch wants only at its end, in `last`, where the L2 cache holds it.

What sums over the whole hidden layer, a prediction and what limits a step, the programs of a document exchange in
memory (exchange.py). Products come before stores: kernels/momentum/scans.py says why.

Tokens are columns here: what belongs to the hidden layer is [BF, *], a row of it in one warp, so that no tile is laid
out anew between products, and those of the hidden layer are operands as they stand in registers. (With tokens as rows
Triton gives tiles of 64 tokens to 8 warps twice over.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.deep.tiles import dot, first_token, scaled, silu, silu_curve, square, tile, turned
from models.kernels.exchange import meet, total
from models.kernels.momentum import tiles as rows


@triton.jit
def scan(
    k,  # [B, N C, H, K]
    v,  # [B, N C, H, V]
    vectors,  # [B H N, ROWS, C]
    base,  # [H, PAIR], in the dtype of k: W
    reference,  # [B H, PAIR]: R of the first mini-batch of a row
    runs,  # [P, 4]: of a document its row, its first and last mini-batch, and the last one that has tokens
    last,  # in and out, [P H, SIZE]: N and S
    held,  # out, [P H, PAIR]: N at the last mini-batch that has tokens
    states,  # out, [B H N, SIZE]: N and S before every mini-batch
    references,  # out, [B H N, PAIR]: R
    hidden,  # out, [B H N, C, F]: X_2
    errors1,  # out, [B H N, C, F]: E_1 without the limit
    errors2,  # out, [B H N, C, V]: E_2 without it
    limits,  # out, [B H N, 3, C]: the share of both that is written, |X_2|^2 and |E_1|^2
    slopes,  # out, [B H N, C, F]: s' at k W_1, for the backward pass alone
    curves,  # out, [B H N, C, F]: s'' * E_2 W_2^T, likewise
    sums,  # [P H, SPLIT, C (V + 2)]: what programs exchange
    arrived,  # [P H], zeros at first
    N,
    H,
    C: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    BF: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BASE: tl.constexpr,
    REFERENCE: tl.constexpr,
    GRADIENT: tl.constexpr,
    NOTHING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    SPLIT: tl.constexpr = F // BF
    program, part = (tl.program_id(0) // SPLIT).to(tl.int64), tl.program_id(0) % SPLIT
    run, head = program // H, program % H
    PAIR: tl.constexpr = K * F + F * V
    n_parts: tl.constexpr = 1 + MOMENTUM
    SIZE: tl.constexpr = n_parts * PAIR
    TYPE: tl.constexpr = k.dtype.element_ty
    bh = tl.load(runs + 4 * run).to(tl.int64) * H + head
    begin, end, final = tl.load(runs + 4 * run + 1), tl.load(runs + 4 * run + 2), tl.load(runs + 4 * run + 3)
    t = tl.arange(0, C)[None, :]
    first, second = part * BF, K * F + part * BF * V  # where this program's columns of W_1 and rows of W_2 lie
    WIDTH: tl.constexpr = C * (V + 2)
    sums += program * (SPLIT * WIDTH)
    at_widths = sums + C * V + t

    at = program * SIZE
    memory1, memory2 = tl.load(turned(last, at + first, BF, K, F)), tl.load(tile(last, at + second, BF, V, V))
    at_momentum1, at_momentum2 = at + PAIR + first, at + PAIR + second
    for n in tl.range(begin, end, disable_licm=True):
        chunk, tokens = bh * N + n, first_token(bh, n, N, H, C)
        gates = vectors + chunk * (rows.ROWS * C)
        key = tl.load(turned(k, tokens * K, K, C, H * K))
        R1, R2 = memory1, memory2
        if BASE:
            R1 += tl.load(turned(base, head * PAIR + first, BF, K, F)).to(tl.float32)
            R2 += tl.load(tile(base, head * PAIR + second, BF, V, V)).to(tl.float32)
        if REFERENCE:  # noqa: SIM102, decided when this is compiled
            if n == 0:
                R1 = tl.load(turned(reference, bh * PAIR + first, BF, K, F))
                R2 = tl.load(tile(reference, bh * PAIR + second, BF, V, V))
        R1, R2 = R1.to(TYPE), R2.to(TYPE)
        z = dot(R1, key, PRECISION)
        x, slope = silu(z)
        x = x.to(TYPE)
        y, widths = dot(tl.trans(R2), x, PRECISION), square(x)
        if SPLIT > 1:
            tl.store(tile(sums, part * WIDTH, V, C, C), y)
            tl.store(at_widths + part * WIDTH, widths)
            meet(arrived + program, SPLIT * (2 * (n - begin) + 1))
            y, widths = total(tile(sums, 0, V, C, C), SPLIT, WIDTH), total(at_widths, SPLIT, WIDTH)
        e = (tl.load(turned(v, tokens * V, V, C, H * V)).to(tl.float32) - y).to(TYPE)
        back = dot(R2, e, PRECISION)
        e1 = (back * slope).to(TYPE)
        sizes1 = square(e1)
        tl.store(turned(hidden, chunk * (C * F) + first, BF, C, F), x)
        tl.store(turned(errors1, chunk * (C * F) + first, BF, C, F), e1)
        if GRADIENT:
            tl.store(turned(slopes, chunk * (C * F) + first, BF, C, F), slope.to(TYPE))
            tl.store(turned(curves, chunk * (C * F) + first, BF, C, F), (back * silu_curve(z)).to(TYPE))
        tl.store(turned(references, chunk * PAIR + first, BF, K, F), R1)
        tl.store(tile(references, chunk * PAIR + second, BF, V, V), R2)
        if SPLIT > 1:
            tl.store(at_widths + part * WIDTH + C, sizes1)
            meet(arrived + program, SPLIT * (2 * (n - begin) + 2))
            sizes1 = total(at_widths + C, SPLIT, WIDTH)
        size = square(e)
        share = (size + NOTHING) / (tl.maximum(size, square(key) * sizes1 + widths * size) + NOTHING)
        if part == 0:
            tl.store(turned(errors2, chunk * (C * V), V, C, V), e)
            at_limits = limits + chunk * (3 * C) + t
            tl.store(at_limits, share)
            tl.store(at_limits + C, widths)
            tl.store(at_limits + 2 * C, sizes1)

        # N <- A N + f S + X^T diag(c) E ,    S <- m S + X^T diag(c') E
        write_m = share * tl.load(gates + rows.WRITE_M * C + t)
        kept_m = tl.load(gates + rows.A * C + C - 1)
        moved1 = kept_m * memory1 + dot(e1, tl.trans(scaled(write_m, key)), PRECISION)
        moved2 = kept_m * memory2 + dot(x, tl.trans(scaled(write_m, e)), PRECISION)
        at = chunk * SIZE
        tl.store(turned(states, at + first, BF, K, F), memory1.to(TYPE))
        tl.store(tile(states, at + second, BF, V, V), memory2.to(TYPE))
        if n == final:
            tl.store(turned(held, program * PAIR + first, BF, K, F), memory1)
            tl.store(tile(held, program * PAIR + second, BF, V, V), memory2)
        if MOMENTUM:
            write_s = share * tl.load(gates + rows.WRITE_S * C + t)
            carried, kept_s = tl.load(gates + rows.F * C + C - 1), tl.load(gates + rows.M * C + C - 1)
            momentum = tl.load(turned(last, at_momentum1, BF, K, F))
            moved1 += carried * momentum
            moved = kept_s * momentum + dot(e1, tl.trans(scaled(write_s, key)), PRECISION)
            tl.store(turned(last, at_momentum1, BF, K, F), moved)
            tl.store(turned(states, at + PAIR + first, BF, K, F), momentum.to(TYPE))
            momentum = tl.load(tile(last, at_momentum2, BF, V, V))
            moved2 += carried * momentum
            moved = kept_s * momentum + dot(x, tl.trans(scaled(write_s, e)), PRECISION)
            tl.store(tile(last, at_momentum2, BF, V, V), moved)
            tl.store(tile(states, at + PAIR + second, BF, V, V), momentum.to(TYPE))
            tl.debug_barrier()
        memory1, memory2 = moved1, moved2
    at = program * SIZE
    tl.store(turned(last, at + first, BF, K, F), memory1)
    tl.store(tile(last, at + second, BF, V, V), memory2)
