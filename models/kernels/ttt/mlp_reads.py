"""What waits for no other mini-batch of TTT-MLP once a scan has left its weights behind: one program for the
mini-batches that begin in a span of C tokens of a head of a sequence, most often one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.ttt import mlp_tiles as at
from models.kernels.ttt.mlp_tiles import errors, gelu, narrow_at, wide_at
from models.kernels.ttt.parts import columns, dot, gradient_backward, project, standardise


@triton.jit
def _weights(weights, biases, K: tl.constexpr, F: tl.constexpr):
    hidden, key = tl.arange(0, F)[:, None], tl.arange(0, K)
    tile = hidden * K + key[None, :]
    W1, W2 = tl.load(weights + tile), tl.load(weights + F * K + tile)
    return W1, tl.load(biases + hidden), W2, tl.load(biases + F + key[:, None])


@triton.jit
def _read(W1, b1, W2, b2, query, x, middle, u1, u2, c, K: tl.constexpr, EPS: tl.constexpr, TYPE: tl.constexpr):
    """Z_2 of the queries standardised and by what, gelu(Z_1) and its derivative, and A' of both layers [writer,
    reader]. c [1, C]: the token sizes.
    """
    place = tl.arange(0, x.shape[1])
    written = place[:, None] <= place[None, :]
    A1 = tl.where(written, dot(tl.trans(x), query, TYPE) + 1.0, 0.0)
    read, slope, _ = gelu(dot(W1, query, TYPE) + b1 - c * dot(u1, A1, TYPE))
    read = read.to(TYPE)
    A2 = tl.where(written, dot(tl.trans(middle), read, TYPE) + 1.0, 0.0)
    z = dot(tl.trans(W2), read, TYPE) + b2 - c * dot(u2, A2, TYPE)
    y, scale = standardise(z, K, EPS, 0)
    return y, scale, read, slope, A1, A2


@triton.jit(do_not_specialize=["g0"])  # or each slab compiles its own
def read(
    q, k, v, steps, sizes, gammas, betas, first, group, fresh, opening, opening_biases, weights, biases,
    o,
    L, H, N, G, g0, SPANS, C: tl.constexpr, K: tl.constexpr, F: tl.constexpr, DOCUMENTS: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """opening [H, 2, F, K] and opening_biases [H, F + K]: W_0 and b_0, as weights and biases are."""
    TYPE: tl.constexpr = q.dtype.element_ty
    g, row = g0 + tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head, place, key = row // H, row % H, tl.arange(0, C), tl.arange(0, K)
    gamma, beta = tl.load(gammas + head * K + key)[:, None], tl.load(betas + head * K + key)[:, None]
    c = tl.load(sizes + place)[None, :]
    for n in range(tl.load(group + batch * (G + 1) + g), tl.load(group + batch * (G + 1) + g + 1)):
        begin, end = tl.load(first + batch * (N + 1) + n), tl.load(first + batch * (N + 1) + n + 1)
        token = begin + place
        real = token < end
        slot = row * SPANS + begin // C - g0
        at_W, at_b = weights + slot * (2 * F * K), biases + slot * (F + K)
        if DOCUMENTS:
            new = tl.load(fresh + batch * N + n) != 0
            at_W = tl.where(new, opening + head * (2 * F * K), at_W)
            at_b = tl.where(new, opening_biases + head * (F + K), at_b)
        W1, b1, W2, b2 = _weights(at_W, at_b, K, F)
        query = tl.load(columns(q, batch, head, token, L, H, K), mask=real[None, :], other=0.0)
        x = tl.load(columns(k, batch, head, token, L, H, K), mask=real[None, :], other=0.0)
        target = tl.load(columns(v, batch, head, token, L, H, K), mask=real[None, :], other=0.0).to(tl.float32) - x
        eta = tl.load(steps + (batch * L + token) * H + head, mask=real, other=0.0)[None, :]
        middle, _, _, _, _, _, u2, _, u1 = errors(W1, b1, W2, b2, x, target, eta, gamma, beta, K, EPS, TYPE)
        y, _, _, _, _, _ = _read(W1, b1, W2, b2, query, x, middle, u1, u2, c, K, EPS, TYPE)
        out = query.to(tl.float32) + gamma * y + beta
        tl.store(columns(o, batch, head, token, L, H, K), out.to(o.dtype.element_ty), mask=real[None, :])


@triton.jit(do_not_specialize=["g0"])
def read_gradient(
    q, k, v, steps, sizes, gammas, betas, first, group, fresh, opening, opening_biases, weights, biases, do,
    dq, dsizes, dgammas, dbetas, wide, narrow,
    L, H, N, G, g0, SPANS, C: tl.constexpr, K: tl.constexpr, F: tl.constexpr, DOCUMENTS: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """All that needs no gradient by later weights. dsizes [B H, G, C], dgammas and dbetas [B H, G, K]: by those of
    queries; wide and narrow but DSUM and DERROR.
    """
    TYPE: tl.constexpr = q.dtype.element_ty
    g, row = g0 + tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head, place, key, hidden = row // H, row % H, tl.arange(0, C), tl.arange(0, K), tl.arange(0, F)
    gamma, beta = tl.load(gammas + head * K + key)[:, None], tl.load(betas + head * K + key)[:, None]
    c = tl.load(sizes + place)[None, :]
    written = place[:, None] <= place[None, :]
    wide += row * (SPANS + 1) * C * (at.WIDE * F)
    narrow += row * (SPANS + 1) * C * (at.NARROW * K)
    dc, dgamma, dbeta = tl.zeros([C], tl.float32), tl.zeros([K, C], tl.float32), tl.zeros([K, C], tl.float32)
    for n in range(tl.load(group + batch * (G + 1) + g), tl.load(group + batch * (G + 1) + g + 1)):
        begin, end = tl.load(first + batch * (N + 1) + n), tl.load(first + batch * (N + 1) + n + 1)
        token = begin + place
        real, index, slot = token < end, token - g0 * C, row * SPANS + begin // C - g0
        mask = real[None, :]
        at_W, at_b = weights + slot * (2 * F * K), biases + slot * (F + K)
        if DOCUMENTS:
            new = tl.load(fresh + batch * N + n) != 0
            at_W = tl.where(new, opening + head * (2 * F * K), at_W)
            at_b = tl.where(new, opening_biases + head * (F + K), at_b)
        W1, b1, W2, b2 = _weights(at_W, at_b, K, F)
        query = tl.load(columns(q, batch, head, token, L, H, K), mask=mask, other=0.0)
        x = tl.load(columns(k, batch, head, token, L, H, K), mask=mask, other=0.0)
        target = tl.load(columns(v, batch, head, token, L, H, K), mask=mask, other=0.0).to(tl.float32) - x
        eta = tl.load(steps + (batch * L + token) * H + head, mask=real, other=0.0)[None, :]
        dout = tl.load(columns(do, batch, head, token, L, H, K), mask=mask, other=0.0).to(tl.float32)
        middle, slope, curve, y, scale, gradient, u2, back, u1 = errors(
            W1, b1, W2, b2, x, target, eta, gamma, beta, K, EPS, TYPE
        )
        bend = back * curve
        tl.store(wide_at(wide, index, at.MIDDLE, hidden, F), middle, mask=mask)
        tl.store(wide_at(wide, index, at.SLOPE, hidden, F), slope.to(TYPE), mask=mask)
        tl.store(wide_at(wide, index, at.BEND, hidden, F), bend.to(TYPE), mask=mask)
        tl.store(wide_at(wide, index, at.ERROR, hidden, F), u1, mask=mask)
        tl.store(narrow_at(narrow, index, at.STANDARD, K), y, mask=mask)
        tl.store(narrow_at(narrow, index, at.GRADIENT, K), gradient, mask=mask)
        tl.store(narrow + (index * at.NARROW + at.SCALE)[None, :] * K, scale, mask=mask)
        y, scale, read, slope_read, A1, A2 = _read(W1, b1, W2, b2, query, x, middle, u1, u2, c, K, EPS, TYPE)
        tl.store(wide_at(wide, index, at.READ, hidden, F), read, mask=mask)

        dgamma += dout * y
        dbeta += dout
        dz2 = project(dout * gamma, y, scale, K, 0)
        tl.store(narrow_at(narrow, index, at.DOUT, K), dz2, mask=mask)
        pulls = dot(tl.trans(u2), dz2, TYPE)
        dc -= tl.sum(A2 * pulls, 0)
        dA = tl.where(written, -c * pulls, 0.0).to(TYPE)
        tl.store(narrow_at(narrow, index, at.DERROR_READ, K), dot(-c * dz2, tl.trans(A2.to(TYPE)), TYPE), mask=mask)
        dz1 = (dot(W2, dz2, TYPE) + dot(middle, dA, TYPE)) * slope_read
        tl.store(wide_at(wide, index, at.DREAD, hidden, F), dz1.to(TYPE), mask=mask)
        dback = dot(-c * dz1, tl.trans(A1.to(TYPE)), TYPE)
        dsum = dot(read, tl.trans(dA), TYPE) * slope + dback * bend
        tl.store(wide_at(wide, index, at.DSUM_READ, hidden, F), dsum.to(TYPE), mask=mask)
        tl.store(wide_at(wide, index, at.DBACK_READ, hidden, F), (dback * slope).to(TYPE), mask=mask)
        dz1 = dz1.to(TYPE)
        pulls = dot(tl.trans(u1), dz1, TYPE)
        dc -= tl.sum(A1 * pulls, 0)
        dA = tl.where(written, -c * pulls, 0.0).to(TYPE)
        dquery = dout + dot(tl.trans(W1), dz1, TYPE) + dot(x, dA, TYPE)
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
    L, H, N, G, g0, SPANS, C: tl.constexpr, K: tl.constexpr, F: tl.constexpr, DOCUMENTS: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """The gradients by pairs and what is left of those by sizes, gamma and beta, which are added to."""
    TYPE: tl.constexpr = k.dtype.element_ty
    g, row = g0 + tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head, place, key, hidden = row // H, row % H, tl.arange(0, C), tl.arange(0, K), tl.arange(0, F)
    gamma, beta = tl.load(gammas + head * K + key)[:, None], tl.load(betas + head * K + key)[:, None]
    last_c, tile = tl.load(sizes + C - 1), hidden[:, None] * K + key[None, :]
    wide += row * (SPANS + 1) * C * (at.WIDE * F)
    narrow += row * (SPANS + 1) * C * (at.NARROW * K)
    dlast_c, dgamma, dbeta = tl.zeros([C], tl.float32), tl.zeros([K, C], tl.float32), tl.zeros([K, C], tl.float32)
    for n in range(tl.load(group + batch * (G + 1) + g), tl.load(group + batch * (G + 1) + g + 1)):
        begin, end = tl.load(first + batch * (N + 1) + n), tl.load(first + batch * (N + 1) + n + 1)
        token = begin + place
        real, index, slot = token < end, token - g0 * C, row * SPANS + begin // C - g0
        mask = real[None, :]
        at_W = weights + slot * (2 * F * K)
        if DOCUMENTS:
            new = tl.load(fresh + batch * N + n) != 0
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
        dz1 = tl.load(wide_at(wide, index, at.DSUM, hidden, F), mask=mask, other=0.0)
        u1 = tl.load(wide_at(wide, index, at.ERROR, hidden, F), mask=mask, other=0.0)
        W1 = tl.load(at_W + tile)
        writes = tl.where(end - begin == C, F, 0)  # there is no dl/dW_1 after others
        D1 = tl.load(dkept + slot * (F * K) + tile, mask=hidden[:, None] < writes, other=0.0)
        d1 = tl.load(dkept_biases + slot * F + hidden[:, None], mask=hidden[:, None] < writes, other=0.0)
        moved = dot(tl.trans(D1), u1, TYPE)
        dlast_c -= tl.sum(x.to(tl.float32) * moved, 0) + tl.sum(d1 * u1.to(tl.float32), 0)
        dx += dot(tl.trans(W1), dz1, TYPE) - last_c * moved - dtarget
        tl.store(columns(dk, batch, head, token, L, H, K), dx.to(dk.dtype.element_ty), mask=mask)
        tl.store(columns(dv, batch, head, token, L, H, K), dtarget.to(dv.dtype.element_ty), mask=mask)
        tl.store(dsteps + (batch * L + token) * H + head, tl.sum(du2 * gradient, 0), mask=real)
    part = row * G + g
    at_last = dsizes + part * C + C - 1
    tl.store(at_last, tl.load(at_last) + tl.sum(dlast_c, 0))
    at_gamma, at_beta = dgammas + part * K + key, dbetas + part * K + key
    tl.store(at_gamma, tl.load(at_gamma) + tl.sum(dgamma, 1))
    tl.store(at_beta, tl.load(at_beta) + tl.sum(dbeta, 1))
