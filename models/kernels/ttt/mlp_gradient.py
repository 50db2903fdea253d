"""The backward pass of mlp.py, in two kernels.

Only the gradients by the weights go from a mini-batch to the one before. So mlp_replay, one program a group of
mini-batches of a head, computes their weights again from those kept at the group's first, and all of the backward pass
that needs no gradient by later weights: what queries have read. mlp_backward, one program a head of a sequence, goes
through the mini-batches from the last to the first with what is left.

What the first leaves for the second, for T tokens and the mini-batches in them:

    weights [B H, T/C, P]    of each mini-batch that does not begin a document, rounded (and without biases)
    wide    [B H, T, 8, F]   rounded, as operands of products are: see _wide
    narrow  [B H, T, 7, K]   float32: see _narrow

That is 10 KB a token of a head in bf16 for keys of 64. To bound it, both take some groups at a time, from the last to
the first (SLAB). A group's mini-batches are those that begin in its GROUP C tokens. Of two that begin within the same C
tokens one at most goes on with a document, and only that one needs weights of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.ttt.mlp import _copy, _errors, _move, _places, _read
from models.kernels.ttt.parts import dot, gradient_backward, load, project, tokens

if TYPE_CHECKING:
    from models.kernels.ttt import Given

SLAB = 256  # programs of mlp_replay, about two for every multiprocessor of an H100: 0.7 GB for keys of 64 in bf16


@triton.jit
def _wide(x, index, which: tl.constexpr, F: tl.constexpr):
    """Of errors: 0 gelu(Z_1), 1 its derivative, 2 its second one times u_2 W_2', 3 u_1 = 1 * u_2 W_2'. Of queries: 4
    gelu(Z_1), 5 dZ_1. Because of queries, of errors: 6 dZ_1, 7 the gradient by u_2 W_2'.
    """
    return x + index[:, None] * (8 * F) + which * F + tl.arange(0, F)[None, :]


@triton.jit
def _narrow(x, index, which: tl.constexpr, K: tl.constexpr):
    """Of errors: 0 u_2, 1 LN before gamma and beta, 2 dl/dZ_2. Of queries: 3 dZ_2. Because of queries, of errors: 4
    du_2, 5 dX. 6 begins with the scale of 1.
    """
    return x + index[:, None] * (7 * K) + which * K + tl.arange(0, K)[None, :]


@triton.jit(do_not_specialize=["g0"])  # or each slab compiles its own
def mlp_replay(
    q, k, v, steps, sizes, start, rounded, gammas, betas, first, group, fresh, kept, do,
    dq, dsizes, dgammas, dbetas, scratch, weights, wide, narrow,
    L, H, N, G, T, g0, C: tl.constexpr, K: tl.constexpr, DOCUMENTS: tl.constexpr, EPS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """dsizes [B, H, G + 1, C], dgammas and dbetas [B, H, G + 1, K]: of each group, and the last of mlp_backward.
    scratch [B H, groups, P] has the weights in float32; rounded is start in the type of q.
    """
    F: tl.constexpr = 4 * K
    TYPE: tl.constexpr = q.dtype.element_ty
    row, g = tl.program_id(0).to(tl.int64), g0 + tl.program_id(1)
    batch, head, P = row // H, row % H, 2 * K * F + F + K
    place, key = tl.arange(0, C), tl.arange(0, K)
    lower = place[:, None] >= place[None, :]
    gamma, beta = tl.load(gammas + head * K + key)[None, :], tl.load(betas + head * K + key)[None, :]
    c, last_c = tl.load(sizes + place)[:, None], tl.load(sizes + C - 1)
    at_W1, _, at_W2, _ = _places(K, F)
    origin = g0 * GROUP * C
    exact = scratch + (row * tl.num_programs(1) + tl.program_id(1)) * P
    weights += row * (T // C) * P
    wide += row * T * 8 * F
    narrow += row * T * 7 * K
    dgamma, dbeta, dc = tl.zeros([C, K], tl.float32), tl.zeros([C, K], tl.float32), tl.zeros([C], tl.float32)
    n0, n1 = tl.load(group + batch * (G + 1) + g), tl.load(group + batch * (G + 1) + g + 1)
    begin = tl.load(first + batch * (N + 1) + n0)
    _copy(kept + (row * G + g) * P, exact, P, 1024)
    _copy(kept + (row * G + g) * P, weights + (begin - origin) // C * P, P, 1024)
    tl.debug_barrier()
    for n in range(n0, n1):
        begin, end = tl.load(first + batch * (N + 1) + n), tl.load(first + batch * (N + 1) + n + 1)
        token = begin + place
        real, index = token < end, token - origin
        here = weights + (begin - origin) // C * P
        goes_on = n + 1 < n1
        if DOCUMENTS:  # both sides of an `and` are compiled
            if tl.load(fresh + batch * N + n) != 0:
                here = rounded + head * P
                _copy(start + head * P, exact, P, 1024)
                tl.debug_barrier()
            if goes_on:
                goes_on = tl.load(fresh + batch * N + n + 1) == 0
        rows = real[:, None]
        query = load(q, batch, head, token, real, L, H, K)
        x = load(k, batch, head, token, real, L, H, K)
        target = load(v, batch, head, token, real, L, H, K) - x
        dout = load(do, batch, head, token, real, L, H, K)
        eta = tl.load(steps + (batch * L + token) * H + head, mask=real, other=0.0)[:, None]
        u1, u2, middle, slope, curve, y, scale, gradient, back = _errors(
            here, exact, x, target, eta, gamma, beta, K, F, EPS, TYPE
        )
        bend = back * curve
        tl.store(_wide(wide, index, 0, F), middle, mask=rows)
        tl.store(_wide(wide, index, 1, F), slope.to(TYPE), mask=rows)
        tl.store(_wide(wide, index, 2, F), bend.to(TYPE), mask=rows)
        tl.store(_wide(wide, index, 3, F), u1.to(TYPE), mask=rows)
        tl.store(_narrow(narrow, index, 0, K), u2, mask=rows)
        tl.store(_narrow(narrow, index, 1, K), y, mask=rows)
        tl.store(_narrow(narrow, index, 2, K), gradient, mask=rows)
        tl.store(narrow + index * (7 * K) + 6 * K, tl.sum(scale, 1), mask=real)
        y, scale, read, slope_read, A1, A2 = _read(here, exact, query, x, middle, u1, u2, c, lower, K, F, EPS, TYPE)
        tl.store(_wide(wide, index, 4, F), read, mask=rows)

        dgamma += dout * y
        dbeta += dout
        dz2 = project(dout * gamma, y, scale, K)
        tl.store(_narrow(narrow, index, 3, K), dz2, mask=rows)
        pulls = dot(dz2, tl.trans(u2), TYPE)
        dc -= tl.sum(A2 * pulls, 1)
        dA = tl.where(lower, -c * pulls, 0.0)
        dz1 = (dot(dz2, tl.trans(tl.load(here + at_W2)), TYPE) + dot(dA, middle, TYPE)) * slope_read
        tl.store(_wide(wide, index, 5, F), dz1.to(TYPE), mask=rows)
        dmiddle = dot(tl.trans(dA), read, TYPE)
        tl.store(_narrow(narrow, index, 4, K), dot(tl.trans(A2), -c * dz2, TYPE), mask=rows)
        dback = dot(tl.trans(A1), -c * dz1, TYPE)
        tl.store(_wide(wide, index, 6, F), (dmiddle * slope + dback * bend).to(TYPE), mask=rows)
        tl.store(_wide(wide, index, 7, F), (dback * slope).to(TYPE), mask=rows)
        pulls = dot(dz1, tl.trans(u1), TYPE)
        dc -= tl.sum(A1 * pulls, 1)
        dA = tl.where(lower, -c * pulls, 0.0)
        dquery = dout + dot(dz1, tl.trans(tl.load(here + at_W1)), TYPE) + dot(dA, x, TYPE)
        tl.store(tokens(dq, batch, head, token, L, H, K), dquery.to(dq.dtype.element_ty), mask=rows)
        tl.store(_narrow(narrow, index, 5, K), dot(tl.trans(dA), query, TYPE), mask=rows)
        tl.debug_barrier()
        if goes_on:  # after a full mini-batch: only such a one lies between two that do not begin a document
            _move(exact, weights + (end - origin) // C * P, x, middle, u1, u2, last_c, K, F, TYPE)
            tl.debug_barrier()
    part = row * (G + 1) + g
    tl.store(dgammas + part * K + key, tl.sum(dgamma, 0))
    tl.store(dbetas + part * K + key, tl.sum(dbeta, 0))
    tl.store(dsizes + part * C + place, dc)


@triton.jit(do_not_specialize=["g0", "g1"])  # or each slab compiles its own
def mlp_backward(
    q, k, v, steps, sizes, rounded, gammas, betas, first, group, fresh, weights, wide, narrow,
    dk, dv, dsteps, dsizes, dstart, dinit, dgammas, dbetas,
    L, H, N, G, T, g0, g1, C: tl.constexpr, K: tl.constexpr, DOCUMENTS: tl.constexpr, EPS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Of groups g0 up to g1. `dinit` comes in with the gradient by the weights after the last of them; what all groups
    share is added to. The gradients by the weights stay in registers, both layers' as [F, K], the shape for which
    consecutive products agree on a layout.
    """
    F: tl.constexpr = 4 * K
    TYPE: tl.constexpr = q.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    batch, head, P = row // H, row % H, 2 * K * F + F + K
    place, key, hidden = tl.arange(0, C), tl.arange(0, K), tl.arange(0, F)
    gamma, beta = tl.load(gammas + head * K + key)[None, :], tl.load(betas + head * K + key)[None, :]
    last_c = tl.load(sizes + C - 1)
    at_W1, at_W2 = hidden[:, None] + key[None, :] * F, K * F + F + hidden[:, None] * K + key[None, :]
    at_b1, at_b2 = K * F + hidden, 2 * K * F + F + key
    origin = g0 * GROUP * C
    weights += row * (T // C) * P
    wide += row * T * 8 * F
    narrow += row * T * 7 * K
    dhere = dinit + row * P
    dW1, db1, dW2, db2 = tl.load(dhere + at_W1), tl.load(dhere + at_b1), tl.load(dhere + at_W2), tl.load(dhere + at_b2)
    dgamma, dbeta = tl.zeros([C, K], tl.float32), tl.zeros([C, K], tl.float32)
    dlast1, dlast2 = tl.zeros([F], tl.float32), tl.zeros([K], tl.float32)
    n0, n1 = tl.load(group + batch * (G + 1) + g0), tl.load(group + batch * (G + 1) + g1)
    for j in range(n0, n1):
        n = n1 - 1 - (j - n0)
        begin, end = tl.load(first + batch * (N + 1) + n), tl.load(first + batch * (N + 1) + n + 1)
        token = begin + place
        real, index = token < end, token - origin
        here = weights + (begin - origin) // C * P
        if DOCUMENTS:
            new = tl.load(fresh + batch * N + n) != 0
            here = tl.where(new, rounded + head * P, here)
        rows, full = real[:, None], tl.where(end - begin == C, 1.0, 0.0)
        size = full * last_c

        middle = tl.load(_wide(wide, index, 0, F), mask=rows, other=0.0)
        u2 = tl.load(_narrow(narrow, index, 0, K), mask=rows, other=0.0)
        W = dW2.to(TYPE)
        moved = dot(middle, W, TYPE) + db2[None, :]
        dlast2 -= full * tl.sum(moved * u2, 0)
        du2 = tl.load(_narrow(narrow, index, 4, K), mask=rows, other=0.0) - size * moved
        dmiddle = dot(-size * u2, tl.trans(W), TYPE)
        x = load(k, batch, head, token, real, L, H, K)
        u1 = tl.load(_wide(wide, index, 3, F), mask=rows, other=0.0)
        W = dW1.to(TYPE)
        moved = dot(x, tl.trans(W), TYPE) + db1[None, :]
        dlast1 -= full * tl.sum(moved * u1, 0)
        dx = tl.load(_narrow(narrow, index, 5, K), mask=rows, other=0.0) - size * dot(u1, W, TYPE)
        moved *= -size

        slope = tl.load(_wide(wide, index, 1, F), mask=rows, other=0.0)
        dz1 = moved * tl.load(_wide(wide, index, 2, F), mask=rows, other=0.0)
        dback = (moved * slope + tl.load(_wide(wide, index, 7, F), mask=rows, other=0.0)).to(TYPE)
        du2 += dot(dback, tl.load(here + at_W2), TYPE)
        y = tl.load(_narrow(narrow, index, 1, K), mask=rows, other=0.0)
        gradient = tl.load(_narrow(narrow, index, 2, K), mask=rows, other=0.0)
        scale = tl.load(narrow + index * (7 * K) + 6 * K, mask=real, other=0.0)[:, None]
        target = load(v, batch, head, token, real, L, H, K) - x
        eta = tl.load(steps + (batch * L + token) * H + head, mask=real, other=0.0)[:, None]
        dz2, dtarget, more_gamma, more_beta = gradient_backward(eta * du2, y, scale, gradient, target, gamma, beta, K)
        dgamma += more_gamma
        dbeta += more_beta
        dmiddle += dot(dz2, tl.load(here + K * F + F + key[:, None] + hidden[None, :] * K), TYPE)
        dz1 += dmiddle * slope + tl.load(_wide(wide, index, 6, F), mask=rows, other=0.0)
        dx += dot(dz1, tl.load(here + at_W1), TYPE) - dtarget
        tl.store(tokens(dk, batch, head, token, L, H, K), dx.to(dk.dtype.element_ty), mask=rows)
        tl.store(tokens(dv, batch, head, token, L, H, K), dtarget.to(dv.dtype.element_ty), mask=rows)
        tl.store(dsteps + (batch * L + token) * H + head, tl.sum(du2 * gradient, 1), mask=real)

        dz1_read = tl.load(_wide(wide, index, 5, F), mask=rows, other=0.0)
        query = load(q, batch, head, token, real, L, H, K)
        db1 += tl.sum(dz1 + dz1_read, 0)
        dW1 += dot(tl.trans(dz1.to(TYPE)), x, TYPE)
        dW1 += dot(tl.trans(dz1_read), query, TYPE)
        dz2_read = tl.load(_narrow(narrow, index, 3, K), mask=rows, other=0.0)
        db2 += tl.sum(dz2 + dz2_read, 0)
        dW2 += dot(tl.trans(middle), dz2, TYPE)
        dW2 += dot(tl.trans(dback), u2, TYPE)
        dW2 += dot(tl.trans(tl.load(_wide(wide, index, 4, F), mask=rows, other=0.0)), dz2_read, TYPE)
        if DOCUMENTS:  # noqa: SIM102, both sides of an `and` are compiled
            if new:  # what comes before is another document
                at = dstart + row * P
                tl.store(at + at_W1, tl.load(at + at_W1) + dW1)
                tl.store(at + at_b1, tl.load(at + at_b1) + db1)
                tl.store(at + at_W2, tl.load(at + at_W2) + dW2)
                tl.store(at + at_b2, tl.load(at + at_b2) + db2)
                dW1, db1, dW2, db2 = tl.zeros_like(dW1), tl.zeros_like(db1), tl.zeros_like(dW2), tl.zeros_like(db2)
    tl.store(dhere + at_W1, dW1)
    tl.store(dhere + at_b1, db1)
    tl.store(dhere + at_W2, dW2)
    tl.store(dhere + at_b2, db2)
    part = row * (G + 1) + G
    at = part * K + key
    tl.store(dgammas + at, tl.load(dgammas + at) + tl.sum(dgamma, 0))
    tl.store(dbetas + at, tl.load(dbetas + at) + tl.sum(dbeta, 0))
    at = dsizes + part * C + C - 1
    tl.store(at, tl.load(at) + tl.sum(dlast1, 0) + tl.sum(dlast2, 0))


def mlp_gradient(do: Tensor, dlast: Tensor, given: Given, options: dict[str, object]) -> list[Tensor]:
    """The gradients by q, k, v, steps, sizes, start, init, gamma and beta, as ttt_scan_backward returns them. options
    are the kernels' last arguments."""
    q, k, v, steps, sizes, start, *shared, kept = given
    B, _, H, K = q.shape
    G, P = kept.shape[2:]
    C, span = len(sizes), len(sizes) * options["GROUP"]
    dq, dk, dv, dsteps = (torch.zeros_like(x) for x in (q, k, v, steps))  # tokens before the first are in no mini-batch
    dstart, dinit, rounded = torch.zeros_like(dlast), dlast.clone(), start.to(q.dtype)
    dsizes, dgamma, dbeta = (steps.new_zeros(B, H, G + 1, n) for n in (C, K, K))
    groups = min(max(SLAB // (B * H), 1), G)
    T = groups * span + C  # the last mini-batch may reach into the group after
    scratch = kept.new_empty(B * H, groups, P)
    weights = q.new_empty(B * H, T // C, P)
    wide, narrow = q.new_empty(B * H, T, 8, 4 * K), kept.new_empty(B * H, T, 7, K)
    for g1 in range(G, 0, -groups):
        g0 = max(g1 - groups, 0)
        mlp_replay[(B * H, g1 - g0)](
            q, k, v, steps, sizes, start, rounded, *shared, kept, do,
            dq, dsizes, dgamma, dbeta, scratch, weights, wide, narrow, T=T, g0=g0, **options,
        )  # fmt: skip
        mlp_backward[(B * H,)](
            q, k, v, steps, sizes, rounded, *shared, weights, wide, narrow,
            dk, dv, dsteps, dsizes, dstart, dinit, dgamma, dbeta, T=T, g0=g0, g1=g1, **options,
        )  # fmt: skip
    return [dq, dk, dv, dsteps, dsizes.sum(2), dstart, dinit, dgamma.sum(2), dbeta.sum(2)]
