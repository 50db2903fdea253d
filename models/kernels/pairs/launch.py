"""The parts of a row, buffers and grids of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from models.kernels.pairs.arguments import Call, Recipe
from models.kernels.pairs.kernels import pairs_backward, pairs_forward

# numbers in a tile of half a head, and warps: 16 numbers a thread forward, 4 backward, where the window, what waits and
# the sums of the weight are held beside them
FORWARD = (1024, 4)
BACKWARD = (256, 4)
SPAN = (64, 16)  # tokens that a program goes through: the most, and the least where programs are few
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
    return triton.next_power_of_2(triton.cdiv(part.width, 2))


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
        # in a tile: half of the widest head
        self.BH = max(_half(part) for part in self.parts)

    def _parts(self) -> Iterator[Part]:
        r, (*_, query_scale, key_scale, frequency) = self.recipe, self.call
        address = (r.activation, r.norm, 0 if frequency is None else 2 * len(frequency))
        kinds = (
            (r.queries, r.key_dim, (*address, query_scale)),
            (r.keys, r.key_dim, (*address, key_scale)),
            (r.values, r.value_dim, (r.activation,)),
            (r.gates, r.value_dim, (r.gate,)),
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
            "BH": _half(part),
        }
        return tensors, settings

    def _strides(self) -> tuple[int, ...]:
        x = self.call.x
        return x.stride(0), x.stride(1), (self.W - 1) * self.C, self.C

    def forward(self) -> list[Tensor]:
        found, (numbers, num_warps) = [], FORWARD
        for part in self.parts:
            tensors, settings = self._arguments(part)
            out = self.call.x.new_empty(self.B, self.T, part.heads, part.width)
            BT = max(1, numbers // settings["BH"])
            pairs_forward[part.heads * triton.cdiv(self.T, BT), self.B](
                *tensors, out, self.T, *self._strides(), self.recipe.eps, **settings, BT=BT, num_warps=num_warps
            )
            found.append(out)
        return found if self.weight is None else [*found, self._tail()]

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

    def backward(self, gradients: list[Tensor]) -> list[Tensor]:
        call, (numbers, num_warps) = self.call, BACKWARD
        heads = sum(part.heads for part in self.parts) / len(self.parts)
        R, (S, least) = max(1, numbers // self.BH), SPAN
        while least < S and self.B * heads * triton.cdiv(self.T, R * S) < PROGRAMS:
            S //= 2
        groups = triton.cdiv(self.T, R * S)
        dx = torch.empty_like(call.x, memory_format=torch.contiguous_format)
        dtail = None if self.tail is None else torch.empty_like(self.tail)
        dweight = None if self.weight is None else self._partial(groups, self.C, self.W)
        dscales = []
        for part, do in zip(self.parts, gradients[: len(self.parts)], strict=True):
            tensors, settings = self._arguments(part)
            to_tail = to_weight = to_scale = None
            if part.channel is not None and dweight is not None:
                to_weight = dweight[:, part.channel :]
                to_tail = None if dtail is None else dtail[..., part.channel :]
            if part.scale is not None:
                to_scale = self._partial(groups, part.heads, part.width)
                dscales.append((to_scale, part.scale.dtype))
            do = do if do.stride(3) == 1 else do.contiguous()
            pairs_backward[part.heads * groups, self.B](
                *tensors, do, dx[..., part.first :], to_tail, to_weight, to_scale, self.T, S, self.C,
                *self._strides(), do.stride(0), do.stride(1), do.stride(2), dx.stride(0), dx.stride(1),
                self.recipe.eps, **settings, R=R, num_warps=num_warps,
            )  # fmt: skip
        found = [dx]
        if dweight is not None and self.weight is not None:
            self._add_tail(gradients[-1], dx, dtail)
            found += [] if dtail is None else [dtail]
            found.append(dweight.sum(0).to(self.weight.dtype))
        return [*found, *(sums.sum((0, 1)).to(dtype) for sums, dtype in dscales)]

    def _partial(self, groups: int, *shape: int) -> Tensor:
        """For the sums of every program."""
        return self.call.x.new_empty(self.B * groups, *shape, dtype=torch.float32)

    def _add_tail(self, gradient: Tensor, dx: Tensor, dtail: Tensor | None) -> None:
        """The gradient by the next call's tail, to what that was made of."""
        gradient, reach, begin = gradient.masked_fill(self._beyond(), 0), self.W - 1, self._convolved()
        rows = dx[:, -reach:, begin : begin + self.C]
        rows += gradient[:, -rows.shape[1] :]
        if dtail is not None and reach > self.T:
            dtail[:, self.T :] += gradient[:, : reach - self.T]
