"""The parts of a row, buffers and grids of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.kernels.backend import cdiv, next_power_of_2
from models.kernels.columns import summed
from models.kernels.pairs.arguments import LATER, LEARNED, Call, Recipe, new_link
from models.kernels.pairs.kernels import pairs_backward, pairs_forward


class Shape(NamedTuple):
    """Of a kernel's programs."""

    numbers: int  # in a tile of halves of heads
    per_thread: int  # of them
    tokens: int  # that a program goes through, where programs are many
    ahead: int  # tokens on their way from memory: 1, 2 or 4
    unroll: int  # tokens in the body of the loop
    registers: int | None = None  # of a thread, at most


# 16 warps on a multiprocessor of an H200, at 125 registers a thread for convolved queries and keys
FORWARD = Shape(numbers=512, per_thread=4, tokens=64, ahead=4, unroll=4)
BACKWARD = Shape(numbers=256, per_thread=2, tokens=64, ahead=2, unroll=2, registers=128)
# without a convolution a thread holds little, 70 registers for queries and keys
BACKWARD_ALONE = Shape(numbers=512, per_thread=4, tokens=64, ahead=2, unroll=2)
LEAST = 16  # tokens that a program goes through where programs are few
PROGRAMS = 512  # few


class Part(NamedTuple):
    """Heads side by side that are treated alike. first: their first channel; channel: the first one's in the
    convolution, None for no convolution; turning: how many channels of a head do; scale: the norm's."""

    first: int
    heads: int
    width: int
    channel: int | None
    activation: str
    norm: str = "none"
    turning: int = 0
    scale: Tensor | None = None


def _half(part: Part) -> int:
    """The width of a tile of half a head."""
    return next_power_of_2(cdiv(part.width, 2))


