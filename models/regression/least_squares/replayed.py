"""Least squares in chunks by models/kernels/least_squares, in little memory.

The moments before every chunk are the largest tensors by far. So the backward pass has only the solution and what came
in, and lays the call out again. On a GPU what stands around the solve and the scan is compiled here, since `solve` and
its gradient are no graph that a block could be compiled with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels import least_squares as kernels
from models.regression.chunks import from_chunks, into_chunks, short
from models.regression.least_squares.layout import Laid, Ridge, laid_out
from models.regression.least_squares.moments import Moments, first_moments
from models.regression.least_squares.solvers import Report, default_tolerance

COMPILED = 64  # tokens from which on it pays
FADED = 1e-30  # of the moments, by which they count as gone


@torch.compiler.disable
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
) -> tuple[Tensor, Moments, Report]:
    """The map of recurrent_least_squares. Arguments and results as chunked_least_squares has them, but for the limits
    of conjugate gradients in the place of a solver. max_steps: None is 4 K, twice as many as in PyTorch, of which those
    with 11 bits do less."""
    first = first_moments(q, k, v, moments)
    (T, _, K), size = k.shape[1:], ridge.size
    assert size is not None
    limits = tolerance or default_tolerance(first.keys.dtype, v.dtype), max_steps or 4 * K
    given = (q, k, v, write_weight, size, log_decay, first.keys, first.pairs, mix)
    with torch.autocast(q.device.type, enabled=False):
        o, keys, pairs, *found = _Replayed.apply(*given, ridge.scaled, limits, min(kernels.LONGEST, short(chunk, T)))
    return o, Moments(keys, pairs), Report(*found)


class _Replayed(torch.autograd.Function):
    """Laid out, solved, read; and in the backward pass laid out again, with the solution of before."""

    @staticmethod
    def forward(ctx, q, k, v, b, size, log_decay, keys, pairs, mix, scaled, limits, chunk):
        given = (q, k, v, b, size, log_decay, keys, pairs, mix)
        (B, T, H, _), ctx.settings, ctx.limits = k.shape, (scaled, chunk), limits
        laid = Laid(*_fused(_lay, k)(*given, scaled, chunk))
        x, *found = kernels.conjugate_gradients(laid.q, *laid.normal, *limits)
        ctx.save_for_backward(*given, x)
        o, *found = (from_chunks(y, (B, T, H)) for y in (_fused(_read, k)(v.dtype, x, *laid), *found))
        ctx.mark_non_differentiable(*found)
        return o, *laid.moments(B)[:2], *found

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dkeys, dpairs, *_):
        *given, x = ctx.saved_tensors
        wanted = [y is not None and need for y, need in zip(given, ctx.needs_input_grad, strict=False)]
        given = [y if y is None else y.detach().requires_grad_(want) for y, want in zip(given, wanted, strict=True)]
        with torch.autocast(x.device.type, enabled=False):
            with torch.enable_grad():
                parts = _fused(_lay, x)(*given, *ctx.settings)
            laid = Laid(*(_detached(y) for y in parts))
            do = into_chunks(do, x.shape[1], x.dtype)
            with _tf32():
                dquery, doG = _fused(_query_gradient, x)(do, *laid)
            dx = dquery if laid.mix is None else dquery * laid.mix
            db = kernels.conjugate_gradients(dx, *laid.normal, *ctx.limits)[0]
            with _tf32():
                upstream = _fused(_gradients, x)(do, doG, dquery, db, x, *laid)
            upstream = [*upstream, _side_by_side(dkeys, dpairs)]
            paths = [(y, g) for y, g in zip(parts, upstream, strict=True) if y is not None and y.requires_grad]
            reached, arriving = zip(*paths, strict=True)
            leaves = [y for y, want in zip(given, wanted, strict=True) if want]
            found = iter(torch.autograd.grad(reached, leaves, arriving, allow_unused=True))
        return *(next(found) if want else None for want in wanted), None, None, None


def _detached(x: Any) -> Any:
    return x if x is None else x.detach()


def _lay(q, k, v, b, size, log_decay, keys, pairs, mix, scaled: bool, chunk: int) -> tuple[Tensor | None, ...]:
    """The parts of Laid. The moments are one tensor: a slice that leaves a graph has its gradient outside of it, three
    passes through all of them."""
    return laid_out(q, k, v, b, Ridge(size, scaled), log_decay, Moments(keys, pairs), mix, chunk, kernels.scan)


def _read(dtype: torch.dtype, x: Tensor, *parts: Any) -> Tensor:
    return Laid(*parts).read(x).to(dtype)


def _query_gradient(do: Tensor, *parts: Any) -> tuple[Tensor, Tensor]:
    """Of what is read with: o = s_t y_t G + sum_i W_ti (y_t . k_i) v_i , y = q + alpha (x - q). And do G^T. do, k and
    values have 16 bits, so that they are what they are in TF32; the solve makes errors of other parts larger."""
    laid = Laid(*parts)
    doG = _times((do,), _two(laid.pairs.mT))
    return doG * laid.start + torch.bmm(torch.bmm(do, laid.values.mT) * laid.weights, laid.keys), doG


def _gradients(do: Tensor, doG: Tensor, dquery: Tensor, db: Tensor, x: Tensor, *parts: Any) -> tuple[Any, ...]:
    """By the parts of Laid, of the read, and of -db . (x A) with x and db held fixed (solvers.py). What goes to gates
    is a sum of terms that cancel, so its products have more digits than TF32. With H it has none: x A = q, so that
        s_t e_t . (x_t H) = e_t . q_t - sum_i W_ti (x_t . k_i) (e_t . k_i) - sum_j Lambda_j x_tj e_tj ,    e = -db .
    """
    k, weights, start, _, ridge, q, values, mix, _ = Laid(*parts)
    y, e = x if mix is None else torch.lerp(q, x, mix), db.neg()
    ek, dov = _times(_two(e), (k.mT,)), torch.bmm(do, values.mT)
    xk = _times(_two(x), (k.mT,))
    yk = xk if mix is None else _times(_two(y), (k.mT,))
    dk = torch.bmm((dov * weights).mT, y) + torch.bmm((xk * weights).mT, e) + torch.bmm((ek * weights).mT, x)
    xe = x * e
    kept = (e * q - xe * ridge).sum(-1, True) - (weights * xk * ek).sum(-1, True)
    # what a gate has closed gets none: it would be divided by nothing, and its own gradient is multiplied by it again
    dstart = (y * doG).sum(-1, True) + torch.where(start > FADED, kept / start.clamp(min=FADED), 0.0)
    dbefore = _times(_two((x * start).mT), _two(torch.cat((e, do), -1)))
    if mix is not None:
        dbefore = torch.cat((dbefore[..., : k.shape[-1]], _times(_two((y * start).mT), (do,))), -1)
    dq = db if mix is None else db + dquery * (1 - mix)
    dmix = None if mix is None else (dquery * (x - q)).sum(-1, True)
    dvalues, dridge = torch.bmm((yk * weights).mT, do), xe.sum_to_size(ridge.shape)
    return Laid(dk, dov * yk + xk * ek, dstart, dbefore, dridge, dq, dvalues, dmix)[:-1]


@contextmanager
def _tf32() -> Iterator[None]:
    """Products of float32 have operands of 11 bits, where the GPU has such."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _two(x: Tensor) -> tuple[Tensor, ...]:
    """Parts of float32 of which TF32 keeps all of the first, 11 bits, and 11 of the 13 of the second. float64 has no
    TF32, and is one part."""
    if x.dtype != torch.float32:
        return (x,)
    high = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return high, x - high


def _times(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    """The product of sums of parts, without that of both second parts, which is below float32's rounding. As one
    product, whose operands are parts beside each other: a sum of several would go through memory for each."""
    pairs = [(i, j) for i, j in ((0, 0), (1, 0), (0, 1)) if i < len(a) and j < len(b)]
    return torch.bmm(torch.cat([a[i] for i, _ in pairs], -1), torch.cat([b[j] for _, j in pairs], -2))


def _side_by_side(dkeys: Tensor, dpairs: Tensor) -> Tensor:
    return torch.cat((dkeys, dpairs), dim=-1).flatten(0, 1)


def _fused(form: Callable[..., Any], like: Tensor) -> Callable[..., Any]:
    return _compiled(form) if like.is_cuda and like.shape[1] >= COMPILED else form


@cache
def _compiled(form: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(form, dynamic=False)
