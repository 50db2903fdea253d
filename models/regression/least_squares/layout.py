"""A call in chunks: what every solve of least squares has before it and after it.

Shapes: B batch, T tokens, H heads, K key width, V value width, C chunk, N chunks, M = N B H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.regression.chunks import fades, into_chunks
from models.regression.least_squares.moments import Moments
from models.regression.least_squares.solvers import Normal

# ||H|| counts as no less in a ridge that is scaled by it: where nothing has been written yet, nothing divides nothing.
LEAST_NORM = 1e-6


class Ridge(NamedTuple):
    """Lambda. size: [H, K], or None for the limit of no ridge, the least squares of least norm. scaled: Lambda_t =
    size * max(||H_t||_F, LEAST_NORM), with a single number for size.
    """

    size: Tensor | None
    scaled: bool = False


class Laid(NamedTuple):
    """A call in chunks, all [M, C, *]: keys, weights, start, ridge of the systems, as Normal has them, and q. before:
    H and G side by side, that a chunk begins with [M, K, K + V]. What is read, values, and mix. last: the moments after
    the last chunk, side by side too [B H, K, K + V]."""

    keys: Tensor
    weights: Tensor
    start: Tensor
    before: Tensor
    ridge: Tensor
    q: Tensor
    values: Tensor
    mix: Tensor | None
    last: Tensor | None = None

    @property
    def normal(self) -> Normal:
        return Normal(self.keys, self.weights, self.start, self.before[..., : self.q.shape[-1]], self.ridge)

    @property
    def pairs(self) -> Tensor:
        return self.before[..., self.q.shape[-1] :]

    def read(self, x: Tensor) -> Tensor:
        query = mixed(self.q, x, None if self.mix is None else self.mix.squeeze(-1))
        attend = torch.bmm(query, self.keys.mT) * self.weights
        return torch.bmm(query, self.pairs) * self.start + torch.bmm(attend, self.values)

    def moments(self, B: int) -> Moments:
        assert self.last is not None
        return Moments(*self.last.unflatten(0, (B, -1)).split([self.q.shape[-1], self.values.shape[-1]], -1))


Scan = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def scan(writes: Tensor, whole: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """S_{n+1} = whole_n S_n + writes_n over the chunks of each sequence, from memory [B H, K, X]. writes [M, K, X],
    whole [M, 1, 1]. Returns all S_n that chunks begin with, [M, K, X], and what the last leaves.
    """
    rows, states = len(memory), [memory]
    for write, left in zip(writes.split(rows), whole.split(rows), strict=True):
        states.append(torch.addcmul(write, left, states[-1]))
    return torch.cat(states[:-1]), states[-1]


def laid_out(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, ridge: Ridge, log_decay: Tensor | None, first: Moments,
    mix: Tensor | None, chunk: int, scan: Scan = scan,
) -> Laid:  # fmt: skip
    """What recurrent_least_squares is given, in chunks, with the moments that each begins with."""
    (H, K), dtype = k.shape[2:], first.keys.dtype
    q, k, values, b, log_decay, mix = (into_chunks(x, chunk, dtype) for x in (q, k, v, b, log_decay, mix))
    within, start, end = fades(k, log_decay)
    writes = torch.bmm((k * (b * end)).mT, torch.cat((k, values), dim=-1))
    start = start.expand(len(k), chunk, 1)
    before, last = scan(writes, start[:, -1:], torch.cat(first[:2], dim=-1).flatten(0, 1))
    weights = within * b.mT
    if ridge.size is None:
        size = k.new_zeros(1, 1, 1).expand_as(b)
    elif ridge.scaled:
        size = ridge.size.to(dtype) * norm(Normal(k, weights, start, before[..., :K], start).squared_norms())
    else:
        size = ridge.size.to(dtype).expand(H, K).repeat(len(k) // H, 1)[:, None]
    return Laid(k, weights, start, before, size, q, values, mix, last)


def norm(squared: Tensor) -> Tensor:
    return squared.clamp(min=LEAST_NORM**2).sqrt()


def mixed(q: Tensor, x: Tensor, mix: Tensor | None) -> Tensor:
    """q + alpha (x - q), or x."""
    return x if mix is None else torch.lerp(q, x, mix.to(q.dtype).unsqueeze(-1))
