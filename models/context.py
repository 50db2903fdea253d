"""One sequence over several processes (context parallelism): each has the tokens after those of the process before it.

Of R processes that share a row of T tokens, process r has tokens r T/R to (r+1) T/R - 1. All that a block knows of the
tokens before is its state (models/mixers/mixer.py). So process r hands the state that a block leaves behind to process
r+1, whose block begins with it; backward, the gradient by the state comes back the same way. Nothing else is exchanged,
so this is right for every mixer; what it sends is small where states do not grow with T.

While process r+1 is in a block, process r is in the next one: L blocks take the time of L + R - 1. NCCL keeps nothing
that was sent for later: what is sent at a time is received at a time, and in the same order, which a test looks after.

A state that holds all pairs is the whole sequence in the end. So where each block has softmax alone, or its like, pairs
stay where they are and pass by the others (models/regression/local/ring.py), and all processes are in the same block.
Beside other blocks they are handed on: these would wait for the last process in every such block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.cache import leaves, map_tensors
from models.mixers.layer import State, positions_of
from models.mixers.mixer import Mixer
from models.regression.local.pairs import Elsewhere
from models.regression.local.ring import Ring, wait


class Context:
    """This process's place among `size` processes that follow each other in rank and share their sequences. To be made
    by all processes together."""

    def __init__(self, size: int) -> None:
        assert size > 1 and dist.get_world_size() % size == 0, size
        rank = dist.get_rank()
        self.size, self.place = size, rank % size
        self.before = rank - 1 if self.place > 0 else None
        self.after = rank + 1 if self.place < size - 1 else None
        self.words = dist.new_group(backend="gloo")
        # apart from the group that sums gradients: there a sum that waits would be in the way of what it waits for
        groups = [dist.new_group(range(i, i + size)) for i in range(0, dist.get_world_size(), size)]
        self.ring = Ring(groups[rank // size], size, self.place)
        self.position: Tensor | None = None  # [B]: of this process's first tokens in their documents

    def begin(self, tokens: Tensor, segments: Tensor | None) -> None:
        """Before each pass: tokens and segments [B, T] of the whole rows."""
        self.ring.meet(tokens.device)
        first = self.place * (tokens.shape[1] // self.size)
        self.position = positions_of(tokens.unsqueeze(-1), None, segments)[:, first]

    def share(self, x: Tensor) -> Tensor:
        """x [B, T, *] of this process's tokens."""
        return x.chunk(self.size, dim=1)[self.place]

    def among_all(self, x: Tensor) -> Tensor:
        """x [*, T / size] of this process's tokens at their places in [*, T], zeros elsewhere."""
        found = x.new_zeros(*x.shape[:-1], x.shape[-1] * self.size)
        found.chunk(self.size, dim=-1)[self.place].copy_(x)
        return found

    def receive(self, like: Tensor) -> State | None:
        """The state that the process before has handed on, on the device of `like`; None for the first process."""
        if self.before is None:
            return None
        told: list[Any] = [None]
        dist.recv_object_list(told, self.before, group=self.words)
        anchor = like.new_zeros((), requires_grad=torch.is_grad_enabled())
        tensors = iter(_Receive.apply(anchor, self, leaves(told[0])))
        return map_tensors(told[0], lambda _: next(tensors))

    def elsewhere(self, mixer: Mixer, segments: Tensor | None) -> State:
        """What a block begins with whose pairs pass by. segments [B, T / size]."""
        assert self.position is not None, "begin was not called"
        memory, tails = Elsewhere(self.ring, self.position), (None,) * (mixer.num_tails + 1)
        return State(memory, tails, self.position, None if segments is None else segments[:, 0])

    def hand_on(self, x: Tensor, state: State) -> Tensor:
        """x, from which gradients reach the state too: those that the process after has for it."""
        if self.after is None:
            return x
        dist.send_object_list([map_tensors(state, lambda y: y.to("meta"))], self.after, group=self.words)
        return _HandOn.apply(x, self, *leaves(state))


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, context: Context, like: list[Tensor]) -> tuple[Tensor, ...]:
        found = tuple(torch.empty(y.shape, dtype=y.dtype, device=anchor.device) for y in like)
        ctx.context, ring = context, context.ring
        wait(ring.exchange([], [(y, ring.place - 1) for y in found]))
        ctx.mark_non_differentiable(*(y for y in found if not y.is_floating_point()))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ring, floats = ctx.context.ring, [x.contiguous() for x in gradients if x.is_floating_point()]
        wait(ring.exchange([(x, ring.place - 1) for x in floats], []))
        return None, None, None


class _HandOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: Context, *state: Tensor) -> Tensor:
        ring, each = context.ring, [y.contiguous() for y in state]
        wait(ring.exchange([(y, ring.place + 1) for y in each], []))
        ctx.context, ctx.like = context, [(y.shape, y.dtype) for y in state]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        ring = ctx.context.ring
        found = [torch.empty(shape, dtype=dtype, device=dx.device) if dtype.is_floating_point else None
                 for shape, dtype in ctx.like]  # fmt: skip
        wait(ring.exchange([], [(x, ring.place + 1) for x in found if x is not None]))
        return dx, None, *found
