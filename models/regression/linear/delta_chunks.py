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
        with torch.autocast(q.device.type, enabled=False):
            tensors = (q, k, v, b, log_decay, w)
            q, k, v, b, log_decay, w = (into_chunks(x, chunk, memory.dtype) for x in tensors)
            w = w if own else k
            early, channels = gradient_before_decay and log_decay is not None, _per_channel(log_decay)
            kept, start, end, start_k = _inside(k, log_decay, early)
            fade, fade_k = _fades(kept, early, channels)
            R = unit_inverse(_scores(k, w, fade_k).mul_(b))
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
            o = torch.bmm(q * start, S[:M]).baddbmm_(_scores(q, w, fade), U)
        ctx.save_for_backward(q, k, w, v, b, start, end, start_k, R, Y, U, S, *kept)
        ctx.like, ctx.has_decay, ctx.early, ctx.own = (B, T, H), log_decay is not None, early, own
        ctx.channels = channels
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
        q, k, w, v, b, start, end, start_k, R, Y, U, S, *kept = ctx.saved_tensors
        fade, fade_k = _fades(kept, ctx.early, ctx.channels)
        (M, rows), whole = (len(k), len(S) - len(k)), start[:, -1].unsqueeze(-1)
        with torch.autocast(q.device.type, enabled=False):
            do = into_chunks(do, q.shape[1], q.dtype)
            dU = torch.bmm(_scores(q, w, fade).mT, do)
            Z = w * end
            dS = torch.empty_like(S)
            torch.bmm((q * start).mT, do, out=dS[:M])
            dS[M:] = dmemory.flatten(0, 1)
            for n in reversed(range(0, M, rows)):
                here, there = slice(n, n + rows), slice(n + rows, n + 2 * rows)
                dU[here].baddbmm_(Z[here], dS[there])
                dS[here].addcmul_(dS[there], whole[here]).baddbmm_(Y[here].mT, dU[here], alpha=-1)
            E = torch.bmm(R.mT, dU)

            dq, dw = _scores_backward(torch.bmm(do, U.mT), q, w, fade)
            dq.add_(torch.bmm(do, S[:M].mT).mul_(start))
            EU = torch.bmm(E, U.mT)
            EU.diagonal(dim1=-2, dim2=-1).zero_()
            G, dw_erased = _scores_backward(EU, k * b, w, fade_k)
            G.add_(torch.bmm(E, S[:M].mT).mul_(start_k)).neg_()
            dw.sub_(dw_erased).add_(torch.bmm(U, dS[rows:].mT).mul_(end))
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
                dlog_decay = dlog_decay if ctx.channels else dlog_decay.squeeze(-1)
            if not ctx.own:
                dk.add_(dw)
            dv, dmemory = E.mul_(b), dS[:rows].unflatten(0, ctx.like[::2])
            dq, dk, dv, db = (from_chunks(x, ctx.like) for x in (dq, dk, dv, db))
            dw_own = from_chunks(dw, ctx.like) if ctx.own else None
            return dq, dk, dw_own, dv, db.squeeze(-1), dlog_decay, dmemory, None, None


class _Channels(NamedTuple):
    """In place of L, where each channel fades at its own rate [M, C, K]; early: before a token's own gate."""

    log_decay: Tensor
    early: bool

    def readers(self, x: Tensor) -> Tensor:
        """Nothing of before is there at FORGET."""
        return x.masked_fill(self.log_decay <= FORGET, 0.0) if self.early else x


Fade = Tensor | _Channels


def _per_channel(log_decay: Tensor | None) -> bool:
    """Of log decays in chunks."""
    return log_decay is not None and log_decay.shape[-1] > 1


def _inside(k: Tensor, log_decay: Tensor | None, early: bool) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """What _fades makes L of, and what is left of the first memory at each token and of each at the chunk's end; and of
    that memory where the keys look it up."""
    if log_decay is not None and _per_channel(log_decay):
        start, end = log_decay.cumsum(1).exp(), halvings.after(log_decay).exp()
        return [log_decay], start, end, _before_decay(start, log_decay, 1.0) if early else start
    fade, start, end = fades(k, log_decay)
    if log_decay is None or not early:
        return [fade], start, end, start
    return [fade, _before_decay(fade, log_decay, 0.0)], start, end, _before_decay(start, log_decay, 1.0)


def _fades(kept: list[Tensor], early: bool, channels: bool) -> tuple[Fade, Fade]:
    """L for the queries, and for the keys."""
    if channels:
        return _Channels(kept[0], False), _Channels(kept[0], early)
    return kept[0], kept[-1]


def _before_decay(left: Tensor, log_decay: Tensor, first: float) -> Tensor:
    """What is left where the token before reads: rows one later, and of the first `first`. Nothing at FORGET."""
    left = left.roll(1, 1)
    left[:, 0] = first
    return left.masked_fill_(log_decay <= FORGET, 0.0)


def _scores(x: Tensor, y: Tensor, fade: Fade) -> Tensor:
    """sum_j x_tj L_ti(j) y_ij of x, y [M, C, K] with L [C, C], [M, C, C] or per channel."""
    if isinstance(fade, _Channels):
        return halvings.scores(fade.readers(x), y, *fade)
    return torch.bmm(x, y.mT).mul_(fade)


def _scores_backward(d: Tensor, x: Tensor, y: Tensor, fade: Fade) -> tuple[Tensor, Tensor]:
    """The gradients of _scores by x and y, d [M, C, C] being its own; d is overwritten."""
    if isinstance(fade, _Channels):
        dx, dy = halvings.scores_backward(d, fade.readers(x), y, *fade)
        return fade.readers(dx), dy
    d.mul_(fade)
    return torch.bmm(d, y), torch.bmm(d.mT, x)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y).unsqueeze(-1)
