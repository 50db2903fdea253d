"""One token of a linear memory, its states written where they are: what a step of decoding is made of.

A whole pass spends a launch on each sum, cast and gate. For one token a launch takes longer than its work, so that here
a mixer is three kernels beside its two products with weights,

    convolve          the short convolution and its activation; the tail and the position move on
    write_and_read    norms of q and k, gates, M (and S) and o: delta.py's rule or momentum.py's, the memory read once
                      and written once
    read_out          the norm of each head and the output gate

beside a residual with the norm after it, which is one too (models/kernels/residual). A product of few tokens with a
weight reads the weight as fast as the memory brings it, which tiles made for many tokens don't.

The formulas are those of models/mixers/mixer.py, delta.py and momentum.py for T = 1, which stay the definition. There
are no gradients.

Shapes: B batch, C convolved channels, N columns of `pairs`, H heads, K key width, V value width, W width of the
convolution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import backend

GATES = {"none": 0, "silu": 1, "sigmoid": 2}
WIDEST = 256
FEW = 4  # tokens: for more a product is the matrix units'


class Rule(NamedTuple):
    """What is computed. silu: the activation after the convolution. unit: whether q and k get the length one, `eps`
    added to the square of theirs. largest: of the steps. tied: momentum's gates. norm_eps: of the output norm.
    """

    silu: bool
    unit: bool
    eps: float
    largest: float
    tied: bool
    norm_eps: float
    gate: str


class Parameters(NamedTuple):
    """Those that are no matrices, None for what the recipe doesn't have. convolution [C, W]; log_rate, decay_bias,
    step_bias and momentum_bias [H]; norm [V].
    """

    convolution: Tensor
    log_rate: Tensor | None
    decay_bias: Tensor | None
    step_bias: Tensor | None
    momentum_bias: Tensor | None
    norm: Tensor | None


class States(NamedTuple):
    """What is written in place. memory and momentum [B, H, K, V], float32; tail [B, W-1, C]; position [B]."""

    memory: Tensor
    momentum: Tensor | None
    tail: Tensor
    position: Tensor


def refusal(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """Why these kernels can't run here, or None if they can. dtype is that of q, k and v."""
    if (reason := backend.refusal(device, dtype)) is not None:
        return reason
    if max(key_dim, value_dim) > WIDEST:
        return f"keys {key_dim} and values {value_dim} wide do not fit into registers; {WIDEST} do"
    return None


def mix(pairs: Tensor, states: States, parameters: Parameters, rule: Rule) -> Tensor:
    """pairs [B, N]: q, k, v [C], the gate [H V] if there is one, logits of the decay (if there is one), of the step
    and of the momentum (if there is one) [H] each, and what fills N up. Returns what the output projection reads,
    [B, H V], in the dtype of pairs; the states are those after the token.
    """
    from models.kernels.step import kernels

    (B, N), (H, K, V) = pairs.shape, states.memory.shape[1:]
    C, W = parameters.convolution.shape
    heads, gated = (C - H * V) // (2 * K), rule.gate != "none"
    along, o = pairs.new_empty(B, C), pairs.new_empty(B, H * V)
    block = 256
    grid = (B, _blocks(C, block))
    kernels.convolve[grid](
        pairs, states.tail, parameters.convolution, states.position, along, N, C, W, rule.silu, BLOCK=block
    )
    values = min(32, _power(V))
    kernels.write_and_read[B, H, _blocks(V, values)](
        along, pairs, states.memory, states.momentum, o, *parameters[1:5], rule.eps, rule.largest,
        N, C, C + H * V * gated, H, K, V, H // heads, parameters.log_rate is not None, states.momentum is not None,
        rule.tied, rule.unit, parameters.step_bias is not None, KEYS=_power(K), VALUES=values, num_warps=4,
    )  # fmt: skip
    if parameters.norm is None and not gated:
        return o
    out = torch.empty_like(o)
    kernels.read_out[B, H](
        o, pairs, parameters.norm, out, rule.norm_eps, N, C, H, V, parameters.norm is not None, GATES[rule.gate],
        VALUES=_power(V), num_warps=1,
    )  # fmt: skip
    return out


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, summed in float32. x [B, D] and weight [N, D] of one dtype; [B, N]."""
    from models.kernels.step import kernels

    if len(x) > FEW:
        return F.linear(x, weight)
    (B, D), N = x.shape, len(weight)
    out, rows = x.new_empty(B, N), 8
    kernels.product[B, _blocks(N, rows)](
        x.contiguous(), weight.contiguous(), out, N, D, ROWS=rows, BLOCK=min(1024, _power(D)), num_warps=4
    )
    return out


def swiglu(x: Tensor) -> Tensor:
    """silu(a) b of x = [a, b] [B, 2 F]; [B, F]."""
    from models.kernels.step import kernels

    B, inner = x.shape[0], x.shape[1] // 2
    out, block = x.new_empty(B, inner), 512
    kernels.swiglu[B, _blocks(inner, block)](x, out, inner, BLOCK=block)
    return out


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _power(x: int) -> int:
    return 1 << (x - 1).bit_length()
