"""Solving (H_t + Lambda) x_t = b_t for every token of every chunk at once, and the gradient of it.

No H_t is formed where products with it suffice. From the chunk's first H, with s_t what is left of it at token t and
W_ti what is left there of the pair i,
    H_t = s_t H + sum_{i<=t} W_ti k_i^T k_i ,    p_t H_t = s_t p_t H + sum_{i<=t} W_ti (p_t . k_i) k_i :
for all tokens together that is one pass of linear attention in chunks, with keys for values (MesaNet, von Oswald et al.
2025, section 3).

Gradient.   x = A^-1 b with A symmetric, so a loss with gradient dx by x has, by another solve with the same A,
                db = A^-1 dx ,    dA = -x^T db ,
            and dA goes on to what A is made of. It is the gradient of the solution, not of the steps that led there,
            and so only as good as both solves: at 4 steps of conjugate gradients in place of 8 it is 2 % off.

Shapes: M chunks, C tokens of a chunk, K key width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from models.parts import solves

# Numbers in the matrices that a direct solver holds at a time: 128 MiB of float64
AT_ONCE = 1 << 24

# Steps of conjugate gradients on a GPU between two looks at whether all tokens are done: looking waits for the device.
LOOK_EVERY = 4


class Normal(NamedTuple):
    """The matrices A_t = H_t + Lambda of the normal equations, by their parts.

    keys [M, C, K], weights [M, C, C] (W above, zero for i > t), start [M, C, 1] (s), first [M, K, K] (H), and ridge
    [M, 1, K] or [M, C, 1].
    """

    keys: Tensor
    weights: Tensor
    start: Tensor
    first: Tensor
    ridge: Tensor

    def times(self, p: Tensor) -> Tensor:
        """p_t A_t, [M, C, K] to [M, C, K]."""
        attend = torch.bmm(p, self.keys.mT).mul_(self.weights)
        return torch.bmm(p, self.first).mul_(self.start).baddbmm_(attend, self.keys).addcmul_(p, self.ridge)

    def diagonal(self) -> Tensor:
        """[M, C, K]."""
        first = self.first.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        return torch.baddbmm(self.start * first, self.weights, self.keys.square()) + self.ridge

    def squared_norms(self) -> Tensor:
        """||H_t||_F^2 without the ridge, [M, C, 1]: a sum of terms that are not negative, so nothing cancels."""
        k, W, s = self.keys, self.weights, self.start
        first = self.first.square().sum((-2, -1), keepdim=True)
        cross = torch.linalg.vecdot(torch.bmm(k, self.first), k).unsqueeze(-1)
        among = (torch.bmm(W, torch.bmm(k, k.mT).square()) * W).sum(-1, keepdim=True)
        return s.square() * first + 2 * s * torch.bmm(W, cross) + among

    def matrices(self) -> Tensor:
        """H_t without the ridge, [M, C, K, K]: large, for a few chunks at a time."""
        outer = (self.keys.unsqueeze(-1) * self.keys.unsqueeze(-2)).flatten(-2)
        return (
            torch.bmm(self.weights, outer)
            .unflatten(-1, self.first.shape[-2:])
            .addcmul_(self.start.unsqueeze(-1), self.first.unsqueeze(-3))
        )

    def few(self) -> Iterator[tuple[slice, Normal]]:
        """The same, as many chunks at a time as AT_ONCE allows."""
        M, C, K = self.keys.shape
        step = max(1, AT_ONCE // (C * K * K))
        for rows in (slice(m, m + step) for m in range(0, M, step)):
            yield rows, Normal(*(x[rows] for x in self))


class Solution(NamedTuple):
    """x [M, C, K]; and of iterative solvers, the steps each token took [M, C, 1] and the residual |b - x A| / |b| it
    was left with [M, C, 1], by the solver's own account."""

    x: Tensor
    steps: Tensor | None = None
    residual: Tensor | None = None


class Report(NamedTuple):
    """Of a call's solves, [B, T, H, 1]: the steps that each token took and the residual that it was left with. None by
    a direct solver."""

    steps: Tensor | None = None
    residual: Tensor | None = None


# (A, b, the dtype that the pairs came in): A and b have twice its digits, and the solution need not use them all.
Solver = Callable[[Normal, Tensor, torch.dtype], Solution]


