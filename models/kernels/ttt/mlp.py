"""Triton kernels of TTT-MLP: one program a head of a sequence, mini-batch by mini-batch.

As linear.py, with two layers: what is said there of a layer holds for each, with inputs X = k and gelu(Z_1). A
head's weights are packed as [W_1 b_1 W_2 b_2], P numbers, and too many for registers: they stay in `last`, where every
mini-batch moves them on, and going back their gradients in `dinit`. The L2 cache holds both. Other threads read what a
thread has written there, hence the barriers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.ttt.parts import dot, gradient_backward, load, project, standardise, tokens


@triton.jit
def _gelu(z):
    """z S, S = sigmoid(2 c (z + d z^3)), and its first and second derivative. Numbers: 2 c, d, 3 d and 12 c d."""
    S = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    dw = 1.5957691216057308 * (1 + 0.134145 * z * z)
    dS = S * (1 - S) * dw
    ddS = dS * (1 - 2 * S) * dw + S * (1 - S) * (0.42812495301279414 * z)
    return z * S, S + z * dS, 2 * dS + z * ddS


@triton.jit
def _copy(source, target, P, BLOCK: tl.constexpr):
    for i in range(0, P, BLOCK):
        at = i + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < P, other=0.0), mask=at < P)


@triton.jit
def _add(source, target, P, BLOCK: tl.constexpr):
    """target += source, and source = 0."""
    for i in range(0, P, BLOCK):
        at = i + tl.arange(0, BLOCK)
        x = tl.load(source + at, mask=at < P, other=0.0) + tl.load(target + at, mask=at < P, other=0.0)
        tl.store(target + at, x, mask=at < P)
        tl.store(source + at, tl.zeros_like(x), mask=at < P)


@triton.jit
def _places(K: tl.constexpr, F: tl.constexpr):
    """Where W_1, b_1, W_2 and b_2 are in a head's weights."""
    key, hidden = tl.arange(0, K), tl.arange(0, F)
    W1, W2 = key[:, None] * F + hidden[None, :], K * F + F + hidden[:, None] * K + key[None, :]
    return W1, K * F + hidden[None, :], W2, 2 * K * F + F + key[None, :]


@triton.jit
def _errors(here, x, target, eta, gamma, beta, K: tl.constexpr, F: tl.constexpr, EPS: tl.constexpr, TYPE: tl.constexpr):
    """u of both layers, for the weights at `here`, and what they are made of."""
    W1, b1, W2, b2 = _places(K, F)
    middle, slope, curve = _gelu(dot(x, tl.load(here + W1), TYPE) + tl.load(here + b1))
    middle, W2 = middle.to(TYPE), tl.load(here + W2).to(TYPE)
    y, scale = standardise(dot(middle, W2, TYPE) + tl.load(here + b2), K, EPS)
    gradient = project(gamma * (gamma * y + beta - target), y, scale, K)
    back = dot(eta * gradient, tl.trans(W2), TYPE)
    return back * slope, eta * gradient, middle, slope, curve, y, scale, gradient, back


@triton.jit
def _read(
    here, query, x, middle, u1, u2, c, lower, K: tl.constexpr, F: tl.constexpr, EPS: tl.constexpr, TYPE: tl.constexpr
):
    """LN before gamma and beta, and what it is made of."""
    W1, b1, W2, b2 = _places(K, F)
    A1 = tl.where(lower, dot(query, tl.trans(x), TYPE) + 1.0, 0.0)
    z1 = dot(query, tl.load(here + W1), TYPE) + tl.load(here + b1) - c * dot(A1, u1, TYPE)
    read, slope, _ = _gelu(z1)
    read = read.to(TYPE)
    A2 = tl.where(lower, dot(read, tl.trans(middle), TYPE) + 1.0, 0.0)
    z2 = dot(read, tl.load(here + W2), TYPE) + tl.load(here + b2) - c * dot(A2, u2, TYPE)
    y, scale = standardise(z2, K, EPS)
    return y, scale, read, slope, A1, A2


