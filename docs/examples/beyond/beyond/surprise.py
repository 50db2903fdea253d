"""Mini-batches that end where they surprise: gradients at an old memory only while it knows what is coming.

Problem.    Memories that learn in mini-batches take the gradients of a mini-batch at the memory R before it, so that
            its tokens can be computed together. What repeats within a mini-batch is then written as often as it
            repeats. Here a mini-batch lasts as long as R predicts well: it ends behind the token with which the
            surprise in it,
                sum_i ||v_i - k_i R||^2 / ||v_i||^2 ,
            reaches a budget, and behind its longest number of tokens at the latest.
Solution.   S_t = a_t S_{t-1} + b_t k_t^T (v_t - k_t R) ,    o_t = q_t S_t ,    R <- S_t where the mini-batch ends.
Members.    A budget of 0 ends each at its first token, R = S_{t-1}: leaky LMS. No budget: mini-batches of one length,
            counted from the document's first token.
Exactness.  Where a mini-batch ends is no smooth function of anything, and no gradient goes through it. Both backends
            loop over tokens. `diagnostics` tells how long mini-batches were on average: how many times fewer steps one
            after another a form that does a mini-batch at once would have.

Shapes: B batch, T tokens, H heads, K key width, V value width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.parts.precision import NOTHING, wide, working_dtype
from models.parts.sizes import Sizes
from models.regression.documents import forget_at_starts
from models.regression.memory import Memory, first_memory
from models.regression.regressor import FORGET, Tokens


class State(NamedTuple):
    """memory, before [B, H, K, V]: S, and R, that before the mini-batch. surprise, length [B, H]: its surprise so far,
    and its tokens."""

    memory: Tensor
    before: Tensor
    surprise: Tensor
    length: Tensor


def recurrent_surprise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_decay: Tensor | None,
    state: State | None,
    budget: float,
    longest: int,
) -> tuple[Tensor, State, Tensor]:
    """q, k [B, T, H, K], v [B, T, H, V], step_size [B, T, H], log_decay [B, T, H] or None. Returns o [B, T, H, V] in
    float32 at least, the last state, and how many mini-batches have ended, [B, H]."""
    dtype = working_dtype(q, k, v)
    q, k, v, b = (y.to(dtype) for y in (q, k, v, step_size))
    S = first_memory(k, v, None if state is None else state.memory)
    R = S if state is None else state.before.to(dtype)
    surprise, length = (S.new_zeros(S.shape[:2]) for _ in "SL") if state is None else state[2:]
    outputs, count = [], torch.zeros_like(length)
    with torch.autocast(q.device.type, enabled=False):
        decay = torch.ones_like(b) if log_decay is None else log_decay.to(dtype).exp()
        begins = torch.zeros_like(b, dtype=torch.bool) if log_decay is None else log_decay <= FORGET  # documents
        size = v.square().sum(-1) + NOTHING
        given = (
            q.unsqueeze(3),
            k.unsqueeze(3),
            v.unsqueeze(3),
            b[..., None, None],
            decay[..., None, None],
            size,
            begins,
        )
        for query, key, value, step, a, square, new in zip(*(y.unbind(1) for y in given), strict=True):
            if log_decay is not None:
                R = R.masked_fill(new[..., None, None], 0.0)
                surprise, length = surprise.masked_fill(new, 0.0), length.masked_fill(new, 0.0)
            error = value - key @ R
            S = a * S + key.mT @ (step * error)
            outputs.append((query @ S).squeeze(2))
            with torch.no_grad():
                surprise, length = surprise + error.square().sum((-2, -1)) / square, length + 1
                ends = (surprise >= budget) | (length >= longest)
                surprise, length = surprise.masked_fill(ends, 0.0), length.masked_fill(ends, 0.0)
                count = count + ends
            R = torch.where(ends[..., None, None], S, R)
    return torch.stack(outputs, dim=1), State(S, R, surprise, length), count


class Surprise(Memory):
    """The rule above with a learned step size per head and token, b = sigmoid(x W + c).

    budget: of surprise, 1 for a token of which nothing is known; null for none.  longest: tokens of a mini-batch.
    """

    weighs_values = False  # where a mini-batch ends depends on values

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        chunk: int | None = None,
        budget: float | None = 2.0,
        longest: int = 16,
    ) -> None:
        super().__init__(sizes, backend, chunk)
        if longest < 1:
            raise ValueError(f"regressor.longest={longest} is no number of tokens; a positive integer")
        if budget is not None and budget < 0:
            raise ValueError(f"regressor.budget={budget} must be at least 0, or null for no budget")
        self.budget, self.longest = math.inf if budget is None else budget, longest
        self.fit = f"gradient step, mini-batches of up to {longest}"
        self.step_size = nn.Linear(sizes.hidden_size, sizes.num_heads)
        self.mean_length: Tensor | None = None

    def forward(self, tokens: Tokens, state: Any = None) -> tuple[Tensor, Any]:
        x, q, k, v, log_decay, segments = tokens
        if log_decay is not None:
            log_decay = log_decay.clamp(min=FORGET / 2)  # a gate that closes is no document's end
        log_decay = forget_at_starts(log_decay, segments, like=q)
        b = wide(self.step_size(x)).sigmoid()
        o, state, count = recurrent_surprise(q, k, v, b, log_decay, state, self.budget, self.longest)
        self.mean_length = q.shape[1] / count.mean().clamp(min=1 / q.shape[1])
        return o.to(v.dtype), state

    def forget(self, state: State, rows: Tensor) -> State:
        return State._make(y.masked_fill(rows.view(-1, *[1] * (y.ndim - 1)), 0.0) for y in state)

    def diagnostics(self) -> dict[str, Tensor]:
        return {} if self.mean_length is None else {"mini_batch": self.mean_length}

    def describe(self, tokens: Tokens) -> dict[str, Tensor]:
        return {"step_size": wide(self.step_size(tokens.x)).sigmoid()}

    def flops_per_token(self, seq_len: int) -> int:
        return self.num_heads * (6 * self.key_dim * self.value_dim + 2 * self.hidden_size)

    def state_size(self, seq_len: int) -> int:
        """Two matrices and two numbers a head."""
        return self.num_heads * (2 * self.key_dim * self.value_dim + 2)
