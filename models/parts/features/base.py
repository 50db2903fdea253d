"""What all feature maps share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.parts.precision import wide
from models.parts.sizes import Sizes


class FeatureMap(nn.Module):
    """The frame of a map: `phi` computes it in float32 at least, with autocast off; the features leave it in the dtype
    of x. (bfloat16 has the range of float32, so large ones are rounded and not lost.) `positive` says that phi(q) .
    phi(k) is never negative.
    """

    positive: bool = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def phi(self, x: Tensor, positions: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.phi(wide(x), positions).to(x.dtype)

    def flops_per_token(self) -> int:
        """Products of the token's queries and keys with weights."""
        return 0


class InverseTemperature(nn.Module):
    """sqrt(b) x, so that a kernel of q.k becomes one of b q.k."""

    def __init__(self, sizes: Sizes, inverse_temperature: float | str) -> None:
        super().__init__()
        self.log_beta = None
        if inverse_temperature == "learned":
            self.log_beta = nn.Parameter(torch.zeros(sizes.num_kv_heads))
        elif isinstance(inverse_temperature, int | float) and inverse_temperature > 0:
            self.root = math.sqrt(inverse_temperature)
        else:
            raise ValueError(
                f"features.inverse_temperature={inverse_temperature!r} must be 'learned' or a positive number"
            )

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.root if self.log_beta is None else for_heads((wide(self.log_beta) / 2).exp(), x).unsqueeze(-1))


def product(weight: Tensor, x: Tensor) -> Tensor:
    """weight [G, m, K] times x [B, T, H, K]: [B, T, H, m]."""
    return torch.einsum("bthk,hmk->bthm", x, for_heads(weight, x))


def for_heads(parameter: Tensor, x: Tensor) -> Tensor:
    """parameter [G, ...] of the key heads for the heads of x [B, T, H, K]: [H, ...]."""
    return wide(parameter).repeat_interleave(x.shape[2] // len(parameter), dim=0)


def at_least_one(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"features.{name}={value} must be a whole number of at least 1")
    return value
