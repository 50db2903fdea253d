"""Kernel regression: the attention that inverts its kernel matrix.

Problem.    Fit a function of a reproducing-kernel space to the pairs seen so far,
                m_t = argmin_m  sum_{i<=t} ||v_i - m(k_i)||^2 / c_i + lambda ||m||^2 ,
                kappa(q, k) = exp(-beta |q - k|^2 / 2) .
Solution.   o_t = kappa(q_t, K) (kappa(K, K) + lambda diag(c))^-1 V over the pairs up to t, which Garnelo and Czarnecki
            (2023) call Intention. Without the inverse it is the unnormalized softmax of constant.py. T systems, but the
            leading blocks of a Cholesky factor factor the leading blocks, so that one is enough:
                kappa(K, K) + lambda diag(c) = L L^T ,   U = L^-1 V ,   X = L^-1 kappa(K, Q) ,   O = triu(X)^T U .
Decay.      c_i = gamma_1 ... gamma_i, counted from the start of the document: older pairs count less, and the ridge
            fades with them, which keeps the systems nested (recursive least squares with forgetting is the same with a
            linear kernel). A ridge that fades away leaves systems that are singular, so c_i stops at LEAST: no pair
            counts more than 1 / LEAST times as much as the first.
State.      The keys, L and U: the next token adds a row to L. It grows with T^2.
Exactness.  Exact. T^3 / 3 multiply-adds for the factor and T^2 numbers of memory: for a thousand tokens, not for ten.
            A sequence that begins in a call has a backward of its own, by L^-1 and products alone.

Shapes: B batch, T tokens, S tokens in the cache, N = S + T, H heads, K key width, V value width.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.parts.precision import wide, working_dtype
from models.parts.sizes import Sizes
from models.parts.solves import cholesky
from models.regression.local.constant import of_heads, squared_distance
from models.regression.local.pairs import Nonparametric, View, document_starts, faded
from models.regression.regressor import Tokens

# float32 knows the eigenvalues of N x N kernel values to about N 6e-8, 6e-5 for a thousand: below that a system may be
# none. The smallest ridge of all is LEAST_RIDGE LEAST = 1e-4.
LEAST = 1e-2
LEAST_RIDGE = 1e-2


class Factor(NamedTuple):
    """The systems solved so far: k [B, S, H, K], L [B, H, S, S], U [B, H, S, V]; age [B, H], the log of the last pair's
    c before it is bounded; first [B], the index of the first pair of the present document, None for 0.
    """

    k: Tensor
    L: Tensor
    U: Tensor
    age: Tensor
    first: Tensor | None = None


def gaussian(q: Tensor, k: Tensor, beta: Tensor) -> Tensor:
    """exp(-beta |q - k|^2 / 2) [..., T, S] of q [..., T, K] and k [..., S, K], beta [H, 1, 1]."""
    return (-beta / 2 * squared_distance(q, k)).exp()


def recurrent_intention(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, ridge: Tensor, view: View, factor: Factor
) -> tuple[Tensor, Factor]:
    """The definition, one row of the factor at a time.

    q, k [B, T, H, K]; v [B, T, H, V]; beta [H]; ridge [B, T, H], lambda c above; view: which pairs each query may use.
    Returns o [B, T, H, V] and the factor with T rows more. All in one dtype, float32 at least.
    """
    outputs = []
    for t in range(q.shape[1]):
        now = slice(t, t + 1)
        here = View(view.past + t, None if view.start is None else view.start[:, now])
        o, factor = parallel_intention(q[:, now], k[:, now], v[:, now], beta, ridge[:, now], here, factor)
        outputs.append(o)
    return torch.cat(outputs, dim=1), factor


def parallel_intention(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, ridge: Tensor, view: View, factor: Factor
) -> tuple[Tensor, Factor]:
    """The same, all T rows at once, where there are no pairs before with a backward of its own. With the factor L of S:

    [[ K_SS, K_ST ], [ K_TS, K_TT ]] + ridge = [[ L, 0 ], [ R, L' ]] [[ L, 0 ], [ R, L' ]]^T ,
    R = K_TS L^-T ,   L' L'^T = K_TT + ridge - R R^T ,   U' = L'^-1 (V - R U) .
    """
    T, S, beta = q.shape[1], view.past, of_heads(beta)
    if S == 0 and T > 1:
        o, L, U = _Solved.apply(*(x.transpose(1, 2) for x in (q, k, v)), beta, ridge.transpose(1, 2), view)
        return o.transpose(1, 2), Factor(k, L, U, *factor[3:])
    q, v, keys = q.transpose(1, 2), v.transpose(1, 2), torch.cat([factor.k, k], dim=1).transpose(1, 2)
    visible = view.visible(slice(0, T), slice(0, S + T), q.device).unsqueeze(1)
    K = gaussian(keys[:, :, S:], keys, beta).masked_fill(~visible, 0.0)  # the lower triangle
    R = torch.linalg.solve_triangular(factor.L, K[..., :S].mT, upper=False).mT
    corner = K[..., S:] + K[..., S:].tril(-1).mT + ridge.transpose(1, 2).diag_embed()
    below = cholesky(corner - R @ R.mT)
    L = torch.cat([F.pad(factor.L, (0, T)), torch.cat([R, below], dim=-1)], dim=-2)
    U = torch.cat([factor.U, torch.linalg.solve_triangular(below, v - R @ factor.U, upper=False)], dim=-2)

    kappa = gaussian(q, keys, beta).masked_fill(~visible, 0.0)
    X = torch.linalg.solve_triangular(L, kappa.mT, upper=False).mT
    o = X.masked_fill(~visible, 0.0) @ U
    return o.transpose(1, 2), Factor(keys.transpose(1, 2), L, U, *factor[3:])


class _Solved(torch.autograd.Function):
    """O, L and U of a sequence without a past, [B, H, T, *], by products with M = L^-1: T x T systems are solved once,
    and every pass over T x T that autograd would make to differentiate the solves, the factor and the kernel is saved.

    With P = tril(kappa(Q, K) M^T), O = P U and U = M V:
                dP = tril(dO U^T) ,   dU = P^T dO ,   dV = M^T dU ,   dkappa(Q, K) = dP M .
    From M K M^T = I, dM M^-1 is -M dK M^T below the diagonal and half of it there, so that the gradient by K is
    -M^T Psi M / 2 with Psi the symmetric matrix that has the lower triangle of dP^T P + dU U^T. Of log kappa
    = beta (z . k - |z|^2 / 2 - |k|^2 / 2) for the rows z = [k, q], with E = dkappa kappa,
                dz = beta (E k - sum_j E z) ,   dk = beta (E^T z - sum_i E k) ,   dbeta = sum E log kappa / beta .
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, ridge: Tensor, view: View
    ) -> tuple[Tensor, Tensor, Tensor]:
        T = k.shape[-2]
        z = torch.cat([k, q], dim=-2)
        kernels = _log_kernel(z, k, beta).clamp_(max=0.0).exp_()
        if view.start is None:
            kernels.unflatten(-2, (2, T)).tril_()
        else:
            hidden = ~view.visible(slice(0, T), slice(0, T), k.device).unsqueeze(1)
            kernels.unflatten(-2, (2, T)).masked_fill_(hidden.unsqueeze(2), 0.0)
        L = cholesky(kernels[..., :T, :] + ridge.diag_embed())
        M = inverse_of_triangle(L)
        P, U = (kernels[..., T:, :] @ M.mT).tril_(), M @ v
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, k, beta, kernels, M, P, U)
        return P @ U, L, U

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor | None, dL: Tensor | None, dU: Tensor | None) -> tuple[Tensor | None, ...]:
        z, k, beta, kernels, M, P, U = ctx.saved_tensors
        T = k.shape[-2]
        do = torch.zeros_like(U) if do is None else do
        dP, dU = (do @ U.mT).tril_(), P.mT @ do + (0 if dU is None else dU)
        psi = (dP.mT @ P).add_(dU @ U.mT)
        if dL is not None:
            psi -= inverse_of_triangle(M).mT @ dL
        psi = psi.tril_() + psi.tril(-1).mT
        E = torch.cat([psi, dP], dim=-2) @ M
        E[..., :T, :] = M.mT @ E[..., :T, :].neg()
        d_ridge = E[..., :T, :].diagonal(dim1=-2, dim2=-1) / 2
        E *= kernels  # of kappa(K, K), whose gradient is twice that, the lower triangle
        z_, k_ = (F.pad(x, (0, 1), value=1.0) for x in (z, k))
        dz, dk = E @ k_, E.mT @ z_
        of_z, of_k = dz[..., -1:] * z, dk[..., -1:] * k
        dz, dk = dz[..., :-1] - of_z, dk[..., :-1] - of_k
        d_beta = ((dz + of_z / 2) * z).sum((0, 2, 3)) - (of_k * k).sum((0, 2, 3)) / 2
        dz, dk = beta * dz, beta * dk
        return dz[..., T:, :], dk + dz[..., :T, :], M.mT @ dU, of_heads(d_beta), d_ridge, None


