"""What a step holds, and the cache that it leaves behind."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from models.cache import Cache, alone, leaves, map_tensors
from models.mixers.layer import State

States = Sequence[State | None]
ALIGNED = 64  # numbers from one tensor's beginning to the next: wide loads want it
LOCK = threading.RLock()  # a thread's token and states must not meet another's


class Buffers:
    """States at fixed places, where a captured step finds them, and whose they are: the last cache's that went on here.
    Tensors of one dtype lie side by side, so that all are copied by one call.
    """

    def __init__(self, states: States) -> None:
        self.signature = signature(states)
        self.places: list[tuple[torch.dtype, int, torch.Size]] = []
        given = leaves(states)
        sizes = dict.fromkeys((x.dtype for x in given), 0)
        for x in given:
            self.places.append((x.dtype, sizes[x.dtype], x.shape))
            sizes[x.dtype] += x.numel() + -x.numel() % ALIGNED
        self.flat = {dtype: given[0].new_zeros(size, dtype=dtype) for dtype, size in sizes.items()}
        self.states = self._laid_out(states, self.flat)
        self.owner: weakref.ref[Held] | None = None
        self.filling = False  # by a prompt

    def _laid_out(self, like: States, flat: dict[torch.dtype, Tensor]) -> States:
        places = iter(self.places)

        def place(_: Tensor) -> Tensor:
            dtype, start, shape = next(places)
            return flat[dtype][start : start + shape.numel()].view(shape)

        return [map_tensors(state, place) for state in like]

    def copied(self) -> States:
        """States of the same numbers elsewhere."""
        return self._laid_out(self.states, {dtype: x.clone() for dtype, x in self.flat.items()})

    def load(self, states: States, first: int = 0) -> None:
        """The numbers of other states, of the layers from `first` on. Those that were written in place are there
        already; what else lies here, under another name, is read before it is written over.
        """
        here = {x.untyped_storage().data_ptr() for x in self.flat.values()}
        pairs = []
        for a, b in zip(leaves(self.states[first : first + len(states)]), leaves(states), strict=True):
            if a.data_ptr() != b.data_ptr() or a.stride() != b.stride():
                pairs.append((a, b.clone() if b.untyped_storage().data_ptr() in here else b))
        for dtype in {a.dtype for a, _ in pairs}:
            some = [pair for pair in pairs if pair[0].dtype == dtype]
            torch._foreach_copy_([a for a, _ in some], [b for _, b in some])

    def keep(self, layer: int, state: State) -> State:
        """The state of a layer, here if it is one of those that the step is for."""
        if signature(state) != signature(self.states[layer]):
            return alone(state)
        self.load([state], layer)
        return cast("State", self.states[layer])

    @property
    def free(self) -> bool:
        """Whether no cache lies here."""
        return not self.filling and (self.owner is None or self.owner() is None)

    def owned_by(self, cache: Cache) -> bool:
        return self.owner is not None and self.owner() is cache

    def hand_to(self, cache: Held | None) -> None:
        """The cache whose states these are from now on. The one before parts with them before they change."""
        self.owner = None if cache is None else weakref.ref(cache)


class Held(Cache):
    """The cache after a step, or after a prompt that found a step's places free. Its states are where the step holds
    them, until somebody looks at them, or the step goes on from this cache or another: then they are copies. So a step
    changes no cache that it is given, as no call of a model does.

    spent: generate goes on from a cache once and forgets it; a step then spares the copy. prompt: after one, from which
    no step has gone on: whether one can is still to be asked.
    """

    def __init__(self, buffers: Buffers, rows: int, seen: int, prompt: bool = False) -> None:
        self.buffers, self.rows, self.seen, self.spent, self.prompt = buffers, rows, seen, False, prompt
        self.own: States | None = None
        buffers.hand_to(self)

    @property
    def states(self) -> States:  # type: ignore[override]
        self.part()
        assert self.own is not None
        return self.own

    def part(self) -> None:
        """From here on the states are copies."""
        with LOCK:
            if self.own is None:
                assert self.buffers.owned_by(self), "a spent cache has no states"
                self.own = self.buffers.copied()
                self.buffers.hand_to(None)

    def __reduce__(self) -> tuple[type[Cache], tuple[States, int]]:
        """What copy.copy and pickle make of it has its states where any cache has them."""
        return Cache, (list(self.states), self.seen)

    @property
    def batch_size(self) -> int:
        return self.rows

    @property
    def segment(self) -> Tensor | None:
        first = (self.buffers.states if self.own is None else self.own)[0]
        return None if first is None else first.segment

    def _map(self, function: Callable[[Tensor], Any]) -> None:
        """Beams are chosen where the states are; what changes the number of rows parts with them."""
        with LOCK:
            if self.own is None:
                changed = [map_tensors(state, function) for state in self.buffers.states]
                if signature(changed) == self.buffers.signature:
                    self.buffers.load(changed)
                    return
                self.buffers.hand_to(None)
                self.own = changed
            else:
                self.own = [map_tensors(state, function) for state in self.own]
            self.rows = len(leaves(self.own)[0])


def signature(node: Any) -> Any:
    """The shapes, dtypes and devices of states, and all in them that is no tensor: what a captured step is made for."""
    if isinstance(node, Tensor):
        return tuple(node.shape), node.dtype, node.device
    return tuple(map(signature, node)) if isinstance(node, tuple | list) else node
