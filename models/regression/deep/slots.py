"""Mini-batches of documents, side by side.

The tokens of a document fall into mini-batches of b, from its first one on. A memory that is no matrix has to go
through them one after another, many sequences at once, while their documents begin where they like. So tokens are laid
out in slots: each holds C places for consecutive tokens of one mini-batch, and slot n of every row is computed at once.
Where nothing is known of documents that is how they lie already; else rows have slots that are partly or wholly empty.

Shapes: B batch, T tokens, C places of a slot, N slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.regression.documents import positions


class Slots(NamedTuple):
    """place [B, T]: of each token, among the N C of its row; None where token t has place t. num: N. batch [N, B]:
    in which slots a mini-batch begins, document [N, B]: and a document that is not the state's; None where a mini-batch
    begins in every slot, or no document in any. ends: for each slot [B], where a mini-batch is over with it; True or
    False for all rows. phase [B]: how many tokens the last mini-batch has, 0 where the next
    token begins one.
    """

    place: Tensor | None
    num: int
    size: int
    batch: Tensor | None
    document: Tensor | None
    ends: Sequence[Tensor | bool]
    phase: Tensor

    def fill(self, x: Tensor) -> Tensor:
        """[B, T, *] of tokens to [B, N C, *] of places, zeros in the empty ones."""
        if self.place is None:
            return x
        index = self.place.view(*self.place.shape, *[1] * (x.ndim - 2)).expand_as(x)
        return x.new_zeros(len(x), self.num * self.size, *x.shape[2:]).scatter(1, index, x)

    def empty(self, x: Tensor) -> Tensor:
        """The way back."""
        if self.place is None:
            return x
        index = self.place.view(*self.place.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return x.gather(1, index)

    def first(self, x: Tensor) -> Tensor:
        """[B, T, *] of tokens to [B, N, *] of the first of every slot, zeros for an empty one."""
        if self.place is None:
            return x[:, :: self.size]
        slot = torch.where(self.place % self.size == 0, self.place // self.size, self.num)
        index = slot.view(*slot.shape, *[1] * (x.ndim - 2)).expand_as(x)
        return x.new_zeros(len(x), self.num + 1, *x.shape[2:]).scatter(1, index, x)[:, : self.num]

    def flags(
        self, x: Tensor | Sequence[Tensor | bool] | None, heads: int, alike: bool = False
    ) -> list[Tensor | bool | None]:
        """batch, document or ends for each slot, for rows of B times heads: [rows, 1, 1], or what says so for all.
        alike: a tensor for each if for one, so that slots do not have to be compiled in all combinations.
        """
        rows: list[Any] = [None] * self.num if x is None else list(x)
        if alike and any(isinstance(r, Tensor) for r in rows):
            rows = [torch.as_tensor(r, device=self.phase.device).expand(len(self.phase)) for r in rows]
        return [r.repeat_interleave(heads).view(-1, 1, 1) if isinstance(r, Tensor) else r for r in rows]


def lay_out(
    tokens: Tensor,
    size: int,
    grad_batch: int,
    phase: Tensor | None = None,
    segments: Tensor | None = None,
    multiple: int = 1,
) -> Slots:
    """The slots of tokens [B, T, ...], of `size` tokens, for mini-batches of grad_batch. multiple: of which there are
    as many where places are looked up, the last ones empty: how many documents need differs from batch to batch.
    """
    (B, T), device = tokens.shape[:2], tokens.device
    if phase is None and segments is None and (grad_batch % size == 0 or size >= T):
        count, end = -(-T // size), torch.full((B,), T % grad_batch, device=device)
        opens = (torch.arange(count, device=device) * size % grad_batch == 0).unsqueeze(1).expand(-1, B)
        ends = [min((n + 1) * size, T) % grad_batch == 0 for n in range(count)]
        return Slots(None, count, size, None if grad_batch == size else opens, None, ends, end)
    position, document = positions(tokens, phase, segments)
    within = position % grad_batch
    opens = within % size == 0
    opens[:, 0] = True
    slot, index = opens.cumsum(1) - 1, torch.arange(T, device=device).expand(B, T)
    place = slot * size + index - torch.where(opens, index, 0).cummax(1).values
    num = -(-(int(slot[:, -1].max()) + 1) // multiple) * multiple
    empty = torch.zeros(B, num, dtype=torch.long, device=device)
    flags = ((within == 0) & opens, document & opens, within == grad_batch - 1)
    batch, document, over = (empty.scatter_add(1, slot, x.long()).bool().T for x in flags)
    some = [row if any_row else False for row, any_row in zip(over, over.any(1).tolist(), strict=True)]
    phase = (within[:, -1] + 1) % grad_batch
    return Slots(place, num, size, batch, None if segments is None else document, some, phase)


Step = Callable[..., tuple[Tensor, Any]]


def in_turn(step: Step, state: Any, inputs: Sequence[Sequence[Any]]) -> tuple[list[Tensor], Any]:
    """step(state, *inputs[n]) -> (o, state), one after another: all o, and the last state."""
    outputs = []
    for x in inputs:
        o, state = step(state, *x)
        outputs.append(o)
    return outputs, state


def scan(
    steps: Callable[[Any, Sequence[Sequence[Any]]], tuple[list[Tensor], Any]],
    state: Any,
    inputs: Sequence[Sequence[Any]],
    remat: int,
    at_once: int = 1,
) -> tuple[list[Tensor], Any]:
    """The same by `steps`, which takes some of them, `at_once` or `remat` if that is less, in a row, and one by one
    those that are left in the end: it may be compiled, for each number of them.

    remat: of so many steps together the backward pass computes once more what it needs, so that memory is needed for
    those and for the states between them (activation checkpointing); 0: never.
    """

    def several(state: Any, inputs: Sequence[Sequence[Any]]) -> tuple[list[Tensor], Any]:
        outputs = []
        whole = len(inputs) - len(inputs) % at_once
        starts = [*range(0, whole, at_once), *range(whole, len(inputs))]
        for n, end in pairwise([*starts, len(inputs)]):
            some, state = steps(state, inputs[n:end])
            outputs += some
        return outputs, state

    at_once = min(at_once, remat or at_once)
    if not (remat and torch.is_grad_enabled()):
        return several(state, inputs)
    outputs = []
    for n in range(0, len(inputs), remat):
        given = inputs[n : n + remat]
        some, state = checkpoint(several, state, given, use_reentrant=False, preserve_rng_state=False)
        outputs += some
    return outputs, state
