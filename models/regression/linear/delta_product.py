"""DeltaProduct: several pairs a token.

Problem.    That of delta.py, with n pairs (k_j, v_j) and steps b_j for every token, all projected from it: the memory
            fades once, takes n gradient steps, and is read.
Solution.   S_0 = a_t S_{t-1} ,    S_j = S_{j-1} + b_j k_j^T (v_j - k_j S_{j-1}) ,    S_t = S_n ,    o_t = q_t S_t .
            A token multiplies the memory by (I - b_n k_n^T k_n) ... (I - b_1 k_1^T k_1), n generalised Householder
            matrices instead of one: of n = 1 the eigenvalues are real, n = 2 with b = 2 is a rotation in the plane of
            its keys, and n = K any orthogonal matrix. States that turn can so be tracked in one layer.
Source.     Siems et al. 2025, section 4. b up to 2 belongs to it: with b < 1 all steps contract.
Exactness.  It is the delta rule on n T tokens, of which the first of each n fades and the last is read, in every form.

Shapes: B batch, T tokens, n pairs a token, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.parts.precision import working_dtype
from models.parts.sizes import Sizes
from models.regression.linear.delta import Delta
from models.regression.memory import first_memory


def recurrent_delta_product(
    q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | None = None, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time.

    q: [B, T, H, K].  k: [B, T n, H, K].  v: [B, T n, H, V].  step_size: [B, T n, H].  log_decay: [B, T, H] or
    [B, T, H, K], or None for a = 1.  memory: [B, H, K, V] or None for zeros.
    Returns o [B, T, H, V] in the dtype of v, and the memory after the last token. Computed in float32 at least.
    """
    dtype, T = working_dtype(q, k, v), q.shape[1]
    out_dtype, q = v.dtype, q.to(dtype)
    k, v, b = (x.to(dtype).unflatten(1, (T, -1)) for x in (k, v, step_size.unsqueeze(-1)))
    memory = first_memory(k[:, :, 0], v[:, :, 0], memory)
    if log_decay is not None:
        decay = (log_decay if log_decay.ndim == 4 else log_decay.unsqueeze(-1)).to(dtype).exp().unsqueeze(-1).unbind(1)
    outputs = []
    with torch.autocast(q.device.type, enabled=False):
        for t, (q_t, *steps) in enumerate(zip(*(x.unbind(1) for x in (q, k, v, b)), strict=True)):
            if log_decay is not None:
                memory = decay[t] * memory
            for k_j, v_j, b_j in zip(*(x.unbind(1) for x in steps), strict=True):
                error = v_j - (k_j.unsqueeze(-2) @ memory).squeeze(-2)
                memory = memory + k_j.unsqueeze(-1) @ (b_j * error).unsqueeze(-2)
            outputs.append((q_t.unsqueeze(-2) @ memory).squeeze(-2))
        return torch.stack(outputs, dim=1).to(out_dtype), memory


class DeltaProduct(Delta):
    """n = `num_steps` delta steps a token, each with a key, a value and a step size of its own; the shell projects n
    times as many keys and values. `step` is the delta rule's.

    By fla it is the gated delta rule on n T tokens. chunk_gated_delta_product computes the same, not in float32; it
    reads T queries instead of n T, and goes back as this does.
    """

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        chunk: int | None = None,
        num_steps: int = 2,
        step: str = "gradient",
        negative_eigenvalues: bool = True,
        bias: bool = True,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"regressor.num_steps={num_steps} must be at least 1")
        self.pairs_per_token = num_steps
        super().__init__(sizes, backend, chunk, step, negative_eigenvalues, bias=bias)
        self.fit = f"{num_steps} {step} steps"

    def solve(
        self, backend: str, q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | None, state: Any
    ) -> tuple[Tensor, Any]:
        if backend == "recurrent":
            return recurrent_delta_product(q, k, v, step_size, log_decay, state)
        n = self.pairs_per_token
        q = F.pad(q.unsqueeze(2), (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)
        if log_decay is not None:
            others = (0, 0) * (log_decay.ndim - 2) + (0, n - 1)
            log_decay = F.pad(log_decay.unsqueeze(2), others).flatten(1, 2)
        o, memory = super().solve(backend, q, k, v, step_size, log_decay, state)
        return o[:, n - 1 :: n], memory

    def flops_per_token(self, seq_len: int) -> int:
        """Two products with the memory for each pair and one to read it, and the step sizes' projection."""
        n = self.pairs_per_token
        return self.num_heads * ((4 * n + 2) * self.key_dim * self.value_dim + 2 * n * self.hidden_size)
