"""Memories of a fixed size: what all regressors share whose state does not grow with the sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.parts.precision import working_dtype
from models.parts.sizes import Sizes
from models.regression.regressor import Regressor


def first_memory(k: Tensor, v: Tensor, memory: Tensor | None) -> Tensor:
    """The memory [B, H, K, V] to begin with, zeros for None, in float32 at least. k [B, T, H, K], v [B, T, H, V]."""
    dtype = working_dtype(k, v)
    if memory is None:
        return torch.zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=dtype, device=k.device)
    return memory.to(dtype)


class Memory(Regressor):
    """A matrix per head, [B, H, K, V], fitted token by token and computed chunk by chunk.

    chunk: tokens of a chunk in the PyTorch form, a choice of speed and not of the model; None takes 32 on a CPU and 64
    on a GPU, where fewer, larger products are worth more.
    """

    accepts_decay: tuple[str, ...] = ("none", "head")

    def __init__(self, sizes: Sizes, backend: str = "auto", chunk: int | None = None) -> None:
        super().__init__(sizes, backend)
        if chunk is not None and chunk < 1:
            raise ValueError(
                f"regressor.chunk={chunk} is no number of tokens; a positive integer, or null for this device's best"
            )
        self.chunk = chunk

    def tokens_at_once(self, v: Tensor) -> int:
        """The chunk for this device."""
        return self.chunk or (64 if v.is_cuda else 32)

    def recall(self, x: Tensor, q: Tensor, state: Any) -> Tensor:
        """q M, of a state that is M or calls it `memory`."""
        memory = state if state is None or isinstance(state, Tensor) else state.memory
        memory = first_memory(q, q.new_empty(1, 1, 1, self.columns), memory)
        with torch.autocast(q.device.type, enabled=False):
            o = q.transpose(1, 2).to(memory.dtype) @ memory
        return o.transpose(1, 2).to(q.dtype)

    def recall_flops_per_token(self) -> int:
        return 2 * self.num_heads * self.key_dim * self.columns

    def state_size(self, seq_len: int) -> int:
        return self.num_heads * self.key_dim * self.columns

    @property
    def columns(self) -> int:
        """Of the matrix: what it holds for a key, the value and maybe more."""
        return self.value_dim
