"""Mamba's layer, as published: a selective state space (Gu and Dao 2023, algorithm 2 and section 3.4).

        u, z    = x W_u, x W_z                     D_in = expand D channels each
        u       = silu(conv(u) + c)
        d, b, q = u W_d, u W_b, u W_q              a step of R numbers, and B and C of the paper, N numbers each
        s       = softplus(d W_s + e)              [D_in], the step
        h_t     = exp(s_t A) * h_{t-1} + (s_t u_t) b_t ,    A = -exp(log_rate)  [D_in, N], h in each channel N numbers
        y_t     = (h_t q_t + skip * u_t) * silu(z_t) ,    then W_o

With one rate for all channels h would be `linear`'s memory with a decay, b its keys, q its queries: that is Mamba-2.
Here every number of h fades at its own rate, so no weighted sum of losses over the past has h as its least one.

The parallel form scans in two rounds. A piece of the sequence falls into chunks. Of all chunks at once the first round
finds what each adds to h, token by token within a chunk; then h before each chunk follows, chunk by chunk; the second
round goes through the chunks again, now from there. No decay is ever divided by, so nothing overflows.

Shapes: B batch, T tokens, E = D_in channels, N numbers of each, R rank of the step, C tokens of a chunk, J chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.mixers.baselines.baseline import Baseline, Held, starts
from models.parts.convolution import ShortConvolution
from models.parts.precision import wide
from models.regression.deep.slots import scan

MANY = 1 << 26  # 256 MiB in float32, of which the scan keeps a handful
STEPS = (1e-3, 1e-1)  # at the start, drawn evenly in their logarithm: section 3.6


def selective_scan(h: Tensor, rate: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The definition: h <- keep exp(step rate) h + (step u) b, y = h q, token by token.

    h [B, E, N]; rate [E, N], negative; given: step, u [B, T, E], b, q [B, T, N] and keep [B, T], 0 where a document
    begins, else 1. Returns y [B, T, E] and the last h.
    """
    step, u, b, q, keep = given
    outputs = []
    for t in range(u.shape[1]):
        fade = (step[:, t].unsqueeze(-1) * rate).exp() * keep[:, t].view(-1, 1, 1)
        h = fade * h + (step[:, t] * u[:, t]).unsqueeze(-1) @ b[:, t].unsqueeze(1)
        outputs.append((h @ q[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1), h


def chunked_scan(h: Tensor, rate: Tensor, chunk: int, given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The same for a piece of the sequence, of any length."""
    T = given[0].shape[1]
    padding = -T % chunk
    # behind the last token a step of zero, which changes nothing
    step, u, b, q, keep = (F.pad(y, (*[0, 0] * (y.ndim - 2), 0, padding), value=float(y.ndim == 2)) for y in given)
    step, u, b, q, keep = (y.unflatten(1, (-1, chunk)) for y in (step, u, b, q, keep))  # [B, J, C, *]
    fade = (step.unsqueeze(-1) * rate).exp() * keep[..., None, None]  # [B, J, C, E, N]
    fades, writes = fade.unbind(2), ((step * u).unsqueeze(-1) * b.unsqueeze(-2)).unbind(2)
    before = [h]
    if fade.shape[1] > 1:
        added, left = writes[0], fades[0]
        for each, write in zip(fades[1:], writes[1:], strict=True):
            added, left = torch.addcmul(write, each, added), each * left
        for one, kept in zip(added.unbind(1)[:-1], left.unbind(1)[:-1], strict=True):
            before.append(torch.addcmul(one, kept, before[-1]))
    held, found = torch.stack(before, dim=1), []
    for each, write in zip(fades, writes, strict=True):
        held = torch.addcmul(write, each, held)
        found.append(held)
    y = torch.stack(found, dim=2) @ q.unsqueeze(-1)
    return y.squeeze(-1).flatten(1, 2)[:, :T], held[:, -1]


class Mamba(Baseline):
    """The layer above.

    state_dim, expand, conv_size: N, D_in / D, and the width of the convolution.
    step_rank: R, None for D / 16, rounded up.
    chunk: tokens of a chunk.
    piece: tokens of a piece, a multiple of it; None takes 16 chunks on a GPU, and one on a CPU, where several at once
        gain nothing.
    remat: pieces computed again together in the backward pass; 0: never; None: 1 for calls with more than MANY numbers
        in the states of all tokens, else 0. Like chunk and piece a choice of memory and speed.
    """

    def __init__(
        self,
        hidden_size: int,
        layer_index: int,
        state_dim: int = 16,
        expand: int = 2,
        conv_size: int = 4,
        step_rank: int | None = None,
        chunk: int = 16,
        piece: int | None = None,
        remat: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(hidden_size, layer_index, backend)
        for name, value, least in (
            ("state_dim", state_dim, 1),
            ("expand", expand, 1),
            ("conv_size", conv_size, 2),
            ("step_rank", step_rank, 1),
            ("chunk", chunk, 1),
            ("remat", remat, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if piece is not None and (piece < chunk or piece % chunk):
            raise ValueError(f"piece={piece} must be a multiple of chunk={chunk}, or null for this device's best")
        self.width, self.state_dim = expand * hidden_size, state_dim
        self.rank = step_rank or math.ceil(hidden_size / 16)
        self.chunk, self.piece, self.remat = chunk, piece, remat
        self.projection = nn.Linear(hidden_size, 2 * self.width, bias=False)
        self.convolution = ShortConvolution(self.width, conv_size)
        self.conv_bias = nn.Parameter(_uniform(conv_size, self.width))
        self.selection = nn.Linear(self.width, self.rank + 2 * state_dim, bias=False)
        self.step_weight = nn.Parameter(_uniform(self.rank, self.width, self.rank))
        low, high = map(math.log, STEPS)
        first = torch.empty(self.width).uniform_(low, high).exp()
        self.step_bias = nn.Parameter(first + torch.log(-torch.expm1(-first)))  # softplus of it is the step
        self.log_rate = nn.Parameter(torch.arange(1.0, state_dim + 1).log().repeat(self.width, 1))
        self.skip = nn.Parameter(torch.ones(self.width))
        self.output = nn.Linear(self.width, hidden_size, bias=False)

    def parallel(self, x: Tensor, held: Held | None, segments: Tensor | None) -> tuple[Tensor, Held]:
        return self._mixed(x, held, segments, self._in_pieces)

    def recurrent(self, x: Tensor, held: Held | None, segments: Tensor | None) -> tuple[Tensor, Held]:
        return self._mixed(x, held, segments, lambda h, given: selective_scan(h, self.rate, given))

    @property
    def rate(self) -> Tensor:
        """A, [E, N]."""
        return -wide(self.log_rate).exp()

    @torch.compiler.disable  # a loop over tokens, which a compiler would write out
    def _in_pieces(self, h: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        rate = self.rate

        def steps(h: Tensor, pieces: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], Tensor]:
            (one,) = pieces
            y, h = chunked_scan(h, rate, self.chunk, one)
            return [y], h

        tokens = self.piece or self.chunk * (16 if h.is_cuda else 1)
        pieces = list(zip(*(y.split(tokens, dim=1) for y in given), strict=True))
        remat = int(given[0].numel() * self.state_dim > MANY) if self.remat is None else self.remat
        outputs, h = scan(steps, h, pieces, remat)
        return torch.cat(outputs, dim=1), h

    def _mixed(self, x: Tensor, held: Held | None, segments: Tensor | None, scanned: Any) -> tuple[Tensor, Held]:
        u, z = self.projection(x).chunk(2, dim=-1)
        u, tail = self.convolution(u, None if held is None else held[0], segments)
        u = F.silu(u + self.conv_bias.to(u.dtype))
        low, b, q = self.selection(u).split([self.rank, self.state_dim, self.state_dim], dim=-1)
        step = F.linear(low, self.step_weight.to(low.dtype))
        begins = starts(segments)
        with torch.autocast(x.device.type, enabled=False):
            step = F.softplus(wide(step) + wide(self.step_bias))
            keep = step.new_ones(x.shape[:2]) if begins is None else (~begins).to(step.dtype)
            h = step.new_zeros(len(x), self.width, self.state_dim) if held is None else held[1]
            wide_u = wide(u)
            y, h = scanned(h, (step, wide_u, wide(b), wide(q), keep))
            y = (y + wide(self.skip) * wide_u).to(u.dtype)
        return self.output(y * F.silu(z)), (tail, h)

    def flops_per_token(self, seq_len: int) -> int:
        """Products with weights, and of the definition what is written, (step u) b, and what is read."""
        weights = (self.projection.weight, self.selection.weight, self.step_weight, self.output.weight)
        return 2 * sum(w.numel() for w in weights) + 4 * self.width * self.state_dim

    def state_size(self, seq_len: int) -> int:
        return self.width * (self.state_dim + self.convolution.width - 1)


def _uniform(inputs: int, *shape: int) -> Tensor:
    """Within 1 / sqrt(inputs) on either side of zero."""
    return torch.empty(shape).uniform_(-(inputs**-0.5), inputs**-0.5)
