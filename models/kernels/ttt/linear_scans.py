"""The two scans of TTT-Linear: one program a head of a sequence, mini-batch by mini-batch, with what waits for the
mini-batch before and nothing else.

The weights stay in registers, transposed, [values, keys], so that they go into a product of warp groups from where they
are, and so do the errors, [values, tokens]. All means along the values are sums of one reduction a mini-batch, which is
a barrier, and norms and their gradients are polynomials of them.

A loop goes over the mini-batches of one document. So it knows where the next ones lie, whose inputs come from memory to
shared memory by themselves, and no condition in it brings other weights in, which would then be held twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.ttt import linear_tiles as at
from models.kernels.ttt.linear_tiles import lay_out, no_gradients, number_at
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


@triton.jit
def _goes_on(position, opens, L):
    """Whether the first mini-batch goes on with what the call has begun with."""
    return (opens == 0) | (tl.load(position + opens, mask=opens < L, other=1) > 0)


@triton.jit
def _keep(kept, biases, edges, weights, b, span, begin, once, matrix, K: tl.constexpr):
    """Leaves what stands where a span begins. kept, biases: of the head."""
    tl.store(edges + span, begin, mask=once)
    tl.store(kept + span * (K * K) + matrix, weights)
    tl.store(biases + span * K + tl.arange(0, K)[:, None], b)


@triton.jit(do_not_specialize=["L", "G"])
def scan(
    k, v, steps, sizes, start, gammas, betas, init, position,
    last, kept, biases, errors, standard, numbers, starts, edges, counts,
    L, H, G, C: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """From init [B H, P], or if there is none from start [H, P]: last [B H, P]; of every token u and y, errors and
    standard [B, L, H, K], and numbers [B H, 6, L]; and what stands before the first mini-batch of each span, kept [B H,
    G, K, K] and, in float32, biases [B H, G, K]. Of each row starts [B, L + 1] as lay_out leaves them, the spans' edges
    [B, G + 1], where each begins and the last one ends, L beyond; and counts [B, 2], of documents and of spans.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head, P = row // H, row % H, K * K + K
    TYPE: tl.constexpr = k.dtype.element_ty
    key = tl.arange(0, K)
    matrix, bias = key[None, :] * K + key[:, None], K * K + key[:, None]
    which, place = tl.arange(0, 8)[:, None], tl.arange(0, C)[None, :]
    gamma, beta = tl.load(gammas + head * K + key[:, None]), tl.load(betas + head * K + key[:, None])
    one = _one(TYPE, C)
    curve = gamma * gamma
    slope, last_c = tl.sum(curve) / K, tl.load(sizes + C - 1)
    opening, once, first = start + head * P, head == 0, batch * L * H + head
    position, starts, edges = position + batch * L, starts + batch * (L + 1), edges + batch * (G + 1)
    opens, num = lay_out(position, starts, L, C, DOCUMENTS)  # all heads of a row write the same
    source = opening
    if init is not None:
        source = tl.where(_goes_on(position, opens, L), init + row * P, opening)
    W, b = tl.load(source + matrix), tl.load(source + bias)
    span, span_begin = -1, -L - TILE
    kept, biases = kept + row * G * (K * K), biases + row * G * K
    for document in range(0, num):
        begin, stop = tl.load(starts + document), tl.load(starts + document + 1)
        if document > 0:
            W, b = tl.load(opening + matrix), tl.load(opening + bias)
        if tl.minimum(begin + C, stop) > span_begin + TILE:
            span, span_begin = span + 1, begin
            _keep(kept, biases, edges, W.to(TYPE), b, span, begin, once, matrix, K)
        for n in tl.range(0, (stop - begin + C - 1) // C, disable_licm=True):
            here = begin + n * C
            origin, length, after = first + here * H, tl.minimum(stop - here, C), here + C
            x, value, eta = _pairs(k, v, steps, origin, length, H, K, C)

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
            step = tl.where(length == C, -last_c, 0.0) * u
            W = add_dot(step, x, W, TYPE)
            rounded = W.to(TYPE)  # here, since for what conditions alone want of a product Triton does not wait
            b += tl.sum(step, 1, keep_dims=True)
            _store_both(errors, standard, u.to(TYPE), y.to(TYPE), origin, length, H, K, C)
            number = number_at(numbers, row, here, L) + which * L + place
            tl.store(number, found, mask=(place < length) & (which < at.NUMBERS))
            if (after < stop) & (tl.minimum(after + C, stop) > span_begin + TILE):
                span, span_begin = span + 1, after
                _keep(kept, biases, edges, rounded, b, span, after, once, matrix, K)
    tl.store(last + row * P + matrix, W)
    tl.store(last + row * P + bias, b)
    for g in range(span + 1, G + 1):
        tl.store(edges + g, L, mask=once)
    tl.store(counts + 2 * batch, num, mask=once)
    tl.store(counts + 2 * batch + 1, span + 1, mask=once)


@triton.jit
def _number(number, which: tl.constexpr, length, L, C: tl.constexpr):
    place = tl.arange(0, C)
    return tl.load(number + which * L + place, mask=place < length, other=0.0)[None, :]


@triton.jit
def _span_before(dkept, edges, weights, span, edge, matrix, K: tl.constexpr):
    """Leaves the gradient by what stands at the end of a span, the one before `span`, which begins at `edge`. dkept: of
    the head. The span and its edge; and the one before that, on its way before it is wanted."""
    tl.store(dkept + (span - 1) * (K * K) + matrix, weights)
    return span - 1, edge, tl.load(edges + tl.maximum(span - 2, 0))


@triton.jit(do_not_specialize=["L", "G"])
def scan_gradient(
    q, k, v, sizes, gammas, betas, position, starts, edges, counts, standard, numbers, derrors, dreads,
    dlast, dinit, dstart, dkept, dback, dv, dsteps, shared,
    L, H, G, C: tl.constexpr, K: tl.constexpr,
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
    one = _one(TYPE, C)
    curve = gamma * gamma
    slope, last_c = tl.sum(curve) / K, tl.load(sizes + C - 1)
    starts, edges = starts + batch * (L + 1), edges + batch * (G + 1)
    place, opens = tl.arange(0, C), tl.load(edges)
    no_gradients(dv, opens, batch, head, L, H, C, K)
    tl.store(dsteps + (batch * L + place) * H + head, tl.zeros([C], tl.float32), mask=place < opens)
    opening, first = dstart + row * P, batch * L * H + head
    D, d = tl.zeros([K, K], tl.float32), tl.zeros([K, 1], tl.float32)
    if dlast is not None:
        D, d = tl.load(dlast + row * P + matrix), tl.load(dlast + row * P + bias)
    dgamma, dbeta, by_last_c = tl.zeros([K, 4], tl.float32), tl.zeros([K, 4], tl.float32), tl.zeros([K, 4], tl.float32)
    num, span = tl.load(counts + 2 * batch), tl.load(counts + 2 * batch + 1)
    dkept += row * G * (K * K)
    carried = 0
    if dinit is not None:
        carried = _goes_on(position + batch * L, opens, L).to(tl.int32)
    edge, next_edge = L, tl.load(edges + tl.maximum(span - 1, 0))
    for document in range(0, num):
        at_start = starts + num - 1 - document
        begin, stop = tl.load(at_start), tl.load(at_start + 1)
        batches = (stop - begin + C - 1) // C
        if stop == edge:
            span, edge, next_edge = _span_before(dkept, edges, D.to(TYPE), span, next_edge, matrix, K)
        for n in tl.range(0, batches, disable_licm=True):
            here = begin + (batches - 1 - n) * C
            origin, length, number = first + here * H, tl.minimum(stop - here, C), number_at(numbers, row, here, L)
            scale, eta_s = _number(number, at.SCALE, length, L, C), _number(number, at.STEP, length, L, C)
            cross, turn = _number(number, at.CROSS, length, L, C), _number(number, at.TURN, length, L, C)
            bent, rest = _number(number, at.BENT, length, L, C), _number(number, at.REST, length, L, C)
            query, x, value = (
                _rows(q, origin, length, H, K, C),
                _rows(k, origin, length, H, K, C),
                _rows(v, origin, length, H, K, C),
            )
            y_row, du = (_rows(standard, origin, length, H, K, C), _rows(derrors, origin, length, H, K, C))
            dread, level = _rows(dreads, origin, length, H, K, C), 2 * bent + rest

            full = tl.where(length == C, 1.0, 0.0)
            moved = full * (dot(D, tl.trans(x), TYPE) + d)
            y, p, read = _turned(y_row, one), _turned(du, one), _turned(dread, one)
            pull = beta + (_turned(x, one) - _turned(value, one))
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
            rounded = D.to(TYPE)
            d += tl.sum(dz + read, 1, keep_dims=True)

            by_last_c += _fold(eta_s * moved * (g - (bent + rest) - y * cross), K, C)
            deta = scale * (K * (by_h + (turn - cross) * by_y + mean * bent) - by_both)
            tl.store(dsteps + origin + (place * H)[None, :], deta, mask=(place < length)[None, :])
            dg = eta_s * (p - y * by_y)
            _store_both(dback, dv, dz.to(TYPE), (-gamma * dg).to(TYPE), origin, length, H, K, C)
            dgamma += _fold(dg * (2 * gamma * y + pull), K, C)
            dbeta += _fold(dg, K, C)
            if (here == edge) & (here > begin):
                span, edge, next_edge = _span_before(dkept, edges, rounded, span, next_edge, matrix, K)
        if (document + 1 < num) | (carried == 0):  # what comes before is another document
            before = document > 0
            tl.store(opening + matrix, tl.load(opening + matrix, mask=before, other=0.0) + D)
            tl.store(opening + bias, tl.load(opening + bias, mask=before, other=0.0) + d)
            D, d = tl.zeros_like(D), tl.zeros_like(d)
    if dinit is not None:
        tl.store(dinit + row * P + matrix, D)
        tl.store(dinit + row * P + bias, d)
        if num <= carried:  # none has begun with start
            tl.store(opening + matrix, tl.zeros_like(D))
            tl.store(opening + bias, tl.zeros_like(d))
    shared += (row * (G + 1) + G) * (C + 2 * K)
    tl.store(shared + place, tl.where(place == C - 1, -tl.sum(by_last_c), 0.0))
    tl.store(shared + C + key, tl.sum(dgamma, 1))
    tl.store(shared + C + K + key[:, None], gamma * tl.sum(dbeta, 1, keep_dims=True))
