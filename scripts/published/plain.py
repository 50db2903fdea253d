"""What lets a published layer run on a CPU in float64: its own forward pass, with its kernels replaced by their
definitions in PyTorch, and what it casts to float32 kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]


class Wide(SimpleNamespace):
    """torch, whose float32 is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


@contextmanager
def in_float64(*modules: ModuleType, **replaced: Any) -> Iterator[None]:
    """Inside, the modules' torch.float32 is float64, as are `.float()` and new tensors; and of these modules the names
    in `replaced` are what is given.
    """
    before = [(module, dict(vars(module))) for module in modules]
    plain, default = Tensor.float, torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        Tensor.float = Tensor.double  # type: ignore[method-assign]
        for module in modules:
            given = {name: value for name, value in replaced.items() if hasattr(module, name)}
            vars(module).update({"torch": Wide()} | given)
        yield
    finally:
        Tensor.float = plain  # type: ignore[method-assign]
        torch.set_default_dtype(default)
        for module, names in before:
            vars(module).update(names)


def varied(layer: nn.Module) -> nn.Module:
    """The layer in float64, its norms, biases and other vectors drawn anew: at the start many are 0 or 1, and would
    hide where they stand, and some are not set before a model is made."""
    with torch.no_grad():
        for parameter in layer.double().parameters():
            if parameter.numel() == max(parameter.shape):
                parameter.copy_(torch.randn_like(parameter))
    return layer


def drawn(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Random numbers whose products are of order one."""
    return {name: torch.randn(shape, dtype=torch.float64) / math.sqrt(shape[-1]) for name, shape in shapes.items()}


def unit(x: Tensor) -> Tensor:
    """Of length one, as fla and Qwen3-Next have it."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def convolved(weight: Tensor, bias: Tensor | None, activation: str | None) -> Callable[..., tuple[Tensor, None]]:
    """fla's ShortConvolution: x [B, T, C] -> (y, no cache)."""

    def call(x: Tensor, **_: Any) -> tuple[Tensor, None]:
        y = F.conv1d(x.mT, weight, bias, padding=weight.shape[-1] - 1, groups=len(weight))[..., : x.shape[1]].mT
        return F.silu(y) if activation in ("silu", "swish") else y, None

    return call


def normed(weight: Tensor, eps: float, activation: str | None = None) -> Callable[..., Tensor]:
    """fla's RMSNorm and FusedRMSNormGated: (x, gate) -> norm(x) * act(gate)."""

    def call(x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
        return y if gate is None else y * (gate.sigmoid() if activation == "sigmoid" else F.silu(gate))

    return call


def turned(base: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """fla's RotaryEmbedding: q, k [B, T, H, K] -> both turned by their positions."""

    def turn(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        frequency = base ** -(torch.arange(half, dtype=x.dtype) / half)
        angle = torch.arange(x.shape[1], dtype=x.dtype).view(-1, 1, 1) * frequency
        a, b = x.split(half, dim=-1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)

    return lambda q, k, **_: (turn(q), turn(k))


def without_kernels(layer: Any) -> Any:
    """A layer of fla whose modules that are kernels are the functions above, with the same weights."""
    made: dict[str, Callable[[Any], Callable[..., Any]]] = {
        "ShortConvolution": lambda m: convolved(m.weight, m.bias, m.activation),
        "RMSNorm": lambda m: normed(m.weight, m.eps),
        "FusedRMSNormGated": lambda m: normed(m.weight, m.eps, m.activation),
        "RotaryEmbedding": lambda m: turned(m.base),
    }
    for name, module in list(layer.named_children()):
        if (kind := type(module).__name__) in made:
            delattr(layer, name)
            setattr(layer, name, made[kind](module))
    return layer
