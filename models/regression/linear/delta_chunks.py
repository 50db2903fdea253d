"""The delta rule's chunked form with a gradient written by hand: large products and one scan, not a walk along the
scan's graph. The mathematics is chunked_delta's (delta.py).

Shapes: B batch, T tokens, H heads, K key width, V value width, C chunk, N chunks, M = N B H: the chunks of one sequence
are B H apart, `rows` below.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.regression import halvings
from models.regression.chunks import fades, from_chunks, into_chunks, unit_inverse
from models.regression.regressor import FORGET


class ChunkedDelta(torch.autograd.Function):
    """(q, k, w or None for k, v, b, log_decay, memory, chunk, gradient_before_decay) -> (o, memory)."""

    @staticmethod
    def forward(ctx, q, k, w, v, b, log_decay, memory, chunk, gradient_before_decay):
        (B, T, H, _), own = k.shape, w is not None
        ctx.by_channel = log_decay is not None and log_decay.ndim == k.ndim  # of which there may be one
        with torch.autocast(q.device.type, enabled=False):
            tensors = (q, k, v, b, log_decay, w)
            q, k, v, b, log_decay, w = (into_chunks(x, chunk, memory.dtype) for x in tensors)
            w = w if own else k
            inside, start, end, start_k = _inside(k, log_decay, gradient_before_decay and log_decay is not None)
            attend, system = inside.scores(q, k, w)
            R = unit_inverse(system.mul_(b))
            Y = torch.bmm(R, k * (start_k * b))
            U = torch.bmm(R * b.mT, v)
            Z = w * end
            (M, rows), whole = (len(k), B * H), start[:, -1].unsqueeze(-1)
            S = k.new_zeros(M + rows, *memory.shape[-2:])  # before every chunk, and after the last
            S[:rows] = memory.flatten(0, 1)
            for n in range(0, M, rows):
                here, there = slice(n, n + rows), slice(n + rows, n + 2 * rows)
                U[here].baddbmm_(Y[here], S[here], alpha=-1)
                # 0 + S e^c, not by out=, which a graph of torch.export can't run where weights want gradients
                S[there].addcmul_(S[here], whole[here]).baddbmm_(Z[here].mT, U[here])
            o = torch.bmm(q * start, S[:M]).baddbmm_(attend, U)
        ctx.save_for_backward(q, k, w, v, b, start, end, start_k, R, Y, U, S, attend, *inside.kept)
        ctx.like, ctx.has_decay, ctx.early, ctx.own = (B, T, H), log_decay is not None, inside.early, own
        ctx.channels = inside.channels
        return from_chunks(o, ctx.like), S[M:].clone().unflatten(0, (B, H))

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dmemory):
        """With dX the gradient by X, each line is the transpose of one of chunked_delta's:

        dU = (Q W^T * L)^T dO + Z dS'                         E = R^T dU , the gradient by the system's right-hand side
        dS = (e^c Q)^T dO + e^{c_C} dS' - Y^T dU              the scan, now from the last chunk to the first
        dQ = (dO U^T * L) W + e^c dO S^T
        dK = b G ,   G = -(E U^T * L) W - e^c E S^T           (the diagonal of E U^T does not count)
        dW = (dO U^T * L)^T Q - (E U^T * L)^T b K + e^{c_C - c} U dS'^T
        dV = b E ,       db = E . V + G . K                   (row by row)
        dc = Q . dQ + K . dK - W . dW ,                       plus S' . dS' for the chunk's last c
        The last: e^{c_t} scales whatever token t reads with, its query and its key; e^{-c_t} the key it writes with.
        Before the decay the key reads with c_{t-1}, and K . dK is that one's. And since c is a sum of log decays, each
        of these collects dc from its token to the end of the chunk. With a decay per channel no product is summed over
        channels.
        """
        q, k, w, v, b, start, end, start_k, R, Y, U, S, attend, *kept = ctx.saved_tensors
        inside = _Fades(tuple(kept), ctx.early, ctx.channels)
        (M, rows), whole = (len(k), len(S) - len(k)), start[:, -1].unsqueeze(-1)
        with torch.autocast(q.device.type, enabled=False):
            do = into_chunks(do, q.shape[1], q.dtype)
            dU = torch.bmm(attend.mT, do)
            Z = w * end
            dS = torch.empty_like(S)
            torch.bmm((q * start).mT, do, out=dS[:M])
            dS[M:] = dmemory.flatten(0, 1)
            for n in reversed(range(0, M, rows)):
                here, there = slice(n, n + rows), slice(n + rows, n + 2 * rows)
                dU[here].baddbmm_(Z[here], dS[there])
                dS[here].addcmul_(dS[there], whole[here]).baddbmm_(Y[here].mT, dU[here], alpha=-1)
            E = torch.bmm(R.mT, dU)

            EU = torch.bmm(E, U.mT).neg_()
            EU.diagonal(dim1=-2, dim2=-1).zero_()
            dq, G, dw = inside.backward(torch.bmm(do, U.mT), EU, q, k * b, w)
            dq.add_(torch.bmm(do, S[:M].mT).mul_(start))
            G.sub_(torch.bmm(E, S[:M].mT).mul_(start_k))
            dw.add_(torch.bmm(U, dS[rows:].mT).mul_(end))
            db = _dot(E, v).add_(_dot(k, G))
            dk, dlog_decay = G.mul_(b), None
            if ctx.has_decay:
                along = torch.mul if ctx.channels else _dot
                erased = along(k, dk)
                if ctx.early:
                    erased = erased.roll(-1, 1)
                    erased[:, -1] = 0.0
                dc = along(q, dq) + erased - along(w, dw)
                dc[:, -1] += (S[rows:] * dS[rows:]).sum(-1 if ctx.channels else (-2, -1)).view_as(dc[:, -1])
                dlog_decay = from_chunks(dc.flip(-2).cumsum(-2).flip(-2), ctx.like)
                dlog_decay = dlog_decay if ctx.by_channel else dlog_decay.squeeze(-1)
            if not ctx.own:
                dk.add_(dw)
            dv, dmemory = E.mul_(b), dS[:rows].unflatten(0, ctx.like[::2])
            dq, dk, dv, db = (from_chunks(x, ctx.like) for x in (dq, dk, dv, db))
            dw_own = from_chunks(dw, ctx.like) if ctx.own else None
            return dq, dk, dw_own, dv, db.squeeze(-1), dlog_decay, dmemory, None, None


class _Fades(NamedTuple):
    """L for the queries and for the keys, [C, C] or [M, C, C]; or the log decays [M, C, K] of channels that fade at
    their own rates. early: keys look up before their own gate, and at FORGET nothing."""

    kept: tuple[Tensor, ...]
    early: bool
    channels: bool

    def readers(self, q: Tensor, k: Tensor) -> tuple[halvings.Reader, halvings.Reader]:
        return halvings.Reader(q), halvings.Reader(self.forgotten(k), self.early)

    def forgotten(self, k: Tensor) -> Tensor:
        return k.masked_fill(self.kept[0] <= FORGET, 0.0) if self.early else k

    def scores(self, q: Tensor, k: Tensor, w: Tensor) -> list[Tensor]:
        """sum_j x_tj L_ti(j) w_ij of queries x and of keys, [M, C, C]."""
        if self.channels:
            return halvings.scores(self.readers(q, k), w, self.kept[0])
        return [torch.bmm(x, w.mT).mul_(L) for x, L in ((q, self.kept[0]), (k, self.kept[-1]))]

    def backward(self, dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients by q, k and w from those by both scores, which are overwritten."""
        if self.channels:
            (by_q, by_k), by_w = halvings.scores_backward((dq, dk), self.readers(q, k), w, self.kept[0])
            return by_q, self.forgotten(by_k), by_w
        dq.mul_(self.kept[0])
        dk.mul_(self.kept[-1])
        return torch.bmm(dq, w), torch.bmm(dk, w), torch.bmm(dq.mT, q).baddbmm_(dk.mT, k)


def _inside(k: Tensor, log_decay: Tensor | None, early: bool) -> tuple[_Fades, Tensor, Tensor, Tensor]:
    """What is left inside a chunk; of the first memory at each token; of each at the chunk's end; and of that memory
    where the keys look it up."""
    if log_decay is not None and log_decay.shape[-1] > 1:
        start, end = log_decay.cumsum(1).exp(), halvings.after(log_decay).exp()
        inside = _Fades((log_decay,), early, channels=True)
    else:
        fade, start, end = fades(k, log_decay)
        inside = _Fades((fade, _before_decay(fade, log_decay, 0.0) if early else fade), early, channels=False)
    return inside, start, end, _before_decay(start, log_decay, 1.0) if early else start


def _before_decay(left: Tensor, log_decay: Tensor | None, first: float) -> Tensor:
    """What is left where the token before reads: rows one later, and of the first `first`. Nothing at FORGET."""
    assert log_decay is not None
    left = left.roll(1, 1)
    left[:, 0] = first
    return left.masked_fill_(log_decay <= FORGET, 0.0)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y).unsqueeze(-1)