def _log_kernel(q: Tensor, k: Tensor, beta: Tensor) -> Tensor:
    """-beta |q - k|^2 / 2 [..., T, S] as one product, of [beta q, -beta |q|^2 / 2, 1] and [k, 1, -beta |k|^2 / 2]."""
    of_q, of_k = (-beta / 2 * x.square().sum(-1, keepdim=True) for x in (q, k))
    return torch.cat([beta * q, of_q, torch.ones_like(of_q)], -1) @ torch.cat([k, torch.ones_like(of_k), of_k], -1).mT


def inverse_of_triangle(L: Tensor, width: int = 64) -> Tensor:
    """L^-1 of lower triangles [..., T, T], by products but for blocks of `width` on the diagonal:
    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]].
    """
    T = L.shape[-1]
    if width >= T:
        return torch.linalg.solve_triangular(L, torch.eye(T, dtype=L.dtype, device=L.device), upper=False)
    half = -(-T // (2 * width)) * width
    A, C = inverse_of_triangle(L[..., :half, :half], width), inverse_of_triangle(L[..., half:, half:], width)
    M = torch.zeros_like(L)
    M[..., :half, :half], M[..., half:, half:] = A, C
    M[..., half:, :half] = -(C @ (L[..., half:, :half] @ A))
    return M


class Intention(Nonparametric):
    """Causal kernel ridge regression with a Gaussian kernel, with or without a decay per head.

    ridge: lambda. "learned" is one per head, LEAST_RIDGE more than a positive number that starts at 0.1; a number is
        fixed, LEAST_RIDGE at least.
    inverse_temperature: pairs.py.
    """

    accepts_decay: tuple[str, ...] = ("none", "head")
    grouped_heads: ClassVar[bool] = False
    function_class = "Gaussian kernels"
    fit = "ridge regression, Cholesky"

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        ridge: str | float = "learned",
        inverse_temperature: str | float = "learned",
    ) -> None:
        super().__init__(sizes, backend, inverse_temperature)
        self.log_ridge = None
        if ridge == "learned":
            self.log_ridge = nn.Parameter(torch.full((self.num_heads,), math.log(0.1)))
        elif isinstance(ridge, int | float) and ridge >= LEAST_RIDGE:
            self.fixed_ridge = float(ridge)
        else:
            raise ValueError(f"regressor.ridge={ridge!r} must be 'learned' or a number of at least {LEAST_RIDGE}")

    def ridge(self, q: Tensor) -> Tensor:
        """[H], in float32 at least."""
        if self.log_ridge is None:
            return torch.full((self.num_heads,), self.fixed_ridge, dtype=working_dtype(q), device=q.device)
        return wide(self.log_ridge).exp() + LEAST_RIDGE

    def forward(self, tokens: Tokens, state: Factor | None = None) -> tuple[Tensor, Factor]:
        _, q, k, v, log_decay, segments = tokens
        dtype, out_dtype = working_dtype(q, k, v), v.dtype
        q, k, v = (y.to(dtype) for y in (q, k, v))
        factor = _nothing(k, v) if state is None else state
        past = factor.k.shape[1]
        view = View(past, document_starts(q.shape[1], past, factor.first, segments))
        age = _ages(log_decay, factor.age, view, q)
        recurrent = self.choose(q.device, out_dtype).backend == "recurrent"
        form = recurrent_intention if recurrent else parallel_intention
        with torch.autocast(q.device.type, enabled=False):
            ridge = self.ridge(q) * age.clamp(min=math.log(LEAST)).exp()
            o, factor = form(q, k, v, self.beta(q), ridge, view, factor)
        first = None if view.start is None else view.start[:, -1]
        return o.to(out_dtype), Factor(*factor[:3], age[:, -1], first)

    def flops_per_token(self, seq_len: int) -> int:
        """The key's and the query's comparisons with every pair, the read, and the new row of the factor with the rows
        before it; the triangular solves, 2 T^2 a token, are no matrix products and left out.
        """
        pairs = self.num_visible(seq_len)
        products = (4 * self.key_dim + 2 * self.value_dim) * pairs + 2 * (self.value_dim + 1) * (pairs - seq_len)
        return self.num_heads * products // seq_len

    def state_size(self, seq_len: int) -> int:
        return self.num_heads * (seq_len * (self.key_dim + self.value_dim + seq_len) + 1)


def _nothing(k: Tensor, v: Tensor) -> Factor:
    """The factor of no pairs, for k [B, T, H, K] and v [B, T, H, V]."""
    B, _, H, K = k.shape
    empty = (k.new_empty(B, 0, H, K), k.new_empty(B, H, 0, 0), k.new_empty(B, H, 0, v.shape[-1]))
    return Factor(*empty, age=k.new_zeros(B, H))


def _ages(log_decay: Tensor | None, before: Tensor, view: View, q: Tensor) -> Tensor:
    """log c of each token, counted from the start of its document: [B, T, H]. before [B, H]: of the token before."""
    if log_decay is None:
        return q.new_zeros(q.shape[:3])
    total = faded(log_decay, view.start, view.past)
    if view.start is None:
        return (total + before.unsqueeze(1)).to(q.dtype)
    begun_here = (view.start >= view.past).unsqueeze(-1)
    return torch.where(begun_here, total, total + before.unsqueeze(1)).to(q.dtype)
