"""What a call of the kernels is told."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

LATER = "later"  # a gate that is not made here


class Call(NamedTuple):
    """Tensors of a call. None where there is none."""

    x: Tensor  # [B, T, N], q, k, v, the gate and a rest side by side; channels lie next to each other
    positions: Tensor  # [B, T], integers: how many tokens of the document came before
    tail: Tensor | None = None  # [B, W - 1, C], the inputs of the convolution before the first token
    weight: Tensor | None = None  # [C, W], weight[c, W - 1] meets the present token
    query_scale: Tensor | None = None  # [K], of norm rms
    key_scale: Tensor | None = None  # [K]
    frequency: Tensor | None = None  # [channels that turn / 2], float32, radians a token


LEARNED = ("tail", "weight", "query_scale", "key_scale")  # have gradients, beside x


class Recipe(NamedTuple):
    """Numbers of heads and widths, of what the row has side by side; gates: heads of the gate, as wide as values.
    convolved: qkv | k. norm: none | l2 | rms. activation: none | silu, gate: none | silu | sigmoid | later.
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

    @property
    def made(self) -> int:
        """How many of queries, keys, values and gates the kernels make: where the outputs have the link."""
        counts = (self.queries, self.keys, self.values, 0 if self.gate == LATER else self.gates)
        return sum(count > 0 for count in counts)


def new_link(x: Tensor) -> Tensor:
    """x's shape and dtype, and no memory."""
    return x.new_empty(1).expand(x.shape)
