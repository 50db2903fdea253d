"""What the kernels of TTT-Linear share.

With u = eta dl/dz and c the token sizes, of which the last one, c_b, is for what a full mini-batch leaves behind, the
inputs of the layer norm are, for an error (the key x of a token) and for a query q of it,

    z = x W_0 + b_0 - c_b sum_{j earlier} (x_j.x + 1) u_j
    z = q W_0 + b_0 - sum_{j <= t} c (x_j.q + 1) u_j ,   c = c_p in the same mini-batch, c_b before it

with W_0, b_0 what a span of tokens begins with and j in that span and in the same document; where that one begins in
the span, W_0 and b_0 are its own. So once the scan has left u and the weights of each span, all tokens of a span are
read at once, and the gradients go the same way from the end of a span, where scan_gradient has left them.

A mini-batch begins where a token's position in its document is a multiple of C, and ends before the next one does. A
span has as many mini-batches as TILE tokens hold, each but the last of a row more than TILE - C. Its edges are what the
first scan finds on its way.

p = eta du has by the inner gradient the gradient dz = H p. For z - mean = y / s, g = gamma (gamma y + beta - target),

    H p = s^2 [ (gamma^2 - <g y>) p' - <gamma^2 p'> - h <y p> - y <h p> ] ,   p' = p - <p> ,
    h = g + gamma^2 y - <g + gamma^2 y> - y (<gamma^2 y^2> + 3 <g y>) / 2 ,   < > the mean over values.

Between the kernels there are, in the type of q as [B, L, H, K], u, y, of the queries y too, and their gradients by u
and z; and in float32 numbers [B, H, 6, L], and of the queries s [B, H, L].
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.ttt.parts import tokens

NUMBERS = tl.constexpr(6)
SCALE, STEP, CROSS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # s, eta s, <g y>
# <gamma^2 y>, <gamma (beta - target)>, and what y is taken from h times
BENT, REST, TURN = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)


@triton.jit
def number_at(numbers, row, token, L):
    """A pointer to the first number of a token; the others lie L behind each other."""
    return numbers + row * NUMBERS * L + token


@triton.jit
def lay_out(position, starts, L, C: tl.constexpr, DOCUMENTS: tl.constexpr, AT_ONCE: tl.constexpr = 2048):
    """Of a row, given the positions [L] of its tokens: where its first mini-batch begins, L if there is none, and how
    many documents have mini-batches. starts [L + 1] become the tokens where the first ones of those begin, and L.
    """
    place = tl.arange(0, C)
    near = tl.load(position + place, mask=place < L, other=1)
    opens = tl.minimum(tl.min(tl.where(near % C == 0, place, C)), L)
    num = (opens < L).to(tl.int32)
    tl.store(starts, opens)
    if DOCUMENTS:
        for begin in range(0, L, AT_ONCE):
            token = begin + tl.arange(0, AT_ONCE)
            new = (tl.load(position + token, mask=token < L, other=1) == 0) & (token > opens)
            here = new.to(tl.int32)
            tl.store(starts + num + tl.cumsum(here, 0) - here, token, mask=new)
            num += tl.sum(here)
    tl.store(starts + num, L)
    tl.debug_barrier()  # what other threads have written is read
    return opens, num


@triton.jit
def no_gradients(x, begin, batch, head, L, H, C: tl.constexpr, K: tl.constexpr):
    """Of tokens before the one where the first mini-batch begins."""
    token, zeros = tl.arange(0, C), tl.zeros([C, K], x.dtype.element_ty)
    tl.store(tokens(x, batch, head, token, L, H, K), zeros, mask=(token < begin)[:, None])


@triton.jit
def span_tokens(edges, position, batch, g, G, L, C: tl.constexpr, TILE: tl.constexpr):
    """Of a span, edges [B, G + 1]: where it begins and ends; its tokens, and which of them are there; their places in
    their mini-batches, and where those and their documents begin.
    """
    begin, end = tl.load(edges + batch * (G + 1) + g), tl.load(edges + batch * (G + 1) + g + 1)
    token = begin + tl.arange(0, TILE)
    real = token < end
    place = tl.load(position + batch * L + token, mask=real, other=0)
    return begin, end, token, real, place % C, token - place % C, token - place


@triton.jit
def carried_on(begin, real, document_of):
    """Whose document has begun before the span, or with the call; and whether there are others."""
    carried = document_of < tl.maximum(begin, 1)
    return carried, tl.max(tl.where(real & (carried == 0), 1, 0)) > 0


@triton.jit
def shares(token, batch_of, document_of, share, last_c):
    """[reader, writer]: c, 0 of what is not read."""
    written = (document_of[:, None] == document_of[None, :]) & (token[:, None] >= token[None, :])
    return tl.where(written, tl.where(batch_of[:, None] == batch_of[None, :], share[:, None], last_c), 0.0)


@triton.jit
def part(x, batch, head, token, real, j, L, H, K: tl.constexpr, PART: tl.constexpr):
    """Channels j to j + PART of tokens."""
    at = ((batch * L + token) * H + head)[:, None] * K + j + tl.arange(0, PART)[None, :]
    return tl.load(x + at, mask=real[:, None], other=0.0)


@triton.jit
def rows(weights, j, K: tl.constexpr, PART: tl.constexpr):
    """Rows j to j + PART of a matrix of K columns."""
    return tl.load(weights + (j + tl.arange(0, PART))[:, None] * K + tl.arange(0, K)[None, :])


@triton.jit
def scores_of(x, k, batch, head, token, real, L, H, TILE: tl.constexpr, K: tl.constexpr, PART: tl.constexpr):
    """x k' + 1 [TILE, TILE], for x and k [B, L, H, K]."""
    scores = tl.zeros([TILE, TILE], tl.float32) + 1.0
    for j in tl.range(0, K, PART):
        x_part = part(x, batch, head, token, real, j, L, H, K, PART)
        scores = tl.dot(x_part, tl.trans(part(k, batch, head, token, real, j, L, H, K, PART)), scores)
    return scores


@triton.jit
def layer(
    x, k, weights, bias, opening, opening_bias, carried, others, batch, head, token, real,
    L, H, TILE: tl.constexpr, K: tl.constexpr, PART: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """x W_0 + b_0 [TILE, K], and x k' + 1, for x and k [B, L, H, K]. carried [TILE]: whose document has begun before;
    others: whether one begins in the span.
    """
    key = tl.arange(0, K)
    z = tl.zeros([TILE, K], tl.float32) + tl.load(bias + key)[None, :]
    scores = tl.zeros([TILE, TILE], tl.float32) + 1.0
    for j in tl.range(0, K, PART):
        x_part = part(x, batch, head, token, real, j, L, H, K, PART)
        z = tl.dot(x_part, rows(weights, j, K, PART), z)
        scores = tl.dot(x_part, tl.trans(part(k, batch, head, token, real, j, L, H, K, PART)), scores)
    if DOCUMENTS:  # noqa: SIM102, both sides of an `and` are compiled
        if others:  # added to nothing, where there were zeros for x; a sum of its own would be a second tile
            z = tl.where(carried[:, None], z, tl.load(opening_bias + key)[None, :])
            for j in tl.range(0, K, PART):
                x_part = part(x, batch, head, token, real & (carried == 0), j, L, H, K, PART)
                z = tl.dot(x_part, rows(opening, j, K, PART), z)
    return z, scores
