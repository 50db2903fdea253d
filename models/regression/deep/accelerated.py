"""Deep memories by our kernels: for the recipes that those declare, what forms.deep_memory does.

models/kernels/deep has the rule Online, a document of a head for every program. A document begins with the start
whatever came before it, so that none waits for another of its row. Mini-batches lie in slots (slots.py) of their own
size, and every slot but the first of a call begins one; that one takes its gradients at the references of the state.

models/kernels/ttt has the rule Averaged, a head of a row for every program, and mini-batches that begin in the call.
What a state has of an unfinished one before them, and what is left of one after them, is computed in PyTorch.

Shapes: B batch, T tokens, H heads, P documents, N slots or mini-batches, b tokens of a mini-batch; weights are packed
as the kernels have them, PAIR numbers, and with sums SIZE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import ttt as averaged
from models.kernels.deep import Scan, deep_scan
from models.regression.deep.forms import Call, State, deep_memory
from models.regression.deep.rules import Averaged, Fitted, Online, Weights, where
from models.regression.deep.slots import Slots, lay_out
from models.regression.documents import positions


class Documents(NamedTuple):
    """runs [P, 4]: of every document its row, its first slot, the one after its last, and the last that has tokens.
    last [B]: which is the last one of each row.
    """

    runs: Tensor
    last: Tensor


def documents(slots: Slots, B: int, device: torch.device) -> Documents:
    """The documents of B rows, in order. What a row has of empty slots belongs to its last one."""
    N, rows = slots.num, torch.arange(B, device=device)
    full = torch.full_like(rows, N)
    final = full - 1 if slots.place is None else slots.place[:, -1] // slots.size
    if slots.document is None:
        return Documents(torch.stack([rows, torch.zeros_like(rows), full, final], dim=1).int(), rows)
    begins = slots.document.T.clone()
    begins[:, 0] = True
    row, first = begins.nonzero().unbind(1)
    ends = row != row.roll(-1)
    ends[-1] = True
    until = torch.where(ends, N, first.roll(-1))
    runs = torch.stack([row, first, until, torch.minimum(until - 1, final[row])], dim=1)
    return Documents(runs.int(), ends.nonzero().squeeze(1))


def pack(weights: Sequence[Tensor]) -> Tensor:
    """[*, in, out] of the layers to [*, PAIR]."""
    return torch.cat([w.flatten(-2) for w in weights], dim=-1)


def unpack(x: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The way back, to the widths of these [*, in, out]."""
    shapes = [w.shape[-2:] for w in like]
    parts = x.split([n * m for n, m in shapes], dim=-1)
    return tuple(part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True))


@torch.compiler.disable  # how many documents there are depends on the data
def kernel_online(rule: Online, call: Call) -> tuple[Tensor, State]:
    """Results as of deep_memory."""
    start, q, k, v, gates, state, C, segments = call
    (B, T, H), dtype = k.shape[:3], torch.float32
    slots = lay_out(k, C, C, None if state is None else state.phase, segments)
    runs, last_run = documents(slots, B, k.device)
    products = torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype))

    def places(x: Tensor | None) -> Tensor | None:
        """[B, N C, ...] of tokens [B, T, ...], zeros where none is."""
        if x is None:
            return None
        x = slots.fill(x)
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, slots.num * C - x.shape[1]))

    with torch.autocast(q.device.type, enabled=False):
        filled = None if slots.place is None and slots.num * C == T else places(k.new_ones(B, T))
        given = [places(x) for x in (q.to(products), k.to(products), v.to(products), *gates[:3])]

        first = pack([w.to(dtype) for w in start.weights])
        base = torch.zeros_like(first) if start.fades else first
        momenta = [torch.zeros_like(first)] if rule.momentum else []
        begin, reference = torch.cat([first - base, *momenta], dim=-1).expand(len(runs), -1, -1), None
        if state is not None:
            M, S, R = ([pack([w.to(dtype) for w in part])] if part else [] for part in state.fitted[:3])
            goes_on = torch.cat([M[0] - base, *S], dim=-1)[runs[:, 0]]
            begin = torch.where((runs[:, 1] == 0).view(-1, 1, 1), goes_on, begin)
            reference = torch.where((state.phase == 0).view(-1, 1, 1), M[0], R[0])
        weights = (begin.flatten(0, 1), None if start.fades else base)
        handed = None if reference is None else reference.flatten(0, 1)
        o, last, held = deep_scan(Scan._make((*given, *weights, handed, filled, runs)), C)

        last, held = (x.unflatten(0, (-1, H))[last_run] for x in (last, held))
        fading, sums = last[..., : base.shape[-1]], last[..., base.shape[-1] :]
        held = held + base
        if reference is not None:
            held = torch.where((runs[last_run, 3] == 0).view(-1, 1, 1), reference, held)
        parts = [unpack(x, start.weights) if x.shape[-1] else () for x in (fading + base, sums, held)]
    o = o[:, :T] if slots.place is None else slots.empty(o)
    return o.to(v.dtype), State(Fitted(parts[0], parts[1], parts[2]), slots.phase)


