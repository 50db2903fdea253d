"""Rotary positions (Su et al. 2021): q_t . k_i then depends on where the two are only through t - i.

Channel j of the first half and channel j of the second half form a plane that turns by `position * base^(-2j / K)`
radians.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.parts.precision import wide


def rotate(x: Tensor, positions: Tensor, base: float, channels: int | None = None) -> Tensor:
    """x [B, T, H, K], K even; positions [B, T] or [T], integers counted from the start of the document. Same shape and
    dtype out. channels: how many turn, the first ones, as if they were all; the others stay (None: K of them turn).
    """
    if channels is not None:
        return torch.cat([rotate(x[..., :channels], positions, base), x[..., channels:]], dim=-1)
    half = x.shape[-1] // 2
    dtype = wide(x).dtype
    frequency = frequencies(half, base, x.device, dtype)
    angle = (positions.to(dtype).unsqueeze(-1) * frequency).unsqueeze(-2)  # [B, T, 1, K/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def frequencies(half: int, base: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """[half]: the radians that each pair of channels turns by from a token to the next."""
    return base ** -(torch.arange(half, device=device, dtype=dtype) / half)
