"""What a model carries from one call to the next: the states of its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from models.mixers.layer import State


class Cache:
    """The states of all layers, None at the start: what generate passes from one call to the next. seen: how many
    tokens, padding included, have been handed in. A call makes a new one, and changes none that it is given.
    """

    def __init__(self, states: Sequence[State | None], seen: int = 0) -> None:
        self.states, self.seen = states, seen

    is_compileable = False  # generate asks

    @property
    def segment(self) -> Tensor | None:
        """The number of the last token's document [B], None where none was told."""
        return None if self.states[0] is None else self.states[0].segment

    @property
    def batch_size(self) -> int | None:
        """How many rows it has, None at the start."""
        return None if self.states[0] is None else self.states[0].position.shape[0]

    def reorder_cache(self, rows: Tensor) -> None:
        """Beam search: row i goes on from what was row rows[i]."""
        self._map(lambda t: t.index_select(0, rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, for a prompt that several rows go on with. (transformers' caches have it too.)"""
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        """With the gradients' graph, which torch's own copies refuse."""
        copied = Cache(self.states, self.seen)
        copied._map(Tensor.clone)
        return copied

    def _map(self, function: Callable[[Tensor], Any]) -> None:
        self.states = [map_tensors(state, function) for state in self.states]

    def get_seq_length(self) -> int:
        """What generate calls `seen`."""
        return self.seen

    @property
    def num_bytes(self) -> int:
        sizes: list[int] = []
        for state in self.states:
            map_tensors(state, lambda t: sizes.append(t.numel() * t.element_size()))
        return sum(sizes)


def alone(state: Any) -> Any:
    """The state without what else is in its tensors' memory: the last tokens of a long call, say, and all before."""

    def fits(x: Tensor) -> bool:
        return x.untyped_storage().nbytes() <= x.numel() * x.element_size()

    return map_tensors(state, lambda x: x if fits(x) else x.clone())


def map_tensors(node: Any, function: Callable[[Tensor], Any]) -> Any:
    """function applied to every tensor in nested (named) tuples."""
    if isinstance(node, Tensor):
        return function(node)
    if isinstance(node, tuple):
        mapped = [map_tensors(item, function) for item in node]
        return type(node)(*mapped) if hasattr(node, "_fields") else tuple(mapped)
    return node


def leaves(node: Any) -> list[Tensor]:
    """The tensors of nested tuples, or of a list of them, in order."""
    found: list[Tensor] = []
    map_tensors(tuple(node), found.append)
    return found
