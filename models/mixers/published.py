"""The shells of published layers, where they are not Mixer's (models/mixers/mixer.py), as recipes may want them:

        o <- o + D v                                skip: Mamba-2
        o <- norm(o) * gate(x W_1 W_2 + b)          gate_rank: Kimi Delta Attention
        o <- norm of all heads' (o * gate(x))       gate_first, read_norm=rms_all: Mamba-2
        o <- layer norm of all heads' o             read_norm=layer_all: TTT

and, of pairs, a convolution with biases, or of queries and keys alone, one projection for both of these, and positions
that begin anew every few tokens. Which layers are the published ones, and what else differs: docs/published.md.

Shapes: B batch, T tokens, D model width, H heads, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.mixers.layer import Tails, check_choice
from models.mixers.mixer import GATES, Gate, Mixer
from models.parts.convolution import ShortConvolution
from models.parts.decay import ScalarDecay
from models.parts.norm import RMSNorm

OWN_GATES: dict[str, Any] = GATES | {"gelu": partial(F.gelu, approximate="tanh")}
READ_NORMS = ("rms", "rms_all", "layer_all")
CONVOLVED = ("qkv", "qk")


class PublishedReadOut(Mixer):
    """A Mixer with what published layers do to values and reads; its other settings are Mixer's.

    output_gate: also gelu, by its approximation with tanh.
    gate_rank: the gate's projection goes through so many channels, and has a bias; None for one matrix.
    gate_first: the gate before the norm.
    read_norm: None for Mixer's output_norm; rms, of each head; rms_all and layer_all, of all heads side by side.
    read_norm_eps: what that adds to the mean square of what is read, whatever its scale.
    skip: D v is added to what the memory reads, D a number per head, 1 at the start.
    stepped: pairs are written with the step of the decay, log gamma = -rate step: v times the step.
    """

    def __init__(
        self,
        hidden_size: int,
        layer_index: int,
        *,
        output_gate: str = "none",
        output_norm: bool = False,
        gate_rank: int | None = None,
        gate_first: bool = False,
        read_norm: str | None = None,
        read_norm_eps: float = 1e-5,
        skip: bool = False,
        stepped: bool = False,
        **settings: Any,
    ) -> None:
        check_choice("output_gate", output_gate, OWN_GATES)
        if gate_rank is not None and gate_rank < 1:
            raise ValueError(f"gate_rank={gate_rank} must be at least 1, or null for one matrix")
        if gate_first and output_gate == "none":
            raise ValueError("gate_first=true: output_gate=none is no gate; choose silu, sigmoid or gelu")
        if read_norm is not None:
            check_choice("read_norm", read_norm, READ_NORMS)
            if output_norm:
                raise ValueError(
                    f"read_norm={read_norm} stands in the place of output_norm=true; only false is possible"
                )
        own = gate_rank is not None or output_gate not in GATES  # else its rows are among the other projections'
        super().__init__(
            hidden_size, layer_index, output_gate="none" if own else output_gate, output_norm=output_norm, **settings
        )
        H, V = self.num_heads, self.value_dim
        if stepped and type(self.decay) is not ScalarDecay:
            raise ValueError(f"stepped=true: {type(self.decay).__name__} has no step; decay=scalar has")
        if (stepped or skip) and self.regressor.pairs_per_token > 1:
            several = f"{type(self.regressor).__name__} has several values a token"
            raise ValueError(f"skip={skip}, stepped={stepped}: {several}; only false is possible for both")
        self.gate_first, self.stepped = gate_first, stepped
        self.own_gate = OWN_GATES[output_gate] if own else None
        if gate_rank is not None:
            layers = nn.Linear(hidden_size, gate_rank, bias=False), nn.Linear(gate_rank, H * V)
            nn.init.zeros_(layers[1].bias)
            self.gate_projection: nn.Module | None = nn.Sequential(*layers)
        else:
            self.gate_projection = nn.Linear(hidden_size, H * V, bias=False) if self.own_gate is not None else None
        self.read_norm_kind = read_norm
        self.read_norm: nn.Module | None = {
            None: lambda: None,
            "rms": lambda: RMSNorm(V, read_norm_eps),
            "rms_all": lambda: RMSNorm(H * V, read_norm_eps),
            "layer_all": lambda: nn.LayerNorm(H * V, read_norm_eps),
        }[read_norm]()
        self.skip = nn.Parameter(torch.ones(H)) if skip else None

    def _written(self, v: Tensor, log_decay: Tensor | None) -> Tensor:
        if not self.stepped:
            return v
        assert log_decay is not None and isinstance(self.decay, ScalarDecay)
        return (v * self.decay.steps(log_decay).unsqueeze(-1)).to(v.dtype)

    def _leave(self, x: Tensor, o: Tensor, v: Tensor, gate: Gate | None) -> Tensor:
        if self.skip is not None:
            o = o + self.skip.unsqueeze(-1) * v
        if self.own_gate is not None and self.gate_projection is not None:
            gate = self.own_gate(self.gate_projection(x))
        if isinstance(gate, Tensor) and self.gate_first:
            return self._read_out(o * gate.unflatten(-1, (self.num_heads, -1))).to(x.dtype)
        return super()._leave(x, o, v, gate)

    def _read_out(self, o: Tensor) -> Tensor:
        if self.read_norm is None:
            return super()._read_out(o)
        if self.read_norm_kind == "rms":
            return self.read_norm(o).flatten(-2)
        return self.read_norm(o.flatten(-2))

    def flops_per_token(self, seq_len: int) -> int:
        gate = (
            [] if self.gate_projection is None else [m for m in self.gate_projection.modules() if type(m) is nn.Linear]
        )
        return super().flops_per_token(seq_len) + 2 * sum(layer.weight.numel() for layer in gate)


class PublishedMixer(PublishedReadOut):
    """The same with what published layers do to pairs.

    conv_on: qkv, or qk: the convolution and the activation leave values as they are projected.
    conv_bias: the convolution has a bias per channel.
    shared_qk: queries and keys are one projection, told apart by their convolutions (TTT's Mamba backbone).
    rotary_period: positions begin anew after so many tokens of a document.
    """

    def __init__(
        self,
        hidden_size: int,
        layer_index: int,
        *,
        conv_on: str = "qkv",
        conv_bias: bool = False,
        shared_qk: bool = False,
        rotary_period: int | None = None,
        **settings: Any,
    ) -> None:
        check_choice("conv_on", conv_on, CONVOLVED)
        self.values_as_projected, self.has_conv_bias = conv_on == "qk", conv_bias
        super().__init__(hidden_size, layer_index, **settings)
        if shared_qk and (self.sizes[0] != self.sizes[1] or self.gate is not None or self.shift is not None):
            raise ValueError(
                "shared_qk=true: queries and keys must be as many and as wide, beside pairs=same and a gate with a "
                "projection of its own (output_gate=none or gelu, or gate_rank)"
            )
        if rotary_period is not None and (self.rotary is None or rotary_period < 1):
            raise ValueError(f"rotary_period={rotary_period} must be at least 1, and stand beside a rotary base")
        self.shared_qk, self.rotary_period = shared_qk, rotary_period
        if shared_qk:
            self.projection = nn.Linear(hidden_size, self.sizes[1] + self.sizes[2], bias=False)

    def _build_along(self, conv_size: int, conv_on: str) -> None:
        self.conv_on = "qk" if self.values_as_projected else "qkv"
        channels = sum(self.sizes[: 2 if self.values_as_projected else 3])
        self.convolution = ShortConvolution(channels, conv_size) if conv_size > 1 else None
        if self.has_conv_bias and self.convolution is None:
            raise ValueError(f"conv_bias=true: conv_size={conv_size} is no convolution")
        reach = conv_size**-0.5
        self.conv_bias = nn.Parameter(torch.empty(channels).uniform_(-reach, reach)) if self.has_conv_bias else None

    def _along(self, pairs: Tensor, tails: Tails, segments: Tensor | None) -> tuple[tuple[Tensor, ...], Tails]:
        (tail,) = tails
        if self.shared_qk:
            pairs = torch.cat([pairs[..., : self.sizes[1]], pairs], dim=-1)
        v = None
        if self.values_as_projected:
            pairs, v = pairs.split([sum(self.sizes[:2]), self.sizes[2]], dim=-1)
        if self.convolution is not None:
            pairs, tail = self.convolution(pairs, tail, segments)
        if self.conv_bias is not None:
            pairs = pairs + self.conv_bias.to(pairs.dtype)
        if self.activation is not None:
            pairs = self.activation(pairs)
        made = pairs.split(self.sizes[: 3 if v is None else 2], dim=-1)
        return (*made, *(() if v is None else (v,))), (tail,)

    def _address(self, x: Tensor, positions: Tensor, norm: Callable[[Tensor], Tensor] | None) -> Tensor:
        return super()._address(x, positions if self.rotary_period is None else positions % self.rotary_period, norm)
