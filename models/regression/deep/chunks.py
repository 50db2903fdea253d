"""Deep memories in chunks: the dual form of mlp.py, one chunk of every sequence at a time.

What fades of a layer, N = M - W, and its momentum S lie one above the other, X [rows, n in, out] with n = 2 (1 without
momentum): a query's input y scaled by n numbers each reads both in one product, and so do the inputs that write.

Shapes: rows = B H, C chunk, in and out of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.regression.deep.network import Network
from models.regression.deep.slots import in_turn
from models.regression.linear.mixtures import spread

Weights = tuple[Tensor, ...]


class Rows(NamedTuple):
    """For every sequence: M_0 of the layers; W, or nothing for W = 0; the norm's scale and shift. [rows, *, *] each."""

    first: Sequence[Tensor]
    base: Sequence[Tensor]
    norm: Sequence[Tensor]


class State(NamedTuple):
    """For every layer: weights M [B, H, in, out], momenta S (none for plain gradient descent), and references R, the
    memory at which the last token took its gradient. phase [B]: how many tokens the mini-batch has, 0 where the next
    token begins one.
    """

    weights: Weights
    momenta: Weights
    references: Weights
    phase: Tensor


class Start(NamedTuple):
    """Where a document begins: weights M_0 [H, in, out] of every layer. fades: whether they fade as well (W = 0). norm:
    scale and shift [H, 1, V] of the network's layer norm, or nothing.
    """

    weights: Weights
    fades: bool = False
    norm: Weights = ()

    def rows(self, B: int, dtype: torch.dtype) -> Rows:
        """For the rows of B sequences, in this dtype."""
        first, norm = ([x.to(dtype).repeat(B, 1, 1) for x in part] for part in (self.weights, self.norm))
        return Rows(first, [] if self.fades else first, norm)

    def state(self, given: State | None, B: int, dtype: torch.dtype, momentum: bool) -> State:
        """The state to begin with, in this dtype."""
        if given is not None:
            return State(*(tuple(x.to(dtype) for x in part) for part in given[:3]), given.phase)
        weights = tuple(x.to(dtype).expand(B, -1, -1, -1) for x in self.weights)
        momenta = tuple(torch.zeros_like(x) for x in weights) if momentum else ()
        return State(weights, momenta, weights, torch.zeros(B, dtype=torch.long, device=weights[0].device))


class Fitted(NamedTuple):
    """What a chunk begins with: X of every layer, and the references R, None for those of the first token."""

    stacked: Sequence[Tensor]
    references: Sequence[Tensor] | None


class Chunk(NamedTuple):
    """q, k [rows, C, K] and v [rows, C, V]; what its tokens read, and what it carries on (of_gates in
    linear/coefficients.py)."""

    q: Tensor
    k: Tensor
    v: Tensor
    read: Tensor
    read_writes: Tensor
    carry: Tensor
    carry_writes: Tensor


def stack(rows: Rows, weights: Sequence[Tensor], momenta: Sequence[Tensor]) -> list[Tensor]:
    """X from M and S [rows, in, out]."""
    fading = [m - w for m, w in zip(weights, rows.base, strict=True)] if rows.base else weights
    return [torch.cat(x, dim=1) for x in zip(fading, *([momenta] if momenta else []), strict=True)]


def unstack(rows: Rows, stacked: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The way back: M and S."""
    parts = [x.split(w.shape[1], dim=1) for x, w in zip(stacked, rows.first, strict=True)]
    fading, momenta = [x[0] for x in parts], [x[1] for x in parts if len(x) == 2]
    return [w + m for w, m in zip(rows.base, fading, strict=True)] if rows.base else fading, momenta


def advance(
    network: Network, fitted: Fitted, rows: Rows, opens: Tensor | None, begins: Tensor | None, chunk: Chunk
) -> tuple[Tensor, Fitted]:
    """One chunk: o [rows, C, V], and what the next begins with. opens, begins [rows, 1, 1]: whether it begins a
    mini-batch (None: every row does), and another document (None: none does).
    """
    X, dtype = list(fitted.stacked), chunk.q.dtype
    if begins is not None:
        empty = stack(rows, rows.first, [torch.zeros_like(w) for w in rows.first] if chunk.read.shape[-1] == 2 else [])
        X = [torch.where(begins, e, x) for e, x in zip(empty, X, strict=True)]
    R = unstack(rows, X)[0]
    if opens is not None:
        R = [torch.where(opens, m, r) for m, r in zip(R, fitted.references, strict=True)]
    inputs, errors = network.errors([r.to(dtype) for r in R], chunk.k, chunk.v, rows.norm)
    writes = chunk.read_writes.to(dtype)

    def product(layer: int, y: Tensor) -> Tensor:
        z = torch.bmm(torch.bmm(y, inputs[layer].mT) * writes, errors[layer])
        z = torch.baddbmm(z, spread(y, chunk.read).to(dtype), X[layer].to(dtype))
        return torch.baddbmm(z, y, rows.base[layer].to(dtype)) if rows.base else z

    o = network.read([partial(product, layer) for layer in range(len(X))], chunk.q, rows.norm)
    following = []
    for x, y, e in zip(X, inputs, errors, strict=True):
        parts = x.split(y.shape[-1], dim=1)
        kept = [
            sum(chunk.carry[:, i : i + 1, j : j + 1] * parts[j] for j in range(i, len(parts)))
            for i in range(len(parts))
        ]
        following.append(torch.cat(kept, dim=1) + torch.bmm(spread(y, chunk.carry_writes.mT).to(dtype).mT, e))
    return o, Fitted(following, R)


@cache
def compiled(network: Network) -> Callable[..., tuple[list[Tensor], Fitted]]:
    """Some steps of this network in turn, by torch.compile."""

    def steps(fitted: Fitted, inputs: Sequence[Sequence[Any]]) -> tuple[list[Tensor], Fitted]:
        return in_turn(partial(advance, network), fitted, inputs)

    return torch.compile(steps, dynamic=False)
