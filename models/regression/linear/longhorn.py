"""Longhorn: the implicit step, and its diagonal.

Problem.    Stay near the memory that was, and near the new pair, both at once (online learning's proximal step):
                S_t = argmin_S  ||S - S'||^2 + b_t ||v_t - k_t S||^2 ,    S' = a_t S_{t-1} .
Solution.   The delta rule with a step that shrinks for long keys (Liu et al. 2024, theorem 3.1),
                S_t = S' + d_t k_t^T (v_t - k_t S') ,    d_t = b_t / (1 + b_t |k_t|^2) .
Diagonal.   The code published with the paper keeps of d k^T k, which erases, only the diagonal:
                S_t = (1 - d_t k_t^2) * S' + d_t k_t^T v_t ,
            a memory that only adds and fades channel by channel, log1p(-d k^2) on top of its own decay. Every channel
            is erased for its own part in the key: keys that are not one-hot are not replaced but mixed. Another model,
            as cheap as linear.py, and computed by it.
Exactness.  Both are computed as they are stated, by exact chunked forms.

Shapes: B batch, T tokens, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels import fla
from models.parts.sizes import Sizes
from models.regression.linear.delta import Delta
from models.regression.linear.linear import chunked_linear, recurrent_linear

# A key with b |k|^2 -> infinity erases its channel whole, which no logarithm can say; 1e-6 of it stays.
LEAST_KEPT = 1e-6


class Longhorn(Delta):
    """The delta rule with the implicit step; with `diagonal`, of its erasure only the diagonal."""

    def __init__(self, sizes: Sizes, backend: str = "auto", chunk: int | None = None, diagonal: bool = False) -> None:
        super().__init__(sizes, backend, chunk, step="implicit")
        self.diagonal = diagonal
        self.fit = "diagonal implicit step" if diagonal else "implicit step"

    def solve(
        self, backend: str, q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | None, state: Any
    ) -> tuple[Tensor, Any]:
        if not self.diagonal:
            return super().solve(backend, q, k, v, step_size, log_decay, state)
        with torch.autocast(v.device.type, enabled=False):
            k = k.to(step_size.dtype)
            write = step_size.unsqueeze(-1) * k
            fade = torch.log1p(-(write * k).clamp(max=1 - LEAST_KEPT))
        if log_decay is not None:
            fade = fade + (log_decay if log_decay.ndim == 4 else log_decay.unsqueeze(-1))
        if backend == "recurrent":
            return recurrent_linear(q, write, v, fade, state)
        if backend == "fla":
            return fla.linear(q, write, v, fade, state)
        return chunked_linear(q, write, v, fade, state, self.tokens_at_once(v))

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        return {"fla": fla.refusal_linear(device, dtype)} if self.diagonal else super().accelerators(device, dtype)

    def route(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        if self.diagonal:
            return fla.route_linear(device, "channel") if backend == "fla" else ""
        return super().route(backend, device, dtype)

    def flops_per_token(self, seq_len: int) -> int:
        """Of the diagonal, two products with the memory (write, read), for it predicts nothing."""
        predictions = self.num_heads * 2 * self.key_dim * self.value_dim if self.diagonal else 0
        return super().flops_per_token(seq_len) - predictions
