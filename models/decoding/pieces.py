"""A prompt in pieces of a few fixed lengths, each captured once as a graph and then replayed.

Layer by layer, a prompt waits for the host as a token does. A graph is always the same, so a prompt is cut into pieces
of given lengths, the longest first; what is left at its end goes layer by layer. A piece goes on from the states in the
step's places (held.py) and leaves its own there. So the first piece too begins with states, those after no token, of
the shapes that the others have (a layer's `emptied`).

A graph reads the parameters where they are, and casts them to autocast's dtype itself, in each piece anew. That costs
what it costs layer by layer, and a weight counts that was changed between two prompts in whatever way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.decoding.graph import HostNeededError, captured
from models.decoding.held import Buffers, signature

# Tokens of a piece, all rows together. What the largest works in is held as long as the step is, and twice as many
# tokens would be read an eighth faster; the smallest keeps short what is left at the end.
TOKENS = (8192, 2048, 512)
MULTIPLE = 64  # a row's tokens in a piece are one of it, as the chunks of most memories are


def lengths(rows: int, length: int) -> list[int]:
    """Tokens a row of the pieces of a prompt [rows, length], in order. What is left is less than the shortest piece."""
    found: list[int] = []
    for tokens in TOKENS:
        size = max(tokens // rows // MULTIPLE, 1) * MULTIPLE
        found += [size] * ((length - sum(found)) // size)
    return found


class Pieces:
    """Of prompts whose states lie in the buffers; dtype: of autocast, None without. Each is captured when a prompt has
    the first of its length. All lie in one memory, since no two run side by side: as large as the largest needs it,
    where that was captured first. On a CPU they are run as they are.

    Raises HostNeededError where a piece can't be captured.
    """

    def __init__(self, buffers: Buffers, dtype: torch.dtype | None) -> None:
        self.buffers, self.dtype = buffers, dtype
        self.pieces: dict[int, _Piece] = {}  # by tokens a row
        self.begin: Callable[[], None] | None = None
        self.pool: Any = None
        self._refusal: list[str | None] = []  # once it is known

    def refusal(self, model: Any) -> str | None:
        """Why a piece can't begin with states after no token, or None if it can."""
        if not self._refusal:
            pairs = zip(model.blocks, self.buffers.states, strict=True)
            self._refusal = [next(filter(None, (_refusal_of_start(block, state) for block, state in pairs)), None)]
        return self._refusal[0]

    def capture(self, model: Any, prompt: Tensor, sizes: list[int]) -> None:
        """What is not captured yet of a prompt's pieces. The states in the buffers are nobody's then."""
        if self.begin is None:
            self.pool = torch.cuda.graph_pool_handle() if prompt.is_cuda else None
            self.begin = self._graph(partial(self._empty, model), prompt)
        for size in sorted(set(sizes) - self.pieces.keys(), reverse=True):
            piece = _Piece(prompt[:, :size].clone(), self.buffers, self.dtype)
            piece.run = self._graph(partial(piece.layers, model), prompt)
            self.pieces[size] = piece

    def __call__(self, prompt: Tensor, sizes: list[int]) -> Tensor:
        """What the head reads of the last token of so many of the prompt's first, [B, 1, D]. All are captured."""
        assert self.begin is not None and sizes
        self.begin()
        start = 0
        for size in sizes:
            self.pieces[size](prompt[:, start : start + size])
            start += size
        return self.pieces[sizes[-1]].hidden.clone()

    def _graph(self, run: Callable[[], None], like: Tensor) -> Callable[[], None]:
        return captured(run, "a layer", self.pool) if like.is_cuda else run

    def _empty(self, model: Any) -> None:
        for i, (block, state) in enumerate(zip(model.blocks, self.buffers.states, strict=True)):
            assert state is not None
            first = block.emptied(state)
            assert first is not None
            self.buffers.load([first], i)


def _refusal_of_start(block: Any, state: Any) -> str | None:
    if state.segment is not None:
        return "its step is for rows of which documents were told, padding for example"
    first, name = block.emptied(state), type(block.mixer).__name__
    if first is None:
        return f"{name} can't tell its state after no token"
    if signature(first) != signature(state):
        return f"the state of {name} after no token has not the shapes of one after some"
    return None


class _Piece:
    """Of one length: ids [B, T], from and to the states in the buffers."""

    run: Callable[[], None]
    hidden: Tensor  # of the last token, [B, 1, D]

    def __init__(self, ids: Tensor, buffers: Buffers, dtype: torch.dtype | None) -> None:
        self.ids, self.buffers, self.dtype = ids, buffers, dtype

    def __call__(self, ids: Tensor) -> None:
        self.ids.copy_(ids)
        self.run()

    def layers(self, model: Any) -> None:
        states = list(self.buffers.states)
        with torch.autocast(self.ids.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False):
            (hidden,) = model._layers(model.embedding(self.ids), None, states, buffers=self.buffers)
        if any(a is not b for a, b in zip(states, self.buffers.states, strict=True)):
            raise HostNeededError("its states change their shapes from piece to piece")
        self.hidden = hidden[:, -1:].clone()
