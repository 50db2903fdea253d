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

from models.kernels.deep.tiles import (
    NOTHING,
    dot,
    first_token,
    load_layers,
    of_document,
    scaled,
    silu,
    silu_curve,
    square,
    store_layers,
    tile,
    turned,
    turned_layers,
    turned_units,
)
from models.kernels.exchange import meet, total
from models.kernels.momentum import tiles as rows


@triton.jit
def _momentum(moved, at, before, x, y, carried, kept, S: tl.constexpr):
    """S <- m S + x y^T of a layer. Returns N with what S gives it, `moved` without."""
    momentum = tl.load(at)
    moved += carried * momentum
    after = kept * momentum + dot(x, tl.trans(y), S)
    tl.store(at, after)
    tl.store(before, momentum)
    return moved


@triton.jit
def scan(call, left, last, held, sums, arrived, S: tl.constexpr):
    """Leaves `left` behind; last [P H, SIZE], N and S before a document and then after it; held [P H, PAIR], N at the
    last mini-batch that has tokens. In sums [P H, SPLIT, C (V + 2)] programs exchange theirs, of which arrived [P H],
    zeros at first, have come."""
    program, part, bh, begin, end, final = of_document(call, S)
    TYPE: tl.constexpr = call.k.dtype.element_ty
    t = tl.arange(0, S.C)[None, :]
    WIDTH: tl.constexpr = S.C * (S.V + 2)
    sums += program * (S.split * WIDTH)
    at_widths = sums + S.C * S.V + t

    memory1, memory2 = load_layers(last, program * S.size, part, S)
    for n in tl.range(begin, end, disable_licm=True):
        chunk, tokens = bh * call.N + n, first_token(bh, n, call, S)
        gates = call.vectors + chunk * (rows.ROWS * S.C)
        key = tl.load(turned(call.k, tokens * S.K, S.K, S.C, call.H * S.K))
        R1, R2 = memory1, memory2
        if call.base is not None:
            W1, W2 = load_layers(call.base, program % call.H * S.pair, part, S)
            R1, R2 = R1 + W1.to(tl.float32), R2 + W2.to(tl.float32)
        if call.reference is not None:  # noqa: SIM102, decided when this is compiled
            if n == 0:
                R1, R2 = load_layers(call.reference, bh * S.pair, part, S)
        R1, R2 = R1.to(TYPE), R2.to(TYPE)
        z = dot(R1, key, S)
        x, slope = silu(z)
        x = x.to(TYPE)
        y, widths = dot(tl.trans(R2), x, S), square(x)
        if S.split > 1:
            tl.store(tile(sums, part * WIDTH, S.V, S.C, S.C), y)
            tl.store(at_widths + part * WIDTH, widths)
            meet(arrived + program, S.split * (2 * (n - begin) + 1))
            y, widths = total(tile(sums, 0, S.V, S.C, S.C), S.split, WIDTH), total(at_widths, S.split, WIDTH)
        e = (tl.load(turned(call.v, tokens * S.V, S.V, S.C, call.H * S.V)).to(tl.float32) - y).to(TYPE)
        back = dot(R2, e, S)
        e1 = (back * slope).to(TYPE)
        sizes1 = square(e1)
        tl.store(turned_units(left.hidden, chunk, part, S), x)
        tl.store(turned_units(left.errors1, chunk, part, S), e1)
        if left.slopes is not None:
            tl.store(turned_units(left.slopes, chunk, part, S), slope)
            tl.store(turned_units(left.curves, chunk, part, S), back * silu_curve(z))
        store_layers(left.references, chunk * S.pair, part, R1, R2, S)
        if S.split > 1:
            tl.store(at_widths + part * WIDTH + S.C, sizes1)
            meet(arrived + program, S.split * (2 * (n - begin) + 2))
            sizes1 = total(at_widths + S.C, S.split, WIDTH)
        size = square(e)
        share = (size + NOTHING) / (tl.maximum(size, square(key) * sizes1 + widths * size) + NOTHING)
        if part == 0:
            tl.store(turned(left.errors2, chunk * (S.C * S.V), S.V, S.C, S.V), e)
            at_limits = left.limits + chunk * (3 * S.C) + t
            tl.store(at_limits, share)
            tl.store(at_limits + S.C, widths)
            tl.store(at_limits + 2 * S.C, sizes1)

        # N <- A N + f S + X^T diag(c) E ,    S <- m S + X^T diag(c') E
        write_m = share * tl.load(gates + rows.WRITE_M * S.C + t)
        kept_m = tl.load(gates + rows.A * S.C + S.C - 1)
        moved1 = kept_m * memory1 + dot(e1, tl.trans(scaled(write_m, key)), S)
        moved2 = kept_m * memory2 + dot(x, tl.trans(scaled(write_m, e)), S)
        store_layers(left.states, chunk * S.size, part, memory1, memory2, S)
        if n == final:
            store_layers(held, program * S.pair, part, memory1, memory2, S)
        if S.MOMENTUM:
            write_s = share * tl.load(gates + rows.WRITE_S * S.C + t)
            carried, kept_s = tl.load(gates + rows.F * S.C + S.C - 1), tl.load(gates + rows.M * S.C + S.C - 1)
            at1, at2 = turned_layers(last, program * S.size + S.pair, part, S)
            before1, before2 = turned_layers(left.states, chunk * S.size + S.pair, part, S)
            moved1 = _momentum(moved1, at1, before1, e1, scaled(write_s, key), carried, kept_s, S)
            moved2 = _momentum(moved2, at2, before2, x, scaled(write_s, e), carried, kept_s, S)
            tl.debug_barrier()
        memory1, memory2 = moved1, moved2
    store_layers(last, program * S.size, part, memory1, memory2, S)
