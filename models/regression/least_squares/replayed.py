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
from models.regression.least_squares.solvers import Normal, Solution, default_tolerance

COMPILED = 64  # tokens from which on it pays


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
) -> tuple[Tensor, Moments, Solution]:
    """The map of recurrent_least_squares. Arguments and results as chunked_least_squares has them, but for the limits
    of conjugate gradients in the place of a solver. max_steps: None is 4 K, twice as many as in PyTorch, of which those
    in TF32 do less."""
    first = first_moments(q, k, v, moments)
    (T, _, K), size = k.shape[1:], ridge.size
    assert size is not None
    limits = tolerance or default_tolerance(first.keys.dtype, v.dtype), max_steps or 4 * K
    given = (q, k, v, write_weight, size, log_decay, first.keys, first.pairs, mix)
    with torch.autocast(q.device.type, enabled=False):
        o, keys, pairs, *found = _Replayed.apply(*given, ridge.scaled, limits, min(kernels.LONGEST, short(chunk, T)))
    return o.to(v.dtype), Moments(keys, pairs), Solution(*found)


class _Replayed(torch.autograd.Function):
    """Laid out, solved, read; and in the backward pass laid out again, with the solution of before."""

    @staticmethod
    def forward(ctx, q, k, v, b, size, log_decay, keys, pairs, mix, scaled, limits, chunk):
        given = (q, k, v, b, size, log_decay, keys, pairs, mix)
        (B, T, H, _), ctx.settings, ctx.limits = k.shape, (scaled, chunk), limits
        *parts, last = _fused(_lay, k)(*given, scaled, chunk)
        x, steps, residual = kernels.conjugate_gradients(parts[5], *parts[:5], *limits)
        ctx.save_for_backward(*given, x)
        o = _fused(_read, k)(*parts, x)
        o, *found = (from_chunks(y, (B, T, H)) for y in (o, x, steps, residual))
        ctx.mark_non_differentiable(*found)
        return o, *_moments(last, B, k.shape[-1]), *found

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dkeys, dpairs, *_):
        *given, x = ctx.saved_tensors
        wanted = [y is not None and need for y, need in zip(given, ctx.needs_input_grad, strict=False)]
        given = [y if y is None else y.detach().requires_grad_(want) for y, want in zip(given, wanted, strict=True)]
        with torch.autocast(x.device.type, enabled=False):
            with torch.enable_grad():
                *parts, last = _fused(_lay, x)(*given, *ctx.settings)
            plain = [y if y is None else y.detach() for y in parts]
            do = into_chunks(do, x.shape[1], x.dtype)
            with _tf32():
                dquery, doG = _fused(_query_gradient, x)(do, *plain)
            dx = dquery if plain[8] is None else dquery * plain[8]
            db = kernels.conjugate_gradients(dx, *plain[:5], *ctx.limits)[0]
            with _tf32():
                upstream = _fused(_gradients, x)(do, doG, dquery, db, x, *plain)
            upstream = [*upstream, _side_by_side(dkeys, dpairs)]
            paths = [(y, g) for y, g in zip([*parts, last], upstream, strict=True) if y is not None and y.requires_grad]
            reached, arriving = zip(*paths, strict=True)
            leaves = [y for y, want in zip(given, wanted, strict=True) if want]
            found = iter(torch.autograd.grad(reached, leaves, arriving, allow_unused=True))
        return *(next(found) if want else None for want in wanted), None, None, None


def _lay(q, k, v, b, size, log_decay, keys, pairs, mix, scaled: bool, chunk: int) -> tuple[Tensor | None, ...]:
    """The parts of Normal, then q, G, values, mix [M, C, 1], and last, as layout.Laid has them."""
    laid = laid_out(q, k, v, b, Ridge(size, scaled), log_decay, Moments(keys, pairs), mix, chunk, kernels.scan)
    return *laid.A, laid.q, laid.G, laid.values, laid.mix, laid.last


def _read(k, weights, start, first, ridge, q, G, values, mix, x) -> Tensor:
    return Laid(Normal(k, weights, start, first, ridge), q, G, values, mix, x).read(x)


def _query_gradient(do, k, weights, start, first, ridge, q, G, values, mix) -> tuple[Tensor, Tensor]:
    """Of what is read with: o = s_t y_t G + sum_i W_ti (y_t . k_i) v_i , y = q + alpha (x - q). And do G^T. do, k and
    values have 16 bits, so that they are what they are in TF32; the solve makes errors of other parts larger."""
    doG = _times((do,), _two(G.mT))
    return doG * start + torch.bmm(torch.bmm(do, values.mT) * weights, k), doG


def _gradients(do, doG, dquery, db, x, k, weights, start, first, ridge, q, G, values, mix) -> tuple[Tensor | None, ...]:
    """By the parts of Normal, q, G, values and mix: of the read, and of -db . (x A) with x and db held fixed
    (solvers.py). What goes to gates is a sum of terms that cancel, so its products have more digits than TF32."""
    y, e = x if mix is None else torch.lerp(q, x, mix), db.neg()
    ek, dov = torch.bmm(e, k.mT), torch.bmm(do, values.mT)
    xk = _times(_two(x), (k.mT,))
    yk = xk if mix is None else _times(_two(y), (k.mT,))
    dk = torch.bmm((dov * weights).mT, y) + torch.bmm((xk * weights).mT, e) + torch.bmm((ek * weights).mT, x)
    dstart = (y * doG).sum(-1, True) + (e * _times(_two(x), _two(first))).sum(-1, True)
    dfirst, dG = _times(_two((x * start).mT), _two(e)), _times(_two((y * start).mT), (do,))
    dq = db if mix is None else db + dquery * (1 - mix)
    dmix = None if mix is None else (dquery * (x - q)).sum(-1, True)
    dvalues, dridge = torch.bmm((yk * weights).mT, do), (x * e).sum_to_size(ridge.shape)
    return dk, dov * yk + xk * ek, dstart, dfirst, dridge, dq, dG, dvalues, dmix


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
    """The product of sums of parts, without that of both second parts, which is below float32's rounding."""
    product = torch.bmm(a[0], b[0])
    for i, j in ((1, 0), (0, 1)):
        if i < len(a) and j < len(b):
            product = torch.baddbmm(product, a[i], b[j])
    return product


def _moments(last: Tensor, B: int, K: int) -> tuple[Tensor, Tensor]:
    keys, pairs = last.unflatten(0, (B, -1)).split([K, last.shape[-1] - K], -1)
    return keys, pairs


def _side_by_side(dkeys: Tensor, dpairs: Tensor) -> Tensor:
    return torch.cat((dkeys, dpairs), dim=-1).flatten(0, 1)


def _fused(form: Callable[..., Any], like: Tensor) -> Callable[..., Any]:
    return _compiled(form) if like.is_cuda and like.shape[1] >= COMPILED else form


@cache
def _compiled(form: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(form, dynamic=False)
