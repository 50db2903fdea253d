"""Norms. They are computed in float32 inside torch's kernel, whatever goes in and comes out."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parts.precision import wide


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight along the last axis (Zhang and Sennrich 2019), in the dtype of x. (torch's own
    has no fused kernel for half-precision x and a float32 weight.)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def is_plain(norm: nn.Module) -> TypeGuard[RMSNorm]:
    """Whether it is RMSNorm and no more: no hook, and a weight that lies here as a whole."""
    changed = norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__
    return type(norm) is RMSNorm and type(norm.weight) in (nn.Parameter, Tensor) and not changed


def unit(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(|x|^2 + eps) along the last axis. Zero stays zero, so that a padded key writes nothing."""
    y = wide(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def sum_to_one(x: Tensor, eps: float) -> Tensor:
    """x / (sum |x| + eps) along the last axis: weights that add up to one, for positive x. Zero stays zero."""
    y = wide(x)
    return (y / (y.abs().sum(-1, keepdim=True) + eps)).to(x.dtype)
