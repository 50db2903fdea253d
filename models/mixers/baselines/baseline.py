"""What baselines share: the contract of a mixer (models/mixers/layer.py) without a regressor.

A subclass has two forms of one map, `parallel` and `recurrent`, the definition. Both are told where documents begin,
and neither has to think of calls: what the last call left behind, emptied where it was of another document, is given.

Shapes: B batch, T tokens, D model width, N documents of a call.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.mixers.layer import Layer, State, check_choice, positions_of
from models.regression.regressor import Choice

BACKENDS = ("auto", "torch", "recurrent")

Held = tuple[Tensor, ...]  # what a call leaves behind, [B, *] each; all zero before the first token


class Baseline(Layer):
    """(x [B, T, D], state=None, segments=None) -> (y [B, T, D], state), as every mixer.

    backend: auto | torch (the parallel form, which auto takes) | recurrent (the definition, a loop over tokens).
    """

    num_heads: ClassVar[int] = 1  # of a feed-forward layer that has the mixer's (persistent_memory)

    def __init__(self, hidden_size: int, layer_index: int, backend: str = "auto") -> None:
        super().__init__()
        check_choice("backend", backend, BACKENDS)
        self.hidden_size, self.layer_index, self.backend = hidden_size, layer_index, backend

    def forward(self, x: Tensor, state: State | None = None, segments: Tensor | None = None) -> tuple[Tensor, State]:
        if state is not None and segments is not None:
            state = self.enter(state, segments[:, 0])
        held, position, segment = (None, None, None) if state is None else (state.memory, state.position, state.segment)
        form = self.recurrent if self.backend == "recurrent" else self.parallel
        y, held = form(x, held, segments if x.shape[1] > 1 else None)
        position = positions_of(x, position, segments)[:, -1] + 1
        return y, State(held, (), position, segment if segments is None else segments[:, -1])

    def enter(self, state: State, segment: Tensor) -> State:
        """The state as the first document of a call wants it: emptied in the rows where another document begins.
        Without segments, all is document 0.
        """
        new = segment != (torch.zeros_like(segment) if state.segment is None else state.segment)
        held = tuple(y.masked_fill(new.view(-1, *[1] * (y.ndim - 1)), 0) for y in state.memory)
        return State(held, (), state.position.masked_fill(new, 0), segment)

    def emptied(self, state: State) -> State | None:
        return self.enter(state, torch.ones_like(state.position))._replace(segment=None)

    def parallel(self, x: Tensor, held: Held | None, segments: Tensor | None) -> tuple[Tensor, Held]:
        """All tokens at once. held: of the document that the first token belongs to; None is all zero."""
        raise NotImplementedError

    def recurrent(self, x: Tensor, held: Held | None, segments: Tensor | None) -> tuple[Tensor, Held]:
        """The same, token by token."""
        raise NotImplementedError

    def matrices(self) -> list[nn.Parameter]:
        """Weights of products that are no nn.Linear's, for weight decay, which leaves alone what sets a decay or a step
        size (models/training/optimizer.py)."""
        return []

    def choose(self, device: torch.device, dtype: torch.dtype) -> Choice:
        """The form, for the table that is printed before the first step."""
        if self.backend == "auto":
            return Choice("torch", "a baseline has no kernel" if device.type == "cuda" else "")
        return Choice(self.backend, "as asked")

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """Forward, multiply-adds counted as two, of the products of the definition."""
        raise NotImplementedError

    def state_size(self, seq_len: int) -> int:
        """Numbers held per sequence after seq_len tokens."""
        raise NotImplementedError


def starts(segments: Tensor | None) -> Tensor | None:
    """[B, T]: whether a document begins here, behind another one of the call."""
    return None if segments is None else F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))


class Apart(NamedTuple):
    """The documents of a call, each a row of its own. number, place [B T]: the document of each token, and where in it.
    lengths [N]. first, last [B]: the documents that a row begins and ends with.
    """

    number: Tensor
    place: Tensor
    lengths: Tensor
    first: Tensor
    last: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """x [B, T, C] as [N, L, C], zero behind a document's end."""
        found = x.new_zeros(len(self.lengths), int(self.lengths.max()), x.shape[-1])
        return found.index_put((self.number, self.place), x.flatten(0, 1))

    def tokens(self, y: Tensor, like: Tensor) -> Tensor:
        """y [N, L, C] as [B, T, C]."""
        return y[self.number, self.place].view(*like.shape[:2], -1)

    def begun(self, held: Tensor) -> Tensor:
        """held [B, *] of the rows as [N, *] of the documents: zero for those that begin in the call."""
        return held.new_zeros(len(self.lengths), *held.shape[1:]).index_copy(0, self.first, held)


def apart(segments: Tensor) -> Apart:
    """A layer that has no way to forget within a row gets each document by itself. Their number and lengths are read
    from the device, which a GPU waits for."""
    B, T = segments.shape
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    number = begins.flatten().cumsum(0) - 1
    begin = begins.flatten().nonzero().squeeze(1)
    ends = torch.cat([begin[1:], begin.new_full((1,), B * T)])
    by_row = number.view(B, T)
    place = torch.arange(B * T, device=segments.device) - begin[number]
    return Apart(number, place, ends - begin, by_row[:, 0], by_row[:, -1])
