"""The scan over mini-batches, one after another: a document of a head has SPLIT programs, each with BF units of its
hidden layer. N of these units stays in a program's registers (64 KB of float32 for BF = 128 and K = V = 64), S, which
a mini-batch wants only at its end, in `momenta`, where the L2 cache holds it.

What sums over the whole hidden layer, a prediction and what limits a step, the programs of a document exchange in
memory (exchange.py), and do meanwhile what does not wait for it. Products come before stores: kernels/momentum/scans.py
says why.

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
    load_layers,
    load_layers_where,
    load_turned_tokens,
    of_document,
    of_layers,
    of_slot,
    of_units,
    scaled,
    silu,
    square,
    store_layers,
    tile,
    turned,
    zeros,
)
from models.kernels.exchange import arrive, total, wait
from models.kernels.momentum import tiles as rows


@triton.jit
def _first(n, head, row, call, last, momenta, program, part, S: tl.constexpr):
    """N before a document, and S in its place."""
    memory1, memory2 = zeros(S.BF, S.K), zeros(S.BF, S.V)
    momentum1, momentum2 = memory1, memory2
    if call.first is not None:
        memory1, memory2 = load_layers(call.first, head * S.pair, part, S)
    if call.carried is not None:
        goes_on = (of_slot(call, n, head)[3] >= 0).to(tl.int32)
        state = (row * call.H + head) * S.size
        held1, held2 = load_layers_where(goes_on, call.carried, state, part, S)
        fresh = 1 - goes_on
        memory1, memory2 = held1 + fresh * memory1, held2 + fresh * memory2
        if S.MOMENTUM:
            momentum1, momentum2 = load_layers_where(goes_on, call.carried, state + S.pair, part, S)
    if S.MOMENTUM:
        store_layers(momenta, program * S.pair, part, momentum1, momentum2, S)
        tl.debug_barrier()
    return memory1, memory2


@triton.jit
def _carry(moved, at, before, carried):
    """N with what S gives it, `moved` without; S is left for the outputs."""
    momentum = tl.load(at)
    tl.store(before, momentum)
    return moved + carried * momentum


@triton.jit
def _momentum(at, x, y, kept, S: tl.constexpr):
    """S <- m S + x y^T of a layer."""
    tl.store(at, dot(x, tl.trans(y), S, kept * tl.load(at)))


@triton.jit
def scan(call, left, last, momenta, sums, arrived, S: tl.constexpr):
    """Leaves `left` behind, and `last`. momenta [P H, PAIR] is S of every document; in sums [P H, SPLIT, C (V + 2)]
    programs exchange theirs, of which arrived [P H], zeros at first, have come."""
    program, part, head, row, begin, end, ends = of_document(call, S)
    TYPE: tl.constexpr = call.k.dtype.element_ty
    t = tl.arange(0, S.C)[None, :]
    WIDTH: tl.constexpr = S.C * (S.V + 2)
    sums += program * (S.split * WIDTH)
    at_widths = sums + S.C * S.V + t
    of_row = row * call.H + head

    memory1, memory2 = _first(begin, head, row, call, last, momenta, program, part, S)
    for n in tl.range(begin, end, disable_licm=True):
        chunk, first, count, opens = of_slot(call, n, head)
        gates = call.vectors + chunk * (rows.ROWS * S.C)
        key = load_turned_tokens(call.k, first, count, S.K, call, S)
        R1, R2 = memory1, memory2
        if call.base is not None:
            W1, W2 = load_layers(call.base, head * S.pair, part, S)
            R1, R2 = R1 + W1.to(tl.float32), R2 + W2.to(tl.float32)
        if call.reference is not None:  # noqa: SIM102, decided when this is compiled
            if opens >= 0:
                R1, R2 = load_layers(call.reference, of_row * S.pair, part, S)
        R1, R2 = R1.to(TYPE), R2.to(TYPE)
        z = dot(R1, key, S).to(TYPE)
        x = silu(z.to(tl.float32))[0].to(TYPE)
        y, widths = dot(tl.trans(R2), x, S), square(x)
        if S.split > 1:
            tl.store(tile(sums, part * WIDTH, S.V, S.C, S.C), y)
            tl.store(at_widths + part * WIDTH, widths)
            arrive(arrived + program)
        tl.store(of_units(left.z, chunk, part, S), z)

        # N <- A N + f S + X^T diag(c) E ,    S <- m S + X^T diag(c') E : first what they have of themselves
        kept_m = tl.load(gates + rows.A * S.C + S.C - 1)
        store_layers(left.states, chunk * S.size, part, memory1, memory2, S)
        if (n == end - 1) & (ends > 0):
            store_layers(last.held, of_row * S.pair, part, memory1, memory2, S)
        memory1, memory2 = kept_m * memory1, kept_m * memory2
        if S.MOMENTUM:
            carried = tl.load(gates + rows.F * S.C + S.C - 1)
            at1, at2 = of_layers(momenta, program * S.pair, part, S)
            before1, before2 = of_layers(left.states, chunk * S.size + S.pair, part, S)
            memory1 = _carry(memory1, at1, before1, carried)
            memory2 = _carry(memory2, at2, before2, carried)
        tl.store(of_units(left.hidden, chunk, part, S), x)
        if S.split > 1:
            wait(arrived + program, S.split * (2 * (n - begin) + 1))
            y, widths = total(tile(sums, 0, S.V, S.C, S.C), S.split, WIDTH), total(at_widths, S.split, WIDTH)
        else:
            tl.debug_barrier()
        e = (load_turned_tokens(call.v, first, count, S.V, call, S).to(tl.float32) - y).to(TYPE)
        back = dot(R2, e, S)
        slope = silu(tl.load(of_units(left.z, chunk, part, S)).to(tl.float32))[1]  # rather than waits in registers
        e1 = (back * slope).to(TYPE)
        sizes1 = square(e1)
        if S.split > 1:
            tl.store(at_widths + part * WIDTH + S.C, sizes1)
            arrive(arrived + program)
        tl.store(of_units(left.errors1, chunk, part, S), e1)
        if left.back is not None:
            tl.store(of_units(left.back, chunk, part, S), back)
        if S.split > 1:
            wait(arrived + program, S.split * (2 * (n - begin) + 2))
            sizes1 = total(at_widths + S.C, S.split, WIDTH)
        size = square(e)
        share = (size + NOTHING) / (tl.maximum(size, square(key) * sizes1 + widths * size) + NOTHING)
        write_m = share * tl.load(gates + rows.WRITE_M * S.C + t)
        memory1 = dot(e1, tl.trans(scaled(write_m, key)), S, memory1)
        memory2 = dot(x, tl.trans(scaled(write_m, e)), S, memory2)
        if S.MOMENTUM:
            write_s, kept_s = share * tl.load(gates + rows.WRITE_S * S.C + t), tl.load(gates + rows.M * S.C + S.C - 1)
            _momentum(at1, e1, scaled(write_s, key), kept_s, S)
            _momentum(at2, x, scaled(write_s, e), kept_s, S)
        if part == 0:
            tl.store(turned(left.errors2, chunk * (S.C * S.V), S.V, S.C, S.V), e)
            at_limits = left.limits + chunk * (3 * S.C) + t
            tl.store(at_limits, share)
            tl.store(at_limits + S.C, widths)
            tl.store(at_limits + 2 * S.C, sizes1)
        tl.debug_barrier()
    if ends > 0:
        store_layers(last.state, of_row * S.size, part, memory1, memory2, S)
        if S.MOMENTUM:
            momentum1, momentum2 = load_layers(momenta, program * S.pair, part, S)
            store_layers(last.state, of_row * S.size + S.pair, part, momentum1, momentum2, S)
