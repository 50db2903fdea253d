"""A sequence in chunks: what every chunked form does before and after its own products.

Between two tokens i <= t of a chunk a memory fades by L_ti, the exponential of the sum of the log decays after i up to
t. No sum is positive, so nothing overflows and no entry exceeds one.

Shapes: B batch, T tokens, H heads, C chunk, N chunks, M = N B H: chunks of one sequence are B H apart, so that
x[n B H : (n + 1) B H] is the n-th chunk of every sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def into_chunks(x: Tensor | None, chunk: int, dtype: torch.dtype) -> Tensor | Any:  # None for None
    """[B, T, H, X] or [B, T, H] to [N B H, C, X], zero-padded at the end: zeros write nothing and forget nothing."""
    if x is None:
        return None
    x = (x.unsqueeze(-1) if x.ndim == 3 else x).to(dtype)
    if x.shape[1] % chunk:
        x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4).flatten(0, 2)


def from_chunks(x: Tensor, like: tuple[int, ...]) -> Tensor:
    """The way back, [N B H, C, X] to [B, T, H, X]. like: B, T, H."""
    B, T, H = like
    return x.unflatten(0, (-1, B, H)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]


def short(chunk: int, tokens: int) -> int:
    """The chunk, or a power of two that holds all the tokens where they are few."""
    return min(chunk, 1 << max(tokens - 1, 3).bit_length())


class Fades(NamedTuple):
    """What is left, inside a chunk, of a pair (i) where token t reads it: within [M, C, C], L above, zero for i > t; of
    the chunk's first memory at t: start [M, C, 1]; of a pair at the chunk's end: end [M, C, 1]. With a decay per
    channel [M, C, C, K], [M, C, K] and [M, C, K].
    """

    within: Tensor
    start: Tensor
    end: Tensor


def fades(like: Tensor, log_decay: Tensor | None) -> Fades:
    """From log decays in chunks, [M, C, 1] per head or [M, C, K] per channel; None fades nothing. like [M, C, *] gives
    sizes, dtype and device.

    Every entry has a sum of its own, of the log decays between its two tokens. A difference of sums from the chunk's
    beginning would lose the digits that all before took: 64 momenta of 1e-6, or the FORGET of every document, which is
    -64 where float32 then resolves 4e-6, and which no sum within another document contains.
    """
    M, C, _ = like.shape
    causal = like.new_ones(C, C).tril_()
    if log_decay is None:
        one = like.new_ones(1, 1, 1).expand(M, C, 1)
        return Fades(causal, one, one)
    not_between = like.new_ones(C, C, dtype=torch.bool).triu().unsqueeze(-1)
    within = log_decay.unsqueeze(2).masked_fill(not_between, 0.0).cumsum(1).exp() * causal.unsqueeze(-1)
    start, end = log_decay.cumsum(1).exp(), within[:, -1]
    return Fades(within.squeeze(-1) if within.shape[-1] == 1 else within, start, end)


def unit_inverse(A: Tensor) -> Tensor:
    """(I + A)^-1 of the strictly lower triangle of A [M, C, C], by halves:
        [[P, 0], [B, Q]]^-1 = [[P^-1, 0], [-Q^-1 B P^-1, Q^-1]] ,
    from blocks of 4, where (I + A)^-1 = (I - A)(I + A^2) exactly. A few products of many small matrices: three times as
    fast as triangular solves on a CPU, and as accurate. Larger first blocks by the same series are not: with b = 2 and
    nearly the same key 64 times, float32, the error is 5e-5 from blocks of 4 (2e-4 by solves), 8e-4 from 8, 4 from 16.
    """
    C = A.shape[-1]
    size = 1 << max(C - 1, 3).bit_length()
    if size != C:
        return unit_inverse(F.pad(A, (0, size - C, 0, size - C)))[:, :C, :C]
    blocks = _diagonal_blocks(A, 4).tril(-1).flatten(0, 1)
    square = blocks @ blocks
    inverse = (square - blocks).baddbmm_(blocks, square, alpha=-1)
    inverse.diagonal(dim1=-2, dim2=-1).add_(1.0)
    size = 4
    while size < C:
        pairs = inverse.view(-1, 2, size, size)
        below = _diagonal_blocks(A, 2 * size)[:, :, size:, :size].flatten(0, 1)
        double = A.new_zeros(len(pairs), 2, size, 2, size)
        double[:, 0, :, 0] = pairs[:, 0]
        double[:, 1, :, 1] = pairs[:, 1]
        double[:, 1, :, 0] = torch.bmm(torch.bmm(pairs[:, 1], below), pairs[:, 0]).neg_()
        size *= 2
        inverse = double.view(-1, size, size)
    return inverse


def _diagonal_blocks(A: Tensor, size: int) -> Tensor:
    """[M, C, C] to a view [M, C / size, size, size]."""
    return A.unflatten(2, (-1, size)).unflatten(1, (-1, size)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
