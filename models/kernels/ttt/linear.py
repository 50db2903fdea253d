"""Triton kernels of test-time training: one program a head of a sequence, mini-batch by mini-batch.

models/regression/deep/ttt.py has the formulas. With u = eta dl/dz, A = tril(Q X^T + 1), c the token sizes, of a
layer

    read    Z' = X' W + b - c * (A u) ,    write    W <- W - c_b X^T u ,    b <- b - c_b sum u ,

c_b the last of c, or 0 where the mini-batch is not complete. What is kept for the backward pass is the weights at every
GROUP-th mini-batch of the sequence; it computes the others of a group again before it goes through them backwards.

A head's weights are packed as [W b], P numbers, and stay in registers.

Mini-batches: group [B, G + 1] the first of each group, first [B, N + 1] their first tokens, fresh [B, N] those that
begin a document (models/regression/deep/accelerated.py). Shapes: C tokens of a mini-batch, K key width, F hidden width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.ttt.parts import dot, gradient_backward, load, mini_batch, project, standardise, tokens


@triton.jit
def linear_forward(
    q, k, v, steps, sizes, start, gammas, betas, init, first, group, fresh, o, last, kept,
    L, H, N, G, C: tl.constexpr, K: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, head, P = row // H, row % H, K * K + K
    place, key = tl.arange(0, C), tl.arange(0, K)
    TYPE: tl.constexpr = q.dtype.element_ty
    matrix, bias = key[:, None] * K + key[None, :], K * K + key
    lower = place[:, None] >= place[None, :]
    gamma, beta = tl.load(gammas + head * K + key)[None, :], tl.load(betas + head * K + key)[None, :]
    c, last_c = tl.load(sizes + place)[:, None], tl.load(sizes + C - 1)
    W, b = tl.load(init + row * P + matrix), tl.load(init + row * P + bias)
    for g in range(0, G):
        tl.store(kept + (row * G + g) * P + matrix, W)
        tl.store(kept + (row * G + g) * P + bias, b)
        for n in range(tl.load(group + batch * (G + 1) + g), tl.load(group + batch * (G + 1) + g + 1)):
            _begin, length, token, real, new = mini_batch(first, fresh, batch, n, N, C, DOCUMENTS)
            if DOCUMENTS:  # noqa: SIM102, both sides of an `and` are compiled
                if new:
                    W, b = tl.load(start + head * P + matrix), tl.load(start + head * P + bias)
            query = load(q, batch, head, token, real, L, H, K)
            x = load(k, batch, head, token, real, L, H, K)
            target = load(v, batch, head, token, real, L, H, K) - x
            eta = tl.load(steps + (batch * L + token) * H + head, mask=real, other=0.0)[:, None]
            y, scale = standardise(dot(x, W, TYPE) + b[None, :], K)
            u = eta * project(gamma * (gamma * y + beta - target), y, scale, K)
            A = tl.where(lower, dot(query, tl.trans(x), TYPE) + 1.0, 0.0)
            z = dot(query, W, TYPE) + b[None, :] - c * dot(A, u, TYPE)
            y, scale = standardise(z, K)
            out = query + gamma * y + beta
            tl.store(tokens(o, batch, head, token, L, H, K), out.to(o.dtype.element_ty), mask=real[:, None])
            size = tl.where(length == C, last_c, 0.0)
            W -= size * dot(tl.trans(x), u, TYPE)
            b -= size * tl.sum(u, 0)
    tl.store(last + row * P + matrix, W)
    tl.store(last + row * P + bias, b)


@triton.jit
def linear_backward(
    q, k, v, steps, sizes, start, gammas, betas, init, first, group, fresh, kept, do, dlast,
    dq, dk, dv, dsteps, dsizes, dstart, dgammas, dbetas, dinit, scratch,
    L, H, N, G, C: tl.constexpr, K: tl.constexpr, DOCUMENTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The transpose of every line above. d* of what all sequences share are of this one; dstart comes in as zeros."""
    row = tl.program_id(0).to(tl.int64)
    batch, head, P = row // H, row % H, K * K + K
    place, key = tl.arange(0, C), tl.arange(0, K)
    TYPE: tl.constexpr = q.dtype.element_ty
    matrix, bias = key[:, None] * K + key[None, :], K * K + key
    lower = place[:, None] >= place[None, :]
    gamma, beta = tl.load(gammas + head * K + key)[None, :], tl.load(betas + head * K + key)[None, :]
    c, last_c = tl.load(sizes + place)[:, None], tl.load(sizes + C - 1)
    scratch += row * GROUP * P
    dW, db = tl.load(dlast + row * P + matrix), tl.load(dlast + row * P + bias)
    dgamma, dbeta = tl.zeros([C, K], tl.float32), tl.zeros([C, K], tl.float32)
    dc, dlast_c = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for i in range(0, G):
        g = G - 1 - i
        n0, n1 = tl.load(group + batch * (G + 1) + g), tl.load(group + batch * (G + 1) + g + 1)
        W, b = tl.load(kept + (row * G + g) * P + matrix), tl.load(kept + (row * G + g) * P + bias)
        tl.debug_barrier()
        for n in range(n0, n1):
            begin, length, token, real, new = mini_batch(first, fresh, batch, n, N, C, DOCUMENTS)
            if new:
                W, b = tl.load(start + head * P + matrix), tl.load(start + head * P + bias)
            else:  # a full mini-batch lies between two of these, so that no two meet
                here = scratch + (begin // C) % GROUP * P
                tl.store(here + matrix, W)
                tl.store(here + bias, b)
            x = load(k, batch, head, token, real, L, H, K)
            target = load(v, batch, head, token, real, L, H, K) - x
            eta = tl.load(steps + (batch * L + token) * H + head, mask=real, other=0.0)[:, None]
            y, scale = standardise(dot(x, W, TYPE) + b[None, :], K)
            u = eta * project(gamma * (gamma * y + beta - target), y, scale, K)
            size = tl.where(length == C, last_c, 0.0)
            W -= size * dot(tl.trans(x), u, TYPE)
            b -= size * tl.sum(u, 0)
        tl.debug_barrier()
        for j in range(n0, n1):
            n = n1 - 1 - (j - n0)
            begin, length, token, real, new = mini_batch(first, fresh, batch, n, N, C, DOCUMENTS)
            here = scratch + (begin // C) % GROUP * P
            if DOCUMENTS:
                here = tl.where(new, start + head * P, here)
            W, b = tl.load(here + matrix), tl.load(here + bias)
            query = load(q, batch, head, token, real, L, H, K)
            x = load(k, batch, head, token, real, L, H, K)
            target = load(v, batch, head, token, real, L, H, K) - x
            dout = load(do, batch, head, token, real, L, H, K)
            eta = tl.load(steps + (batch * L + token) * H + head, mask=real, other=0.0)[:, None]
            size = tl.where(length == C, last_c, 0.0)

            y, scale = standardise(dot(x, W, TYPE) + b[None, :], K)
            gradient = project(gamma * (gamma * y + beta - target), y, scale, K)
            u = eta * gradient
            A = tl.where(lower, dot(query, tl.trans(x), TYPE) + 1.0, 0.0)
            y_read, scale_read = standardise(dot(query, W, TYPE) + b[None, :] - c * dot(A, u, TYPE), K)

            dgamma += dout * y_read
            dbeta += dout
            dz_read = project(dout * gamma, y_read, scale_read, K)
            pulls = dot(dz_read, tl.trans(u), TYPE)
            dc -= tl.sum(A * pulls, 1)
            dA = tl.where(lower, -c * pulls, 0.0)
            moved = dot(x, dW, TYPE) + db[None, :]
            dlast_c -= tl.where(length == C, tl.sum(moved * u, 1), 0.0)
            du = dot(tl.trans(A), -c * dz_read, TYPE) - size * moved
            dx = dot(tl.trans(dA), query, TYPE) - size * dot(u, tl.trans(dW), TYPE)
            dquery = dout + dot(dz_read, tl.trans(W), TYPE) + dot(dA, x, TYPE)
            deta = tl.sum(du * gradient, 1)
            dz, dtarget, more_gamma, more_beta = gradient_backward(eta * du, y, scale, gradient, target, gamma, beta, K)
            dgamma += more_gamma
            dbeta += more_beta
            dx += dot(dz, tl.trans(W), TYPE) - dtarget
            dW += dot(tl.trans(query), dz_read, TYPE) + dot(tl.trans(x), dz, TYPE)
            db += tl.sum(dz_read + dz, 0)

            rows = real[:, None]
            tl.store(tokens(dq, batch, head, token, L, H, K), dquery.to(dq.dtype.element_ty), mask=rows)
            tl.store(tokens(dk, batch, head, token, L, H, K), dx.to(dk.dtype.element_ty), mask=rows)
            tl.store(tokens(dv, batch, head, token, L, H, K), dtarget.to(dv.dtype.element_ty), mask=rows)
            tl.store(dsteps + (batch * L + token) * H + head, deta, mask=real)
            if new:  # what comes before is another document
                at = dstart + row * P
                tl.store(at + matrix, tl.load(at + matrix) + dW)
                tl.store(at + bias, tl.load(at + bias) + db)
                dW, db = tl.zeros_like(dW), tl.zeros_like(db)
    tl.store(dinit + row * P + matrix, dW)
    tl.store(dinit + row * P + bias, db)
    tl.store(dgammas + row * K + key, tl.sum(dgamma, 0))
    tl.store(dbetas + row * K + key, tl.sum(dbeta, 0))
    tl.store(dsizes + row * C + place, dc + tl.where(place == C - 1, tl.sum(dlast_c, 0), 0.0))
