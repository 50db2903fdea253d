"""The preconditioned delta rule: a step size for every channel of the keys, from how often it was used.

Problem.    The ridge regression of least_squares.py,
                S_t = argmin_S  sum_{i<=t} gamma_i^(t) b_i ||v_i - k_i S||^2 + ridge ||S||^2 ,
            whose recursive solution (RLS) steps along k P / (1 + b k P k^T), P the inverse of the Hessian
            ridge + sum_i gamma b k_i^T k_i of the pairs before. Here only the Hessian's diagonal is kept, A.
Solution.   P_t = 1 / (ridge + a_t A_{t-1}) ,    w_t = k_t P_t / (1 + b_t k_t . (k_t P_t)) ,
            S_t = a_t S_{t-1} + b_t w_t^T (v_t - k_t a_t S_{t-1}) ,    A_t = a_t A_{t-1} + b_t k_t^2 ,
            o_t = q_t S_t .
            The gain is the exact one for a diagonal Hessian: b w.k < 1, so that no key, however long, makes a step
            overshoot. A channel that was often written is written more gently: a mean over its pairs instead of its
            last value. For a = 1 and keys that use one channel each, it is the ridge regression itself; in general it
            lies between delta.py and least_squares.py, at the price of the first.
Squashed.   Preconditioned DeltaNet (Tumma, Loo and Rus 2026, arXiv 2604.21100; fla 0.6.0, precond_gated_delta_rule) has
            the same diagonal with gates of its own, and a preconditioner that is squashed to within a factor x of 1,
                A_t = c_t A_{t-1} + e_t k_t^2 ,    r = ln(A_t + 1e-6) - m ,    P_t = x^(-r / (1 + |r|)) ,
                S_t = a_t S_{t-1} + b_t (k_t * P_t)^T (v_t - k_t a_t S_{t-1}) ,
            x = 1.5, m learned per head from -0.2. Its step b knows nothing of P: b k.(k P) < 2 by the squash. With
            x = 1 it is the gated delta rule.
Exactness.  A is a decayed sum, found for all tokens at once; with it, the rest is the delta rule with a write key of
            its own, in every form equal to the recurrence up to rounding.

Shapes: B batch, T tokens, H heads, K key width, V value width, C chunk, M chunks of all sequences.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.kernels import fla, momentum
from models.parts.decay import ScalarDecay
from models.parts.precision import wide, working_dtype
from models.parts.sizes import Sizes
from models.regression.chunks import fades, from_chunks, into_chunks, short
from models.regression.documents import forget_at_starts
from models.regression.linear.delta import Delta
from models.regression.regressor import Tokens

UNUSED = 1e-6  # added to A where its logarithm is taken


class Preconditioned(NamedTuple):
    """memory [B, H, K, V], and curvature [B, H, K], A."""

    memory: Tensor
    curvature: Tensor


def recurrent_curvature(x: Tensor, log_decay: Tensor | None, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: a_t A_{t-1} for every token, before it adds its own x_t = b_t k_t^2, and A after the last.

    x [B, T, H, K]; log_decay [B, T, H], or None for a = 1; curvature [B, H, K].
    """
    decay = None if log_decay is None else log_decay.to(x.dtype).exp().unsqueeze(-1).unbind(1)
    before = []
    for t, x_t in enumerate(x.unbind(1)):
        before.append(curvature if decay is None else decay[t] * curvature)
        curvature = before[-1] + x_t
    return torch.stack(before, dim=1), curvature


