"""The residual block: a mixer and a feed-forward layer, each behind a norm.

x = x + mixer(norm(x)) ,    x = x + feed_forward(norm(x))
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.mixer import Mixer, State
from models.norm import RMSNorm


class SwiGLU(nn.Module):
    """(silu(x W_a) * x W_b) W_c (Shazeer 2020): the memory that does not change at test time. x [B, T, D], inner width
    F.
    """

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, 2 * inner_size, bias=False)
        self.output = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, dim=-1)
        return self.output(F.silu(a) * b)

    def flops_per_token(self) -> int:
        return 2 * (self.up.weight.numel() + self.output.weight.numel())


class Block(nn.Module):
    """One layer of the model."""

    def __init__(self, hidden_size: int, mixer: Mixer, feed_forward: SwiGLU, norm_eps: float) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = RMSNorm(hidden_size, norm_eps), mixer
        self.feed_forward_norm, self.feed_forward = RMSNorm(hidden_size, norm_eps), feed_forward

    def forward(self, x: Tensor, state: State | None = None, segments: Tensor | None = None) -> tuple[Tensor, State]:
        y, state = self.mixer(self.mixer_norm(x), state, segments)
        x = x + y
        return x + self.feed_forward(self.feed_forward_norm(x)), state


def derived_inner_size(hidden_size: int, mixer_params: int) -> int:
    """The width of SwiGLU with which a block has 12 D^2 parameters (4 D^2 attention and 8 D^2 feed-forward, the
    transformer's), whatever its mixer.

    A multiple of D / 16, the widths that tile well, which keeps every block within 0.8 % of 12 D^2 plus its norms.
    Raises ValueError if the mixer alone has more than that.
    """
    step = max(1, hidden_size // 16)
    inner = round((12 * hidden_size**2 - mixer_params) / (3 * hidden_size * step)) * step
    if inner < step:
        raise ValueError(
            f"the mixer alone has {mixer_params:,} parameters, and a block 12 hidden_size^2 = {12 * hidden_size**2:,}: "
            "nothing is left for the feed-forward layer; make the mixer smaller or set model.feed_forward_size"
        )
    return inner