def default_tolerance(dtype: torch.dtype, pairs: torch.dtype, condition: float = 1e4) -> float:
    """The relative residual to stop at, of a solve in `dtype` for `pairs` and condition numbers up to `condition`:
    1.2e-9 in float64 for pairs in float32, 2.2e-14 for pairs in float64, and 1.2e-5 in float32.

    With r what is left of b, an output is off by r A^-1 G = r S: by the residual, whatever the condition. A gradient
    db = A^-1 dx is off by r A^-1 too, but may be as small as dx / |A|, so that its error is up to the condition number
    times the residual: 100 roundings of the pairs, or of float32 for those in 16 bits, are spread over it. Less than
    100 roundings of `dtype` would not be reached.
    """
    rounding = torch.finfo(torch.promote_types(pairs, torch.float32)).eps
    return 100 * max(torch.finfo(dtype).eps, rounding / condition)


def conjugate_gradients(
    A: Normal, b: Tensor, pairs: torch.dtype, tolerance: float | None = None, max_steps: int | None = None
) -> Solution:
    """Hestenes and Stiefel (1952), from x = b / diag(A) as MesaNet starts (algorithm 1).

    A token stops where its |b - x A| <= tolerance |b| and stays as it is, whatever others do: outputs depend neither on
    what else is in the batch nor on how a sequence is split into calls. Tokens that have not stopped after max_steps
    are left where they are. None: default_tolerance, for 2048 equal keys and a ridge of 0.2; 2 K steps, where exact
    arithmetic needs K.
    """
    tolerance, max_steps = tolerance or default_tolerance(b.dtype, pairs), max_steps or 2 * b.shape[-1]
    look = 1 if b.device.type == "cpu" else LOOK_EVERY
    b, size = _scaled(b)
    length = _dot(b, b)
    x = b / A.diagonal()
    r = b - A.times(x)
    p, squares, goal = r.clone(), _dot(r, r), tolerance**2 * length
    steps = torch.zeros_like(length)
    for step in range(max_steps):
        active = squares > goal
        if step % look == 0 and not torch.compiler.is_exporting() and not active.any():
            break  # an exported graph has no branches, and takes all steps
        Ap = A.times(p)
        alpha = torch.where(active, squares, 0.0) / torch.where(active, _dot(p, Ap), 1.0)
        x.addcmul_(alpha, p)
        r.addcmul_(alpha, Ap, value=-1)
        before, squares = squares, _dot(r, r)
        p.mul_(torch.where(active, squares, 0.0) / torch.where(active, before, 1.0)).add_(r)
        steps += active
    residual = (squares / torch.where(length > 0, length, 1.0)).sqrt()
    return Solution(x.mul_(size), steps, residual)


def chebyshev(
    A: Normal,
    b: Tensor,
    pairs: torch.dtype,
    scale: float,
    tolerance: float | None = None,
    max_steps: int | None = None,
) -> Solution:
    """Chebyshev's semi-iteration (Golub and Varga 1961) for ridge_t = a N_t with N_t >= ||H_t||, a = scale (Gated
    KalmaNet, Peng et al. 2025).

    All eigenvalues lie in [a N, (1 + a) N], so the condition number is at most (1 + a) / a (51 for a = .02) and nothing
    has to be measured: no inner products, the same steps for all tokens. In n steps
        |b - x A| <= 2 / (c^n + c^-n) |b| ,    c = (sqrt(kappa) + 1) / (sqrt(kappa) - 1) ,
    so n follows from the tolerance, which knows kappa. For a = .02 it is 57 for pairs in float32 (2.3e-7), 114 for
    float64, and 43 for 16 bits, where rounding leaves 3e-5; the paper's 30 leave 4e-4. max_steps ends it earlier.
    """
    steps = chebyshev_steps(scale, tolerance or default_tolerance(b.dtype, pairs, (1 + scale) / scale))
    steps = min(steps, max_steps or steps)
    b, size = _scaled(b)
    center = A.ridge * (1 + 0.5 / scale)
    rho, omega = 1 / (1 + 2 * scale), 2.0
    before, x = torch.zeros_like(b), b / center
    for _ in range(steps - 1):
        omega = 4 / (4 - rho**2 * omega)
        x, before = ((b - A.times(x)) / center + x - before).mul_(omega).add_(before), x
    length = _dot(b, b)
    r = b - A.times(x)
    residual = (_dot(r, r) / torch.where(length > 0, length, 1.0)).sqrt()
    return Solution(x * size, torch.full_like(length, steps), residual)


