"""Kaczmarz: a step that no key is too long for.

Problem.    The delta rule's, with every pair's loss divided by the length of its key,
                S_t = S' - b_t d/dS 1/2 ||v_t - k_t S||^2 / (|k_t|^2 + eps)  at  S' = a_t S_{t-1} .
Solution.   S_t = S' + b_t k_t^T (v_t - k_t S') / (|k_t|^2 + eps) ,    o_t = q_t S_t .
            With b = 1 and eps = 0 this is the nearest memory to S' that stores the pair exactly (Kaczmarz 1937), with b
            in (0, 1) its relaxation, normalised LMS (Nagumo and Noda 1967). eps is for keys of length zero.
Exactness.  The chunked form equals the recurrence up to rounding, whatever the chunk.

Shapes: B batch, T tokens, H heads, K key width, V value width, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.parts.precision import wide, working_dtype
from models.parts.sizes import Sizes
from models.regression.documents import forget_at_starts
from models.regression.linear.delta import chunked_delta
from models.regression.memory import Memory, first_memory
from models.regression.regressor import Tokens

EPS = 1e-6


def recurrent_kaczmarz(
    q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | None = None, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time: what the chunked form is held to.

    q, k [B, T, H, K], v [B, T, H, V], step_size [B, T, H], log_decay [B, T, H] or None, memory [B, H, K, V] or None for
    zeros. Returns o [B, T, H, V] in the dtype of v, and the memory after the last token.
    """
    dtype = working_dtype(q, k, v)  # float32 at least
    out_dtype, (q, k, v, step_size) = v.dtype, (y.to(dtype) for y in (q, k, v, step_size))
    S, outputs = first_memory(k, v, memory), []
    with torch.autocast(q.device.type, enabled=False):
        for t in range(q.shape[1]):
            query, key, value = (y[:, t, :, None] for y in (q, k, v))  # rows: [B, H, 1, K] or [B, H, 1, V]
            if log_decay is not None:
                S = log_decay[:, t, :, None, None].to(dtype).exp() * S
            error = (value - key @ S) / (key.square().sum(-1, keepdim=True) + EPS)
            S = S + key.mT @ (step_size[:, t, :, None, None] * error)
            outputs.append((query @ S).squeeze(-2))
        return torch.stack(outputs, dim=1).to(out_dtype), S


def chunked_kaczmarz(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_decay: Tensor | None = None,
    memory: Tensor | None = None,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """The same map, a chunk of tokens at a time: the delta rule's parallel form, with another step."""
    step_size = step_size / (wide(k).square().sum(-1) + EPS)
    return chunked_delta(q, k, v, step_size, log_decay, memory, chunk)


class Kaczmarz(Memory):
    """Normalised LMS with a learned step per head and token, b = sigmoid(x W + c)."""

    accepts_decay = ("none", "head")
    fit = "normalised step"

    def __init__(self, sizes: Sizes, backend: str = "auto", chunk: int | None = None) -> None:
        super().__init__(sizes, backend, chunk)
        self.step_size = nn.Linear(sizes.hidden_size, sizes.num_heads)

    def forward(self, tokens: Tokens, state: Any = None) -> tuple[Tensor, Any]:
        x, q, k, v, log_decay, segments = tokens
        step_size = wide(self.step_size(x)).sigmoid()
        log_decay = forget_at_starts(log_decay, segments, like=q)  # documents do not see each other
        if q.shape[1] == 1 or self.choose(v.device, v.dtype).backend == "recurrent":
            return recurrent_kaczmarz(q, k, v, step_size, log_decay, state)
        return chunked_kaczmarz(q, k, v, step_size, log_decay, state, self.tokens_at_once(v))

    def flops_per_token(self, seq_len: int) -> int:
        """Three products with the memory (predict, write, read), and the step sizes' projection."""
        return self.num_heads * (6 * self.key_dim * self.value_dim + 2 * self.hidden_size)

    def state_size(self, seq_len: int) -> int:
        """A matrix per head, however long the sequence."""
        return self.num_heads * self.key_dim * self.value_dim
