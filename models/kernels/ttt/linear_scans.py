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
from models.kernels.ttt.linear_tiles import batch_at, lay_out, no_gradients, number_at
from models.kernels.ttt.parts import EPS, add_dot, dot


@triton.jit
def _add5(a, b, c, d, e, a1, b1, c1, d1, e1):
    return a + a1, b + b1, c + c1, d + d1, e + e1


@triton.jit
def _add6(a, b, c, d, e, f, a1, b1, c1, d1, e1, f1):
    return a + a1, b + b1, c + c1, d + d1, e + e1, f + f1


@triton.jit
def _at(t, H, K: tl.constexpr):
    """How far the rows of tokens t lie behind token 0: 32 bits, of a mini-batch."""
    return (t * (H * K))[:, None] + tl.arange(0, K)[None, :]


@triton.jit
def _rows(x, origin, length, H, K: tl.constexpr, C: tl.constexpr):
    """The rows [C, K] of a mini-batch of x [B, L, H, K], which begins at row `origin` of [B L H, K]."""
    place = tl.arange(0, C)
    return tl.load(x + origin * K + _at(place, H, K), mask=(place < length)[:, None], other=0.0)


@triton.jit
def _one(TYPE: tl.constexpr, C: tl.constexpr):
    return tl.where(tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :], 1.0, 0.0).to(TYPE)


@triton.jit
def _turned(x, one):
    """x' [K, C] of rows x [C, K], as the product with ones: it lies as products do, without a barrier. Of float32 the
    product would be TF32's.
    """
    if x.dtype == tl.float32:
        return tl.trans(x)
    return tl.dot(tl.trans(x), one)


@triton.jit
def _stacked(a, b, c, d, origin, length, H, K: tl.constexpr, C: tl.constexpr):
    """The rows [4 C, K] of a mini-batch of four tensors, one below the other."""
    t, start = tl.arange(0, 4 * C), origin * K
    first = tl.where(t < 2 * C, tl.where(t < C, a + start, b + start), tl.where(t < 3 * C, c + start, d + start))
    return tl.load(first[:, None] + _at(t % C, H, K), mask=(t % C < length)[:, None], other=0.0)


@triton.jit
def _turned_each(x, one, K: tl.constexpr, C: tl.constexpr):
    """The four tiles [K, C] of rows [4 C, K]."""
    columns = tl.permute(tl.reshape(_turned(x, one), [K, 2, 2, C]), [0, 3, 1, 2])
    even, odd = tl.split(columns)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _store_both(a, b, x, y, origin, length, H, K: tl.constexpr, C: tl.constexpr):
    """Stores tiles [K, C] as rows, x in a and y in b: laid out so together, which are barriers."""
    t, start = tl.arange(0, 2 * C), origin * K
    rows = tl.reshape(tl.permute(tl.join(x, y), [2, 1, 0]), [2 * C, K])
    first = tl.where(t < C, a + start, b + start)
    tl.store(first[:, None] + _at(t % C, H, K), rows, mask=(t % C < length)[:, None])


