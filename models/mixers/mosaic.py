"""Memory Mosaics (Zhang et al. 2025): attention whose keys are the recent past and whose values the next token.

        a_t = sum_{i<=t} lambda^(t-i) x_i W_k ,    k_t = a_t / |a_t|          lambda in (0, 1), one per channel
        u_t = (1 - c) x_{t+1} W_v + c x_t W_v ,    v_t = u_t / |u_t|          c in (0, 1), one per head
        o_t = sum_{i<t} exp(beta k_t . k_i) v_i / sum_{i<t} exp(beta k_t . k_i) ,    o = 0 at a document's first token

The key is the query as well, and there are no positions: what a key knows of order it knows by averaging. A value that
peeks at the next token can be stored when that token is here, hence i < t. Counted by when a pair is complete, pair t
is (k_{t-1}, v_{t-1}): with `pairs: shift` a strict mask and a look ahead are causal pairs, of which a document's first
token completes none (`regressor.skip_first`).

Keys average at several rates at once: lambda is one per channel. `rates=head` has one per head, as the published code.
The scale of the values, which that learns, is W_o's here.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.mixers.layer import Tails, check_choice
from models.mixers.mixer import Mixer
from models.parts.convolution import Shift
from models.parts.norm import unit
from models.parts.precision import wide

RATES = (0.5, 5.0)  # -log lambda at the start, over the channels of a head: from half of the past left to next to none
EACH = ("channel", "head")


class LeakyAverage(nn.Module):
    """a_t = x_t + lambda a_{t-1}, a = x_t at a document's first token; lambda = exp(-exp(log_rate)) in each channel.

    forward(x [B, T, C], last=None [B, 1, C], segments=None) -> (a [B, T, C], its last token), float32 at least. By
    doubling: the sums over the last n tokens are those over n/2 and, faded, those of n/2 tokens before, where that is
    the same document. log2 T steps, each causal to the last bit, and no power of lambda that is larger than one. each:
    channel, or head, of which the rates -log lambda are then evenly spread.
    """

    def __init__(self, num_heads: int, head_dim: int, each: str = "channel") -> None:
        super().__init__()
        low, high = map(math.log, RATES)
        self.repeats = head_dim if each == "head" else 1
        by_channel = torch.linspace(low, high, head_dim).repeat(num_heads)
        self.log_rate = nn.Parameter(torch.linspace(*RATES, num_heads).log() if each == "head" else by_channel)

    def forward(self, x: Tensor, last: Tensor | None = None, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rate, a, reach = wide(self.log_rate).exp(), wide(x), 1
        if self.repeats > 1:
            rate = rate.repeat_interleave(self.repeats)
        documents = None if segments is None else F.pad(segments[:, 1:] != segments[:, :-1], (1, 0)).cumsum(1)
        last = torch.zeros_like(a[:, :1]) if last is None else last
        a = torch.cat([a[:, :1] + (-rate).exp() * last, a[:, 1:]], dim=1)
        while reach < x.shape[1]:
            before = a[:, :-reach]
            if documents is not None:
                before = before.masked_fill((documents[:, :-reach] != documents[:, reach:]).unsqueeze(-1), 0)
            a = torch.cat([a[:, :reach], a[:, reach:] + (-reach * rate).exp() * before], dim=1)
            reach *= 2
        return a, a[:, -1:]


class MemoryMosaic(Mixer):
    """The layer above, in the shell of every mixer, with its settings (a gate, an output norm, ...).

    rates: channel | head, of which each has a lambda.
    """

    own_queries: ClassVar[bool] = False
    num_tails: ClassVar[int] = 3

    def __init__(self, hidden_size: int, layer_index: int, *, rates: str = "channel", **settings: Any) -> None:
        check_choice("rates", rates, EACH)
        self.rates = rates
        super().__init__(hidden_size, layer_index, **settings)

    def _build_along(self, conv_size: int, conv_on: str) -> None:
        super()._build_along(conv_size, conv_on)
        if self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}: queries are the keys; only num_heads={self.num_heads} is possible"
            )
        self.average = LeakyAverage(self.num_heads, self.key_dim, self.rates)
        self.before = Shift(self.num_heads * self.value_dim)
        self.peek = nn.Parameter(torch.zeros(self.num_heads))  # c = sigmoid(peek)

    def _along(self, pairs: Tensor, tails: Tails, segments: Tensor | None) -> tuple[tuple[Tensor, ...], Tails]:
        tail, average, last_value = tails
        (_, k, v), (tail,) = super()._along(pairs, (tail,), segments)
        a, average = self.average(k, average, segments)
        k = a.to(k.dtype)
        before, last_value = self.before(v, last_value, segments)
        c = wide(self.peek).sigmoid().to(v.dtype).repeat_interleave(self.value_dim)
        v = torch.lerp(v, before, c).unflatten(-1, (self.num_heads, -1))
        return (k, k, unit(v, self.norm_eps).flatten(-2)), (tail, average, last_value)

    def state_size(self, seq_len: int) -> int:
        return super().state_size(seq_len) + self.num_heads * (self.key_dim + self.value_dim)
