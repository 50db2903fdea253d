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
    q, k, sizes, gammas, betas, edges, position, opening, opening_biases, kept, biases, errors,
    o,
    L, H, G, C: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """opening [H, K, K] and opening_biases [H, K]: what a document begins with."""
    g, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head, key = row // H, row % H, tl.arange(0, K)
    TYPE: tl.constexpr = q.dtype.element_ty
    begin, end, token, real, place, batch_of, document_of = span_tokens(edges, position, batch, g, G, L, C, TILE)
    if begin == end:
        return
    # on its way before the products that it is not for
    u, query = (_rows(errors, batch, head, token, real, L, H, K), _rows(q, batch, head, token, real, L, H, K))
    carried, others = carried_on(begin, real, document_of)
    gamma, beta = tl.load(gammas + head * K + key)[None, :], tl.load(betas + head * K + key)[None, :]
    slot, opening, opening_biases = row * G + g, opening + head * (K * K), opening_biases + head * K
    c = shares(token, batch_of, document_of, tl.load(sizes + place), tl.load(sizes + C - 1))
    z, scores = layer(
        q, k, kept + slot * (K * K), biases + slot * K, opening, opening_biases, carried, others, batch, head, token,
        real, L, H, TILE, K, PART, DOCUMENTS,
    )  # fmt: skip
    y, _ = standardise(z - dot(c * scores, u, TYPE), K)
    _store(o, query + gamma * y + beta, batch, head, token, real, L, H, K)


@triton.jit(do_not_specialize=["L", "G"])
def read_gradient(
    q, k, sizes, gammas, betas, edges, position, opening, opening_biases, kept, biases, errors, do,
    dq, dsizes, dgammas, dbetas, derrors, dreads,
    L, H, G, C: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """dq, and the gradients by u and z because of queries; of each span dsizes [B H, G, C], dgammas and dbetas [B H, G,
    K], which come in as zeros.
    """
    g, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head, key = row // H, row % H, tl.arange(0, K)
    TYPE: tl.constexpr = q.dtype.element_ty
    if g == 0:
        no_gradients(dq, tl.load(edges + batch * (G + 1)), batch, head, L, H, C, K)
    begin, end, token, real, place, batch_of, document_of = span_tokens(edges, position, batch, g, G, L, C, TILE)
    if begin == end:
        return
    # on their way before the products that they are not for
    u, dout = (_rows(errors, batch, head, token, real, L, H, K), _rows(do, batch, head, token, real, L, H, K))
    carried, others = carried_on(begin, real, document_of)
    gamma = tl.load(gammas + head * K + key)[None, :]
    slot, opening, opening_biases = row * G + g, opening + head * (K * K), opening_biases + head * K
    kept, biases = kept + slot * (K * K), biases + slot * K
    c = shares(token, batch_of, document_of, tl.load(sizes + place), tl.load(sizes + C - 1))
    z, A = layer(
        q, k, kept, biases, opening, opening_biases, carried, others, batch, head, token,
        real, L, H, TILE, K, PART, DOCUMENTS,
    )  # fmt: skip
    z -= dot(c * A, u, TYPE)
    y, scale = standardise(z, K)
    dout = dout.to(tl.float32)
    tl.store(dgammas + slot * K + key, tl.sum(dout * y, 0))
    tl.store(dbetas + slot * K + key, tl.sum(dout, 0))
    dz = project(dout * gamma, y, scale, K)
    _store(dreads, dz, batch, head, token, real, L, H, K)
    pulls = dot(dz, tl.trans(u), TYPE)
    same = (batch_of[:, None] == batch_of[None, :]) & (token[:, None] >= token[None, :])
    dc = tl.sum(tl.where(same, A * pulls, 0.0), 1)
    each = tl.arange(0, C)
    tl.store(dsizes + slot * C + each, -tl.sum(tl.where(place[:, None] == each[None, :], dc[:, None], 0.0), 0))
    du = dot(tl.trans(tl.where(same, -c * A, 0.0)), dz, TYPE)
    _store(derrors, du, batch, head, token, real, L, H, K)
    pulls, dz = (c * pulls).to(TYPE), dz.to(TYPE)
    inside = tl.where(carried[:, None], 0.0, dz)
    if DOCUMENTS:
        dz = tl.where(carried[:, None], dz, 0.0)
    for j in tl.range(0, K, PART):
        dquery = dot(dz, tl.trans(rows(kept, j, K, PART)), TYPE)
        dquery -= tl.dot(pulls, part(k, batch, head, token, real, j, L, H, K, PART))
        if DOCUMENTS:  # noqa: SIM102, both sides of an `and` are compiled
            if others:
                dquery += dot(inside, tl.trans(rows(opening, j, K, PART)), TYPE)
        dquery += part(do, batch, head, token, real, j, L, H, K, PART)
        _store_part(dq, dquery, batch, head, token, real, j, L, H, K, PART)


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
    kept, dkept, opening = kept + slot * (K * K), dkept + slot * (K * K), opening + head * (K * K)
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
    inside = tl.where(carried[:, None], 0.0, dz)
    if DOCUMENTS:
        dz = tl.where(carried[:, None], dz, 0.0)
    for j in tl.range(0, K, PART):
        dx = dot(u, tl.trans(rows(dkept, j, K, PART)), TYPE)
        dx = tl.dot(scores, part(k, batch, head, token, real, j, L, H, K, PART), dx)
        dx = tl.dot(pulls, part(q, batch, head, token, real, j, L, H, K, PART), dx)
        dx = dot(dz, tl.trans(rows(kept, j, K, PART)), TYPE) - dx
        if DOCUMENTS:  # noqa: SIM102, both sides of an `and` are compiled
            if others:
                dx += dot(inside, tl.trans(rows(opening, j, K, PART)), TYPE)
        dx -= part(dv, batch, head, token, real, j, L, H, K, PART)
        _store_part(dk, dx, batch, head, token, real, j, L, H, K, PART)
