"""What waits for no other span of TTT-Linear once a scan has been there: one program a span of a head of a sequence.

Products and names are those of linear_tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.ttt.linear_tiles import (
    carried_on,
    layer,
    no_gradients,
    part,
    rows,
    scores_of,
    shares,
    span_tokens,
)  # fmt: skip
from models.kernels.ttt.parts import dot, project, standardise, tokens


@triton.jit
def _store(x, value, batch, head, token, real, L, H, K: tl.constexpr):
    tl.store(tokens(x, batch, head, token, L, H, K), value.to(x.dtype.element_ty), mask=real[:, None])


@triton.jit
def _rows(x, batch, head, token, real, L, H, K: tl.constexpr):
    return tl.load(tokens(x, batch, head, token, L, H, K), mask=real[:, None], other=0.0)


@triton.jit
def _store_part(x, value, batch, head, token, real, j, L, H, K: tl.constexpr, PART: tl.constexpr):
    at = ((batch * L + token) * H + head)[:, None] * K + j + tl.arange(0, PART)[None, :]
    tl.store(x + at, value.to(x.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["L", "G"])
def read(
    q, k, sizes, gammas, betas, edges, position, opening, start, kept, biases, errors,
    o, standard, scales,
    L, H, G, C: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """opening and start [H, P]: what a document begins with, the first in the type of q. Beside o, y and s of the
    queries.
    """
    g, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head, key = row // H, row % H, tl.arange(0, K)
    TYPE: tl.constexpr = q.dtype.element_ty
    begin, end, token, real, place, batch_of, document_of = span_tokens(edges, position, batch, g, G, L, C, TILE)
    if begin == end:
        return
    # on its way before the products that it is not for
    u = _rows(errors, batch, head, token, real, L, H, K)
    carried, others = carried_on(begin, real, document_of)
    gamma, beta = tl.load(gammas + head * K + key)[None, :], tl.load(betas + head * K + key)[None, :]
    slot, opening, opening_bias = row * G + g, opening + head * (K * K + K), start + head * (K * K + K) + K * K
    c = shares(token, batch_of, document_of, tl.load(sizes + place), tl.load(sizes + C - 1))
    z, scores = layer(
        q, k, kept + slot * (K * K), biases + slot * K, opening, opening_bias, carried, others, batch, head, token,
        real, L, H, TILE, K, PART, DOCUMENTS,
    )  # fmt: skip
    y, scale = standardise(z - dot(c * scores, u, TYPE), K)
    tl.store(scales + row * L + token[:, None], scale, mask=real[:, None])
    _store(standard, y, batch, head, token, real, L, H, K)
    query = _rows(q, batch, head, token, real, L, H, K)
    _store(o, query + gamma * y + beta, batch, head, token, real, L, H, K)


@triton.jit(do_not_specialize=["L", "G"])
def read_gradient(
    q, k, sizes, gammas, edges, position, opening, kept, errors, standard, scales, do,
    dq, shared, derrors, dreads,
    L, H, G, C: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """dq, and the gradients by u and z because of queries; in shared [B H, G + 1, C + 2 K], of each span, those by
    sizes, gamma and beta, zeros of a span without tokens.
    """
    g, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head, key = row // H, row % H, tl.arange(0, K)
    TYPE: tl.constexpr = q.dtype.element_ty
    if g == 0:
        no_gradients(dq, tl.load(edges + batch * (G + 1)), batch, head, L, H, C, K)
    begin, end, token, real, place, batch_of, document_of = span_tokens(edges, position, batch, g, G, L, C, TILE)
    shared += (row * (G + 1) + g) * (C + 2 * K)
    if begin == end:
        tl.store(shared + tl.arange(0, C), tl.zeros([C], tl.float32))
        tl.store(shared + C + tl.arange(0, 2 * K), tl.zeros([2 * K], tl.float32))
        return
    # on their way before the products that they are not for
    y, dout = (_rows(standard, batch, head, token, real, L, H, K), _rows(do, batch, head, token, real, L, H, K))
    u, scale = _rows(errors, batch, head, token, real, L, H, K), tl.load(scales + row * L + token, mask=real, other=0.0)
    carried, others = carried_on(begin, real, document_of)
    gamma = tl.load(gammas + head * K + key)[None, :]
    kept, opening = kept + (row * G + g) * (K * K), opening + head * (K * K + K)
    y, dout = y.to(tl.float32), dout.to(tl.float32)
    tl.store(shared + C + key, tl.sum(dout * y, 0))
    tl.store(shared + C + K + key, tl.sum(dout, 0))
    dz = project(dout * gamma, y, scale[:, None], K).to(TYPE)
    _store(dreads, dz, batch, head, token, real, L, H, K)
    pulls = tl.dot(dz, tl.trans(u))
    A = scores_of(q, k, batch, head, token, real, L, H, TILE, K, PART)
    c = shares(token, batch_of, document_of, tl.load(sizes + place), tl.load(sizes + C - 1))
    same = (batch_of[:, None] == batch_of[None, :]) & (token[:, None] >= token[None, :])
    dc = tl.sum(tl.where(same, A * pulls, 0.0), 1)
    each = tl.arange(0, C)
    tl.store(shared + each, -tl.sum(tl.where(place[:, None] == each[None, :], dc[:, None], 0.0), 0))
    du = dot(tl.trans(tl.where(same, -c * A, 0.0)), dz, TYPE)
    _store(derrors, du, batch, head, token, real, L, H, K)
    pulls = (c * pulls).to(TYPE)
    mine = real
    if DOCUMENTS:
        mine = real & carried
    _query_gradient(dq, dz, pulls, kept, k, do, batch, head, token, real, mine, L, H, K, PART)
    if DOCUMENTS:  # noqa: SIM102, both sides of an `and` are compiled
        if others:
            mine = real & (carried == 0)
            _query_gradient(dq, dz, pulls, opening, k, do, batch, head, token, real, mine, L, H, K, PART)


@triton.jit
def _query_gradient(
    dq, dz, pulls, weights, k, do, batch, head, token, real, mine, L, H, K: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """dz W' - pulls k + do of those tokens that are mine. A product under a condition inside this loop was wrong."""
    for j in tl.range(0, K, PART):
        dquery = tl.dot(dz, tl.trans(rows(weights, j, K, PART)))
        dquery -= tl.dot(pulls, part(k, batch, head, token, real, j, L, H, K, PART))
        dquery += part(do, batch, head, token, real, j, L, H, K, PART)
        _store_part(dq, dquery, batch, head, token, mine, j, L, H, K, PART)


