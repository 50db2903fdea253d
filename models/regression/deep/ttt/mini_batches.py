"""Mini-batches of a call: which tokens take their gradients at the same memory.

The tokens of a document fall into mini-batches of b, and a new document begins a new one, so that rows of a batch may
have them at different places, short ones in between, and a call may end inside one. A memory that keeps the tokens of
an unfinished mini-batch (b - 1 at most) and puts them in front of the next call's has no other case to think of: every
row is then a run of mini-batches, of which any may be short.

Shapes: B batch, L tokens of the call with those kept before it, b tokens of a mini-batch, N mini-batches, M = N B H.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MiniBatches(NamedTuple):
    """first [B, N + 1]: the first token of each, and where the last one ends; L for those that a row doesn't have.
    fresh [B, N]: those that begin with a document inside the call; None where none can. Of size b.
    """

    first: Tensor
    fresh: Tensor | None
    size: int

    @property
    def complete(self) -> Tensor:
        """[B, N]: those of b tokens, after which the memory moves on."""
        return self.first.diff(dim=1) == self.size

    @property
    def real(self) -> Tensor:
        """[B, N b]: the places that have a token."""
        return (self._tokens < self.first[:, 1:, None]).flatten(1)

    def gather(self, x: Tensor) -> Tensor:
        """[B, L, ...] to [B, N b, ...], a mini-batch after the other; places without a token repeat one before."""
        return _select(x, torch.minimum(self._tokens, self.first[:, 1:, None] - 1).flatten(1))

    def scatter(self, x: Tensor, length: int) -> Tensor:
        """The way back, [B, N b, ...] to [B, L, ...]; of no meaning before the first mini-batch."""
        batch, place = self.places(length)
        return _select(x, (batch * self.size + place).clamp(min=0))

    @property
    def _tokens(self) -> Tensor:
        return self.first[:, :-1, None] + torch.arange(self.size, device=self.first.device)

    def places(self, length: int) -> tuple[Tensor, Tensor]:
        """[B, L]: of each token its mini-batch and its place there, which is negative before the first."""
        token = torch.arange(length, device=self.first.device).expand(len(self.first), -1).contiguous()
        batch = torch.searchsorted(self.first[:, 1:].contiguous(), token, right=True)
        return batch, token - self.first.gather(1, batch)

    def phase(self, length: int) -> Tensor:
        """[B]: how many tokens the last mini-batch has, 0 where it is complete."""
        return (length - self.first.masked_fill(self.first >= length, 0).amax(1)) % self.size


def mini_batches(
    like: Tensor, size: int, kept: int, phase: Tensor | None, segments: Tensor | None, counted: bool = True
) -> MiniBatches:
    """For L tokens, like [B, L, ...], of which the first `kept` are of previous calls, and of those the last phase [B]
    of the present mini-batch. segments [B, L - kept].

    With documents their number N depends on the data, and on a GPU counting them waits for all that comes before. Not
    counted, N is L, which is as many as there can be.
    """
    B, L = like.shape[:2]
    index = torch.arange(L, device=like.device)
    begin = torch.zeros(B, 1, dtype=torch.long, device=like.device) if phase is None else kept - phase.unsqueeze(1)
    if segments is None or segments.shape[1] == 1:
        count = torch.arange(-(-L // size) + 1, device=like.device)
        return MiniBatches((begin + size * count).clamp(max=L), None, size)
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (kept + 1, 0))
    document = torch.where(starts, index, begin).cummax(1).values
    opens = (index >= begin) & ((index - document) % size == 0)
    first = torch.where(opens, index, L).sort(1).values[:, : int(opens.sum(1).max()) if counted else L]
    fresh = starts.gather(1, first.clamp(max=L - 1)) & (first < L)
    return MiniBatches(F.pad(first, (0, 1), value=L), fresh, size)


def _select(x: Tensor, index: Tensor) -> Tensor:
    """The rows index [B, *] of x [B, T, ...]: [B, *, ...]."""
    B, T = x.shape[:2]
    index = index + T * torch.arange(B, device=index.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, (B, -1))
