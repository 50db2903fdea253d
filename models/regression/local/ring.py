"""Softmax over pairs that lie on several processes: each has its tokens' pairs alone, and those of others pass by.

Of R processes that share a row (models/context.py), process r has the queries and the pairs of tokens r S to
(r+1) S - 1. In round d = 0, 1, ..., it meets the pairs of process r - d, which process r - 1 met the round before (ring
attention, Liu et al. 2023): while it compares its queries with these, the next ones are on their way.

Forward.    A round gives a weighted mean o_d and the logarithm L_d of the sum of its weights. Of two rounds
                L = log(e^L_1 + e^L_2) ,    o = o_1 e^(L_1 - L) + o_2 e^(L_2 - L) .
Backward.   With p_ti = exp(s_ti - L_t), a_ti = do_t . v_i and delta_t = do_t . o_t, each pair has its gradients,
                ds_ti = p_ti (a_ti - delta_t) ,    dv_i = sum_t p_ti do_t ,    dk_i = sum_t ds_ti q_t ,
            without any other: the pairs pass by once more, and from the second process on their gradients with them,
            which the last process that they meet sends home. So no process ever holds more than two processes' pairs.
Window.     Only as many rounds as it reaches back; where that is one, only its last W - 1 pairs are sent.
Fading.     Ages are of the process's own tokens. Between a query and a pair d processes before lie the decays of all
            processes between: offset_d.

The last process has the most to compare, (2 R - 1) / R times the average: tokens stay in their order, which other
layers want.

Shapes: as in pairs.py; S = T pairs a process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels import attention as kernels
from models.parts.precision import wide, working_dtype
from models.regression.local.pairs import Pairs, View, by_head

NOTHING = -1e30  # the logarithm of a sum of no weights

Block = list[Tensor]  # k, v and, where weights fade, age


class Ring:
    """This process's place among those that share its sequences, in the order of their ranks. group: theirs."""

    def __init__(self, group: Any, size: int, place: int) -> None:
        self.group, self.size, self.place, self.met = group, size, place, False

    def exchange(self, send: Sequence[tuple[Tensor, int]], receive: Sequence[tuple[Tensor, int]]) -> list[Any]:
        """Begins to send and to receive tensors, all at a time, each with a place; what is to be waited for."""
        ops = [dist.P2POp(dist.isend, x, group=self.group, group_peer=place) for x, place in send]
        ops += [dist.P2POp(dist.irecv, x, group=self.group, group_peer=place) for x, place in receive]
        return dist.batch_isend_irecv(ops) if ops else []

    def step(self, held: Block | None, like: Block, d: int) -> tuple[Block | None, list[Any]]:
        """What this process holds in round d - 1 goes on, and what it holds in round d comes."""
        here, coming = self.place, None
        if here >= d:
            coming = [torch.empty_like(x) for x in like]
        on = held if held is not None and here + 1 < self.size else []
        return coming, self.exchange([(x, here + 1) for x in on], [(x, here - 1) for x in coming or []])

    def meet(self, device: torch.device) -> None:
        """NCCL wants all processes of a group in its first call."""
        if not self.met:
            self.add_up(torch.zeros((), device=device))
            self.met = True

    def add_up(self, x: Tensor) -> None:
        """Over all processes, in place."""
        dist.all_reduce(x, group=self.group)

    def gather(self, x: Tensor) -> list[Tensor]:
        """Of each process."""
        each = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(each, x.contiguous(), group=self.group)
        return each


def wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()


def starts(position: Tensor, segments: Tensor | None, T: int) -> Tensor | None:
    """View.start [B, T], counted from the first pair of this process: below 0 where the document is older."""
    if segments is None:
        return None
    begins = torch.cat([torch.ones_like(segments[:, :1], dtype=torch.bool), segments[:, 1:] != segments[:, :-1]], 1)
    index = torch.arange(T, device=segments.device)
    return torch.where(begins, index - position.unsqueeze(1) * (index == 0), -(2**30)).cummax(1).values


@torch.compiler.disable
def ring_softmax(q: Tensor, pairs: Pairs, beta: Tensor, view: View, block: int, triton: bool) -> Tensor:
    """o [B, T, H, V]. q [B, T, H, K] and pairs of this process; view: of these, its start as `starts` has it; block:
    queries at a time without the kernels."""
    kind, ring, offsets = q.device.type, view.ring, None
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and triton else pairs.v.dtype
    q, k, v = (x.to(dtype) for x in (q * beta.to(q.dtype).unsqueeze(-1), *pairs[:2]))
    if pairs.age is not None:
        offsets = _Offsets.apply(pairs.age[:, -1], ring)
    return _RingSoftmax.apply(_Call(ring, view.start, view.window, block, triton), q, k, v, pairs.age, offsets)


