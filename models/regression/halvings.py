"""Scores of a chunk whose channels fade at their own rates: a product for each halving.

    S_ti = sum_j x_tj L_ti(j) y_ij  for i <= t ,    L_ti(j) = exp(g_(i+1)j + .. + g_tj) ,

is no product of two matrices, and L has C numbers for each token and channel. But with a border r between the two, t >=
r > i, L_ti is exp(g_r + .. + g_t) exp(g_(i+1) + .. + g_(r-1)): a factor of the token that reads and one of the token
that writes, neither larger than 1. So a chunk is halved, and its halves, down to single tokens: each pair of tokens
meets at the border of one halving, whose pairs are one product. A chunk of C tokens has log2(C) halvings.

No factor is a quotient of others, so nothing overflows whatever the decay, and every sum is of the gates between two
tokens alone: a document's start takes no digits of those after it. The secondary chunking of Gated Linear Attention
(Yang et al. 2024, arXiv 2312.06635) is the same idea, taken one level down.

Shapes: M chunks, C tokens of one, K channels. y, log_decay g: [M, C, K].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Reader(NamedTuple):
    """Tokens x [M, C, K] that read. early: before their own gate g_t, which then is not in L, and nothing of their own
    write."""

    x: Tensor
    early: bool = False


class Halving(NamedTuple):
    """Of the n pairs of neighbouring blocks of `size` tokens. writes [M, n, size, K]: what is left of the first block's
    tokens at the border; reads: from there at the second block's, of a reader that is not early and of one that is."""

    size: int
    writes: Tensor
    reads: tuple[Tensor, ...]


def halvings(log_decay: Tensor, early: bool) -> Iterator[Halving]:
    """Of chunks whose length is a power of two, from single tokens to halves. early: whether a reader is."""
    size = 1
    while size < log_decay.shape[1]:
        write, read = log_decay.unflatten(1, (-1, 2, size)).unbind(2)
        reads = (read.cumsum(-2).exp(),)
        yield Halving(size, after(write).exp(), (*reads, after(read.flip(-2)).flip(-2).exp()) if early else reads)
        size *= 2


def after(log_decay: Tensor) -> Tensor:
    """[*, C, K]: the sums of what comes after each token."""
    later = F.pad(log_decay[..., 1:, :], (0, 0, 0, 1))
    return later.flip(-2).cumsum(-2).flip(-2)


def scores(readers: Sequence[Reader], y: Tensor, log_decay: Tensor) -> list[Tensor]:
    """S [M, C, C] of each reader, zero for i > t."""
    C = y.shape[1]
    y, log_decay = _filled(y), _filled(log_decay)
    readers = [Reader(_filled(x), early) for x, early in readers]
    found = [
        torch.diag_embed(torch.zeros_like(x[..., 0]) if early else torch.linalg.vecdot(x, y)) for x, early in readers
    ]
    for halving in halvings(log_decay, any(reader.early for reader in readers)):
        writer = (_first(y, halving.size) * halving.writes).mT
        for S, reader in zip(found, readers, strict=True):
            _met(S, halving.size).copy_(_readers(reader, halving) @ writer)
    return [S[:, :C, :C] for S in found]


def scores_backward(
    d: Sequence[Tensor], readers: Sequence[Reader], y: Tensor, log_decay: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The gradients of `scores` by each x and by y; d [M, C, C] of each is its own, of which what is above the diagonal
    is not read."""
    C = y.shape[1]
    y, log_decay = _filled(y), _filled(log_decay)
    rest = y.shape[1] - C
    d = [F.pad(x, (0, rest, 0, rest)) for x in d]
    readers = [Reader(_filled(x), early) for x, early in readers]
    dx, dy = [], torch.zeros_like(y)
    for own, (x, early) in zip(d, readers, strict=True):
        one = own.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        dx.append(torch.zeros_like(x) if early else one * y)
        if not early:
            dy.addcmul_(one, x)
    for halving in halvings(log_decay, any(reader.early for reader in readers)):
        size, writer = halving.size, _first(y, halving.size) * halving.writes
        for own, dread, reader in zip(d, dx, readers, strict=True):
            met = _met(own, size)
            _second(dread, size).addcmul_(met @ writer, halving.reads[reader.early])
            _first(dy, size).addcmul_(met.mT @ _readers(reader, halving), halving.writes)
    return [x[:, :C] for x in dx], dy[:, :C]


def _readers(reader: Reader, halving: Halving) -> Tensor:
    return _second(reader.x, halving.size) * halving.reads[reader.early]


def _filled(x: Tensor) -> Tensor:
    """To a power of two, by tokens of zeros behind the others."""
    return F.pad(x, (0, 0, 0, (1 << (x.shape[1] - 1).bit_length()) - x.shape[1]))


def _first(x: Tensor, size: int) -> Tensor:
    return x.unflatten(1, (-1, 2, size))[:, :, 0]


def _second(x: Tensor, size: int) -> Tensor:
    return x.unflatten(1, (-1, 2, size))[:, :, 1]


def _met(S: Tensor, size: int) -> Tensor:
    """The view [M, n, size, size] of S [M, C, C] in which the second block of each pair meets the first."""
    pairs = S.unflatten(1, (-1, 2 * size)).unflatten(3, (-1, 2 * size)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
    return pairs[:, :, size:, :size]