class Launch:
    """One call."""

    def __init__(self, call: Call, recipe: Recipe) -> None:
        self.call, self.recipe, (self.B, self.T, _) = call, recipe, call.x.shape
        assert call.x.stride(2) == 1, "channels lie next to each other"
        self.positions = call.positions.contiguous()
        self.tail = None if call.tail is None else call.tail.contiguous()
        self.weight = None if call.weight is None else call.weight.contiguous()
        self.C, self.W = (0, 1) if self.weight is None else self.weight.shape
        self.parts = list(self._parts())
        self.later = recipe.gate == LATER
        heads = recipe.queries + recipe.keys, recipe.values + recipe.gates
        self.used = heads[0] * recipe.key_dim + heads[1] * recipe.value_dim  # of a row; the rest goes through

    def _parts(self) -> Iterator[Part]:
        r, (*_, query_scale, key_scale, frequency) = self.recipe, self.call
        address = (r.activation, r.norm, 0 if frequency is None else 2 * len(frequency))
        kinds = (
            (r.queries, r.key_dim, (*address, query_scale)),
            (r.keys, r.key_dim, (*address, key_scale)),
            (r.values, r.value_dim, (r.activation,)),
            (0 if r.gate == LATER else r.gates, r.value_dim, (r.gate,)),
        )
        begin = r.queries * r.key_dim if r.convolved == "k" else 0
        first = 0
        for heads, width, kind in kinds:
            if heads:
                inside = begin <= first < begin + self.C
                yield Part(first, heads, width, first - begin if inside else None, *kind)
            first += heads * width

    def _arguments(self, part: Part) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What both kernels are told of a part: tensors, and what they are compiled for."""
        tail = weight = None
        if part.channel is not None and self.weight is not None:
            weight = self.weight[part.channel :]
            tail = None if self.tail is None else self.tail[..., part.channel :]
        tensors = (self.call.x[..., part.first :], tail, weight, part.scale, self.call.frequency, self.positions)
        # where some channels turn and others don't, halves are in pieces: so many channels lie next to each other
        pieces = (part.turning // 2, part.width // 2) if part.turning < part.width else ()
        settings = {
            "HEADS": part.heads,
            "WIDTH": part.width,
            "TURN": part.turning,
            "ALIGNED": min([16, *(n & -n for n in pieces if n)]),
            "W": 1 if weight is None else self.W,
            "ACTIVATION": part.activation,
            "NORM": part.norm,
        }
        return tensors, settings

    def _programs(self, part: Part, shape: Shape) -> dict[str, Any]:
        """What a kernel's programs are compiled for."""
        BH = _half(part)
        BG = min(next_power_of_2(part.heads), max(1, shape.numbers // BH))
        programs = {"BG": BG, "BH": BH, "S": self._span(shape), "AHEAD": shape.ahead, "UNROLL": shape.unroll}
        warps = max(1, BG * BH // (32 * shape.per_thread))
        return programs | {"num_warps": warps, "maxnreg": shape.registers}

    def _span(self, shape: Shape) -> int:
        """The tokens of a program, the same for all parts of this shape, since their sums of the weight are as many."""
        S, numbers = min(shape.tokens, next_power_of_2(self.T)), max(p.heads * _half(p) for p in self.parts)
        while LEAST < S and self.B * cdiv(self.T, S) * cdiv(numbers, shape.numbers) < PROGRAMS:
            S //= 2
        return S

    def _grid(self, part: Part, programs: dict[str, Any]) -> tuple[int, int]:
        return cdiv(part.heads, programs["BG"]) * cdiv(self.T, programs["S"]), self.B

    def _strides(self) -> tuple[int, ...]:
        x = self.call.x
        return x.stride(0), x.stride(1), (self.W - 1) * self.C, self.C

    def forward(self) -> list[Tensor]:
        found = []
        for part in self.parts:
            (tensors, settings), programs = self._arguments(part), self._programs(part, FORWARD)
            out = self.call.x.new_empty(self.B, self.T, part.heads, part.width)
            pairs_forward[self._grid(part, programs)](
                *tensors, out, self.T, *self._strides(), self.recipe.eps, **settings, **programs
            )
            found.append(out)
        found += [new_link(self.call.x)] if self.later else []
        found += [self._rest()] if self.used < self.call.x.shape[2] else []
        return found if self.weight is None else [*found, self._tail()]

    def _rest(self) -> Tensor:
        """Never a view of the row, which it would be as `contiguous` of one token: an operator's output is its own."""
        return self.call.x[..., self.used :].clone(memory_format=torch.contiguous_format)

    def _tail(self) -> Tensor:
        """The inputs of the convolution that the next call needs: those of the last token's document."""
        x, reach, begin = self.call.x, self.W - 1, self._convolved()
        rows = x[:, -reach:, begin : begin + self.C]
        if reach > self.T:
            tail = x.new_zeros(self.B, reach, self.C) if self.tail is None else self.tail.to(x.dtype)
            rows = torch.cat([tail[:, self.T :], rows], dim=1)
        return rows.masked_fill(self._beyond(), 0)

    def _convolved(self) -> int:
        """The first channel of the row that is convolved."""
        return next(part.first for part in self.parts if part.channel == 0)

    def _beyond(self) -> Tensor:
        """[B, W - 1, 1]: which of the last inputs are of a document before that of the last token."""
        back = torch.arange(self.W - 2, -1, -1, device=self.positions.device)
        return (back > self.positions[:, -1:]).unsqueeze(-1)

    def backward(self, gradients: list[Tensor], dx: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fills dx; returns the gradients by what is LEARNED. gradients: those of `forward`'s, without the link's; of
        the next call's tail there may be none.
        """
        call = self.call
        dtail = None if self.tail is None else torch.empty_like(self.tail)
        dweight = None if self.weight is None else self._partial(BACKWARD, self.W, self.C)
        sums: dict[str, Tensor] = {}
        for part, do in zip(self.parts, gradients[: len(self.parts)], strict=True):
            shape = BACKWARD_ALONE if part.channel is None else BACKWARD
            (tensors, settings), programs = self._arguments(part), self._programs(part, shape)
            to_tail = to_weight = to_scale = None
            if part.channel is not None and dweight is not None:
                to_weight = dweight[..., part.channel :]
                to_tail = None if dtail is None else dtail[..., part.channel :]
            if part.scale is not None:
                to_scale = self._partial(shape, part.heads, part.width)
                sums["query_scale" if part.scale is call.query_scale else "key_scale"] = to_scale.flatten(0, 1)
            do = do if do.stride(3) == 1 else do.contiguous()
            pairs_backward[self._grid(part, programs)](
                *tensors, do, dx[..., part.first :], to_tail, to_weight, to_scale, self.T, self.C,
                *self._strides(), do.stride(0), do.stride(1), do.stride(2), dx.stride(0), dx.stride(1),
                self.recipe.eps, **settings, **programs,
            )  # fmt: skip
        others = gradients[len(self.parts) :]
        if self.used < dx.shape[2]:
            dx[..., self.used :] = others.pop(0)
        if others:
            self._add_tail(others[0], dx, dtail)
        sums |= {} if dweight is None else {"weight": dweight}
        made = {} if dtail is None else {"tail": dtail}
        made |= {name: summed(x, getattr(call, name)) for name, x in sums.items()}
        a, b, c, d = (made.get(name, dx.new_empty(0)) for name in LEARNED)
        return a, b, c, d

    def _partial(self, shape: Shape, *sizes: int) -> Tensor:
        """For the sums over every span of tokens."""
        return self.call.x.new_empty(self.B * cdiv(self.T, self._span(shape)), *sizes, dtype=torch.float32)

    def _add_tail(self, gradient: Tensor, dx: Tensor, dtail: Tensor | None) -> None:
        """The gradient by the next call's tail, to what that was made of."""
        gradient, reach, begin = gradient.masked_fill(self._beyond(), 0), self.W - 1, self._convolved()
        rows = dx[:, -reach:, begin : begin + self.C]
        rows += gradient[:, -rows.shape[1] :]
        if dtail is not None and reach > self.T:
            dtail[:, self.T :] += gradient[:, : reach - self.T]