@triton.jit
def _move(here, there, x, middle, u1, u2, size, K: tl.constexpr, F: tl.constexpr, TYPE: tl.constexpr):
    """The weights after the mini-batch, written to `there`."""
    W1, b1, W2, b2 = _places(K, F)
    tl.store(there + W1, tl.load(here + W1) - size * dot(tl.trans(x), u1, TYPE))
    tl.store(there + b1, tl.load(here + b1) - size * tl.sum(u1, 0)[None, :])
    tl.store(there + W2, tl.load(here + W2) - size * dot(tl.trans(middle), u2, TYPE))
    tl.store(there + b2, tl.load(here + b2) - size * tl.sum(u2, 0)[None, :])


@triton.jit
def mlp_forward(
    q, k, v, steps, sizes, start, init, gammas, betas, first, group, fresh, o, last, kept,
    L, H, N, G, C: tl.constexpr, K: tl.constexpr, DOCUMENTS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """`last` comes in as a copy of `init`."""
    F: tl.constexpr = 4 * K
    TYPE: tl.constexpr = q.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    batch, head, P = row // H, row % H, 2 * K * F + F + K
    place, key = tl.arange(0, C), tl.arange(0, K)
    lower = place[:, None] >= place[None, :]
    gamma, beta = tl.load(gammas + head * K + key)[None, :], tl.load(betas + head * K + key)[None, :]
    c, last_c = tl.load(sizes + place)[:, None], tl.load(sizes + C - 1)
    here = last + row * P
    for g in range(0, G):
        _copy(here, kept + (row * G + g) * P, P, 1024)
        for n in range(tl.load(group + batch * (G + 1) + g), tl.load(group + batch * (G + 1) + g + 1)):
            begin, end = tl.load(first + batch * (N + 1) + n), tl.load(first + batch * (N + 1) + n + 1)
            token = begin + place
            real = token < end
            if DOCUMENTS:  # noqa: SIM102, both sides of an `and` are compiled
                if tl.load(fresh + batch * N + n) != 0:
                    tl.debug_barrier()
                    _copy(start + head * P, here, P, 1024)
                    tl.debug_barrier()
            query = load(q, batch, head, token, real, L, H, K)
            x = load(k, batch, head, token, real, L, H, K)
            target = load(v, batch, head, token, real, L, H, K) - x
            eta = tl.load(steps + (batch * L + token) * H + head, mask=real, other=0.0)[:, None]
            u1, u2, middle, _, _, _, _, _, _ = _errors(here, x, target, eta, gamma, beta, K, F, EPS, TYPE)
            y, _, _, _, _, _ = _read(here, query, x, middle, u1, u2, c, lower, K, F, EPS, TYPE)
            out = query + gamma * y + beta
            tl.store(tokens(o, batch, head, token, L, H, K), out.to(o.dtype.element_ty), mask=real[:, None])
            tl.debug_barrier()
            _move(here, here, x, middle, u1, u2, tl.where(end - begin == C, last_c, 0.0), K, F, TYPE)
            tl.debug_barrier()


@triton.jit
def mlp_backward(
    q, k, v, steps, sizes, start, gammas, betas, first, group, fresh, kept, do, dlast,
    dq, dk, dv, dsteps, dsizes, dstart, dinit, dgammas, dbetas, scratch,
    L, H, N, G, C: tl.constexpr, K: tl.constexpr, DOCUMENTS: tl.constexpr, EPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The transpose of every line above. `dinit` comes in as a copy of `dlast`, dstart as zeros."""
    F: tl.constexpr = 4 * K
    TYPE: tl.constexpr = q.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    batch, head, P = row // H, row % H, 2 * K * F + F + K
    place, key = tl.arange(0, C), tl.arange(0, K)
    lower = place[:, None] >= place[None, :]
    gamma, beta = tl.load(gammas + head * K + key)[None, :], tl.load(betas + head * K + key)[None, :]
    c, last_c = tl.load(sizes + place)[:, None], tl.load(sizes + C - 1)
    scratch += row * GROUP * P
    dhere = dinit + row * P
    at_W1, at_b1, at_W2, at_b2 = _places(K, F)
    dgamma, dbeta = tl.zeros([C, K], tl.float32), tl.zeros([C, K], tl.float32)
    dc, dlast_c = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for i in range(0, G):
        g = G - 1 - i
        n0, n1 = tl.load(group + batch * (G + 1) + g), tl.load(group + batch * (G + 1) + g + 1)
        begin = tl.load(first + batch * (N + 1) + n0)
        _copy(kept + (row * G + g) * P, scratch + (begin // C) % GROUP * P, P, 1024)
        tl.debug_barrier()
        for n in range(n0, n1 - 1):
            begin, end = tl.load(first + batch * (N + 1) + n), tl.load(first + batch * (N + 1) + n + 1)
            here = scratch + (begin // C) % GROUP * P
            goes_on = begin >= 0
            if DOCUMENTS:
                here = tl.where(tl.load(fresh + batch * N + n) != 0, start + head * P, here)
                goes_on = tl.load(fresh + batch * N + n + 1) == 0
            if goes_on:
                token = begin + place
                real = token < end
                x = load(k, batch, head, token, real, L, H, K)
                target = load(v, batch, head, token, real, L, H, K) - x
                eta = tl.load(steps + (batch * L + token) * H + head, mask=real, other=0.0)[:, None]
                u1, u2, middle, _, _, _, _, _, _ = _errors(here, x, target, eta, gamma, beta, K, F, EPS, TYPE)
                # a full mini-batch lies between two that do not begin a document, so that no two meet
                _move(here, scratch + (end // C) % GROUP * P, x, middle, u1, u2, last_c, K, F, TYPE)
                tl.debug_barrier()
        for j in range(n0, n1):
            n = n1 - 1 - (j - n0)
            begin, end = tl.load(first + batch * (N + 1) + n), tl.load(first + batch * (N + 1) + n + 1)
            token = begin + place
            real = token < end
            here = scratch + (begin // C) % GROUP * P
            if DOCUMENTS:
                here = tl.where(tl.load(fresh + batch * N + n) != 0, start + head * P, here)
            query = load(q, batch, head, token, real, L, H, K)
            x = load(k, batch, head, token, real, L, H, K)
            target = load(v, batch, head, token, real, L, H, K) - x
            dout = load(do, batch, head, token, real, L, H, K)
            eta = tl.load(steps + (batch * L + token) * H + head, mask=real, other=0.0)[:, None]
            size = tl.where(end - begin == C, last_c, 0.0)
            u1, u2, middle, slope, curve, y, scale, gradient, back = _errors(
                here, x, target, eta, gamma, beta, K, F, EPS, TYPE
            )
            y_read, scale_read, read, slope_read, A1, A2 = _read(
                here, query, x, middle, u1, u2, c, lower, K, F, EPS, TYPE
            )

            tl.debug_barrier()  # this and the next keep loads where they are: registers are short
            dgamma += dout * y_read
            dbeta += dout
            dz2_read = project(dout * gamma, y_read, scale_read, K)
            pulls = dot(dz2_read, tl.trans(u2), TYPE)
            dc -= tl.sum(A2 * pulls, 1)
            dA = tl.where(lower, -c * pulls, 0.0)
            dz1_read = dot(dz2_read, tl.trans(tl.load(here + at_W2)), TYPE) + dot(dA, middle, TYPE)
            dz1_read *= slope_read
            dmiddle = dot(tl.trans(dA), read, TYPE)
            tl.debug_barrier()
            W = tl.load(dhere + at_W2).to(TYPE)
            moved = dot(middle, W, TYPE) + tl.load(dhere + at_b2)
            dlast_c -= tl.where(end - begin == C, tl.sum(moved * u2, 1), 0.0)
            du2 = dot(tl.trans(A2), -c * dz2_read, TYPE) - size * moved
            dmiddle -= size * dot(u2, tl.trans(W), TYPE)
            tl.debug_barrier()
            pulls = dot(dz1_read, tl.trans(u1), TYPE)
            dc -= tl.sum(A1 * pulls, 1)
            dA = tl.where(lower, -c * pulls, 0.0)
            dquery = dout + dot(dz1_read, tl.trans(tl.load(here + at_W1)), TYPE) + dot(dA, x, TYPE)
            tl.debug_barrier()
            W = tl.load(dhere + at_W1).to(TYPE)
            moved = dot(x, W, TYPE) + tl.load(dhere + at_b1)
            dlast_c -= tl.where(end - begin == C, tl.sum(moved * u1, 1), 0.0)
            dback = dot(tl.trans(A1), -c * dz1_read, TYPE) - size * moved
            dx = dot(tl.trans(dA), query, TYPE) - size * dot(u1, tl.trans(W), TYPE)
            tl.debug_barrier()
            tl.store(dhere + at_W1, tl.load(dhere + at_W1) + dot(tl.trans(query), dz1_read, TYPE))
            tl.store(dhere + at_b1, tl.load(dhere + at_b1) + tl.sum(dz1_read, 0)[None, :])
            tl.debug_barrier()

            dz1 = dmiddle * slope + dback * back * curve
            dback = (dback * slope).to(TYPE)
            W = tl.load(here + at_W2).to(TYPE)
            du2 += dot(dback, W, TYPE)
            dz2, dtarget, more_gamma, more_beta = gradient_backward(
                eta * du2, y, scale, gradient, target, gamma, beta, K
            )
            dgamma += more_gamma
            dbeta += more_beta
            dz1 += dot(dz2, tl.trans(W), TYPE) * slope
            tl.debug_barrier()
            dx += dot(dz1, tl.trans(tl.load(here + at_W1)), TYPE) - dtarget
            rows = real[:, None]
            tl.store(tokens(dq, batch, head, token, L, H, K), dquery.to(dq.dtype.element_ty), mask=rows)
            tl.store(tokens(dk, batch, head, token, L, H, K), dx.to(dk.dtype.element_ty), mask=rows)
            tl.store(tokens(dv, batch, head, token, L, H, K), dtarget.to(dv.dtype.element_ty), mask=rows)
            tl.store(dsteps + (batch * L + token) * H + head, tl.sum(du2 * gradient, 1), mask=real)
            tl.debug_barrier()
            tl.store(dhere + at_W1, tl.load(dhere + at_W1) + dot(tl.trans(x), dz1, TYPE))
            tl.store(dhere + at_b1, tl.load(dhere + at_b1) + tl.sum(dz1, 0)[None, :])
            tl.debug_barrier()
            W = dot(tl.trans(read), dz2_read, TYPE) + dot(tl.trans(dback), u2, TYPE) + dot(tl.trans(middle), dz2, TYPE)
            tl.store(dhere + at_W2, tl.load(dhere + at_W2) + W)
            tl.store(dhere + at_b2, tl.load(dhere + at_b2) + tl.sum(dz2_read + dz2, 0)[None, :])
            tl.debug_barrier()
            if DOCUMENTS:  # noqa: SIM102
                if tl.load(fresh + batch * N + n) != 0:  # what comes before is another document
                    _add(dhere, dstart + row * P, P, 1024)
                    tl.debug_barrier()
    tl.store(dgammas + row * K + key, tl.sum(dgamma, 0))
    tl.store(dbetas + row * K + key, tl.sum(dbeta, 0))
    tl.store(dsizes + row * C + place, dc + tl.where(place == C - 1, tl.sum(dlast_c, 0), 0.0))
