"""What waits for no other mini-batch of TTT-MLP once a scan has left its weights behind: one program for the
mini-batches that begin in a span of C tokens of a head of a sequence, most often one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.ttt import mlp_tiles as at
from models.kernels.ttt.mlp_tiles import gelu, narrow_at, wide_at
from models.kernels.ttt.parts import columns, dot, gradient_backward, mini_batch, project, standardise


@triton.jit
def _units(weights, biases, j, K: tl.constexpr, F: tl.constexpr, BF: tl.constexpr):
    """Some hidden units, and their W_1 and b_1, and where their W_2 is."""
    unit = j * BF + tl.arange(0, BF)
    tile = unit[:, None] * K + tl.arange(0, K)[None, :]
    return unit, tl.load(weights + tile), tl.load(biases + unit[:, None]), weights + F * K + tile


@triton.jit
def _errors(
    weights, biases, x, target, gamma, beta,
    K: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Z_2 of a mini-batch standardised and by what, and dl/dZ_2."""
    z = tl.zeros(x.shape, tl.float32) + tl.load(biases + F + tl.arange(0, K)[:, None])
    for j in tl.range(0, F // BF, disable_licm=True):
        _, W1, b1, at_W2 = _units(weights, biases, j, K, F, BF)
        middle, _, _ = gelu(dot(W1, x, TYPE) + b1)
        z += dot(tl.trans(tl.load(at_W2)), middle, TYPE)
    y, scale = standardise(z, K, 0)
    return y, scale, project(gamma * (gamma * y + beta - target), y, scale, K, 0)


@triton.jit
def _read(
    weights, biases, query, x, u2, A1, c, written, wide, index, mask,
    K: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, TYPE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Z_2 of the queries standardised and by what, and A' of the second layer [writer, reader]; A1 is the first one's.
    c [1, C]: the token sizes. KEEP: what is found on the way is left in wide.
    """
    z = tl.zeros(x.shape, tl.float32) + tl.load(biases + F + tl.arange(0, K)[:, None])
    scores = tl.zeros(A1.shape, tl.float32)
    for j in tl.range(0, F // BF, disable_licm=True):
        unit, W1, b1, at_W2 = _units(weights, biases, j, K, F, BF)
        W2 = tl.load(at_W2)
        middle, slope, curve = gelu(dot(W1, x, TYPE) + b1)
        back = dot(W2, u2, TYPE)
        middle, u1 = middle.to(TYPE), (back * slope).to(TYPE)
        read, _, _ = gelu(dot(W1, query, TYPE) + b1 - c * dot(u1, A1, TYPE))
        read = read.to(TYPE)
        scores += dot(tl.trans(middle), read, TYPE)
        z += dot(tl.trans(W2), read, TYPE)
        if KEEP:
            tl.store(wide_at(wide, index, at.MIDDLE, unit, F), middle, mask=mask)
            tl.store(wide_at(wide, index, at.SLOPE, unit, F), slope.to(TYPE), mask=mask)
            tl.store(wide_at(wide, index, at.BEND, unit, F), (back * curve).to(TYPE), mask=mask)
            tl.store(wide_at(wide, index, at.ERROR, unit, F), u1, mask=mask)
            tl.store(wide_at(wide, index, at.READ, unit, F), read, mask=mask)
    A2 = tl.where(written, scores + 1.0, 0.0).to(TYPE)
    y, scale = standardise(z - c * dot(u2, A2, TYPE), K, 0)
    return y, scale, A2


@triton.jit(do_not_specialize=["g0"])  # or each slab compiles its own
def read(
    q, k, v, steps, sizes, gammas, betas, first, group, fresh, opening, opening_biases, weights, biases,
    o,
    L, H, N, G, g0, SPANS,
    C: tl.constexpr, K: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """opening [H, 2, F, K] and opening_biases [H, F + K]: W_0 and b_0, as weights and biases are."""
    TYPE: tl.constexpr = q.dtype.element_ty
    g, row = g0 + tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head, place, key = row // H, row % H, tl.arange(0, C), tl.arange(0, K)
    gamma, beta = tl.load(gammas + head * K + key)[:, None], tl.load(betas + head * K + key)[:, None]
    c, written = tl.load(sizes + place)[None, :], place[:, None] <= place[None, :]
    for n in range(tl.load(group + batch * (G + 1) + g), tl.load(group + batch * (G + 1) + g + 1)):
        begin, _length, token, real, new = mini_batch(first, fresh, batch, n, N, C, DOCUMENTS)
        slot = row * SPANS + begin // C - g0
        at_W, at_b = weights + slot * (2 * F * K), biases + slot * (F + K)
        if DOCUMENTS:
            at_W = tl.where(new, opening + head * (2 * F * K), at_W)
            at_b = tl.where(new, opening_biases + head * (F + K), at_b)
        query = tl.load(columns(q, batch, head, token, L, H, K), mask=real[None, :], other=0.0)
        x = tl.load(columns(k, batch, head, token, L, H, K), mask=real[None, :], other=0.0)
        target = tl.load(columns(v, batch, head, token, L, H, K), mask=real[None, :], other=0.0).to(tl.float32) - x
        eta = tl.load(steps + (batch * L + token) * H + head, mask=real, other=0.0)[None, :]
        _, _, gradient = _errors(at_W, at_b, x, target, gamma, beta, K, F, BF, TYPE)
        u2 = (eta * gradient).to(TYPE)
        A1 = tl.where(written, dot(tl.trans(x), query, TYPE) + 1.0, 0.0).to(TYPE)
        y, _, _ = _read(at_W, at_b, query, x, u2, A1, c, written, o, token, token, K, F, BF, TYPE, False)
        out = query.to(tl.float32) + gamma * y + beta
        tl.store(columns(o, batch, head, token, L, H, K), out.to(o.dtype.element_ty), mask=real[None, :])


@triton.jit(do_not_specialize=["g0"])
def read_gradient(
    q, k, v, steps, sizes, gammas, betas, first, group, fresh, opening, opening_biases, weights, biases, do,
    dq, dsizes, dgammas, dbetas, wide, narrow,
    L, H, N, G, g0, SPANS,
    C: tl.constexpr, K: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """All that needs no gradient by later weights. dsizes [B H, G, C], dgammas and dbetas [B H, G, K]: by those of
    queries; wide and narrow but DSUM and DERROR.
    """
    TYPE: tl.constexpr = q.dtype.element_ty
    g, row = g0 + tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head, place, key = row // H, row % H, tl.arange(0, C), tl.arange(0, K)
    gamma, beta = tl.load(gammas + head * K + key)[:, None], tl.load(betas + head * K + key)[:, None]
    c = tl.load(sizes + place)[None, :]
    written = place[:, None] <= place[None, :]
    wide += row * (SPANS + 1) * C * (at.WIDE * F)
    narrow += row * (SPANS + 1) * C * (at.NARROW * K)
    dc, dgamma, dbeta = tl.zeros([C], tl.float32), tl.zeros([K, C], tl.float32), tl.zeros([K, C], tl.float32)
    for n in range(tl.load(group + batch * (G + 1) + g), tl.load(group + batch * (G + 1) + g + 1)):
        begin, _length, token, real, new = mini_batch(first, fresh, batch, n, N, C, DOCUMENTS)
        index, slot = token - g0 * C, row * SPANS + begin // C - g0
        mask = real[None, :]
        at_W, at_b = weights + slot * (2 * F * K), biases + slot * (F + K)
        if DOCUMENTS:
            at_W = tl.where(new, opening + head * (2 * F * K), at_W)
            at_b = tl.where(new, opening_biases + head * (F + K), at_b)
        query = tl.load(columns(q, batch, head, token, L, H, K), mask=mask, other=0.0)
        x = tl.load(columns(k, batch, head, token, L, H, K), mask=mask, other=0.0)
        target = tl.load(columns(v, batch, head, token, L, H, K), mask=mask, other=0.0).to(tl.float32) - x
        eta = tl.load(steps + (batch * L + token) * H + head, mask=real, other=0.0)[None, :]
        dout = tl.load(columns(do, batch, head, token, L, H, K), mask=mask, other=0.0).to(tl.float32)
        y, scale, gradient = _errors(at_W, at_b, x, target, gamma, beta, K, F, BF, TYPE)
        u2 = (eta * gradient).to(TYPE)
        tl.store(narrow_at(narrow, index, at.STANDARD, K), y, mask=mask)
        tl.store(narrow_at(narrow, index, at.GRADIENT, K), gradient, mask=mask)
        tl.store(narrow + (index * at.NARROW + at.SCALE)[None, :] * K, scale, mask=mask)
        A1 = tl.where(written, dot(tl.trans(x), query, TYPE) + 1.0, 0.0).to(TYPE)
        y, scale, A2 = _read(at_W, at_b, query, x, u2, A1, c, written, wide, index, mask, K, F, BF, TYPE, True)
        dgamma += dout * y
        dbeta += dout
        dz2 = project(dout * gamma, y, scale, K, 0)
        tl.store(narrow_at(narrow, index, at.DOUT, K), dz2, mask=mask)
        pulls = dot(tl.trans(u2), dz2, TYPE)
        dc -= tl.sum(A2.to(tl.float32) * pulls, 0)
        dA = tl.where(written, -c * pulls, 0.0).to(TYPE)
        tl.store(narrow_at(narrow, index, at.DERROR_READ, K), dot(-c * dz2, tl.trans(A2), TYPE), mask=mask)
        dz2, dquery, pulls = dz2.to(TYPE), dout, tl.zeros([C, C], tl.float32)
        tl.debug_barrier()  # what _read has stored other threads load now
        for j in tl.range(0, F // BF, disable_licm=True):
            unit, W1, b1, at_W2 = _units(at_W, at_b, j, K, F, BF)
            middle = tl.load(wide_at(wide, index, at.MIDDLE, unit, F), mask=mask, other=0.0)
            u1 = tl.load(wide_at(wide, index, at.ERROR, unit, F), mask=mask, other=0.0)
            read, slope, _ = gelu(dot(W1, query, TYPE) + b1 - c * dot(u1, A1, TYPE))
            dz1 = (dot(tl.load(at_W2), dz2, TYPE) + dot(middle, dA, TYPE)) * slope
            dmiddle, du1 = dot(read, tl.trans(dA), TYPE), dot(-c * dz1, tl.trans(A1), TYPE)
            dz1 = dz1.to(TYPE)
            pulls += dot(tl.trans(u1), dz1, TYPE)
            dquery += dot(tl.trans(W1), dz1, TYPE)
            tl.store(wide_at(wide, index, at.DREAD, unit, F), dz1, mask=mask)
            tl.store(wide_at(wide, index, at.DMIDDLE_READ, unit, F), dmiddle.to(TYPE), mask=mask)
            tl.store(wide_at(wide, index, at.DERROR1_READ, unit, F), du1.to(TYPE), mask=mask)
        dc -= tl.sum(A1.to(tl.float32) * pulls, 0)
        dA = tl.where(written, -c * pulls, 0.0).to(TYPE)
        dquery += dot(x, dA, TYPE)
        tl.store(columns(dq, batch, head, token, L, H, K), dquery.to(dq.dtype.element_ty), mask=mask)
        tl.store(narrow_at(narrow, index, at.DKEY_READ, K), dot(query, tl.trans(dA), TYPE), mask=mask)
    part = row * G + g
    tl.store(dsizes + part * C + place, dc)
    tl.store(dgammas + part * K + key, tl.sum(dgamma, 1))
    tl.store(dbetas + part * K + key, tl.sum(dbeta, 1))


@triton.jit(do_not_specialize=["g0"])
def write_gradient(
    k, v, steps, sizes, gammas, betas, first, group, fresh, opening, weights, wide, narrow, dkept, dkept_biases,
    dk, dv, dsteps, dsizes, dgammas, dbetas,
    L, H, N, G, g0, SPANS,
    C: tl.constexpr, K: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The gradients by pairs and what is left of those by sizes, gamma and beta, which are added to."""
    TYPE: tl.constexpr = k.dtype.element_ty
    g, row = g0 + tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head, key = row // H, row % H, tl.arange(0, K)
    gamma, beta = tl.load(gammas + head * K + key)[:, None], tl.load(betas + head * K + key)[:, None]
    last_c = tl.load(sizes + C - 1)
    wide += row * (SPANS + 1) * C * (at.WIDE * F)
    narrow += row * (SPANS + 1) * C * (at.NARROW * K)
    dlast_c, dgamma, dbeta = tl.zeros([C], tl.float32), tl.zeros([K, C], tl.float32), tl.zeros([K, C], tl.float32)
    for n in range(tl.load(group + batch * (G + 1) + g), tl.load(group + batch * (G + 1) + g + 1)):
        begin, length, token, real, new = mini_batch(first, fresh, batch, n, N, C, DOCUMENTS)
        index, slot = token - g0 * C, row * SPANS + begin // C - g0
        mask = real[None, :]
        at_W = weights + slot * (2 * F * K)
        if DOCUMENTS:
            at_W = tl.where(new, opening + head * (2 * F * K), at_W)
        x = tl.load(columns(k, batch, head, token, L, H, K), mask=mask, other=0.0)
        target = tl.load(columns(v, batch, head, token, L, H, K), mask=mask, other=0.0).to(tl.float32) - x
        eta = tl.load(steps + (batch * L + token) * H + head, mask=real, other=0.0)[None, :]
        y = tl.load(narrow_at(narrow, index, at.STANDARD, K), mask=mask, other=0.0)
        gradient = tl.load(narrow_at(narrow, index, at.GRADIENT, K), mask=mask, other=0.0)
        scale = tl.load(narrow + (index * at.NARROW + at.SCALE)[None, :] * K, mask=mask, other=0.0)
        du2 = tl.load(narrow_at(narrow, index, at.DERROR, K), mask=mask, other=0.0)
        dx = tl.load(narrow_at(narrow, index, at.DKEY_READ, K), mask=mask, other=0.0)
        _, dtarget, more_gamma, more_beta = gradient_backward(eta * du2, y, scale, gradient, target, gamma, beta, K, 0)
        dgamma += more_gamma
        dbeta += more_beta
        dx -= dtarget
        moved = tl.zeros([K, C], tl.float32)
        writes = tl.where(length == C, F, 0)  # there is no dl/dW_1 after others
        for j in tl.range(0, F // BF, disable_licm=True):
            unit = j * BF + tl.arange(0, BF)
            tile = unit[:, None] * K + key[None, :]
            u1 = tl.load(wide_at(wide, index, at.ERROR, unit, F), mask=mask, other=0.0)
            D1 = tl.load(dkept + slot * (F * K) + tile, mask=unit[:, None] < writes, other=0.0)
            d1 = tl.load(dkept_biases + slot * F + unit[:, None], mask=unit[:, None] < writes, other=0.0)
            moved += dot(tl.trans(D1), u1, TYPE)
            dlast_c -= tl.sum(d1 * u1.to(tl.float32), 0)
            dz1 = tl.load(wide_at(wide, index, at.DSUM, unit, F), mask=mask, other=0.0)
            dx += dot(tl.trans(tl.load(at_W + tile)), dz1, TYPE)
        dlast_c -= tl.sum(x.to(tl.float32) * moved, 0)
        dx -= last_c * moved
        tl.store(columns(dk, batch, head, token, L, H, K), dx.to(dk.dtype.element_ty), mask=mask)
        tl.store(columns(dv, batch, head, token, L, H, K), dtarget.to(dv.dtype.element_ty), mask=mask)
        tl.store(dsteps + (batch * L + token) * H + head, tl.sum(du2 * gradient, 0), mask=real)
    part = row * G + g
    at_last = dsizes + part * C + C - 1
    tl.store(at_last, tl.load(at_last) + tl.sum(dlast_c, 0))
    at_gamma, at_beta = dgammas + part * K + key, dbetas + part * K + key
    tl.store(at_gamma, tl.load(at_gamma) + tl.sum(dgamma, 1))
    tl.store(at_beta, tl.load(at_beta) + tl.sum(dbeta, 1))
