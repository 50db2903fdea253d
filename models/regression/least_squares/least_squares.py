"""Least squares: the memory that pays for the inverse.

Problem.    Ridge regression on all pairs so far, the past fading:
                S_t = argmin_S  sum_{i<=t} w_ti ||v_i - k_i S||^2 + sum_j Lambda_j ||S_j||^2 ,
                w_ti = b_i gamma_{i+1} ... gamma_t ,    S_j the rows of S .
Solution.   The normal equations, with two memories in place of one:
                H_t = gamma_t H_{t-1} + b_t k_t^T k_t ,    G_t = gamma_t G_{t-1} + b_t k_t^T v_t ,
                S_t = (H_t + Lambda)^{-1} G_t ,    o_t = q_t S_t .
            Linear attention reads G_t and leaves out the inverse; one step of the delta rule undoes a little of it.
Members.    Mesa (MesaNet, von Oswald et al. 2025, section 3): a static ridge, by conjugate gradients. Gated KalmaNet
            (Peng et al. 2025): a ridge in proportion to H itself, Lambda = a ||H_t||_F, which bounds the condition
            number by (1 + a) / a and lets Chebyshev's iteration run a constant number of steps; it reads with
            q + alpha (x - q), x = q (H_t + Lambda)^{-1}, between linear attention and least squares. Recursive least
            squares (recursive.py), whose ridge fades with the past: another estimator. Features before it
            (models/parts/features) make it regression in them.
Decay.      One per head. With one per channel, H_t = diag(gamma) H_{t-1} + ... is not symmetric and minimises nothing;
            with a negative one, weights of a least-squares problem would be.
Exactness.  Normal equations square the condition number of their pairs, so moments, solve and read have twice the
            digits of q, k and v: float64 for float32, float32 for 16 bits (moments.py). One key 2048 times over with
            the same value or with others, b = 1, no decay, ridge 0.25: in float32 outputs are 5e-8 off and gradients
            4e-6 (5e-8 by cholesky, 1.2e-5 for a ridge of 0.02 ||H||, by chebyshev). Moments in float32 know the output
            to 4e-3, whatever the solver, which is what bf16 rounds it to. MPS has no float64, so float32 has moments in
            float32 there: the table that is printed before the first step says so.
            The chunked form solves to a tolerance that follows from those digits (solvers.py). The gradient is that of
            the exact solution. Decoding uses the same solver from the same start as training.
            fla 0.6's chunk_mesa_net is not used. It rounds q, k and the solutions to float16 and G to bfloat16; it adds
            1e-5 to denominators, so that its fixed number of steps ends at an error of 1e-4 to 1e-2 whatever that
            number; and it trains from x = 0 but decodes from x = q / diag, which agree only when both have converged.

Shapes: B batch, T tokens, H heads, K key width, V value width, C chunk, N chunks, M = N B H.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import least_squares as kernels
from models.parts import solves
from models.parts.linear import read
from models.parts.precision import doubled_dtype, wide
from models.parts.sizes import Sizes
from models.regression.chunks import from_chunks, short
from models.regression.documents import forget_at_starts
from models.regression.least_squares.layout import Ridge, laid_out, mixed, norm
from models.regression.least_squares.moments import Moments, first_moments, forget
from models.regression.least_squares.recursive import recurrent_fading_ridge, recursive_least_squares
from models.regression.least_squares.replayed import kernel_least_squares
from models.regression.least_squares.solvers import (
    Report,
    Solution,
    Solver,
    chebyshev,
    cholesky,
    conjugate_gradients,
    least_norm,
    pseudo_inverse,
    solve,
)
from models.regression.memory import Memory
from models.regression.regressor import Tokens


def recurrent_least_squares(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write_weight: Tensor,
    ridge: Ridge,
    log_decay: Tensor | None = None,
    moments: Moments | None = None,
    mix: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """The definition, one token at a time.

    q, k: [B, T, H, K].  v: [B, T, H, V].  write_weight: [B, T, H], b above.  log_decay: [B, T, H], natural log of
    gamma, <= 0, or None for 1.  moments: None for zeros.  mix: [B, T, H], alpha above, or None for 1.
    Returns o [B, T, H, V] in the dtype of v, and the moments after the last token, in whose dtype all is computed.
    """
    H, G, _ = first_moments(q, k, v, moments)
    out_dtype, dtype = v.dtype, H.dtype
    q, k, v, b = (x.to(dtype) for x in (q, k, v, write_weight))
    decay = None if log_decay is None else log_decay.to(dtype).exp().unbind(1)
    outputs = []
    with torch.autocast(q.device.type, enabled=False):
        # unbind, since the gradient of x[:, t] is as long as x, which makes the square of T
        for t, (q_t, k_t, v_t, b_t) in enumerate(zip(*(x.unbind(1) for x in (q, k, v, b)), strict=True)):
            if decay is not None:
                H, G = (decay[t][:, :, None, None] * x for x in (H, G))
            write = (b_t.unsqueeze(-1) * k_t).unsqueeze(-1)
            H, G = H + write @ k_t.unsqueeze(-2), G + write @ v_t.unsqueeze(-2)
            if ridge.size is None:
                x = (q_t.unsqueeze(-2) @ pseudo_inverse(H)).squeeze(-2)
            else:
                size = ridge.size.to(dtype)
                if ridge.scaled:
                    size = size * norm(H.square().sum((-2, -1))).unsqueeze(-1)
                x = solves.solve(H + torch.diag_embed(size.expand_as(q_t)), q_t)
            outputs.append((mixed(q_t, x, None if mix is None else mix[:, t]).unsqueeze(-2) @ G).squeeze(-2))
        return torch.stack(outputs, dim=1).to(out_dtype), Moments(H, G)


def chunked_least_squares(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write_weight: Tensor,
    ridge: Ridge,
    log_decay: Tensor | None = None,
    moments: Moments | None = None,
    mix: Tensor | None = None,
    solver: Solver = conjugate_gradients,
    chunk: int = 32,
) -> tuple[Tensor, Moments, Report]:
    """The same map, C tokens at a time: a scan for the moments before every chunk, then one solve for all tokens
    together (solvers.py), then one read,
        o_t = s_t x_t G + sum_{i<=t} W_ti (x_t . k_i) v_i ,    W_ti = b_i exp(c_t - c_i) ,    s_t = exp(c_t) ,
    with c the cumulative log decay of the chunk, H and G its first moments.

    Arguments and results as in recurrent_least_squares, and what the solver tells of itself. Where ridge.size is None
    the solver is least_norm.
    """
    first = first_moments(q, k, v, moments)
    B, T, H, _ = k.shape
    pairs = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    chunk = 1 if T == 1 else short(chunk, T)
    with torch.autocast(q.device.type, enabled=False):
        laid = laid_out(q, k, v, write_weight, ridge, log_decay, first, mix, chunk)
        A, query = laid.normal, laid.q
        found = Solution(least_norm(A, query)) if ridge.size is None else solve(A, query, solver, pairs)
        o = laid.read(found.x)
        report = Report(*(y if y is None else from_chunks(y, (B, T, H)) for y in found[1:]))
    return from_chunks(o, (B, T, H)).to(v.dtype), laid.moments(B), report


class LeastSquares(Memory):
    """Ridge regression with learned write weights b = sigmoid(x W + c), per head and token.

    solver: conjugate_gradients | chebyshev | cholesky, which solve the same problem, or rls, whose ridge fades.
    ridge: Lambda. "learned" is one per head and channel, 0.25 + softplus(.), 1 at the start; a number is the same for
        all. 0 is the limit of no ridge, the pseudo-inverse, which takes a direct solver.
    scaled_ridge: the ridge, then a number, times the norm of H_t.
    tolerance: the relative residual at which conjugate_gradients and chebyshev stop; None is what the digits of the
        pairs deserve (solvers.py, default_tolerance).
    max_steps: and the most steps they take; None for as many as the tolerance needs. The gradient is right where they
        converged.
    decay_cap: with a decay, gamma <- gamma (1 - (1 - decay_cap) b^2), so that one token over and over does not pile up
        without bound in H (MesaNet, section 3); None for gamma as it is.
    query_mix: read with q + alpha (x - q), alpha = sigmoid(x W + c) per head and token (Gated KalmaNet).

    `diagnostics()` tells of the last forward pass. Which backend: recurrent is the definition by torch.linalg.solve,
    torch is `solver` in chunks, a single token too, so that decoding is solved as training was.
    """

    SOLVERS: ClassVar[tuple[str, ...]] = ("conjugate_gradients", "chebyshev", "cholesky", "rls")
    FLOOR: ClassVar[float] = 0.25
    reads = ("write_weight", "query_mix")

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        chunk: int | None = None,
        solver: str = "conjugate_gradients",
        ridge: str | float = "learned",
        scaled_ridge: bool = False,
        tolerance: float | None = None,
        max_steps: int | None = None,
        decay_cap: float | None = None,
        query_mix: bool = False,
    ) -> None:
        super().__init__(sizes, backend, chunk)
        self._check(solver, ridge, scaled_ridge, query_mix)
        for name, value in {"tolerance": tolerance, "decay_cap": decay_cap}.items():
            if value is not None and not 0 < value < 1:
                raise ValueError(f"regressor.{name}={value} must lie between 0 and 1, or be null")
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"regressor.max_steps={max_steps} must be at least 1, or null")
        H, K = self.num_heads, self.key_dim
        self.fit = f"least squares, {solver.replace('_', ' ')}"
        self.fixed_ridge = None if ridge == "learned" else float(ridge)  # a number for chebyshev
        self.solver_name, self.scaled_ridge, self.decay_cap = solver, scaled_ridge, decay_cap
        self.tolerance, self.max_steps = tolerance, max_steps
        self.solver: Any = {
            "conjugate_gradients": partial(conjugate_gradients, tolerance=tolerance, max_steps=max_steps),
            "chebyshev": partial(chebyshev, scale=self.fixed_ridge or 1.0, tolerance=tolerance, max_steps=max_steps),
            "cholesky": cholesky,
        }.get(solver)
        if ridge == "learned":
            self.ridge = nn.Parameter(torch.full((H, K), 1 - self.FLOOR).expm1().log())  # softplus inverted
        self.write_weight = nn.Linear(sizes.hidden_size, H)
        self.query_mix = nn.Linear(sizes.hidden_size, H) if query_mix else None
        self.steps_taken: Tensor | None = None
        self.residual: Tensor | None = None

    def _check(self, solver: str, ridge: str | float, scaled_ridge: bool, query_mix: bool) -> None:
        """Raises ValueError for a ridge that is none, or that this solver cannot have."""
        if solver not in self.SOLVERS:
            raise ValueError(f"regressor.solver={solver!r} is not one of {', '.join(self.SOLVERS)}")
        if ridge != "learned" and not (isinstance(ridge, int | float) and ridge >= 0):
            raise ValueError(f"regressor.ridge={ridge!r} must be 'learned', a positive number, or 0")
        if ridge == 0 and solver != "cholesky":
            raise ValueError(
                f"regressor.ridge=0 leaves H singular, and regressor.solver={solver} needs its inverse; the "
                "pseudo-inverse takes the direct solver, cholesky"
            )
        if scaled_ridge and (ridge in ("learned", 0) or solver == "rls"):
            raise ValueError(
                f"regressor.scaled_ridge=true needs a positive number as regressor.ridge, which it multiplies by the "
                f"norm of H, and not regressor.ridge={ridge} with regressor.solver={solver}"
            )
        if solver == "chebyshev" and not scaled_ridge:
            raise ValueError(
                "regressor.solver=chebyshev needs to know the eigenvalues' range, which only "
                "regressor.scaled_ridge=true gives"
            )
        if solver == "rls" and query_mix:
            raise ValueError("regressor.query_mix=true is not possible with regressor.solver=rls")

    def forward(self, tokens: Tokens, state: Moments | None = None) -> tuple[Tensor, Moments]:
        b, log_decay = wide(read(self.write_weight, tokens.x)).sigmoid(), tokens.log_decay
        if log_decay is not None and self.decay_cap is not None:
            log_decay = log_decay + torch.log1p((self.decay_cap - 1) * b.square())
        return self._fit(Tokens(*tokens[:4], log_decay, tokens.segments), b, state)

    def recall(self, x: Tensor, q: Tensor, state: Moments | None) -> Tensor:
        """The solve again, after pairs of weight zero."""
        k, v = torch.zeros_like(q), q.new_zeros(*q.shape[:3], self.value_dim)
        return self._fit(Tokens(x, q, k, v), wide(v[..., 0]), state)[0]

    def _fit(self, tokens: Tokens, b: Tensor, state: Moments | None) -> tuple[Tensor, Moments]:
        """What forward does once it knows the write weights b [B, T, H]."""
        x, q, k, v, log_decay, segments = tokens
        backend, ridge = self.choose(v.device, v.dtype).backend, self._ridge(k)
        if self.solver_name == "rls":
            assert ridge.size is not None
            starts = None if segments is None else F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
            form = recurrent_fading_ridge if backend == "recurrent" else recursive_least_squares
            return form(q, k, v, b, ridge.size, log_decay, state, starts)
        log_decay = forget_at_starts(log_decay, segments, like=b)
        mix = None if self.query_mix is None else wide(read(self.query_mix, x)).sigmoid()
        if backend == "recurrent":
            return recurrent_least_squares(q, k, v, b, ridge, log_decay, state, mix)
        given, chunk = (q, k, v, b, ridge, log_decay, state, mix), self.tokens_at_once(v)
        if backend == "triton":
            o, state, found = kernel_least_squares(*given, self.tolerance, self.max_steps, chunk)
        else:
            o, state, found = chunked_least_squares(*given, self.solver, chunk)
        self.steps_taken, self.residual = found.steps, found.residual
        return o, state

    def _ridge(self, k: Tensor) -> Ridge:
        if self.fixed_ridge is None:
            return Ridge(self.FLOOR + F.softplus(wide(self.ridge)))
        if self.fixed_ridge == 0:
            return Ridge(None)
        size = torch.full((), self.fixed_ridge, dtype=doubled_dtype(k.device, k.dtype), device=k.device)
        return Ridge(size, True) if self.scaled_ridge else Ridge(size.expand(self.num_heads, self.key_dim))

    def describe(self, tokens: Tokens) -> dict[str, Tensor]:
        return {"write_weight": wide(read(self.write_weight, tokens.x)).sigmoid()}

    def diagnostics(self) -> dict[str, Tensor]:
        """Of the last forward pass in chunks, as tensors on the device, for which nothing waited: the steps that the
        solver took, on average and at most, and the largest relative residual left. {} where nothing was iterated.
        """
        steps, residual = self.steps_taken, self.residual
        if steps is None or residual is None:
            return {}
        return {"solver_steps": steps.mean(), "solver_steps_max": steps.max(), "solver_residual": residual.max()}

    def forget(self, state: Moments, rows: Tensor) -> Moments:
        return forget(state, rows)

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        return {"triton": self._refusal(device, dtype)} if self.solver_name == "conjugate_gradients" else {}

    def _refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if self.chunk is not None and self.chunk > kernels.LONGEST:
            return f"the kernel takes chunks of up to {kernels.LONGEST} tokens, not regressor.chunk={self.chunk}"
        return kernels.refusal(device, dtype, self.key_dim)

    def route(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        moments = str(doubled_dtype(device, dtype)).removeprefix("torch.")
        why = ": MPS has no float64" if device.type == "mps" and dtype is torch.float32 else ""
        return ", ".join([*([] if backend == "recurrent" else [self.solver_name]), f"moments in {moments}{why}"])

    def flops_per_token(self, seq_len: int) -> int:
        """Two writes, a read, and the projections. The solve is not counted: what it takes depends on the solver and,
        by conjugate gradients, on the data (a step is 2 K^2 + 4 C K per head and token; `diagnostics` tells how many).
        So the utilisation that is reported is a lower bound.
        """
        K, V = self.key_dim, self.value_dim
        projections = sum(p.weight.numel() for p in (self.write_weight, self.query_mix) if p is not None)
        return 2 * (self.num_heads * (K * K + 2 * K * V) + projections)

    def state_size(self, seq_len: int) -> int:
        K = self.key_dim
        return self.num_heads * (K * (K + self.value_dim) + (self.solver_name == "rls"))
