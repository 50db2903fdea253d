"""Scores of a chunk whose channels fade at their own rates: a product for each halving.

    S_ti = sum_j x_tj L_ti(j) y_ij  for i <= t ,    L_ti(j) = exp(g_(i+1)j + .. + g_tj) ,

is no product of two matrices, and L has C numbers for each token and channel. But with a border r between the two, t >=
r > i, L_ti is exp(g_r + .. + g_t) exp(g_(i+1) + .. + g_(r-1)): a factor of the token that reads and one of the token
that writes, neither larger than 1. So a chunk is halved, and its halves, down to single tokens: each pair of tokens
meets at the border of one halving, whose pairs are one product. A chunk of C tokens has log2(C) halvings.

No factor is a quotient of others, so nothing overflows whatever the decay, and every sum is of the gates between two
tokens alone: a document's start takes no digits of those after it.

Shapes: M chunks, C tokens of one, K channels. x, y, log_decay g: [M, C, K].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Halving(NamedTuple):
    """reads, writes [M, n, s, K]: what is left between a token and its border, of the n pairs of blocks of s tokens."""

    size: int
    reads: Tensor
    writes: Tensor


def halvings(log_decay: Tensor, early: bool = False) -> Iterator[Halving]:
    """Of chunks whose length is a power of two, from single tokens to halves. early: what reads is there before its own
    gate, which is not in its factor."""
    size = 1
    while size < log_decay.shape[1]:
        write, read = log_decay.unflatten(1, (-1, 2, size)).unbind(2)
        read = after(read.flip(-2)).flip(-2) if early else read.cumsum(-2)
        yield Halving(size, read.exp(), after(write).exp())
        size *= 2


def after(log_decay: Tensor) -> Tensor:
    """[*, C, K]: the sums of what comes after each token."""
    later = F.pad(log_decay[..., 1:, :], (0, 0, 0, 1))
    return later.flip(-2).cumsum(-2).flip(-2)


def scores(x: Tensor, y: Tensor, log_decay: Tensor, early: bool = False) -> Tensor:
    """S [M, C, C], zero for i > t. early: L without g_t, and zero for i = t."""
    C = x.shape[1]
    x, y, log_decay = (_filled(z) for z in (x, y, log_decay))
    found = torch.diag_embed(torch.zeros_like(x[..., 0]) if early else torch.linalg.vecdot(x, y))
    for size, reads, writes in halvings(log_decay, early):
        met = (_second(x, size) * reads) @ (_first(y, size) * writes).mT
        found = found + _placed(met)
    return found[:, :C, :C]


def scores_backward(d: Tensor, x: Tensor, y: Tensor, log_decay: Tensor, early: bool = False) -> tuple[Tensor, Tensor]:
    """The gradients of `scores` by x and y; d [M, C, C] is its own, of which what is above the diagonal is not read."""
    C = x.shape[1]
    x, y, log_decay = (_filled(z) for z in (x, y, log_decay))
    rest = x.shape[1] - C
    d = F.pad(d, (0, rest, 0, rest))
    one = torch.zeros_like(d[:, :, :1]) if early else d.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    dx, dy = one * y, one * x
    for size, reads, writes in halvings(log_decay, early):
        met = d.unflatten(1, (-1, 2 * size)).unflatten(3, (-1, 2 * size)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        met = met[:, :, size:, :size]
        _second(dx, size).add_((met @ (_first(y, size) * writes)).mul_(reads))
        _first(dy, size).add_((met.mT @ (_second(x, size) * reads)).mul_(writes))
    return dx[:, :C], dy[:, :C]


def _filled(x: Tensor) -> Tensor:
    """To a power of two, by tokens of zeros behind the others."""
    return F.pad(x, (0, 0, 0, (1 << (x.shape[1] - 1).bit_length()) - x.shape[1]))


def _first(x: Tensor, size: int) -> Tensor:
    return x.unflatten(1, (-1, 2, size))[:, :, 0]


def _second(x: Tensor, size: int) -> Tensor:
    return x.unflatten(1, (-1, 2, size))[:, :, 1]


def _placed(met: Tensor) -> Tensor:
    """[M, n, s, s] -> [M, C, C]: below the diagonal, where the second block of each pair meets the first."""
    M, n, size, _ = met.shape
    blocks = F.pad(met, (0, size, size, 0))  # [M, n, 2s, 2s]
    return torch.diag_embed(blocks.movedim(1, -1), dim1=1, dim2=3).reshape(M, n * 2 * size, n * 2 * size)