def kernel_averaged(rule: Averaged, call: Call) -> tuple[Tensor, State]:
    """Results as of deep_memory."""
    start, q, k, v, gates, state, b, segments = call
    T = k.shape[1]
    position, begins = positions(k, None if state is None else state.phase, segments)
    opens = position % b == 0
    batches = None if len(start.weights) == 1 else _mini_batches(call, opens, begins)
    learned = pack([w.float() for w in start.weights])
    fitted = rule.begin(start, len(k), torch.float32)
    init = None
    if state is not None:
        mine, few = opens.cumsum(1) == 0, slice(min(b - 1, T))  # tokens of the mini-batch that the state has begun
        only = gates._replace(step_size=(gates.step_size * mine.unsqueeze(-1))[:, few])
        before, (fitted, *_) = deep_memory(rule, Call(start, q[:, few], k[:, few], v[:, few], only, state, b), chunk=b)
        init = pack(fitted.weights)
    scale, shift = (x.squeeze(1) for x in start.norm)
    given = (q, k, v, gates.step_size, gates.share, learned, scale, shift, init, position, batches)
    o, last = averaged.scan(*given, segments is not None)
    if state is not None:
        o = torch.where(mine[..., None, None], F.pad(before, (0, 0, 0, 0, 0, T - before.shape[1])), o)
    weights, sums = unpack(last, start.weights), fitted.sums
    if segments is not None or state is not None or T % b:
        sums = _unfinished(rule, call, weights, position, opens, sums)
    return o.to(v.dtype), State(Fitted(weights, sums), (position[:, -1] + 1) % b)


def _mini_batches(call: Call, opens: Tensor, begins: Tensor) -> tuple[Tensor, Tensor | None]:
    """The first tokens [B, N + 1] of the mini-batches, T beyond the last one, and which of them begin a document [B,
    N], None without documents. opens, begins [B, T]: which tokens begin a mini-batch, and a document."""
    (B, T), b, state = opens.shape, call.grad_batch, call.state
    index = torch.arange(T, device=opens.device)
    if call.segments is not None:  # there may be as many as tokens, and to count them a GPU would have to wait
        place = torch.where(opens, opens.cumsum(1) - 1, T + 1)  # the last one for what begins none
        first = index.new_full((B, T + 2), T).scatter(1, place, index.expand(B, T))[:, :-1]
        return first, begins.gather(1, first[:, :-1].clamp(max=T - 1)) & (first[:, :-1] < T)
    first = index.new_zeros(B, 1) if state is None else (-state.phase % b).unsqueeze(1)
    return (first + b * torch.arange(-(-T // b) + 1, device=opens.device)).clamp(max=T), None


def _unfinished(
    rule: Averaged, call: Call, weights: Weights, position: Tensor, opens: Tensor, sums: Weights
) -> Weights:
    """S of every row's last mini-batch: of the tokens since it began, or nothing if it is over; `sums` where an earlier
    call has begun it."""
    start, _, k, v, gates, *_ = call
    T, b = k.shape[1], call.grad_batch
    index = (T - 1 - position[:, -1:] % b) + torch.arange(b, device=k.device)
    real = (index < T) & (position[:, -1:] % b < b - 1)
    places = index.clamp(0, T - 1)[..., None, None]
    with torch.autocast(k.device.type, enabled=False):
        key, value = (x.gather(1, places.expand(-1, -1, *x.shape[2:])).float().transpose(1, 2) for x in (k, v))
        theta = gates.step_size.float().gather(1, places.squeeze(-1).expand(-1, -1, k.shape[2])) * real.unsqueeze(-1)
        pairs = zip(*rule.network.errors(weights, key, value, [x.float() for x in start.norm]), strict=True)
        found = tuple((theta.mT.unsqueeze(-1) * x).mT @ e for x, e in pairs)
    return where(opens.any(1).view(-1, 1, 1, 1), found, sums)
