"""Least squares in chunks by models/kernels/least_squares, in little memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels import least_squares as kernels
from models.regression.chunks import from_chunks, short
from models.regression.least_squares.layout import Ridge, laid_out
from models.regression.least_squares.moments import Moments, first_moments
from models.regression.least_squares.solvers import Solution, default_tolerance


@torch.compiler.disable  # its backward pass differentiates, which can't be traced
def kernel_least_squares(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write_weight: Tensor,
    ridge: Ridge,
    log_decay: Tensor | None = None,
    moments: Moments | None = None,
    mix: Tensor | None = None,
    tolerance: float | None = None,
    max_steps: int | None = None,
    chunk: int = kernels.LONGEST,
) -> tuple[Tensor, Moments, Solution]:
    """The same map, solved by models/kernels/least_squares. The backward pass has only the solution and what came in,
    and makes the rest again: moments before every chunk are the largest tensors by far."""
    first = first_moments(q, k, v, moments)
    (T, _, K), size = k.shape[1:], ridge.size
    assert size is not None
    limits = tolerance or default_tolerance(first.keys.dtype, v.dtype), max_steps or 2 * K
    given = (q, k, v, write_weight, size, log_decay, first.keys, first.pairs, mix)
    with torch.autocast(q.device.type, enabled=False):
        o, keys, pairs, *found = _Replayed.apply(*given, ridge.scaled, limits, min(kernels.LONGEST, short(chunk, T)))
    return o.to(v.dtype), Moments(keys, pairs), Solution(*found)


class _Replayed(torch.autograd.Function):
    """Laid out, solved, read; and in the backward pass laid out and read again, with the solution of before."""

    @staticmethod
    def forward(ctx, q, k, v, b, size, log_decay, keys, pairs, mix, scaled, limits, chunk):
        given = (q, k, v, b, size, log_decay, keys, pairs, mix)
        (B, T, H, _), ctx.scaled, ctx.limits, ctx.chunk = k.shape, scaled, limits, chunk
        laid = _Replayed.laid_out(ctx, given)
        x, steps, residual = kernels.conjugate_gradients(laid.q, *laid.A, *limits)
        ctx.save_for_backward(*given, x)
        o, *found = (from_chunks(y, (B, T, H)) for y in (laid.read(x), x, steps, residual))
        ctx.mark_non_differentiable(*found)
        return o, *laid.moments(B)[:2], *found

    @staticmethod
    def laid_out(ctx, given):
        q, k, v, b, size, log_decay, keys, pairs, mix = given
        return laid_out(q, k, v, b, Ridge(size, ctx.scaled), log_decay, Moments(keys, pairs), mix, ctx.chunk)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dkeys, dpairs, *_):
        *given, x = ctx.saved_tensors
        wanted = [y is not None and need for y, need in zip(given, ctx.needs_input_grad, strict=False)]
        with torch.autocast(x.device.type, enabled=False), torch.enable_grad():
            given = [y if y is None else y.detach().requires_grad_(want) for y, want in zip(given, wanted, strict=True)]
            laid, x = _Replayed.laid_out(ctx, given), x.detach().requires_grad_()
            o = from_chunks(laid.read(x), do.shape[:3])
            (dx,) = torch.autograd.grad(o, x, do, retain_graph=True)
            with torch.no_grad():
                db = kernels.conjugate_gradients(dx, *laid.A, *ctx.limits)[0]
            # as in solvers.py: db = A^-1 dx, and the rest is the gradient of -db . (x A) with x and db held fixed
            leaves = [y for y, want in zip(given, wanted, strict=True) if want]
            outputs = [o, *laid.moments(len(do))[:2], laid.q, laid.A.times(x.detach())]
            paths = [(y, g) for y, g in zip(outputs, [do, dkeys, dpairs, db, db.neg()], strict=True) if y.requires_grad]
            reached, arriving = zip(*paths, strict=True)
            found = iter(torch.autograd.grad(reached, leaves, arriving, allow_unused=True))
        return *(next(found) if want else None for want in wanted), None, None, None
