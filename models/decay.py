"""gamma: how fast the past fades. (Called decay in code, because `weights` means parameters there.)

A decay turns the layer's input into natural logarithms of gamma, <= 0: None, [B, T, H] (`kind` "head") or [B, T, H, K]
(`kind` "channel").
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.precision import wide


class NoDecay(nn.Module):
    """gamma = 1: every pair counts the same for ever."""

    kind = "none"

    def __init__(self, hidden_size: int, num_heads: int, key_dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> None:
        return None

    def flops_per_token(self) -> int:
        return 0


class ScalarDecay(nn.Module):
    """One gamma per head and token, from the data (Mamba-2, Dao and Gu 2024; Gated DeltaNet, Yang et al. 2024):

        log gamma_t = -rate * softplus(x_t W + bias) ,    rate = exp(log_rate) > 0

    At the start rate is uniform in [1, 16] and softplus(bias) log-uniform in `step_range`, so that the heads'
    half-lives spread from a few to thousands of tokens.
    """

    kind = "head"

    def __init__(
        self, hidden_size: int, num_heads: int, key_dim: int, step_range: tuple[float, float] = (0.001, 0.1)
    ) -> None:
        super().__init__()
        low, high = step_range
        if not 0 < low < high:
            raise ValueError(f"decay.step_range={tuple(step_range)} must be two rising positive numbers")
        self.projection = nn.Linear(hidden_size, num_heads, bias=False)
        self.log_rate = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        step = torch.empty(num_heads).uniform_(math.log(low), math.log(high)).exp()
        self.bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> log gamma [B, T, H], float32 or wider."""
        return -wide(self.log_rate).exp() * F.softplus(wide(self.projection(x)) + self.bias)

    def flops_per_token(self) -> int:
        return 2 * self.projection.weight.numel()
