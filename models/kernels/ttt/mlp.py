"""Triton kernels of TTT-MLP: one program a head of a sequence, mini-batch by mini-batch.

As linear.py, with two layers: what is said there of a layer holds for each, with inputs X = k and gelu(Z_1). A
head's weights are packed as [W_1 b_1 W_2 b_2], P numbers, and too many for registers: they stay in `last`, where every
mini-batch moves them on. The L2 cache holds them. Other threads read what a thread has written there, hence the
barriers. The backward pass is in mlp_gradient.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.ttt.parts import dot, load, project, standardise, tokens


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
def _places(K: tl.constexpr, F: tl.constexpr):
    """Where W_1, b_1, W_2 and b_2 are in a head's weights."""
    key, hidden = tl.arange(0, K), tl.arange(0, F)
    W1, W2 = key[:, None] * F + hidden[None, :], K * F + F + hidden[:, None] * K + key[None, :]
    return W1, K * F + hidden[None, :], W2, 2 * K * F + F + key[None, :]


@triton.jit
def _errors(
    here, exact, x, target, eta, gamma, beta, K: tl.constexpr, F: tl.constexpr, EPS: tl.constexpr, TYPE: tl.constexpr
):
    """u of both layers, for the weights at `here`, and what they are made of. Biases are those at `exact`: `here` may
    have them rounded.
    """
    W1, b1, W2, b2 = _places(K, F)
    middle, slope, curve = _gelu(dot(x, tl.load(here + W1), TYPE) + tl.load(exact + b1))
    middle, W2 = middle.to(TYPE), tl.load(here + W2).to(TYPE)
    y, scale = standardise(dot(middle, W2, TYPE) + tl.load(exact + b2), K, EPS)
    gradient = project(gamma * (gamma * y + beta - target), y, scale, K)
    back = dot(eta * gradient, tl.trans(W2), TYPE)
    return back * slope, eta * gradient, middle, slope, curve, y, scale, gradient, back


@triton.jit
def _read(
    here, exact, query, x, middle, u1, u2, c, lower,
    K: tl.constexpr, F: tl.constexpr, EPS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """LN before gamma and beta, and what it is made of."""
    W1, b1, W2, b2 = _places(K, F)
    A1 = tl.where(lower, dot(query, tl.trans(x), TYPE) + 1.0, 0.0)
    z1 = dot(query, tl.load(here + W1), TYPE) + tl.load(exact + b1) - c * dot(A1, u1, TYPE)
    read, slope, _ = _gelu(z1)
    read = read.to(TYPE)
    A2 = tl.where(lower, dot(read, tl.trans(middle), TYPE) + 1.0, 0.0)
    z2 = dot(read, tl.load(here + W2), TYPE) + tl.load(exact + b2) - c * dot(A2, u2, TYPE)
    y, scale = standardise(z2, K, EPS)
    return y, scale, read, slope, A1, A2


@triton.jit
def _move(here, rounded, x, middle, u1, u2, size, K: tl.constexpr, F: tl.constexpr, TYPE: tl.constexpr):
    """Moves the weights at `here` on by the mini-batch, and writes them to `rounded` too unless that is None."""
    W1, b1, W2, b2 = _places(K, F)
    W = tl.load(here + W1) - size * dot(tl.trans(x), u1, TYPE)
    tl.store(here + W1, W)
    if rounded is not None:
        tl.store(rounded + W1, W.to(TYPE))
    tl.store(here + b1, tl.load(here + b1) - size * tl.sum(u1, 0)[None, :])
    W = tl.load(here + W2) - size * dot(tl.trans(middle), u2, TYPE)
    tl.store(here + W2, W)
    if rounded is not None:
        tl.store(rounded + W2, W.to(TYPE))
    tl.store(here + b2, tl.load(here + b2) - size * tl.sum(u2, 0)[None, :])


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
            u1, u2, middle, _, _, _, _, _, _ = _errors(here, here, x, target, eta, gamma, beta, K, F, EPS, TYPE)
            y, _, _, _, _, _ = _read(here, here, query, x, middle, u1, u2, c, lower, K, F, EPS, TYPE)
            out = query + gamma * y + beta
            tl.store(tokens(o, batch, head, token, L, H, K), out.to(o.dtype.element_ty), mask=real[:, None])
            tl.debug_barrier()
            _move(here, None, x, middle, u1, u2, tl.where(end - begin == C, last_c, 0.0), K, F, TYPE)
            tl.debug_barrier()