@triton.jit
def _fold(x, K: tl.constexpr, C: tl.constexpr):
    """Sums [K, 4] of what one thread has of a product's result [K, C]."""
    return tl.sum(tl.sum(tl.reshape(x, [K, C // 8, 4, 2]), 3), 1)


@triton.jit
def _pairs(k, v, steps, origin, length, H, K: tl.constexpr, C: tl.constexpr):
    place = tl.arange(0, C)
    x, value = _rows(k, origin, length, H, K, C), _rows(v, origin, length, H, K, C)
    return x, value, tl.load(steps + origin + place * H, mask=place < length, other=0.0)


@triton.jit(do_not_specialize=["L", "G"])
def scan(
    k, v, steps, sizes, start, gammas, betas, init, position,
    last, kept, biases, errors, standard, numbers, begins, edges, counts,
    L, H, G, C: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, DOCUMENTS: tl.constexpr, AHEAD: tl.constexpr,
    STACK: tl.constexpr,
):  # fmt: skip
    """From init [B H, P], or if there is none from start [H, P]: last [B H, P]; of every token u and y, errors and
    standard [B, L, H, K], and numbers [B H, 6, L]; and what stands before the first mini-batch of each span, kept [B H,
    G, K, K] and, in float32, biases [B H, G, K]. Of each row begins [B, L + 1] as lay_out leaves them, the spans' edges
    [B, G + 1], where each begins and the last one ends, L beyond; and counts [B, 2], of mini-batches and of spans.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head, P = row // H, row % H, K * K + K
    TYPE: tl.constexpr = k.dtype.element_ty
    key = tl.arange(0, K)
    matrix, bias = key[None, :] * K + key[:, None], K * K + key[:, None]
    which, place = tl.arange(0, 8)[:, None], tl.arange(0, C)[None, :]
    gamma, beta = tl.load(gammas + head * K + key[:, None]), tl.load(betas + head * K + key[:, None])
    one = _one(TYPE, C)
    if STACK:
        t = tl.arange(0, 2 * C)
        signs = tl.where((t % C)[:, None] == tl.arange(0, C)[None, :], tl.where(t < C, 1.0, -1.0)[:, None], 0.0).to(
            TYPE
        )
    curve = gamma * gamma
    slope, last_c = tl.sum(curve) / K, tl.load(sizes + C - 1)
    opening, once, first = start + head * P, head == 0, batch * L * H + head
    begins, edges = begins + batch * (L + 1), edges + batch * (G + 1)
    opens, count = lay_out(position + batch * L, begins, L, C, DOCUMENTS)  # all heads of a row write the same
    if init is None:
        W, b = tl.load(opening + matrix), tl.load(opening + bias)
    else:
        init += row * P
        if DOCUMENTS:
            init = tl.where(tl.load(begins) % 2 > 0, opening, init)
        W, b = tl.load(init + matrix), tl.load(init + bias)
    span, span_begin = 0, opens
    tl.store(edges, opens, mask=once)
    if count > 0:
        tl.store(kept + row * G * (K * K) + matrix, W.to(TYPE))
        tl.store(biases + row * G * K + key[:, None], b)
    if AHEAD:
        begin, end, _ = batch_at(begins, opens, 0, L, C, DOCUMENTS)
        x, value, eta = _pairs(k, v, steps, first + begin * H, end - begin, H, K, C)
    for n in tl.range(0, count, disable_licm=True):
        m = tl.minimum(n + 1, count - 1)
        next_begin, next_end, next_new = batch_at(begins, opens, m, L, C, DOCUMENTS)
        if AHEAD:
            next_x, next_value, next_eta = _pairs(k, v, steps, first + next_begin * H, next_end - next_begin, H, K, C)
        else:
            begin, end, _ = batch_at(begins, opens, n, L, C, DOCUMENTS)
            x, value, eta = _pairs(k, v, steps, first + begin * H, end - begin, H, K, C)
            if STACK:
                t = tl.arange(0, 2 * C)
                both = tl.where(t < C, k + (first + begin * H) * K, v + (first + begin * H) * K)[:, None]
                stack = tl.load(both + _at(t % C, H, K), mask=(t % C < end - begin)[:, None], other=0.0)

        if STACK:
            pull = gamma * (beta + tl.dot(tl.trans(stack), signs))
        else:
            pull = gamma * (beta + (_turned(x, one) - _turned(value, one)))
        z = dot(W, tl.trans(x), TYPE) + b
        bent = curve * z
        means = tl.reduce((z, z * z, bent, bent * z, pull * z, pull), 0, _add6, keep_dims=True)
        mean, square, linear, quadratic, cross, rest = means
        mean, rest = mean / K, rest / K
        scale = tl.rsqrt(tl.maximum(square / K - mean * mean, 0.0) + EPS)
        linear, y = linear / K - mean * slope, scale * (z - mean)  # <gamma^2 (z - mean)>
        quadratic = scale * (quadratic / K - mean * (2 * linear + mean * slope))
        cross = scale * (quadratic + cross / K - mean * rest)  # <g y>
        bent = scale * linear
        u = (eta[None, :] * scale) * (curve * y + pull - (bent + rest) - y * cross)
        found = tl.where(which == at.SCALE, scale, eta[None, :] * scale)
        found = tl.where(which == at.CROSS, cross, found)
        found = tl.where(which == at.BENT, bent, found)
        found = tl.where(which == at.REST, rest, found)
        found = tl.where(which == at.TURN, 0.5 * scale * quadratic + 1.5 * cross, found)
        step = tl.where(end - begin == C, -last_c, 0.0) * u
        W = add_dot(step, x, W, TYPE)
        rounded = W.to(TYPE)  # here, since for what conditions alone want of a product Triton does not wait
        b += tl.sum(step, 1, keep_dims=True)
        _store_both(errors, standard, u.to(TYPE), y.to(TYPE), first + begin * H, end - begin, H, K, C)
        number = number_at(numbers, row, begin, L) + which * L + place
        tl.store(number, found, mask=(place < end - begin) & (which < at.NUMBERS))
        # before a document's own weights come in: after that Triton turns W around for this store in every mini-batch
        if (next_end > span_begin + TILE) & (n + 1 < count):
            span, span_begin = span + 1, next_begin
            tl.store(edges + span, next_begin, mask=once)
            tl.store(kept + (row * G + span) * (K * K) + matrix, rounded)
            tl.store(biases + (row * G + span) * K + key[:, None], b)
        if DOCUMENTS:  # noqa: SIM102, both sides of an `and` are compiled
            if next_new & (n + 1 < count):
                W, b = tl.load(opening + matrix), tl.load(opening + bias)
        if AHEAD:
            begin, end, x, value, eta = next_begin, next_end, next_x, next_value, next_eta
    tl.store(last + row * P + matrix, W)
    tl.store(last + row * P + bias, b)
    for g in range(span + 1, G + 1):
        tl.store(edges + g, L, mask=once)
    tl.store(counts + 2 * batch, count, mask=once)
    tl.store(counts + 2 * batch + 1, tl.where(count > 0, span + 1, 0), mask=once)


@triton.jit
def _number(number, which: tl.constexpr, length, L, C: tl.constexpr):
    place = tl.arange(0, C)
    return tl.load(number + which * L + place, mask=place < length, other=0.0)[None, :]


@triton.jit
def _gradient_inputs(q, k, v, standard, derrors, dreads, origin, length, H, K: tl.constexpr, C: tl.constexpr):
    query, x = _rows(q, origin, length, H, K, C), _rows(k, origin, length, H, K, C)
    value, y = _rows(v, origin, length, H, K, C), _rows(standard, origin, length, H, K, C)
    return query, x, value, y, _rows(derrors, origin, length, H, K, C), _rows(dreads, origin, length, H, K, C)


@triton.jit(do_not_specialize=["L", "G"])
def scan_gradient(
    q, k, v, sizes, gammas, betas, begins, edges, counts, standard, numbers, derrors, dreads,
    dlast, dinit, dstart, dkept, dback, dv, dsteps, shared,
    L, H, G, C: tl.constexpr, K: tl.constexpr, DOCUMENTS: tl.constexpr, AHEAD: tl.constexpr, STACK: tl.constexpr,
):  # fmt: skip
    """Backwards, from the gradient by the last weights dlast [B H, P], or None, to those by the first, dinit [B H, P],
    or None where these were start, and by start, dstart [B H, P]. What stands at the end of each span is left in dkept
    [B H, G, K, K], and the gradient by z of every token's error in dback [B, L, H, K]. dv and dsteps; and those by
    sizes, gamma and beta in the last of shared [B H, G + 1, C + 2 K].
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head, P = row // H, row % H, K * K + K
    TYPE: tl.constexpr = k.dtype.element_ty
    key = tl.arange(0, K)
    matrix, bias = key[None, :] * K + key[:, None], K * K + key[:, None]
    gamma, beta = tl.load(gammas + head * K + key[:, None]), tl.load(betas + head * K + key[:, None])
    one, ones = _one(TYPE, C), _one(TYPE, 4 * C)
    curve = gamma * gamma
    slope, last_c = tl.sum(curve) / K, tl.load(sizes + C - 1)
    begins, edges = begins + batch * (L + 1), edges + batch * (G + 1)
    place, opens = tl.arange(0, C), tl.load(edges)
    no_gradients(dv, opens, batch, head, L, H, C, K)
    tl.store(dsteps + (batch * L + place) * H + head, tl.zeros([C], tl.float32), mask=place < opens)
    opening, opened, first = dstart + row * P, 0, batch * L * H + head
    D, d = tl.zeros([K, K], tl.float32), tl.zeros([K, 1], tl.float32)
    if dlast is not None:
        D, d = tl.load(dlast + row * P + matrix), tl.load(dlast + row * P + bias)
    dgamma, dbeta, by_last_c = tl.zeros([K, 4], tl.float32), tl.zeros([K, 4], tl.float32), tl.zeros([K, 4], tl.float32)
    count, span, edge = tl.load(counts + 2 * batch), tl.load(counts + 2 * batch + 1), L
    if AHEAD:
        begin, end, new = batch_at(begins, opens, tl.maximum(count - 1, 0), L, C, DOCUMENTS)
        query, x, value, y_row, du, dread = _gradient_inputs(
            q, k, v, standard, derrors, dreads, first + begin * H, end - begin, H, K, C
        )
    for i in tl.range(0, count, disable_licm=True):
        if AHEAD:
            next_begin, next_end, next_new = batch_at(begins, opens, tl.maximum(count - 2 - i, 0), L, C, DOCUMENTS)
        else:
            begin, end, new = batch_at(begins, opens, count - 1 - i, L, C, DOCUMENTS)
        origin, length, number = first + begin * H, end - begin, number_at(numbers, row, begin, L)
        scale, eta_s = _number(number, at.SCALE, length, L, C), _number(number, at.STEP, length, L, C)
        cross, turn = _number(number, at.CROSS, length, L, C), _number(number, at.TURN, length, L, C)
        bent, rest = _number(number, at.BENT, length, L, C), _number(number, at.REST, length, L, C)
        level = 2 * bent + rest
        if end == edge:
            span -= 1
            edge = tl.load(edges + span)
            tl.store(dkept + (row * G + span) * (K * K) + matrix, D.to(TYPE))
        if AHEAD:
            next_query, next_x, next_value, next_y, next_du, next_dread = _gradient_inputs(
                q, k, v, standard, derrors, dreads, first + next_begin * H, next_end - next_begin, H, K, C
            )
        elif STACK:
            query, x = _rows(q, origin, length, H, K, C), _rows(k, origin, length, H, K, C)
            stack = _stacked(standard, derrors, dreads, v, origin, length, H, K, C)
        else:
            query, x, value, y_row, du, dread = _gradient_inputs(
                q, k, v, standard, derrors, dreads, origin, length, H, K, C
            )

        full = tl.where(length == C, 1.0, 0.0)
        moved = full * (dot(D, tl.trans(x), TYPE) + d)
        if STACK:
            y, p, read, target = _turned_each(stack, ones, K, C)
        else:
            y, p, read, target = _turned(y_row, one), _turned(du, one), _turned(dread, one), _turned(value, one)
        pull = beta + (_turned(x, one) - target)
        g = curve * y + gamma * pull
        h, p = g + curve * y, p - last_c * moved
        sums = tl.reduce((p, p * y, p * h, curve * p, curve * p * y), 0, _add5, keep_dims=True)
        mean, by_y, by_h, by_curve, by_both = sums
        mean, by_y = mean / K, by_y / K
        by_h = by_h / K - level * mean - turn * by_y
        p -= mean
        dz = (curve - cross) * p - (by_curve / K - mean * slope) - (h - level - turn * y) * by_y - y * by_h
        dz = eta_s * scale * dz
        D = add_dot(read, query, add_dot(dz, x, D, TYPE), TYPE)
        d += tl.sum(dz + read, 1, keep_dims=True)

        by_last_c += _fold(eta_s * moved * (g - (bent + rest) - y * cross), K, C)
        deta = scale * (K * (by_h + (turn - cross) * by_y + mean * bent) - by_both)
        tl.store(dsteps + origin + (place * H)[None, :], deta, mask=(place < length)[None, :])
        dg = eta_s * (p - y * by_y)
        _store_both(dback, dv, dz.to(TYPE), (-gamma * dg).to(TYPE), origin, length, H, K, C)
        dgamma += _fold(dg * (2 * gamma * y + pull), K, C)
        dbeta += _fold(dg, K, C)
        if DOCUMENTS:  # noqa: SIM102, both sides of an `and` are compiled
            if new:  # what comes before is another document
                before = opened > 0
                tl.store(opening + matrix, tl.load(opening + matrix, mask=before, other=0.0) + D)
                tl.store(opening + bias, tl.load(opening + bias, mask=before, other=0.0) + d)
                D, d, opened = tl.zeros_like(D), tl.zeros_like(d), 1
        if AHEAD:
            begin, end, new = next_begin, next_end, next_new
            query, x, value, y_row, du, dread = next_query, next_x, next_value, next_y, next_du, next_dread
    if dinit is not None:
        tl.store(dinit + row * P + matrix, D)
        tl.store(dinit + row * P + bias, d)
        D, d = tl.zeros_like(D), tl.zeros_like(d)
    before = opened > 0
    tl.store(opening + matrix, tl.load(opening + matrix, mask=before, other=0.0) + D)
    tl.store(opening + bias, tl.load(opening + bias, mask=before, other=0.0) + d)
    shared += (row * (G + 1) + G) * (C + 2 * K)
    tl.store(shared + place, tl.where(place == C - 1, -tl.sum(by_last_c), 0.0))
    tl.store(shared + C + key, tl.sum(dgamma, 1))
    tl.store(shared + C + K + key[:, None], gamma * tl.sum(dbeta, 1, keep_dims=True))
