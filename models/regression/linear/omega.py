"""The Omega rule: every step fits a window of pairs, not the last one alone.

Problem.    momentum.py's, with a loss over the last c pairs of the document, each weighted by the token that takes the
            step (the Omega rule of Atlas, Behrouz et al. 2025):
                l_t(M) = 1/2 sum_{r<c} gamma_{t,r} ||v_{t-r} - k_{t-r} M||^2 .
Solution.   S_t = eta_t S_{t-1} + theta_t sum_{r<c} gamma_{t,r} k_{t-r}^T (v_{t-r} - k_{t-r} M_ref)
            M_t = a_t M_{t-1} + S_t ,    o_t = q_t M_t .
            The whole gradient of a token is taken at one memory, with `grad_batch` as there: 1 at M_{t-1}, b at the
            memory after the previous mini-batch. A pair's error is then another one for each token that sees it.
            So every token makes c writes, not one: the chunk's triangular system has C c rows, and no more is needed
            for the exact rule and for any grad_batch. It costs c times momentum.py's products; so does the definition.
Members.    c = 1 with weight 1 is momentum.py.
Stability.  gamma sums to at most one, so that the window asks for no larger step than one pair.
Exactness.  The chunked form equals the recurrence up to rounding, whatever the chunk, gradients included.

Shapes: as in momentum.py; c the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from models.parts.linear import read
from models.parts.precision import wide, working_dtype
from models.parts.sizes import Sizes
from models.regression.linear import references
from models.regression.linear.momentum import Momentum, chunked_momentum, kernel_momentum, recurrent_momentum
from models.regression.regressor import Tokens


class State(NamedTuple):
    """fitted: momentum.py's state. keys [B, c - 1, H, K] and values [B, c - 1, H, V]: the last pairs of the document,
    the newest last; zeros, which write nothing, where it has fewer.
    """

    fitted: references.State
    keys: Tensor
    values: Tensor


def windows(
    k: Tensor, v: Tensor, weights: Tensor, tails: Sequence[Tensor], dtype: torch.dtype, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What every token sees, the newest pair first: keys [B, T, c, H, K], values [B, T, c, H, V], and its weights, zero
    for another document's pairs. And what the next call's tokens will, as State has it. tails: keys and values of the
    state, or nothing.
    """
    (B, T, H), past = k.shape[:3], weights.shape[-1] - 1
    none = [x.new_zeros(B, past, H, x.shape[-1], dtype=dtype) for x in (k, v)]
    pairs = [torch.cat([tail, x.to(dtype)], dim=1) for tail, x in zip(tails or none, (k, v), strict=True)]
    lasting = [x[:, T:] for x in pairs]
    if segments is not None:
        document = torch.cat([segments[:, :1].expand(-1, past), segments], dim=1)
        seen = document.unfold(1, past + 1, 1).flip(-1) == segments.unsqueeze(-1)
        weights = weights.masked_fill(~seen.unsqueeze(2), 0.0)
        other = (document[:, T:] != segments[:, -1:]).view(B, past, 1, 1)
        lasting = [x.masked_fill(other, 0.0) for x in lasting]
    keys, values = (x.unfold(1, past + 1, 1).flip(-1).permute(0, 1, 4, 2, 3) for x in pairs)
    return keys, values, weights, lasting[0], lasting[1]


def omega(
    form: Callable[..., tuple[Tensor, references.State]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    step_size: Tensor,
    log_momentum: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
    grad_batch: int = 1,
    segments: Tensor | None = None,
    **settings: int,
) -> tuple[Tensor, State]:
    """A form of momentum.py with c writes a token: the pairs that it sees, with theta gamma_{t,r} for theta.

    weights: [B, T, H, c], gamma_{t,r} of the r-th last pair. The other arguments and the results as in
    recurrent_momentum, but for the state.
    """
    tails = () if state is None else state[1:]
    keys, values, weights, *pairs = windows(k, v, weights, tails, working_dtype(q, k, v), segments)
    keys, values = keys.to(k.dtype).flatten(1, 2), values.to(v.dtype).flatten(1, 2)
    steps = (weights * step_size.unsqueeze(-1)).transpose(2, 3).flatten(1, 2)
    fitted = None if state is None else state.fitted
    gates = (steps, log_momentum, log_decay)
    o, fitted = form(q, keys, values, *gates, fitted, grad_batch, segments, **settings)
    return o, State(fitted, *pairs)


recurrent_omega, chunked_omega, kernel_omega = (
    partial(omega, form) for form in (recurrent_momentum, chunked_momentum, kernel_momentum)
)


def shares_of(logits: Tensor) -> Tensor:
    """gamma [*, c] of logits: s / max(1, sum of s), s = sigmoid."""
    s = logits.sigmoid()
    return s / s.sum(-1, keepdim=True).clamp(min=1.0)


class Omega(Momentum):
    """Momentum over a window, the weights of its pairs learned per head, token and offset (shares_of x W + b).

    window: c, the pairs of a step.
    """

    reads: ClassVar[tuple[str, ...]] = ("step_size", "momentum", "weights")

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        chunk: int | None = None,
        grad_batch: int = 1,
        gates: str = "tied",
        window: int = 4,
    ) -> None:
        super().__init__(sizes, backend, chunk, grad_batch, gates)
        if window < 1:
            raise ValueError(f"regressor.window={window} is no number of pairs; a positive integer")
        self.window, self.fit = window, f"step for {window} pairs, momentum"
        self.weights = nn.Linear(sizes.hidden_size, sizes.num_heads * window)

    def tokens_at_once(self, v: Tensor) -> int:
        """Fewer where each makes several writes: the triangular system is as large as without a window."""
        return self.chunk or max(8, super().tokens_at_once(v) // self.window)

    def forward(self, tokens: Tokens, state: Any = None) -> tuple[Tensor, Any]:
        x, q, k, v, log_decay, segments = tokens
        weights = shares_of(wide(read(self.weights, x)).unflatten(-1, (-1, self.window)))
        step_size, log_momentum, remaining = self.gates(x, log_decay)
        gates = (weights, step_size, log_momentum, log_decay)
        o, state = omega(self.form(tokens), q, k, v, *gates, state, self.grad_batch, segments)
        fitted, *pairs = state
        return o, State(fitted.times(remaining), *pairs)

    def recall(self, x: Tensor, q: Tensor, state: State | None) -> Tensor:
        return super().recall(x, q, None if state is None else state.fitted)

    def forget(self, state: State, rows: Tensor) -> State:
        keys, values = (x.masked_fill(rows.view(-1, 1, 1, 1), 0.0) for x in state[1:])
        return State(super().forget(state.fitted, rows), keys, values)

    def flops_per_token(self, seq_len: int) -> int:
        """Predictions and writes for the whole window, one read, and the projections of the gates and weights."""
        pairs = (self.window - 1) * (4 * self.key_dim * self.value_dim) + 2 * self.window * self.hidden_size
        return super().flops_per_token(seq_len) + self.num_heads * pairs

    def state_size(self, seq_len: int) -> int:
        """Momentum's, and the window's pairs but the newest."""
        return super().state_size(seq_len) + (self.window - 1) * self.num_heads * (self.key_dim + self.value_dim)
