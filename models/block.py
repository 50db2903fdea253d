"""The residual block: a mixer and a feed-forward layer, each behind a norm.

x = x + mixer(norm(x)) ,    x = x + feed_forward(norm(x))
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import residual, swiglu
from models.mixers.mixer import Mixer, State
from models.parts.linear import is_its_weight, read
from models.parts.norm import RMSNorm, is_plain, unit
from models.parts.precision import product_dtype, wide


class SwiGLU(nn.Module):
    """(silu(x W_a) * x W_b) W_c (Shazeer 2020): the memory that does not change at test time. x [B, T, D], inner width
    F.
    """

    def __init__(self, hidden_size: int, inner_size: int, num_heads: int = 1) -> None:
        super().__init__()
        self.inner_size = inner_size
        self.up = nn.Linear(hidden_size, 2 * inner_size, bias=False)
        self.output = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ab = read(self.up, x)
        if is_its_weight(self.output) and swiglu.refusal(ab.device, ab.dtype) is None:  # less is kept, and written
            return swiglu.gated_output(ab, self.output.weight)
        a, b = ab.chunk(2, dim=-1)
        return self.output(F.silu(a) * b)

    def flops_per_token(self) -> int:
        return 2 * (self.up.weight.numel() + self.output.weight.numel())

    @staticmethod
    def num_params(hidden_size: int, inner_size: int, num_heads: int = 1) -> int:
        return 3 * hidden_size * inner_size


class PersistentMemory(nn.Module):
    """softmax(beta x' P_k^T) P_v, per head, then W_o: kernel regression on F learned pairs, the same for every token
    (Memory Mosaics, Zhang et al. 2025, who average x' over the past as well; the past is left to the mixer here). A
    feed-forward layer act(x W_1) W_2 is this with another activation: its weights are keys and values too.

    x' = x W_q and the keys P_k have length one in each of H heads, as in the softmax mixer; beta is learned per head,
    from sqrt(D / H). x [B, T, D]; P_k and P_v [H, F, D / H].
    """

    def __init__(self, hidden_size: int, inner_size: int, num_heads: int) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"model.feed_forward=persistent_memory has the mixer's heads, and num_heads={num_heads} does not "
                f"divide hidden_size={hidden_size}"
            )
        self.inner_size, width = inner_size, hidden_size // num_heads
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.keys = nn.Parameter(F.normalize(torch.randn(num_heads, inner_size, width), dim=-1))
        self.values = nn.Parameter(torch.randn(num_heads, inner_size, width))
        self.log_beta = nn.Parameter(torch.full((num_heads,), 0.5 * math.log(width)))
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        H, _, K = self.keys.shape
        q = self.query(x).unflatten(-1, (H, K)).transpose(1, 2)
        q = unit(q, 1e-6) * wide(self.log_beta).exp().view(-1, 1, 1).to(q.dtype)
        k, v = (y.to(q.dtype).unsqueeze(0).expand(len(x), -1, -1, -1) for y in (unit(self.keys, 1e-6), self.values))
        o = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.output(o.transpose(1, 2).flatten(-2))

    def flops_per_token(self) -> int:
        return 2 * sum(w.numel() for w in (self.query.weight, self.keys, self.values, self.output.weight))

    @staticmethod
    def num_params(hidden_size: int, inner_size: int, num_heads: int) -> int:
        return 2 * hidden_size * (hidden_size + inner_size) + num_heads


FeedForward = SwiGLU | PersistentMemory
FEED_FORWARDS: dict[str, type[FeedForward]] = {"swiglu": SwiGLU, "persistent_memory": PersistentMemory}


class Block(nn.Module):
    """One layer of the model: (x [B, T, D], y, state, segments, keep) -> (x, y, state).

    x is the residual stream, and y [B, T, D] what is still to be added to it, None for nothing: so each sum is made in
    one pass with the norm of it. keep: whether the state after the last token is wanted; else it is None, and takes
    neither memory nor time.
    """

    def __init__(self, hidden_size: int, mixer: Mixer, feed_forward: FeedForward, norm_eps: float) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = RMSNorm(hidden_size, norm_eps), mixer
        self.feed_forward_norm, self.feed_forward = RMSNorm(hidden_size, norm_eps), feed_forward

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        state: State | None = None,
        segments: Tensor | None = None,
        keep: bool = True,
    ) -> tuple[Tensor, Tensor, State | None]:
        x, n = add_and_norm(x, y, self.mixer_norm)
        y, state = self.mixer(n, state, segments)
        x, n = add_and_norm(x, y, self.feed_forward_norm)
        return x, self.feed_forward(n), state if keep else None


def add_and_norm(x: Tensor, y: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + y, and its norm: by a kernel where one can, in the dtype of the products to come."""
    if y is None:
        return x, norm(x)
    if is_plain(norm) and norm.eps is not None and residual.refusal(x.device, x.dtype, x.shape[-1]) is None:
        return residual.add_and_norm(x, y, norm.weight, norm.eps, product_dtype(x))
    x = x + y
    return x, norm(x)


def feed_forward(kind: str, hidden_size: int, mixer: Mixer, inner_size: int | None = None) -> FeedForward:
    """The feed-forward layer of a block with this mixer; without an inner size, of the derived one. Raises ValueError
    for a kind that isn't there.
    """
    if kind not in FEED_FORWARDS:
        raise ValueError(f"model.feed_forward={kind} is not one of {', '.join(FEED_FORWARDS)}")
    inner = inner_size or derived_inner_size(kind, hidden_size, mixer.num_heads, mixer.num_params)
    return FEED_FORWARDS[kind](hidden_size, inner, mixer.num_heads)


def derived_inner_size(kind: str, hidden_size: int, num_heads: int, mixer_params: int) -> int:
    """The inner width F with which a block has 12 D^2 parameters (4 D^2 attention and 8 D^2 feed-forward, the
    transformer's), whatever its mixer and its feed-forward layer.

    A multiple of D / 16, the widths that tile well, which keeps every block within 0.8 % of 12 D^2 plus its norms.
    Raises ValueError if the mixer alone has more than that.
    """
    count = FEED_FORWARDS[kind].num_params
    step, none = max(1, hidden_size // 16), count(hidden_size, 0, num_heads)
    each = count(hidden_size, 1, num_heads) - none
    inner = round((12 * hidden_size**2 - mixer_params - none) / (each * step)) * step
    if inner < step:
        raise ValueError(
            f"the mixer alone has {mixer_params:,} parameters, and a block 12 hidden_size^2 = {12 * hidden_size**2:,}: "
            "nothing is left for the feed-forward layer; make the mixer smaller or set model.feed_forward_size"
        )
    return inner