def chunked_curvature(x: Tensor, log_decay: Tensor | None, curvature: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The same, C tokens at a time: sums inside a chunk; what chunks add and how they fade is a sequence again, and so
    on. Arguments as in recurrent_curvature.
    """
    (B, T, H, _), chunk = x.shape, short(chunk, x.shape[1])
    x, log_decay = into_chunks(x, chunk, x.dtype), into_chunks(log_decay, chunk, x.dtype)
    within, start, end = fades(x, log_decay)
    added = (end * x).sum(1).unflatten(0, (-1, B, H)).transpose(0, 1)  # [B, N, H, K]
    if added.shape[1] == 1:
        first, last = curvature.unsqueeze(1), start[:, -1].unflatten(0, (B, H)) * curvature + added[:, 0]
    else:
        whole = None if log_decay is None else log_decay.sum(1).view(-1, B, H).transpose(0, 1)
        before, last = chunked_curvature(added, whole, curvature, chunk)
        first = torch.cat([curvature.unsqueeze(1), (before + added)[:, :-1]], dim=1)
    before = within.tril(-1) @ x + start * first.transpose(0, 1).flatten(0, 2).unsqueeze(1)
    return from_chunks(before, (B, T, H)), last


def squashed(curvature: Tensor, center: Tensor, squash: float) -> Tensor:
    """P of the published rule, between 1 / squash and squash. curvature A [B, T, H, K], center m [H, 1]."""
    r = (curvature + UNUSED).log() - center
    return (-math.log(squash) * r / (1 + r.abs())).exp()


class PreconditionedDelta(Delta):
    """The delta rule with its diagonal second order. ridge: where the learned ridge of every head and channel starts;
    the smaller, the more of a first value is stored at once.
    """

    accepts_decay: tuple[str, ...] = ("none", "head", "signed")

    def __init__(self, sizes: Sizes, backend: str = "auto", chunk: int | None = None, ridge: float = 0.1) -> None:
        super().__init__(sizes, backend, chunk)
        if ridge <= 0:
            raise ValueError(f"regressor.ridge={ridge} must be positive")
        self.fit = "diagonal second-order step"
        self.log_ridge = nn.Parameter(torch.full((self.num_heads, self.key_dim), math.log(ridge)))

    def solve(
        self, backend: str, q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | None, state: Any
    ) -> tuple[Tensor, Preconditioned]:
        dtype = working_dtype(q, k, v)
        memory, curvature = state or (None, torch.zeros(k.shape[0], *k.shape[2:], dtype=dtype, device=k.device))
        used = step_size.to(dtype).unsqueeze(-1) * k.to(dtype).square()
        with torch.autocast(v.device.type, enabled=False):
            before, curvature = self.uses(backend, used, log_decay, curvature.to(dtype))
        preconditioner = 1 / (wide(self.log_ridge).exp() + before)
        gain = 1 + (used * preconditioner).sum(-1, keepdim=True)
        write_key = k.to(dtype) * preconditioner / gain
        o, memory = self.take_steps(backend, q, k, v, step_size, log_decay, memory, write_key)
        return o, Preconditioned(memory, curvature)

    def uses(self, backend: str, x: Tensor, log_decay: Tensor | None, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """The curvature by one of its forms."""
        if backend == "recurrent":
            return recurrent_curvature(x, log_decay, curvature)
        return chunked_curvature(x, log_decay, curvature, self.tokens_at_once(x))

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        shape = device, dtype, self.key_dim, self.value_dim
        return {"fla": fla.refusal_write_key(*shape), "triton": momentum.refusal(*shape, own_writes=True)}

    def route(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        return "chunk_comba" if backend == "fla" else ""

    def forget(self, state: Preconditioned, rows: Tensor) -> Preconditioned:
        memory = super().forget(state.memory, rows)
        return Preconditioned(memory, state.curvature.masked_fill(rows.view(-1, 1, 1), 0.0))

    def state_size(self, seq_len: int) -> int:
        return super().state_size(seq_len) + self.num_heads * self.key_dim


class SquashedDelta(PreconditionedDelta):
    """Preconditioned Gated DeltaNet, as published.

    squash: x. center: where m starts.
    """

    reads = ()  # a decay of its own takes x as well

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        chunk: int | None = None,
        squash: float = 1.5,
        center: float = -0.2,
    ) -> None:
        if not 1 <= squash <= 2:
            raise ValueError(f"regressor.squash={squash} must lie between 1, the delta rule, and 2")
        super(PreconditionedDelta, self).__init__(sizes, backend, chunk)
        self.fit, self.squash = "squashed diagonal step", squash
        self.center = nn.Parameter(torch.full((self.num_heads, 1), center))
        self.curvature_decay = ScalarDecay(sizes)
        self.curvature_weight = nn.Linear(sizes.hidden_size, self.num_heads, bias=False)

    def forward(self, tokens: Tokens, state: Any = None) -> tuple[Tensor, Preconditioned]:
        x, q, k, v, log_decay, segments = tokens
        memory, curvature = state or (None, k.new_zeros(k.shape[0], *k.shape[2:], dtype=working_dtype(q, k, v)))
        backend = "recurrent" if q.shape[1] == 1 else self.choose(v.device, v.dtype).backend
        own_decay = forget_at_starts(self.curvature_decay(x)[0], segments)
        used = wide(self.curvature_weight(x)).sigmoid().unsqueeze(-1) * k.to(curvature.dtype).square()
        with torch.autocast(v.device.type, enabled=False):
            before, curvature = self.uses(backend, used, own_decay, curvature)
            write_key = k * squashed(before + used, self.center, self.squash)
        log_decay = forget_at_starts(log_decay, segments, like=q)
        step_size = self.steps(x, k)
        o, memory = self.take_steps(backend, q, k, v, step_size, log_decay, memory, write_key)
        return o, Preconditioned(memory, curvature)

    def flops_per_token(self, seq_len: int) -> int:
        """And the projections of the curvature's gates."""
        return super().flops_per_token(seq_len) + 4 * self.num_heads * self.hidden_size
