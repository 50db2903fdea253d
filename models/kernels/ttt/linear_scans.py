"""The two scans of TTT-Linear: one program a head of a sequence, mini-batch by mini-batch, with what waits for the
mini-batch before and nothing else.

The weights stay in registers, transposed, [values, keys], so that they go into a product of warp groups from where they
are, and so do the errors, [values, tokens]. All means along the values are sums of one reduction a mini-batch, which is
a barrier, and norms and their gradients are polynomials of them. The inputs of the next mini-batch are loaded before
the products of this one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.ttt import linear_tiles as at
from models.kernels.ttt.linear_tiles import no_gradients, number_at
from models.kernels.ttt.parts import EPS, add_dot, dot, mini_batch, tokens


@triton.jit
def _add5(a, b, c, d, e, a1, b1, c1, d1, e1):
    return a + a1, b + b1, c + c1, d + d1, e + e1


@triton.jit
def _add6(a, b, c, d, e, f, a1, b1, c1, d1, e1, f1):
    return a + a1, b + b1, c + c1, d + d1, e + e1, f + f1


@triton.jit
def _rows(x, batch, head, token, real, L, H, K: tl.constexpr):
    return tl.load(tokens(x, batch, head, token, L, H, K), mask=real[:, None], other=0.0)


@triton.jit
def _turned(x):
    return tl.trans(x.to(tl.float32))


@triton.jit
def _pairs(k, v, steps, batch, head, token, real, L, H, K: tl.constexpr):
    x, value = _rows(k, batch, head, token, real, L, H, K), _rows(v, batch, head, token, real, L, H, K)
    return x, value, tl.load(steps + (batch * L + token) * H + head, mask=real, other=0.0)


@triton.jit(do_not_specialize=["L", "N", "G"])
def scan(
    k, v, steps, sizes, start, gammas, betas, init, first, group, fresh,
    last, kept, biases, errors, standard, numbers,
    L, H, N, G, C: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """From init [B H, P]: last [B H, P]; of every token u and y, errors and standard [B, L, H, K], and numbers [B H, 6,
    L]; and what stands before the first mini-batch of each span, kept [B H, G, K, K] and, in float32, biases [B H, G,
    K].
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head, P = row // H, row % H, K * K + K
    TYPE: tl.constexpr = k.dtype.element_ty
    key = tl.arange(0, K)
    matrix, bias = key[None, :] * K + key[:, None], K * K + key[:, None]
    which = tl.arange(0, 8)[:, None]
    gamma_row, beta_row = tl.load(gammas + head * K + key)[None, :], tl.load(betas + head * K + key)[None, :]
    gamma = tl.load(gammas + head * K + key[:, None])
    curve = gamma * gamma
    slope, last_c = tl.sum(curve) / K, tl.load(sizes + C - 1)
    end, opening = tl.load(group + batch * (G + 1) + G), start + head * P
    begin, length, token, real, new = mini_batch(first, fresh, batch, 0, N, C, DOCUMENTS)
    init += row * P
    if DOCUMENTS:
        init = tl.where(new, opening, init)
    W, b = tl.load(init + matrix), tl.load(init + bias)
    span = begin // SPAN
    if end > 0:
        tl.store(kept + (row * G + span) * (K * K) + matrix, W.to(TYPE))
        tl.store(biases + (row * G + span) * K + key[:, None], b)
    x, value, eta = _pairs(k, v, steps, batch, head, token, real, L, H, K)
    for n in tl.range(0, end, disable_licm=True):
        m = tl.minimum(n + 1, N - 1)
        next_begin, next_length, next_token, next_real, next_new = mini_batch(first, fresh, batch, m, N, C, DOCUMENTS)
        next_x, next_value, next_eta = _pairs(k, v, steps, batch, head, next_token, next_real, L, H, K)

        pull = tl.trans(gamma_row * (beta_row - value.to(tl.float32) + x.to(tl.float32)))
        z = dot(W, tl.trans(x), TYPE) + b
        bent = curve * z
        means = tl.reduce((z, z * z, bent, bent * z, pull * z, pull), 0, _add6, keep_dims=True)
        mean, square, linear, quadratic, cross, rest = means
        mean, rest = mean / K, rest / K
        scale = 1 / tl.sqrt(tl.maximum(square / K - mean * mean, 0.0) + EPS)
        linear, y = linear / K - mean * slope, scale * (z - mean)  # <gamma^2 (z - mean)>
        quadratic = scale * (quadratic / K - mean * (2 * linear + mean * slope))
        cross = scale * (quadratic + cross / K - mean * rest)  # <g y>
        bent = scale * linear
        u = (eta[None, :] * scale) * (curve * y + pull - (bent + rest) - y * cross)
        tl.store(tokens(errors, batch, head, token, L, H, K), tl.trans(u.to(TYPE)), mask=real[:, None])
        tl.store(tokens(standard, batch, head, token, L, H, K), tl.trans(y.to(TYPE)), mask=real[:, None])
        found = tl.where(which == at.SCALE, scale, eta[None, :] * scale * scale)
        found = tl.where(which == at.CROSS, cross, found)
        found = tl.where(which == at.BENT, bent, found)
        found = tl.where(which == at.LEVEL, 2 * bent + rest, found)
        found = tl.where(which == at.TURN, 0.5 * scale * quadratic + 1.5 * cross, found)
        tl.store(number_at(numbers, row, which, token[None, :], L), found, mask=real[None, :] & (which < at.NUMBERS))
        u *= tl.where(length == C, -last_c, 0.0)
        W = add_dot(u, x, W, TYPE)
        b += tl.sum(u, 1, keep_dims=True)
        # before a document's own weights come in: after that Triton turns W around for this store in every mini-batch
        if (next_begin // SPAN != span) & (n + 1 < end):
            span = next_begin // SPAN
            tl.store(kept + (row * G + span) * (K * K) + matrix, W.to(TYPE))
            tl.store(biases + (row * G + span) * K + key[:, None], b)
        if DOCUMENTS:  # noqa: SIM102, both sides of an `and` are compiled
            if next_new & (n + 1 < end):
                W, b = tl.load(opening + matrix), tl.load(opening + bias)
        begin, length, token, real = next_begin, next_length, next_token, next_real
        x, value, eta = next_x, next_value, next_eta
    tl.store(last + row * P + matrix, W)
    tl.store(last + row * P + bias, b)


@triton.jit
def _two(numbers, row, one: tl.constexpr, other: tl.constexpr, token, real, L):
    found = tl.load(number_at(numbers, row, one, token, L), mask=real, other=0.0)
    return found[None, :], tl.load(number_at(numbers, row, other, token, L), mask=real, other=0.0)[None, :]


@triton.jit
def _gradient_inputs(q, k, v, standard, derrors, dreads, batch, head, token, real, L, H, K: tl.constexpr):
    query, x = _rows(q, batch, head, token, real, L, H, K), _rows(k, batch, head, token, real, L, H, K)
    value, y = _rows(v, batch, head, token, real, L, H, K), _rows(standard, batch, head, token, real, L, H, K)
    du, dread = _rows(derrors, batch, head, token, real, L, H, K), _rows(dreads, batch, head, token, real, L, H, K)
    return query, x, value, y, du, dread


@triton.jit(do_not_specialize=["L", "N", "G"])
def scan_gradient(
    q, k, v, sizes, gammas, betas, first, group, fresh, standard, numbers, derrors, dreads,
    dinit, dstart, dkept, dbiases, dback, dv, dsteps, dlast_c, dgammas, dbetas,
    L, H, N, G, C: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Backwards, with dinit [B H, P] in and out the gradient by the weights; dstart [B H, P] comes in as zeros. What
    stands at the end of each span is left in dkept [B H, G, K, K] and dbiases [B H, G, K], and the gradient by z of
    every token's error in dback [B, L, H, K]. dv and dsteps; dlast_c [B H], dgammas and dbetas [B H, K].
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head, P = row // H, row % H, K * K + K
    TYPE: tl.constexpr = k.dtype.element_ty
    key = tl.arange(0, K)
    matrix, bias = key[None, :] * K + key[:, None], K * K + key[:, None]
    beta_row = tl.load(betas + head * K + key)[None, :]
    gamma = tl.load(gammas + head * K + key[:, None])
    curve = gamma * gamma
    slope, last_c = tl.sum(curve) / K, tl.load(sizes + C - 1)
    before, opens = tl.arange(0, C), tl.load(first + batch * (N + 1))
    no_gradients(dv, opens, batch, head, L, H, C, K)
    tl.store(dsteps + (batch * L + before) * H + head, tl.zeros([C], tl.float32), mask=before < opens)
    here, opening = dinit + row * P, dstart + row * P
    D, d = tl.load(here + matrix), tl.load(here + bias)
    dgamma, dbeta, shared = tl.zeros_like(d), tl.zeros_like(d), tl.zeros_like(d)
    end, span = tl.load(group + batch * (G + 1) + G), -1
    m = tl.maximum(end - 1, 0)
    begin, length, token, real, new = mini_batch(first, fresh, batch, m, N, C, DOCUMENTS)
    query, x, value, y_row, du, dread = _gradient_inputs(
        q, k, v, standard, derrors, dreads, batch, head, token, real, L, H, K
    )
    for i in tl.range(0, end, disable_licm=True):
        scale, step = _two(numbers, row, at.SCALE, at.STEP, token, real, L)
        cross, bent = _two(numbers, row, at.CROSS, at.BENT, token, real, L)
        level, turn = _two(numbers, row, at.LEVEL, at.TURN, token, real, L)
        if begin // SPAN != span:
            span = begin // SPAN
            tl.store(dkept + (row * G + span) * (K * K) + matrix, D.to(TYPE))
            tl.store(dbiases + (row * G + span) * K + key[:, None], d)
        m = tl.maximum(end - 2 - i, 0)
        next_begin, next_length, next_token, next_real, next_new = mini_batch(first, fresh, batch, m, N, C, DOCUMENTS)
        next_query, next_x, next_value, next_y, next_du, next_dread = _gradient_inputs(
            q, k, v, standard, derrors, dreads, batch, head, next_token, next_real, L, H, K
        )

        full = tl.where(length == C, 1.0, 0.0)
        moved = full * (dot(D, tl.trans(x), TYPE) + d)
        # with a zero that lies as the product does these are laid out so once, and all that they go into with them
        zero = tl.minimum(tl.abs(moved), 0.0)
        y, pull = _turned(y_row) + zero, tl.trans(beta_row - value.to(tl.float32) + x.to(tl.float32)) + zero
        g = curve * y + gamma * pull
        h, p = g + curve * y, _turned(du) - last_c * moved
        sums = tl.reduce((p, p * y, p * h, curve * p, curve * p * y), 0, _add5, keep_dims=True)
        mean, by_y, by_h, by_curve, by_both = sums
        mean, by_y = mean / K, by_y / K
        by_h = by_h / K - level * mean - turn * by_y
        p -= mean
        dz = (curve - cross) * p - (by_curve / K - mean * slope) - (h - level - turn * y) * by_y - y * by_h
        dz = step * dz
        tl.store(tokens(dback, batch, head, token, L, H, K), tl.trans(dz.to(TYPE)), mask=real[:, None])
        D = add_dot(dz, x, D, TYPE)
        D = add_dot(tl.trans(dread), query, D, TYPE)
        d += tl.sum(dz + _turned(dread), 1, keep_dims=True)

        step = tl.where(real[None, :], step / scale, 0.0)  # eta s
        shared += tl.sum(step * moved * (g - (level - bent) - y * cross), 1, keep_dims=True)
        deta = scale * (K * (by_h + (turn - cross) * by_y + mean * bent) - by_both)
        tl.store(dsteps + (batch * L + token[None, :]) * H + head, deta, mask=real[None, :])
        dg = step * (p - y * by_y)
        tl.store(tokens(dv, batch, head, token, L, H, K), tl.trans((-gamma * dg).to(TYPE)), mask=real[:, None])
        dgamma += tl.sum(dg * (2 * gamma * y + pull), 1, keep_dims=True)
        dbeta += tl.sum(dg, 1, keep_dims=True)
        if DOCUMENTS:  # noqa: SIM102, both sides of an `and` are compiled
            if new:  # what comes before is another document
                tl.store(opening + matrix, tl.load(opening + matrix) + D)
                tl.store(opening + bias, tl.load(opening + bias) + d)
                D, d = tl.zeros_like(D), tl.zeros_like(d)
        begin, length, token, real, new = next_begin, next_length, next_token, next_real, next_new
        query, x, value, y_row, du, dread = next_query, next_x, next_value, next_y, next_du, next_dread
    tl.store(here + matrix, D)
    tl.store(here + bias, d)
    tl.store(dlast_c + row, -tl.sum(shared))
    tl.store(dgammas + row * K + key[:, None], dgamma)
    tl.store(dbetas + row * K + key[:, None], gamma * dbeta)
