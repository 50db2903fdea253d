"""What a call of the kernels is told."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """Tensors of a call. None where there is none."""

    x: Tensor  # [B, T, N], q, k, v, the gate and a rest side by side; channels lie next to each other
    positions: Tensor  # [B, T], integers: how many tokens of the document came before
    tail: Tensor | None = None  # [B, W - 1, C], the inputs of the convolution before the first token
    weight: Tensor | None = None  # [C, W], weight[c, W - 1] meets the present token
    query_scale: Tensor | None = None  # [K], of norm rms
    key_scale: Tensor | None = None  # [K]
    frequency: Tensor | None = None  # [channels that turn / 2], float32, radians a token


class Recipe(NamedTuple):
    """Numbers of heads and widths, of what the row has side by side; gates: heads of the gate, as wide as values.
    convolved: qkv | k. norm: none | l2 | rms. activation: none | silu, gate: none | silu | sigmoid.
    """

    queries: int
    keys: int
    values: int
    gates: int
    key_dim: int
    value_dim: int
    convolved: str
    activation: str
    gate: str
    norm: str
    eps: float
