"""Local polynomial regression: attention of a higher order.

Problem.    Softmax fits a constant around every query (constant.py). Fit a polynomial of order p instead, with phi(k)
            all monomials of the keys up to p but the constant, and a ridge lambda that counts against weights that add
            up to one:
                min_{b, W}  sum_{i<=t} w_i ||v_i - b - (phi(k_i) - phi(q)) W||^2 + lambda ||W||^2 ,
                w_i = exp(beta q . k_i) / sum_j exp(beta q . k_j) ,    o_t = b .
Solution.   The mean, corrected by the slope W for lying at the mean key, not at the query: with m = sum_i w_i phi(k_i)
                o_t = sum_i w_i v_i + (phi(q) - m) W = sum_i w_i (1 + (phi(k_i) - m) . u) v_i ,
                u = (C + lambda I)^-1 (phi(q) - m) ,    C = sum_i w_i phi(k_i)^T phi(k_i) - m^T m .
            The weights w_i (1 + ...) still add up to one, but may be negative. lambda -> infinity is softmax; beta -> 0
            is ridge regression with an intercept (not the linear memory's, which has none). Values that are such a
            polynomial of the keys are reproduced exactly as lambda -> 0 (Fan and Gijbels 1996).
            Local linear attention (Zuo et al. 2026) is p = 1, written about the query: there it needs a denominator,
            1 - mu . rho, that comes down to 1e-4 and must be floored. Written about the mean it is the same estimator,
            by Sherman and Morrison, and there is nothing to divide by.
Order 2.    phi(k) has the products k_a k_b as well, all of them or the squares alone. The ridge is on coefficients
            about the origin; about the query, with k - q for k, it would take moments of order four for each.
Parallax.   Spare the solve and learn u, a projection of x: amortised local linear attention (Zuo, Pai et al. 2026).
Exactness.  Both forms solve every query's problem, the blocked one by Cholesky or, for wide phi, by conjugate gradients
            to a tolerance. Gradients are those of the solution, by one more solve and not through the solver. For p = 1
            kernels/local_linear.py does so without holding a block's weights, rounded as it says.

Shapes: as in pairs.py; F features in phi.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.kernels import local_linear as kernels
from models.parts.precision import wide, working_dtype
from models.parts.rotary import rotate
from models.parts.sizes import Sizes
from models.parts.solves import cholesky
from models.regression.local.constant import kernel_weights, of_heads
from models.regression.local.pairs import Nonparametric, Pairs, View, by_head, in_blocks
from models.regression.regressor import Tokens

# C is known to float32's rounding of |phi|^2, 1e-7, and may be that much below zero: a ridge of 1e-3 keeps four digits.
LEAST_RIDGE = 1e-3
# Above this width a solve by conjugate gradients, two products of T x S x F an iteration, is cheaper than C itself.
WIDEST_CHOLESKY = 64
KEYS_AT_ONCE = 256  # of which the products of all pairs of features are held at a time

Solve = Callable[[Tensor], Tensor]


def monomials(k: Tensor, order: int, cross_terms: bool) -> Tensor:
    """phi(k) [..., F] of k [..., K]: k, and for order 2 its products, k_a^2 and sqrt(2) k_a k_b for a < b, so that
    phi(q) . phi(k) = q . k + (q . k)^2 and the ridge knows no axes; without cross terms the squares alone.
    """
    if order == 1:
        return k
    if not cross_terms:
        return torch.cat([k, k.square()], dim=-1)
    a, b = torch.triu_indices(k.shape[-1], k.shape[-1], device=k.device)
    return torch.cat([k, k[..., a] * k[..., b] * torch.where(a == b, 1.0, math.sqrt(2)).to(k.dtype)], dim=-1)


def recurrent_local_polynomial(
    q: Tensor,
    pairs: Pairs,
    beta: Tensor,
    ridge: Tensor,
    view: View | None = None,
    order: int = 1,
    cross_terms: bool = True,
) -> Tensor:
    """The definition: each query's weighted least squares, by its normal equations.

    q [B, T, H, K]; pairs k [B, S, G, K], v [B, S, G, V]; beta, ridge [H]; view: which pairs each query may use, all up
    to its own by default. Returns o [B, T, H, V] in the dtype of v. Computed in float32 at least.
    """
    H, dtype, view = q.shape[2], working_dtype(q, pairs.k), view or View()
    k, v = by_head(pairs.k, H, dtype), by_head(pairs.v, H, dtype)
    outputs = []
    with torch.autocast(q.device.type, enabled=False):
        phi = monomials(k, order, cross_terms)
        penalty = nn.functional.pad(ridge.to(dtype).unsqueeze(-1).expand(-1, phi.shape[-1]), (1, 0)).diag_embed()
        for t in range(q.shape[1]):
            seen = view.reach(slice(t, t + 1))
            visible = view.visible(slice(t, t + 1), seen, q.device).unsqueeze(1)
            query = q[:, t].unsqueeze(2).to(dtype)
            w = kernel_weights("gaussian", visible, query, k[:, :, seen], of_heads(beta))
            z = phi[:, :, seen] - monomials(query, order, cross_terms)
            design = torch.cat([torch.ones_like(z[..., :1]), z], dim=-1)  # 1 and phi(k) - phi(q)
            weighted = (design * w.mT).mT
            normal = cholesky(weighted @ design + penalty)
            solution = torch.cholesky_solve(weighted @ v[:, :, seen], normal)
            outputs.append(solution[..., 0, :])
    return torch.stack(outputs, dim=1).to(pairs.v.dtype)


def blocked_local_polynomial(
    q: Tensor,
    pairs: Pairs,
    beta: Tensor,
    ridge: Tensor,
    view: View,
    order: int,
    cross_terms: bool,
    block: int,
    widest_cholesky: int = WIDEST_CHOLESKY,
) -> Tensor:
    """The same, `block` queries at a time; memory is linear in T. Arguments as in recurrent_local_polynomial."""
    H, dtype = q.shape[2], working_dtype(q, pairs.k)
    q, k, v = q.transpose(1, 2).to(dtype), by_head(pairs.k, H, dtype), by_head(pairs.v, H, dtype)
    queries, keys = (q, monomials(q, order, cross_terms)), (k, v, monomials(k, order, cross_terms))
    form = partial(local_polynomial, widest_cholesky=widest_cholesky)
    o = in_blocks(form, queries, keys, (of_heads(beta), of_heads(ridge)), view, block)
    return o.transpose(1, 2).to(pairs.v.dtype)


def local_polynomial(
    visible: Tensor,
    q: Tensor,
    phi_q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_k: Tensor,
    beta: Tensor,
    ridge: Tensor,
    widest_cholesky: int = WIDEST_CHOLESKY,
) -> Tensor:
    """The solution above for one block of queries, [B, H, T, V]."""
    w = kernel_weights("gaussian", visible, q, k, beta)
    mean = w @ phi_k
    with torch.no_grad():
        solver = factored if phi_k.shape[-1] <= widest_cholesky else iterated
        solve = solver(w, phi_k, mean, ridge)
        u = solve(phi_q - mean)
    # u is the solution but has no gradient. One step from it that is known by its residual alone has the gradient of
    # the solution, d(C^-1 b) = C^-1 (db - dC u), and refines u too.
    u = u + _Implicit.apply(phi_q - mean - covariance(w, phi_k, mean, ridge, u), solve)
    return tilted(w, phi_k, mean, u) @ v


def tilted(w: Tensor, phi: Tensor, mean: Tensor, u: Tensor) -> Tensor:
    """w_i (1 + (phi_i - m) . u): [B, H, T, S] from w, phi [B, H, S, F], mean and u [B, H, T, F]."""
    return w * (1 + u @ phi.mT - (u * mean).sum(-1, keepdim=True))


def covariance(w: Tensor, phi: Tensor, mean: Tensor, ridge: Tensor, x: Tensor) -> Tensor:
    """(C + lambda I) x for every query, x [B, H, T, F], without C."""
    centred = x @ phi.mT - (x * mean).sum(-1, keepdim=True)
    return (w * centred) @ phi - (w * centred).sum(-1, keepdim=True) * mean + ridge * x


def factored(w: Tensor, phi: Tensor, mean: Tensor, ridge: Tensor) -> Solve:
    """(C + lambda I)^-1 by the Cholesky factor of every query's own matrix, [B, H, T, F, F].

    Second moments are one product, of the weights and the upper triangles of phi^T phi; not of T x S x F x F, whose
    sums they are.
    """
    F = phi.shape[-1]
    a, b = torch.triu_indices(F, F, device=phi.device)
    upper = phi.new_zeros(*w.shape[:-1], len(a))
    for begin in range(0, phi.shape[-2], KEYS_AT_ONCE):
        keys = slice(begin, begin + KEYS_AT_ONCE)
        channels = phi[..., keys, :].mT.contiguous()  # whole rows are taken in a fraction of the time
        upper += w[..., keys] @ (channels.index_select(-2, a) * channels.index_select(-2, b)).mT
    upper -= taken(mean, a) * taken(mean, b)
    place = a.new_empty(F, F)
    place[a, b] = place[b, a] = torch.arange(len(a), device=a.device)
    C = taken(upper, place.flatten()).unflatten(-1, (F, F))
    C.diagonal(dim1=-2, dim2=-1).add_(ridge)
    L = cholesky(C)
    return lambda x: torch.cholesky_solve(x.unsqueeze(-1), L).squeeze(-1)


def taken(x: Tensor, index: Tensor) -> Tensor:
    """x[..., index], which a CPU gathers in half of the time that it takes to index."""
    return x.gather(-1, index.expand(*x.shape[:-1], -1))


def iterated(w: Tensor, phi: Tensor, mean: Tensor, ridge: Tensor) -> Solve:
    """(C + lambda I)^-1 by conjugate gradients for all queries at once, each until its residual has fallen to the
    rounding of the right-hand side; at most 2 F iterations.
    """
    apply = partial(covariance, w, phi, mean, ridge)
    tolerance = 10 * torch.finfo(phi.dtype).eps

    def solve(b: Tensor) -> Tensor:
        x, r, p = torch.zeros_like(b), b, b
        squared = r.square().sum(-1, keepdim=True)
        enough = tolerance**2 * squared
        for _ in range(2 * phi.shape[-1]):
            active = squared > enough
            if not active.any():
                break
            product = apply(p)
            step = torch.where(active, squared / (p * product).sum(-1, keepdim=True), 0.0)
            x, r = x + step * p, r - step * product
            before, squared = squared, r.square().sum(-1, keepdim=True)
            p = r + torch.where(active, squared / before, 0.0) * p
        return x

    return solve


class _Implicit(torch.autograd.Function):
    """A^-1 r of a symmetric A that counts as a constant: solve forward, and solve backward."""

    @staticmethod
    def forward(ctx, r: Tensor, solve: Solve) -> Tensor:
        ctx.solve = solve
        return solve(r)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.solve(gradient), None


class LocalPolynomial(Nonparametric):
    """The local polynomial estimator of order 1 or 2, with a Gaussian kernel.

    order: 1 | 2.
    ridge: lambda, relative to the weights. "learned" is one per head, LEAST_RIDGE more than a positive number that
        starts at 0.1; a number is fixed.
    cross_terms: whether order 2 has all products of key channels, K (K + 3) / 2 features, or the squares alone, 2 K;
        None takes all up to K = 8.
    inverse_temperature, window, block: pairs.py.
    """

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        order: int = 1,
        ridge: str | float = "learned",
        cross_terms: bool | None = None,
        inverse_temperature: str | float = "learned",
        window: int | None = None,
        block: int | None = None,
    ) -> None:
        super().__init__(sizes, backend, inverse_temperature, window, block)
        if order not in (1, 2):
            raise ValueError(f"regressor.order={order} must be 1 or 2; order 0 is regressor=softmax")
        self.order, self.function_class = order, f"{'linear' if order == 1 else 'quadratic'} around q"
        self.cross_terms = self.key_dim <= 8 if cross_terms is None else cross_terms
        K = self.key_dim
        self.num_features = K if order == 1 else K * (K + 3) // 2 if self.cross_terms else 2 * K
        self.log_ridge = None
        if ridge == "learned":
            self.log_ridge = nn.Parameter(torch.full((self.num_heads,), math.log(0.1)))
        elif isinstance(ridge, int | float) and ridge > 0:
            self.fixed_ridge = float(ridge)
        else:
            raise ValueError(f"regressor.ridge={ridge!r} must be 'learned' or a positive number")

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        if self.order == 2:
            return {}
        return {"triton": kernels.refusal(device, dtype, self.key_dim, self.value_dim)}

    def route(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        if backend != "torch":
            return ""
        return "blocks of queries, " + ("Cholesky" if self.num_features <= WIDEST_CHOLESKY else "conjugate gradients")

    def ridge(self, q: Tensor) -> Tensor:
        """[H], in float32 at least."""
        if self.log_ridge is None:
            return torch.full((self.num_heads,), self.fixed_ridge, dtype=working_dtype(q), device=q.device)
        return wide(self.log_ridge).exp() + LEAST_RIDGE

    def forward(self, tokens: Tokens, state: Pairs | None = None) -> tuple[Tensor, Pairs]:
        q, (pairs, view) = tokens.q, self.gather(tokens, state)
        backend, beta, ridge = self.choose(q.device, q.dtype).backend, self.beta(q), self.ridge(q)
        arguments = (q, pairs, beta, ridge, view, self.order, self.cross_terms)
        if backend == "triton":
            o = kernels.local_linear(q, pairs.k, pairs.v, beta, ridge, view.start, view.past, view.window)
        elif backend == "recurrent":
            o = recurrent_local_polynomial(*arguments)
        else:
            o = blocked_local_polynomial(*arguments, self.queries_at_once(q))
        return o, self.keep(pairs, view)

    def flops_per_token(self, seq_len: int) -> int:
        """With every visible pair a comparison, the normal equations' left side and right side; the solves, which are
        no matrix products, are left out.
        """
        F = self.num_features + 1
        pair = 2 * (self.key_dim + F * F + F * self.value_dim)
        return self.num_heads * pair * self.num_visible(seq_len) // seq_len


def probed(visible: Tensor, q: Tensor, u: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """sum_i w_i (1 + (k_i - m) . u) v_i for as many queries as are given, [B, H, T, V]."""
    w = kernel_weights("gaussian", visible, q, k, beta)
    return tilted(w, k, w @ k, u) @ v


def recurrent_probed(q: Tensor, u: Tensor, pairs: Pairs, beta: Tensor, view: View) -> Tensor:
    """Parallax, one query at a time: o = (1 + m . r) sum_i w_i v_i - sum_i w_i (k_i . r) v_i with r = -u, as published.

    q, u [B, T, H, K]; pairs, beta, view as in recurrent_local_polynomial.
    """
    H, dtype = q.shape[2], working_dtype(q, pairs.k)
    k, v, r = by_head(pairs.k, H, dtype), by_head(pairs.v, H, dtype), -u.to(dtype)
    outputs = []
    with torch.autocast(q.device.type, enabled=False):
        for t in range(q.shape[1]):
            seen = view.reach(slice(t, t + 1))
            visible = view.visible(slice(t, t + 1), seen, q.device).unsqueeze(1)
            w = kernel_weights("gaussian", visible, q[:, t].unsqueeze(2).to(dtype), k[:, :, seen], of_heads(beta))
            along = r[:, t].unsqueeze(2) @ k[:, :, seen].mT
            mean, second = w @ v[:, :, seen], (w * along) @ v[:, :, seen]
            outputs.append(((1 + (w * along).sum(-1, keepdim=True)) * mean - second).squeeze(2))
    return torch.stack(outputs, dim=1).to(pairs.v.dtype)


def blocked_probed(q: Tensor, u: Tensor, pairs: Pairs, beta: Tensor, view: View, block: int) -> Tensor:
    """The same, `block` queries at a time."""
    H, dtype = q.shape[2], working_dtype(q, pairs.k)
    queries = (q.transpose(1, 2).to(dtype), u.transpose(1, 2).to(dtype))
    keys = (by_head(pairs.k, H, dtype), by_head(pairs.v, H, dtype))
    return in_blocks(probed, queries, keys, (of_heads(beta),), view, block).transpose(1, 2).to(pairs.v.dtype)


class Parallax(Nonparametric):
    """Local linear attention with a learned probe u in place of the solve: u_t = x_t W_u, turned like the queries.

    o = sum_i w_i (1 + (k_i - m) . u) v_i. The published r is -u; W_u = 0 is softmax. Its authors found that Muon trains
    it well and AdamW less so.

    rotary: the base of the mixer's own positions, or None; the probe then meets the keys as a query does. A window is
    refused: behind it the positions could not be counted.
    """

    projections: ClassVar[tuple[str, ...]] = ("probe",)

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        rotary: float | None = None,
        inverse_temperature: str | float = "learned",
        block: int | None = None,
    ) -> None:
        super().__init__(sizes, backend, inverse_temperature, None, block)
        self.function_class, self.fit = "linear around q", "learned probe"
        self.rotary = rotary
        self.probe = nn.Linear(sizes.hidden_size, sizes.num_heads * sizes.key_dim, bias=False)

    def forward(self, tokens: Tokens, state: Pairs | None = None) -> tuple[Tensor, Pairs]:
        q, (pairs, view) = tokens.q, self.gather(tokens, state)
        u = self.probe(tokens.x).unflatten(-1, (self.num_heads, self.key_dim))
        if self.rotary is not None:
            position = torch.arange(view.past, view.past + q.shape[1], device=q.device).unsqueeze(0)
            u = rotate(u, position if view.start is None else position - view.start, self.rotary)
        recurrent = self.choose(q.device, q.dtype).backend == "recurrent"
        form = recurrent_probed if recurrent else partial(blocked_probed, block=self.queries_at_once(q))
        return form(q, u, pairs, self.beta(q), view), self.keep(pairs, view)

    def flops_per_token(self, seq_len: int) -> int:
        """The probe's projection, and softmax with a second comparison and a second sum."""
        pair = 2 * (2 * self.key_dim + 2 * self.value_dim)
        probe = 2 * self.probe.weight.numel()
        return probe + self.num_heads * pair * self.num_visible(seq_len) // seq_len