@triton.jit
def _reaches(position, batch, batch_of, document_of, real, end, L, C: tl.constexpr):
    """Which tokens of a span the weights at its end have something of: of its last document, in a full mini-batch."""
    final = batch_of + C - 1
    full = tl.load(position + batch * L + final, mask=real & (final < L), other=-1) == final - document_of
    return full & (document_of == end - 1 - tl.load(position + batch * L + end - 1))


@triton.jit(do_not_specialize=["L", "G"])
def key_gradient(
    q, k, sizes, edges, position, opening, kept, errors, dreads, dkept, dback, dv,
    dk,
    L, H, G, C: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    g, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // H, row % H
    TYPE: tl.constexpr = q.dtype.element_ty
    if g == 0:
        no_gradients(dk, tl.load(edges + batch * (G + 1)), batch, head, L, H, C, K)
    begin, end, token, real, place, batch_of, document_of = span_tokens(edges, position, batch, g, G, L, C, TILE)
    if begin == end:
        return
    u, dz = (_rows(errors, batch, head, token, real, L, H, K), _rows(dback, batch, head, token, real, L, H, K))
    dread = _rows(dreads, batch, head, token, real, L, H, K)
    carried, others = carried_on(begin, real, document_of)
    slot, last_c = row * G + g, tl.load(sizes + C - 1)
    kept, dkept, opening = kept + slot * (K * K), dkept + slot * (K * K), opening + head * (K * K + K)
    reaches = _reaches(position, batch, batch_of, document_of, real, end, L, C)
    later = (document_of[:, None] == document_of[None, :]) & (batch_of[:, None] < batch_of[None, :])
    forth, back, pulls = tl.dot(u, tl.trans(dz)), tl.dot(dz, tl.trans(u)), tl.dot(u, tl.trans(dread))
    together = document_of[:, None] == document_of[None, :]
    forth = tl.where(later, forth, 0.0)
    back = tl.where(together & (batch_of[:, None] > batch_of[None, :]), back, 0.0)
    scores = (last_c * (forth + back)).to(TYPE)
    c = tl.where(batch_of[:, None] == batch_of[None, :], tl.load(sizes + place)[None, :], last_c)
    pulls = tl.where(together & (token[:, None] <= token[None, :]), c * pulls, 0.0).to(TYPE)
    u = tl.where(reaches[:, None], last_c * u.to(tl.float32), 0.0).to(TYPE)
    mine = real
    if DOCUMENTS:
        mine = real & carried
    _key_gradient(dk, u, scores, pulls, dz, kept, dkept, q, k, dv, batch, head, token, real, mine, L, H, K, PART)
    if DOCUMENTS:  # noqa: SIM102, both sides of an `and` are compiled
        if others:
            mine = real & (carried == 0)
            _key_gradient(
                dk, u, scores, pulls, dz, opening, dkept, q, k, dv, batch, head, token, real, mine, L, H, K, PART
            )


@triton.jit
def _key_gradient(
    dk, u, scores, pulls, dz, weights, dkept, q, k, dv, batch, head, token, real, mine, L, H, K: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """dz W' - u D' - scores k - pulls q - dv of those tokens that are mine."""
    for j in tl.range(0, K, PART):
        dx = tl.dot(u, tl.trans(rows(dkept, j, K, PART)))
        dx = tl.dot(scores, part(k, batch, head, token, real, j, L, H, K, PART), dx)
        dx = tl.dot(pulls, part(q, batch, head, token, real, j, L, H, K, PART), dx)
        dx = tl.dot(dz, tl.trans(rows(weights, j, K, PART))) - dx
        dx -= part(dv, batch, head, token, real, j, L, H, K, PART)
        _store_part(dk, dx, batch, head, token, mine, j, L, H, K, PART)


@triton.jit
def _sum_of_rows(x, out, program, B, M, BLOCK: tl.constexpr):
    """Some columns of the sum [M] over rows of x [B, M]."""
    column = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(0, B):
        total += tl.load(x + row * M + column, mask=column < M, other=0.0)
    tl.store(out + column, total, mask=column < M)


@triton.jit
def _sum_of_spans(x, head, column, B, H, G, S, ROWS: tl.constexpr):
    """Columns of the sum [H, S] of a head, of x [B, H, G + 1, S]."""
    total = tl.zeros([ROWS, column.shape[0]], tl.float32)
    for begin in range(0, B * (G + 1), ROWS):
        row = begin + tl.arange(0, ROWS)
        at = ((row // (G + 1) * H + head).to(tl.int64) * (G + 1) + row % (G + 1))[:, None] * S + column[None, :]
        total += tl.load(x + at, mask=(row < B * (G + 1))[:, None] & (column < S)[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["B", "G"])
def sums(
    shared, dstart, by_sizes, by_gamma, by_beta, by_start, B, H, G, P,
    C: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """by_sizes [H, C], by_gamma and by_beta [H, K] of shared [B, H, G + 1, C + 2 K], and by_start [H, P] of dstart [B,
    H, P]. The first programs have some columns of a head of the one, the others of all of the other."""
    program, S = tl.program_id(0), C + 2 * K
    parts: tl.constexpr = (C + 2 * K + COLUMNS - 1) // COLUMNS
    if program < H * parts:
        head, column = program // parts, program % parts * COLUMNS + tl.arange(0, COLUMNS)
        found = _sum_of_spans(shared, head, column, B, H, G, S, ROWS)
        tl.store(by_sizes + head * C + column, found, mask=column < C)
        tl.store(by_gamma + head * K + column - C, found, mask=(column >= C) & (column < C + K))
        tl.store(by_beta + head * K + column - C - K, found, mask=(column >= C + K) & (column < S))
    else:
        _sum_of_rows(dstart, by_start, program - H * parts, B, H * P, BLOCK)
