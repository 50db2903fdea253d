"""What the forms of momentum.py begin with: their state, and at which memory every token takes its gradient.

The tokens of a document fall into mini-batches of `grad_batch`, and all of one take their gradients at the memory after
the one before. A document begins with a new mini-batch, and with a memory of zero.

Shapes: B batch, T tokens, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.regression.documents import forget_at_starts
from models.regression.memory import first_memory


class State(NamedTuple):
    """memory and momentum: M and S [B, H, K, V]; between the calls of a Momentum with tied gates D. For grad_batch > 1
    also reference, M_ref of the last token, and phase [B], how many tokens the current mini-batch has, 0 where the next
    token begins one; else None.
    """

    memory: Tensor
    momentum: Tensor
    reference: Tensor | None = None
    phase: Tensor | None = None

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        return self[:2] if self.reference is None else (self.memory, self.momentum, self.reference)

    def times(self, c: Tensor | float) -> State:
        """With c S for S."""
        return State(self.memory, c * self.momentum, *self[2:])


class References(NamedTuple):
    """Where gradients are taken. source [B, T]: at the memory after this token of the call; -1 is the memory that the
    call begins with, and less the reference that it begins with. empty [B, T]: at zero, since the document began with
    this mini-batch. phase [B]: the state's, after the call.
    """

    source: Tensor
    empty: Tensor
    phase: Tensor


def first_state(k: Tensor, v: Tensor, state: State | None, grad_batch: int) -> State:
    """The state to begin with, zeros for None, in float32 at least. k [B, T, H, K], v [B, T, H, V]."""
    memory, momentum, reference, phase = (None, None, None, None) if state is None else state
    memory, momentum = first_memory(k, v, memory), first_memory(k, v, momentum)
    if grad_batch == 1:
        return State(memory, momentum)
    phase = torch.zeros(len(k), dtype=torch.long, device=k.device) if phase is None else phase
    return State(memory, momentum, first_memory(k, v, reference), phase)


def last_state(matrices: tuple[Tensor, ...], phase: Tensor) -> State:
    """The state after a call: M, S, and where there are mini-batches M_ref and their phase."""
    return State(*matrices, phase) if len(matrices) == 3 else State(*matrices)


def references(k: Tensor, state: State, grad_batch: int, segments: Tensor | None) -> References:
    """For the tokens of k [B, T, ...]. Mini-batches begin again with every document."""
    B, T = k.shape[:2]
    index = torch.arange(T, device=k.device).expand(B, T)
    start = torch.zeros_like(index)  # of the token's document, 0 for the one that the call begins with
    if segments is not None:
        start = torch.where(F.pad(segments[:, 1:] != segments[:, :-1], (1, 0)), index, 0).cummax(1).values
    position = index - start
    if state.phase is not None:
        position = torch.where(start == 0, position + state.phase.unsqueeze(1), position)
    source = index - position % grad_batch - 1
    return References(source, (start > 0) & (position < grad_batch), (T - 1 - source[:, -1]) % grad_batch)


class Opening(NamedTuple):
    """What every form begins with: the state, the gates with the documents' starts in them, and the references."""

    state: State
    log_momentum: Tensor
    log_decay: Tensor | None
    where: References


def opening(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_momentum: Tensor,
    log_decay: Tensor | None,
    state: State | None,
    grad_batch: int,
    segments: Tensor | None,
) -> Opening:
    state = first_state(k, v, state, grad_batch)
    log_decay = forget_at_starts(log_decay, segments, like=log_momentum)
    where = references(q, state, grad_batch, segments)
    return Opening(state, forget_at_starts(log_momentum, segments), log_decay, where)
