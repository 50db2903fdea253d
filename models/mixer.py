"""The shell that every mixer shares: pairs -> regressor -> read-out.

        q, k, v = projections of x, then a short convolution, an activation, a norm, rotary positions, a feature map o
        = regressor(q, k, v)            the inner model, fitted to the pairs and read at the queries (models/regression)
        y       = (norm(o) * gate(x)) W_o

A mixer is a recipe: its YAML says which of these steps it has, and which decay, features and regressor go in. What
cannot go together is refused here, when it is built.

Shapes: B batch, T tokens, D model width, H heads, G key-value heads, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.convolution import ShortConvolution
from models.norm import RMSNorm, unit
from models.rotary import rotate

ACTIVATIONS = {"none": None, "silu": F.silu}
GATES = {"none": None, "silu": F.silu, "sigmoid": torch.sigmoid}
NORMS = ("none", "l2", "rms")


class State(NamedTuple):
    """What a mixer carries from one call to the next. Its size does not depend on T, but for softmax without a window.

    memory     the regressor's
    tail       [B, W-1, channels], the last inputs of the short convolution, or None
    position   [B], how many tokens of the present document have been seen
    segment    [B], the number of the present document, or None where segments have never been given
    """

    memory: Any
    tail: Tensor | None
    position: Tensor
    segment: Tensor | None


class Mixer(nn.Module):
    """(x [B, T, D], state=None, segments=None) -> (y [B, T, D], state).

    T = 1 with a state is decoding; any split of a sequence into calls gives the same outputs. `segments` [B, T] numbers
    the documents of packed rows, which behave as separate sequences; a document may go on in the next call, under the
    same number.

    num_heads, num_kv_heads, key_dim, value_dim: H, G (default H), K and V (default D / H).
    conv_size: width of the short convolution on q, k and v, 0 for none.
    activation: none | silu, after it.
    qk_norm: none | l2 (length one) | rms (length sqrt(K), with learned weights per channel).
    rotary: the base of the positions, or None.
    output_norm: RMS norm of each head's output.
    output_gate: none | silu | sigmoid, of a projection of x.
    decay, features, regressor: constructors, called with the sizes that they need.
    """

    def __init__(
        self,
        hidden_size: int,
        layer_index: int,
        regressor: Callable[..., nn.Module],
        decay: Callable[..., nn.Module],
        features: Callable[..., nn.Module],
        num_heads: int,
        num_kv_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv_size: int = 0,
        activation: str = "none",
        qk_norm: str = "none",
        rotary: float | None = None,
        output_norm: bool = False,
        output_gate: str = "none",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        H, G = num_heads, num_kv_heads or num_heads
        _check_choice("activation", activation, ACTIVATIONS)
        _check_choice("output_gate", output_gate, GATES)
        _check_choice("qk_norm", qk_norm, NORMS)
        if (key_dim is None or value_dim is None) and hidden_size % H:
            raise ValueError(
                f"num_heads={H} does not divide hidden_size={hidden_size}; set key_dim and value_dim, or other heads"
            )
        if H % G:
            raise ValueError(f"num_kv_heads={G} does not divide num_heads={H}")
        K, V = key_dim or hidden_size // H, value_dim or hidden_size // H
        if rotary is not None and K % 2:
            raise ValueError(f"key_dim={K} must be even for rotary positions")
        self.layer_index = layer_index
        self.num_heads, self.num_kv_heads, self.key_dim, self.value_dim = H, G, K, V
        self.activation, self.gate = ACTIVATIONS[activation], GATES[output_gate]
        self.qk_norm, self.rotary, self.norm_eps = qk_norm, rotary, norm_eps

        self.sizes = [H * K, G * K, G * V]  # q, k, v
        self.projection = nn.Linear(hidden_size, sum(self.sizes) + (H * V if self.gate else 0), bias=False)
        self.convolution = ShortConvolution(sum(self.sizes), conv_size) if conv_size > 1 else None
        if qk_norm == "rms":
            self.q_norm, self.k_norm = RMSNorm(K, norm_eps), RMSNorm(K, norm_eps)
        self.features = features(key_dim=K)
        width = self.features.width
        self.decay = decay(hidden_size=hidden_size, num_heads=H, key_dim=width)
        grouped = {} if G == H else {"num_kv_heads": G}
        recipe = getattr(regressor, "func", regressor)
        if grouped and not recipe.grouped_heads:
            raise ValueError(
                f"num_kv_heads={G}: {recipe.__name__} has a memory per head; only num_kv_heads={H} is possible"
            )
        self.regressor = regressor(hidden_size=hidden_size, num_heads=H, key_dim=width, value_dim=V, **grouped)
        if self.decay.kind not in recipe.accepts_decay:
            raise ValueError(
                f"{recipe.__name__} cannot have a decay of kind {self.decay.kind!r} ({type(self.decay).__name__}); "
                f"possible kinds: {', '.join(recipe.accepts_decay)}"
            )
        self.output_norm = RMSNorm(V, norm_eps) if output_norm else None
        self.output = nn.Linear(H * V, hidden_size, bias=False)

    def forward(self, x: Tensor, state: State | None = None, segments: Tensor | None = None) -> tuple[Tensor, State]:
        if state is not None and segments is not None:
            state = self._enter(state, segments[:, 0])
        tail, memory = (None, None) if state is None else (state.tail, state.memory)
        positions = _positions(x, None if state is None else state.position, segments)

        pairs, gate = self._project(x)
        if self.convolution is not None:
            pairs, tail = self.convolution(pairs, tail, segments)
        if self.activation is not None:
            pairs = self.activation(pairs)
        q, k, v = pairs.split(self.sizes, dim=-1)
        q, k, v = (
            y.unflatten(-1, (-1, width)) for y, width in ((q, self.key_dim), (k, self.key_dim), (v, self.value_dim))
        )
        q, k = self._normalise(q, k)
        if self.rotary is not None:
            q, k = rotate(q, positions, self.rotary), rotate(k, positions, self.rotary)
        q, k = self.features(q), self.features(k)

        o, memory = self.regressor(x, q, k, v, self.decay(x), memory, segments)
        if self.output_norm is not None:
            o = self.output_norm(o)
        o = o.flatten(-2).to(x.dtype)
        if self.gate is not None:
            o = o * self.gate(gate)
        segment = segments[:, -1] if segments is not None else None if state is None else state.segment
        return self.output(o), State(memory, tail, positions[:, -1] + 1, segment)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """One product for everything that is linear in x: (q, k, v side by side, the gate)."""
        projected = self.projection(x)
        if self.gate is None:
            return projected, None
        return projected.split([sum(self.sizes), self.num_heads * self.value_dim], dim=-1)

    def _normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.qk_norm == "l2":
            return unit(q, self.norm_eps), unit(k, self.norm_eps)
        if self.qk_norm == "rms":
            return self.q_norm(q), self.k_norm(k)
        return q, k

    def _enter(self, state: State, segment: Tensor) -> State:
        """The state as the first document of a call wants it: emptied in the rows where another document begins.
        Without segments, all is document 0.
        """
        before = torch.zeros_like(segment) if state.segment is None else state.segment
        new = before != segment
        tail = None if state.tail is None else state.tail.masked_fill(new.view(-1, 1, 1), 0)
        return State(self.regressor.forget(state.memory, new), tail, state.position.masked_fill(new, 0), segment)

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """Forward, multiply-adds counted as two: products with weights, and the regression by its definition. What is
        done element by element (convolution, norms, gates, activations) is left out, as is what a parallel form spends
        beyond the definition: MFU then can't be raised by wasting work.
        """
        products = 2 * (self.projection.weight.numel() + self.output.weight.numel())
        parts = self.decay.flops_per_token() + self.features.flops_per_token()
        return products + parts + self.regressor.flops_per_token(seq_len)

    def state_size(self, seq_len: int) -> int:
        """Numbers held per sequence after seq_len tokens: the memory and the convolution's tail."""
        tail = 0 if self.convolution is None else sum(self.sizes) * (self.convolution.width - 1)
        return self.regressor.state_size(seq_len) + tail


def _positions(x: Tensor, position: Tensor | None, segments: Tensor | None) -> Tensor:
    """[B, T]: how many tokens of its own document came before each token."""
    B, T, _ = x.shape
    index = torch.arange(T, device=x.device).expand(B, T)
    first = torch.zeros(B, 1, dtype=torch.long, device=x.device) if position is None else position.unsqueeze(1)
    if segments is None:
        return first + index
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    start = torch.where(starts, index, 0).cummax(1).values
    return torch.where(start == 0, first + index, index - start)


def _check_choice(name: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value} is not one of {', '.join(allowed)}")
