"""LaCT's layer as published (Zhang et al. 2025): attention and a network that learn from the same queries, keys and
values, each in heads of its own.

        q, k, v = x W                                             attention in a window turns q and k by their positions
        q', k'  = turned(unit(silu(scale * q + offset)))          unit: length one, in the network's heads
        o       = attention(q, k, v) + g norm(f(q'))              f learns from k' and silu(v): models/regression/deep

The network has few wide heads; positions turn channels of attention's heads in both. The published configurations have
no norm of attention's queries and keys.

Shapes: B batch, T tokens, D model width, H heads of the network, K their width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.mixers.layer import State, positions_of
from models.mixers.mixer import Mixer
from models.parts.rotary import rotate
from models.parts.sizes import Sizes
from models.regression.local import Softmax
from models.regression.regressor import Tokens

EPS = 1e-5  # added to lengths


class PublishedLaCT(Mixer):
    """The layer above. Its settings are Mixer's, where num_heads counts the network's heads, and

    attention_heads: of attention, whose width is D over their number.
    window: of attention, in tokens.
    """

    def __init__(
        self, hidden_size: int, layer_index: int, *, attention_heads: int, window: int, **settings: Any
    ) -> None:
        super().__init__(hidden_size, layer_index, **settings)
        if attention_heads < 1 or hidden_size % attention_heads or (hidden_size // attention_heads) % 2:
            raise ValueError(f"attention_heads={attention_heads}: hidden_size={hidden_size} over it must be even")
        if self.rotary is None or set(self.sizes) != {hidden_size} or self.gate is not None:
            raise ValueError(
                f"rotary={self.rotary}, output_gate, num_kv_heads, key_dim and value_dim of {type(self).__name__}: "
                "it has positions, no gate, and q, k and v as wide as the model"
            )
        width = hidden_size // attention_heads
        sizes = Sizes(hidden_size, attention_heads, attention_heads, width, width)
        self.attention = Softmax(sizes, window=window, inverse_temperature="scaled")
        self.scale, self.offset = nn.Parameter(torch.ones(2, hidden_size)), nn.Parameter(torch.zeros(2, hidden_size))

    def forward(self, x: Tensor, state: State | None = None, segments: Tensor | None = None) -> tuple[Tensor, State]:
        if state is not None and segments is not None:
            state = self.enter(state, segments[:, 0])
        memory, pairs = (None, None) if state is None else state.memory
        positions = positions_of(x, None if state is None else state.position, segments)
        q, k, v = self.projection(x).split(self.sizes, dim=-1)
        near = Tokens(x, self._turned(q, positions), self._turned(k, positions), self._by_head(v), segments=segments)
        local, pairs = self.attention(near, pairs)
        q, k = self._learned(q, 0, positions), self._learned(k, 1, positions)
        far = Tokens(x, q, k, F.silu(v).unflatten(-1, (self.num_heads, -1)), segments=segments)
        read, memory = self.regressor(far, memory)
        o = (local.flatten(-2) + read.flatten(-2)).to(x.dtype)
        o = o if self.output is None else self.output(o)
        segment = segments[:, -1] if segments is not None else None if state is None else state.segment
        return o, State((memory, pairs), (None, None), positions[:, -1] + 1, segment)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.attention.num_heads, -1))

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        assert self.rotary is not None
        return rotate(self._by_head(x), positions, self.rotary)

    def _learned(self, x: Tensor, i: int, positions: Tensor) -> Tensor:
        """Queries (i = 0) or keys (1) of the network, [B, T, H, K]."""
        x = F.silu(x * self.scale[i].to(x.dtype) + self.offset[i].to(x.dtype)).unflatten(-1, (self.num_heads, -1))
        x = x / (x.norm(dim=-1, keepdim=True) + EPS)
        return self._turned(x.flatten(-2), positions).flatten(-2).unflatten(-1, (self.num_heads, -1))

    def _forget(self, memory: Any, rows: Tensor) -> Any:
        return self.regressor.forget(memory[0], rows), self.attention.forget(memory[1], rows)

    def flops_per_token(self, seq_len: int) -> int:
        return super().flops_per_token(seq_len) + self.attention.flops_per_token(seq_len)

    def state_size(self, seq_len: int) -> int:
        return super().state_size(seq_len) + self.attention.state_size(seq_len)
