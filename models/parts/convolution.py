"""The short convolution: each channel of q, k and v sees its own last few inputs (H3, Fu et al. 2022; Mamba, Gu and Dao
2023).

        y_t = sum_{j<W} w_j * x_{t-j} ,    x_i = 0 before the document's first token.

One such layer gives keys and values of neighbouring tokens to each other, which is what associative recall needs. The
keys alone suffice, and with w = (0, 1) they need no learning: k_t of x_{t-1} and v_t of x_t store what came after what.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over W tokens. weight[c, W-1] meets the present token.

    forward(x [B, T, C], tail=None, segments=None) -> (y [B, T, C], tail [B, W-1, C]). The tail is the last W-1 inputs,
    those of earlier documents zeroed: what the next call needs to go on.
    """

    def __init__(self, num_channels: int, width: int) -> None:
        super().__init__()
        self.num_channels, self.width = num_channels, width
        self.weight = nn.Parameter(torch.empty(num_channels, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, x: Tensor, tail: Tensor | None = None, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        T, reach = x.shape[1], self.width - 1
        if tail is None:
            tail = x.new_zeros(x.shape[0], reach, x.shape[2])
        padded = torch.cat([tail.to(x.dtype), x], dim=1)
        documents = None  # of padded; the tail belongs to the first document of the call
        if segments is not None:
            documents = torch.cat([segments[:, :1].expand(-1, reach), segments], dim=1)
        # W multiply-adds over shifted views: faster than conv1d on a CPU, and on a GPU the compiler fuses them
        weight = self.weight.to(x.dtype)
        y = x * weight[:, reach]
        for back in range(1, self.width):
            earlier = slice(reach - back, reach - back + T)
            inputs = padded[:, earlier]
            if documents is not None and segments is not None:
                inputs = inputs.masked_fill((documents[:, earlier] != segments).unsqueeze(-1), 0)
            y = torch.addcmul(y, inputs, weight[:, reach - back])
        tail = padded[:, T:]
        if documents is not None and segments is not None:
            tail = tail.masked_fill((documents[:, T:] != segments[:, -1:]).unsqueeze(-1), 0)
        return y, tail


class Shift(ShortConvolution):
    """y_t = x_{t-1}, zero for the document's first token: the convolution of width 2 that has learned it already."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, 2)
        del self.weight
        self.register_buffer("weight", torch.tensor([[1.0, 0.0]]))