def chebyshev_steps(scale: float, tolerance: float) -> int:
    """How many steps chebyshev needs for a relative residual."""
    root = math.sqrt((1 + scale) / scale)
    return math.ceil(math.log(2 / tolerance) / math.log((root + 1) / (root - 1)))


def cholesky(A: Normal, b: Tensor, pairs: torch.dtype) -> Solution:
    """Exact to rounding, whatever the pairs, K^3 / 3 multiply-adds a token. Where rounding has made a matrix
    indefinite, a ridge of K times the rounding of its largest entry is added, with a warning; if that does not help,
    or a matrix is not finite, NaN."""
    x = torch.empty_like(b)
    for rows, few in A.few():
        H = few.matrices()
        H.diagonal(dim1=-2, dim2=-1).add_(few.ridge)
        factor, info = torch.linalg.cholesky_ex(H)
        indefinite = info.bool() & H.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
        if indefinite.any():
            more = H.shape[-1] * torch.finfo(H.dtype).eps * H.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
            warnings.warn(
                f"least squares: {int(indefinite.sum())} of {info.numel()} matrices are not positive definite in "
                f"{H.dtype}; solved with up to {more[indefinite].max():.1e} more ridge. "
                "A larger regressor.ridge avoids it.",
                stacklevel=2,
            )
            H.diagonal(dim1=-2, dim2=-1).add_(more)
        if info.any():
            factor = solves.cholesky(H)
        x[rows] = torch.cholesky_solve(b[rows].unsqueeze(-1), factor).squeeze(-1)
    return Solution(x)


def least_norm(A: Normal, b: Tensor) -> Tensor:
    """x_t = b_t H_t^+ , the limit of no ridge: the fit of least norm among all best ones. Differentiable, the matrices
    made again in the backward pass. The gradient is that of constant rank: where the rank jumps there is none."""

    def solve(b: Tensor, *parts: Tensor) -> Tensor:
        return (b.unsqueeze(-2) @ pseudo_inverse(Normal(*parts).matrices())).squeeze(-2)

    return torch.cat([checkpoint(solve, b[rows], *few, use_reentrant=False) for rows, few in A.few()])


def pseudo_inverse(H: Tensor) -> Tensor:
    """H^+ of symmetric matrices [..., K, K]; eigenvalues below 10 K times the rounding of the largest are none."""
    return solves.pseudo_inverse(H, 10 * H.shape[-1] * torch.finfo(H.dtype).eps)


@torch.compiler.disable  # how many steps it takes depends on the data
def solve(A: Normal, b: Tensor, solver: Solver, pairs: torch.dtype) -> Solution:
    """x_t = b_t A_t^-1 by `solver`, with the gradient above, by `solver` too."""
    return Solution(*_Solve.apply(solver, pairs, b, *A))


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, solver, pairs, b, *parts):
        found = solver(Normal(*parts), b, pairs)
        ctx.save_for_backward(found.x, *parts)
        ctx.solver, ctx.pairs = solver, pairs
        ctx.mark_non_differentiable(*(report for report in found[1:] if report is not None))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, *_):
        """Of -db . (x A) with x and db held fixed, by each part of A."""
        x, k, W, start, first, ridge = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            db = ctx.solver(Normal(k, W, start, first, ridge), dx, ctx.pairs).x
            e, xk = db.neg(), torch.bmm(x, k.mT)
            ek = torch.bmm(e, k.mT)
            dk = torch.bmm((xk * W).mT, e).baddbmm_((ek * W).mT, x)
            dstart = _dot(torch.bmm(x, first), e)
            dfirst = torch.bmm((x * start).mT, e)
            dridge = (x * e).sum_to_size(ridge.shape)
        return None, None, db, dk, xk.mul_(ek), dstart, dfirst, dridge


def _scaled(b: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with a largest entry of one, which neither overflow nor underflow when squared, and the sizes they had."""
    size = b.abs().amax(-1, keepdim=True)
    return b / torch.where(size > 0, size, 1.0), size


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y).unsqueeze(-1)
