"""Local linear regression in a window, joined with a linear memory for the rest.

Problem.    Local linear regression fits a plane around the query, with a ridge that draws its slope to zero. A memory M
            of all pairs so far knows a better slope to be drawn to:
                min_{b, W}  sum_{i in window} w_i ||v_i - b - (k_i - q) W||^2 + lambda ||W - M||^2 ,    o_t = b .
Solution.   In what M leaves unexplained of each value, v_i - k_i M, it is local linear regression with the ridge at
            zero, and that is linear in values. With c_i the weights that it gives them, sum_i c_i = 1,
                o_t = q M + sum_i c_i (v_i - k_i M) = sum_i c_i v_i + (q - sum_i c_i k_i) M .
            So the window is fitted once, to values and keys side by side, and the memory is read at what the window can
            not explain of the query.
Members.    lambda -> 0 is local_linear with a window, whose slope the window alone decides; M = 0 is it for any lambda;
            lambda -> infinity is softmax in a window, plus M read at the query's distance from the mean key.
            M is Gated DeltaNet's, over all pairs, those in the window too.
Exactness.  That of its two parts.

Shapes: B batch, T tokens, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.parts.sizes import Sizes
from models.regression.linear import Delta
from models.regression.local import LocalPolynomial
from models.regression.regressor import Regressor, Tokens


class State(NamedTuple):
    """near: the window's pairs, whose values have their keys beside them. far: the memory [B, H, K, V]."""

    near: Any
    far: Tensor


class Joined(Regressor):
    """The two together. window: of the local fit, in pairs."""

    accepts_decay = ("none", "head", "channel")  # of the memory

    def __init__(self, sizes: Sizes, backend: str = "auto", chunk: int | None = None, window: int = 32) -> None:
        super().__init__(sizes, backend)
        if backend not in ("auto", "torch", "recurrent"):
            raise ValueError(f"regressor.backend={backend}: Joined has auto, torch and recurrent")
        self.fit, self.function_class = "closed form, gradient step", "linear around q, linear"
        both = sizes._replace(value_dim=sizes.value_dim + sizes.key_dim)
        self.near = LocalPolynomial(both, window=window)
        self.far = Delta(sizes, chunk=chunk)

    def forward(self, tokens: Tokens, state: State | None = None) -> tuple[Tensor, State]:
        for part in (self.near, self.far):  # one that was asked for, or for both the PyTorch form
            part.backend = "recurrent" if self.backend == "recurrent" else "torch"
        near, far = (None, None) if state is None else state
        both = tokens._replace(v=torch.cat([tokens.v, tokens.k.to(tokens.v.dtype)], dim=-1), log_decay=None)
        o, near = self.near(both, near)
        o, key = o.split([self.value_dim, self.key_dim], dim=-1)
        rest, far = self.far(tokens._replace(q=tokens.q - key), far)
        return o + rest, State(near, far)

    def forget(self, state: State, rows: Tensor) -> State:
        return State(self.near.forget(state.near, rows), self.far.forget(state.far, rows))

    def describe(self, tokens: Tokens) -> dict[str, Tensor]:
        return self.far.describe(tokens)

    def flops_per_token(self, seq_len: int) -> int:
        return self.near.flops_per_token(seq_len) + self.far.flops_per_token(seq_len)

    def state_size(self, seq_len: int) -> int:
        return self.near.state_size(seq_len) + self.far.state_size(seq_len)
