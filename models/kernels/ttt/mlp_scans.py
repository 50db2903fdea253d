"""The scans of TTT-MLP: mini-batch by mini-batch, what the next one waits for and nothing else. A head of a sequence
has SPLIT programs, each with BF of the hidden units, whose weights, or the gradients by them, stay in registers. What
sums over all units they exchange in memory (kernels/exchange.py), once a mini-batch.

With X_1 = k, X_2 = gelu(Z_1), Z = X W + b, u_2 = eta dl/dZ_2, u_1 = (u_2 W_2') * gelu'(Z_1) and c as in linear.py,

    scan            Z_2 = sum over units;  W <- W - c X' u ,  b <- b - c sum u  of both layers
    scan_gradient   du_1 = du_1 - c (X_1 D_1 + d_1)
                    du_2 = du_2 - c d_2 + sum over units of (du_1 * gelu'(Z_1)) W_2 - c X_2 D_2
                    dX_2 = dX_2 + dZ_2 W_2' - c u_2 D_2' ,  dZ_2 by the second derivative of the norm's loss, from du_2
                    dZ_1 = dX_2 * gelu'(Z_1) + du_1 * gelu''(Z_1) * (u_2 W_2')
                    D <- D + what W is read for: X' dZ of errors, X' dZ of queries, (du_1 * gelu'(Z_1))' u_2 in layer 2

where D and d are the gradients by W and b after a mini-batch, and what stands on the right as du and dX is because of
queries, which read_gradient has found. (The transpose of the dual form of Sun et al. 2024, section 2.5; the layer is in
models/regression/deep/ttt.py.)

Stores come after the exchange, which would wait for them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.exchange import meet, total
from models.kernels.ttt import mlp_tiles as at
from models.kernels.ttt.mlp_tiles import gelu, narrow_at, sum_columns, wide_at
from models.kernels.ttt.parts import columns, dot, gradient_backward, mini_batch, project, standardise


@triton.jit(do_not_specialize=["g0", "g1"])  # or each slab compiles its own
def scan(
    k, v, steps, sizes, gammas, betas, first, group, fresh, start,
    last, weights, biases, sums, arrived,
    L, H, N, G, g0, g1, SPANS,
    C: tl.constexpr, K: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Groups g0 up to g1: moves `last` [B H, P] on, packed as start [H, P] is, and leaves behind weights and biases."""
    SPLIT: tl.constexpr = F // BF
    TYPE: tl.constexpr = k.dtype.element_ty
    program, part = (tl.program_id(0) // SPLIT).to(tl.int64), tl.program_id(0) % SPLIT
    batch, head, P = program // H, program % H, 2 * K * F + F + K
    place, key, unit = tl.arange(0, C), tl.arange(0, K), part * BF + tl.arange(0, BF)
    gamma, beta = tl.load(gammas + head * K + key)[:, None], tl.load(betas + head * K + key)[:, None]
    last_c = tl.load(sizes + C - 1)
    at_W1, at_W2 = key[None, :] * F + unit[:, None], K * F + F + unit[:, None] * K + key[None, :]
    at_b1, at_b2 = K * F + unit[:, None], 2 * K * F + F + key[:, None]
    tile = unit[:, None] * K + key[None, :]
    here, opening = last + program * P, start + head * P
    sums += program * (2 * SPLIT * K * C) + key[:, None] * C + place[None, :]
    W1, b1, W2, b2 = tl.load(here + at_W1), tl.load(here + at_b1), tl.load(here + at_W2), tl.load(here + at_b2)
    n0, n1 = tl.load(group + batch * (G + 1) + g0), tl.load(group + batch * (G + 1) + g1)
    for n in tl.range(n0, n1, disable_licm=True):
        begin, length, token, real, new = mini_batch(first, fresh, batch, n, N, C, DOCUMENTS)
        if DOCUMENTS:  # noqa: SIM102, both sides of an `and` are compiled
            if new:
                W1, b1 = tl.load(opening + at_W1), tl.load(opening + at_b1)
                W2, b2 = tl.load(opening + at_W2), tl.load(opening + at_b2)
        x = tl.load(columns(k, batch, head, token, L, H, K), mask=real[None, :], other=0.0)
        target = tl.load(columns(v, batch, head, token, L, H, K), mask=real[None, :], other=0.0).to(tl.float32) - x
        eta = tl.load(steps + (batch * L + token) * H + head, mask=real, other=0.0)[None, :]
        R1, R2 = W1.to(TYPE), W2.to(TYPE)
        middle, slope, _ = gelu(dot(R1, x, TYPE) + b1)
        middle = middle.to(TYPE)
        z = dot(tl.trans(R2), middle, TYPE)
        if SPLIT > 1:
            turn = sums + (n - n0) % 2 * (SPLIT * K * C)
            tl.store(turn + part * (K * C), z)
            meet(arrived + program, SPLIT * (n - n0 + 1))
            z = total(turn, SPLIT, K * C)
        y, scale = standardise(z + b2, K, 0)
        u2 = (eta * project(gamma * (gamma * y + beta - target), y, scale, K, 0)).to(TYPE)
        u1 = (dot(R2, u2, TYPE) * slope).to(TYPE)
        if new == 0:
            slot = program * SPANS + begin // C - g0
            at_weights, at_biases = weights + slot * (2 * F * K), biases + slot * (F + K)
            tl.store(at_weights + tile, R1)
            tl.store(at_weights + F * K + tile, R2)
            tl.store(at_biases + unit[:, None], b1)
            if part == 0:
                tl.store(at_biases + F + key[:, None], b2)
        size = tl.where(length == C, last_c, 0.0)
        W1 -= size * dot(u1, tl.trans(x), TYPE)
        W2 -= size * dot(middle, tl.trans(u2), TYPE)
        b1 -= size * sum_columns(u1.to(tl.float32))
        b2 -= size * sum_columns(u2.to(tl.float32))
    tl.store(here + at_W1, W1)
    tl.store(here + at_b1, b1)
    tl.store(here + at_W2, W2)
    if part == 0:
        tl.store(here + at_b2, b2)


@triton.jit(do_not_specialize=["g0", "g1"])
def scan_gradient(
    q, k, v, steps, sizes, gammas, betas, first, group, fresh, opening, weights, wide, narrow,
    dinit, dstart, dlast_c, dkept, dkept_biases, sums, arrived,
    L, H, N, G, g0, g1, SPANS,
    C: tl.constexpr, K: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """From the last mini-batch of groups g0 up to g1 to their first: dinit [B H, P], in and out the gradient by the
    weights D_1 and D_2; dstart [B H, P], which is added to as dlast_c [B H, SPLIT] is; DSUM and DERROR. dkept [B H,
    SPANS, F, K] and dkept_biases [B H, SPANS, F] are D_1 after each full mini-batch.
    """
    SPLIT: tl.constexpr = F // BF
    TYPE: tl.constexpr = k.dtype.element_ty
    program, part = (tl.program_id(0) // SPLIT).to(tl.int64), tl.program_id(0) % SPLIT
    batch, head, P = program // H, program % H, 2 * K * F + F + K
    place, key, unit = tl.arange(0, C), tl.arange(0, K), part * BF + tl.arange(0, BF)
    gamma, beta = tl.load(gammas + head * K + key)[:, None], tl.load(betas + head * K + key)[:, None]
    last_c = tl.load(sizes + C - 1)
    at_W1, at_W2 = key[None, :] * F + unit[:, None], K * F + F + unit[:, None] * K + key[None, :]
    at_b1, at_b2 = K * F + unit[:, None], 2 * K * F + F + key[:, None]
    tile, origin = unit[:, None] * K + key[None, :], g0 * C
    here, dopening = dinit + program * P, dstart + program * P
    wide += program * (SPANS + 1) * C * (at.WIDE * F)
    narrow += program * (SPANS + 1) * C * (at.NARROW * K)
    sums += program * (2 * SPLIT * K * C) + key[:, None] * C + place[None, :]
    D1, d1, D2, d2 = tl.load(here + at_W1), tl.load(here + at_b1), tl.load(here + at_W2), tl.load(here + at_b2)
    shared = tl.zeros([K, C], tl.float32)
    mine = tl.where(part == 0, 1.0, 0.0)
    n0, n1 = tl.load(group + batch * (G + 1) + g0), tl.load(group + batch * (G + 1) + g1)
    for i in tl.range(0, n1 - n0, disable_licm=True):
        n = n1 - 1 - i
        begin, length, token, real, new = mini_batch(first, fresh, batch, n, N, C, DOCUMENTS)
        index, slot = token - origin, program * SPANS + begin // C - g0
        mask, full = real[None, :], tl.where(length == C, 1.0, 0.0)
        size, at_W = full * last_c, weights + slot * (2 * F * K)
        if DOCUMENTS:
            at_W = tl.where(new, opening + head * (2 * F * K), at_W)
        x = tl.load(columns(k, batch, head, token, L, H, K), mask=mask, other=0.0)
        middle = tl.load(wide_at(wide, index, at.MIDDLE, unit, F), mask=mask, other=0.0)
        slope = tl.load(wide_at(wide, index, at.SLOPE, unit, F), mask=mask, other=0.0).to(tl.float32)
        bend = tl.load(wide_at(wide, index, at.BEND, unit, F), mask=mask, other=0.0).to(tl.float32)
        du1 = tl.load(wide_at(wide, index, at.DERROR1_READ, unit, F), mask=mask, other=0.0).to(tl.float32)
        dmiddle = tl.load(wide_at(wide, index, at.DMIDDLE_READ, unit, F), mask=mask, other=0.0).to(tl.float32)
        W2 = tl.load(at_W + F * K + tile)
        eta = tl.load(steps + (batch * L + token) * H + head, mask=real, other=0.0)[None, :]
        y = tl.load(narrow_at(narrow, index, at.STANDARD, K), mask=mask, other=0.0)
        gradient = tl.load(narrow_at(narrow, index, at.GRADIENT, K), mask=mask, other=0.0)
        scale = tl.load(narrow + index * (at.NARROW * K) + at.SCALE * K, mask=real, other=0.0)[None, :]
        target = tl.load(columns(v, batch, head, token, L, H, K), mask=mask, other=0.0).to(tl.float32) - x
        du2 = tl.load(narrow_at(narrow, index, at.DERROR_READ, K), mask=mask, other=0.0)
        u2 = (eta * gradient).to(TYPE)

        # what the writes hand back: -c (X D + d) by u
        E1, E2 = D1.to(TYPE), D2.to(TYPE)
        du1 -= size * (dot(E1, x, TYPE) + d1)
        dback = (du1 * slope).to(TYPE)
        moved = dot(tl.trans(E2), middle, TYPE)
        seen = dot(tl.trans(W2), dback, TYPE) - size * moved
        if SPLIT > 1:
            turn = sums + i % 2 * (SPLIT * K * C)
            tl.store(turn + part * (K * C), seen)
            meet(arrived + program, SPLIT * (i + 1))
            seen = total(turn, SPLIT, K * C)
        shared -= full * (moved + mine * d2) * u2.to(tl.float32)
        du2 += seen - size * d2
        dz2, _, _, _ = gradient_backward(eta * du2, y, scale, gradient, target, gamma, beta, K, 0)
        dmiddle += dot(W2, dz2, TYPE) - size * dot(E2, u2, TYPE)
        dz1 = (dmiddle * slope + du1 * bend).to(TYPE)

        tl.store(wide_at(wide, index, at.DSUM, unit, F), dz1, mask=mask)
        if part == 0:
            tl.store(narrow_at(narrow, index, at.DERROR, K), du2, mask=mask)
        if full > 0:
            tl.store(dkept + slot * (F * K) + tile, E1)
            tl.store(dkept_biases + slot * F + unit[:, None], d1)
        query = tl.load(columns(q, batch, head, token, L, H, K), mask=mask, other=0.0)
        read = tl.load(wide_at(wide, index, at.READ, unit, F), mask=mask, other=0.0)
        dread = tl.load(wide_at(wide, index, at.DREAD, unit, F), mask=mask, other=0.0)
        dout = tl.load(narrow_at(narrow, index, at.DOUT, K), mask=mask, other=0.0)
        D1 += dot(dz1, tl.trans(x), TYPE) + dot(dread, tl.trans(query), TYPE)
        D2 += dot(middle, tl.trans(dz2.to(TYPE)), TYPE) + dot(dback, tl.trans(u2), TYPE)
        D2 += dot(read, tl.trans(dout.to(TYPE)), TYPE)
        d1 += sum_columns(dz1.to(tl.float32) + dread.to(tl.float32))
        d2 += sum_columns(dz2 + dout)
        if DOCUMENTS:  # noqa: SIM102, both sides of an `and` are compiled
            if new:  # what comes before is another document
                tl.store(dopening + at_W1, tl.load(dopening + at_W1) + D1)
                tl.store(dopening + at_b1, tl.load(dopening + at_b1) + d1)
                tl.store(dopening + at_W2, tl.load(dopening + at_W2) + D2)
                if part == 0:
                    tl.store(dopening + at_b2, tl.load(dopening + at_b2) + d2)
                D1, d1, D2, d2 = tl.zeros_like(D1), tl.zeros_like(d1), tl.zeros_like(D2), tl.zeros_like(d2)
    tl.store(here + at_W1, D1)
    tl.store(here + at_b1, d1)
    tl.store(here + at_W2, D2)
    if part == 0:
        tl.store(here + at_b2, d2)
    at_part = dlast_c + program * SPLIT + part
    tl.store(at_part, tl.load(at_part) + tl.sum(shared))