class _Offsets(torch.autograd.Function):
    """Of age [B, H] at each process's last token, the sum over the d processes before this one: [R, B, H] for all d.
    Nothing is summed over processes that are not there: those rounds are none."""

    @staticmethod
    def forward(ctx: Any, last: Tensor, ring: Ring) -> Tensor:
        ctx.ring, each = ring, ring.gather(last.contiguous())
        before = [torch.zeros_like(last), *reversed(each[: ring.place])]
        before += [torch.zeros_like(last)] * (ring.size - len(before))
        return torch.stack(before).cumsum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ring = ctx.ring
        each = torch.zeros_like(gradient)  # by the last age of each process
        for d in range(1, ring.place + 1):
            each[ring.place - d] = gradient[d : ring.place + 1].sum(0)
        ring.add_up(each)
        return each[ring.place], None


class _Call(NamedTuple):
    ring: Ring
    start: Tensor | None
    window: int | None
    block: int
    triton: bool

    def rounds(self, S: int) -> int:
        """After the first, in which a process meets its own pairs."""
        last = self.ring.size - 1
        return last if self.window is None else min(last, -(-(self.window - 1) // S))

    def sent(self, S: int) -> int:
        """How many of its pairs a process sends: the last ones."""
        return min(S, self.window - 1) if self.window is not None and self.rounds(S) == 1 else S

    def view(self, d: int, S: int) -> View:
        """Of the pairs of round d."""
        past = 0 if d == 0 else self.sent(S) + (d - 1) * S
        return View(past, None if self.start is None else self.start + past, self.window)


class _RingSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> Tensor:
        q, k, v, age, offsets = tensors
        S, dtype = q.shape[1], working_dtype(q)
        o, L = q.new_zeros(()), None
        for d, block in _rounds(call, k, v, age):
            if block is None:
                continue
            found, level = _forward(call, call.view(d, S), q, block, _ages(age, offsets, d))
            if L is None:
                o, L = found.to(dtype), level
                continue
            both = torch.logaddexp(L, level)
            o = o * (L - both).exp().unsqueeze(-1) + found * (level - both).exp().unsqueeze(-1)
            L = both
        o = o.to(v.dtype)
        ctx.call = call
        ctx.save_for_backward(q, k, v, age, offsets, o, L)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        q, k, v, age, offsets, o, L = ctx.saved_tensors
        call, S, do = ctx.call, q.shape[1], do.contiguous()
        ring, dtype, rounds, sent = call.ring, working_dtype(q), call.rounds(S), call.sent(S)
        dq = torch.zeros_like(q, dtype=dtype)
        d_offsets = None if offsets is None else torch.zeros_like(offsets)
        own: Block = []
        before: Block | None = None  # gradients of the pairs that are met, from the processes that met them before
        for d, block in _rounds(call, k, v, age):
            found: Block = []
            if block is not None:
                ages = _ages(age, offsets, d)
                more, *found = _backward(call, call.view(d, S), q, block, ages, do, o, L)
                dq += more
                if d_offsets is not None:
                    d_offsets[d] -= found[2].sum(1)
            if d == 0:
                own = found
                continue
            if before is not None:
                found = [x + y for x, y in zip(found, before, strict=True)]
            at_end = ring.place == ring.size - 1 or d == rounds
            send = [(x.contiguous(), ring.place - d if at_end else ring.place + 1) for x in found]
            like = [x[:, :sent] for x in own]
            goes_on = d < rounds and ring.place > d
            before = [x.new_empty(x.shape) for x in like] if goes_on else None
            home = [x.new_empty(x.shape) for x in like] if min(ring.size - 1 - ring.place, rounds) == d else []
            come = [(x, ring.place - 1) for x in before or []] + [(x, ring.place + d) for x in home]
            wait(ring.exchange(send, come))
            for x, y in zip(own, home, strict=False):
                x[:, S - sent :] += y
        dk, dv = (x.to(y.dtype) for x, y in zip(own, (k, v), strict=False))
        return None, dq.to(q.dtype), dk, dv, own[2] if age is not None else None, d_offsets


def _rounds(call: _Call, k: Tensor, v: Tensor, age: Tensor | None) -> Iterator[tuple[int, Block | None]]:
    """Round by round the pairs that are met, None where there are none; while they are used, the next ones come."""
    ring, S = call.ring, k.shape[1]
    own = [x for x in (k, v, age) if x is not None]
    held: Block | None
    held = like = [x[:, S - call.sent(S) :].contiguous() for x in own]
    for d in range(call.rounds(S) + 1):
        coming, works = ring.step(held, like, d + 1) if d < call.rounds(S) else (None, [])
        yield d, own if d == 0 else held
        wait(works)
        held = coming


def _ages(age: Tensor | None, offsets: Tensor | None, d: int) -> Tensor | None:
    """Of the queries, as the pairs of round d count it, [B, T, H]."""
    return None if age is None or offsets is None else age + offsets[d].unsqueeze(1)


def _hidden(view: View, S: int, T: int, device: torch.device) -> Tensor:
    """Which queries see none of S pairs: bool [B or 1, T]."""
    low = torch.arange(T, device=device).unsqueeze(0) + view.past + 1
    low = torch.zeros_like(low) if view.window is None else low - view.window
    return (low if view.start is None else torch.maximum(low, view.start)) >= S


def _forward(call: _Call, view: View, q: Tensor, block: Block, ages: Tensor | None) -> tuple[Tensor, Tensor]:
    """o_d [B, T, H, V] and L_d [B, T, H]."""
    (T, H), (k, v), S = q.shape[1:3], block[:2], block[0].shape[1]
    if call.triton:
        start = None if view.start is None else view.start.expand(len(q), -1)
        o, level = kernels.attention(q, k, v, start, view.past, view.window, block[2] if ages is not None else None)
        hidden = _hidden(view, S, T, q.device).unsqueeze(-1)
        if view.past:
            level = level if ages is None else level + (block[2][:, -1:] - ages).to(level.dtype)
            level = level.masked_fill(hidden, NOTHING)
        return o, level
    dtype, found = working_dtype(q), []
    keys, values = by_head(k, H, dtype), by_head(v, H, dtype)
    for _, logits in _logits(call, view, q, keys, block, ages):
        level = logits.logsumexp(-1, keepdim=True)
        found.append(torch.cat([(logits - level).exp() @ values, level], dim=-1).transpose(1, 2))
    o = torch.cat(found, dim=1)
    return o[..., :-1], o[..., -1]


def _logits(
    call: _Call, view: View, q: Tensor, keys: Tensor, block: Block, ages: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """[B, H, block, S] for a block of queries after the other, NOTHING where a pair is not seen."""
    (T, H), S = q.shape[1:3], keys.shape[2]
    for begin in range(0, T, call.block):
        queries = slice(begin, min(begin + call.block, T))
        logits = by_head(q[:, queries], H, keys.dtype) @ keys.mT
        if ages is not None:
            logits = logits + (block[2].permute(0, 2, 1).unsqueeze(2) - ages[:, queries].mT.unsqueeze(3)).to(keys.dtype)
        visible = view.visible(queries, slice(0, S), q.device).unsqueeze(1)
        yield queries, logits.masked_fill(~visible, NOTHING)


def _backward(
    call: _Call, view: View, q: Tensor, block: Block, ages: Tensor | None, do: Tensor, o: Tensor, L: Tensor
) -> list[Tensor]:
    """The gradients that a round gives, by q, k, v and, where weights fade, the pairs' age."""
    (B, _, H), (k, v), S, dtype = q.shape[:3], block[:2], block[0].shape[1], working_dtype(q)
    if call.triton:
        return _backward_kernels(view, q, block, ages, do, o, L)
    keys, values = by_head(k, H, dtype), by_head(v, H, dtype)
    delta = (do.to(dtype) * o.to(dtype)).sum(-1, keepdim=True).transpose(1, 2)
    do, level = do.to(dtype).transpose(1, 2), L.mT.unsqueeze(-1)
    dq, dk, dv = [], torch.zeros_like(keys), torch.zeros_like(values)
    d_age = keys.new_zeros(B, H, S)
    for queries, logits in _logits(call, view, q, keys, block, ages):
        p = (logits - level[:, :, queries]).exp()
        ds = p * (do[:, :, queries] @ values.mT - delta[:, :, queries])
        dv += p.mT @ do[:, :, queries]
        dk += ds.mT @ by_head(q[:, queries], H, dtype)
        dq.append(ds @ keys)
        d_age += ds.sum(2)
    of_pairs = [_of_groups(x.transpose(1, 2), k.shape[2]) for x in (dk, dv)]
    faded = [] if ages is None else [d_age.mT.to(block[2].dtype)]
    return [torch.cat(dq, dim=2).transpose(1, 2), *of_pairs, *faded]


def _backward_kernels(
    view: View, q: Tensor, block: Block, ages: Tensor | None, do: Tensor, o: Tensor, L: Tensor
) -> list[Tensor]:
    """A query that sees none of the pairs uses the last one in the kernels: with a weight of exp(-1e30)."""
    (k, v), (B, T, H), S, age = block[:2], q.shape[:3], block[0].shape[1], None
    G = k.shape[2]
    if ages is not None:
        age = block[2].float().transpose(1, 2).contiguous()
        k, v = (x.repeat_interleave(H // G, dim=2) for x in (k, v))
    if view.past:
        L = L if ages is None else L - (block[2][:, -1:] - ages).to(L.dtype)
        L = L.masked_fill(_hidden(view, S, T, q.device).unsqueeze(-1), -NOTHING)
    start = None if view.start is None else view.start.expand(B, -1).to(torch.int32).contiguous()
    level = (L / math.log(2)).transpose(1, 2).contiguous()
    given = q, k, v, age, start, o, level, view.past, view.window
    dq, dk, dv, d_age = kernels.backward(do, torch.zeros_like(level), *given)
    of_pairs = [_of_groups(wide(x), G) for x in (dk, dv)]
    return [wide(dq), *of_pairs, *([] if ages is None else [d_age.mT.to(block[2].dtype)])]


def _of_groups(x: Tensor, G: int) -> Tensor:
    """[B, S, H, *] to [B, S, G, *]: the sum over the query heads of each key-value head."""
    return x if x.shape[2] == G else x.unflatten(2, (G, -1)).sum(3)
