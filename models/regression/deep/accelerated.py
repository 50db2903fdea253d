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

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import ttt as averaged
from models.kernels.deep import Scan, deep_scan
from models.regression.deep.forms import Call, State, deep_memory
from models.regression.deep.rules import Averaged, Fitted, Online, Weights, where
from models.regression.documents import positions


class Layout(NamedTuple):
    """The mini-batches of B rows, one after another, as models/kernels/deep/arguments.py has them.

    slots [L, 3]: of each its first token, of the B T of all rows, how many there are, and the row that begins with it
    or -1. runs [P, 4]: of every document its row, its first slot, the one after its last, and whether it ends the row;
    long documents come first, so that none is left when all others are done. place [B T]: of each token, among the L C
    of all slots; None where token t has place t. phase [B]: of the state after the call.
    """

    slots: Tensor
    runs: Tensor
    place: Tensor | None
    phase: Tensor

    def fill(self, x: Tensor | None, size: int) -> Tensor | None:
        """[B, T, H] of tokens to [1, L C, H] of places, zeros in the empty ones."""
        if x is None or self.place is None:
            return x if x is None else x.flatten(0, 1).unsqueeze(0)
        return x.new_zeros(len(self.slots) * size, x.shape[-1]).index_copy(0, self.place, x.flatten(0, 1)).unsqueeze(0)


def lay_out(tokens: Tensor, C: int, phase: Tensor | None = None, segments: Tensor | None = None) -> Layout:
    """Of tokens [B, T, ...], for mini-batches of C."""
    (B, T), device = tokens.shape[:2], tokens.device
    row, index = torch.arange(B, device=device), torch.arange(B * T, device=device)
    if phase is None and segments is None:
        N = -(-T // C)
        first = (row.unsqueeze(1) * T + C * torch.arange(N, device=device)).flatten()
        count = (T - first % T).clamp(max=C)
        runs = torch.stack([row, N * row, N * (row + 1), torch.ones_like(row)], dim=1)
        place = None if T % C == 0 else index + index // T * (N * C - T)
        end = torch.full_like(row, T % C)
        return Layout(_slots(first, count, T), runs.int(), place, end)
    position, document = positions(tokens, phase, segments)
    within = position % C
    begins = document.clone()
    begins[:, 0] = True
    opens = ((within == 0) | begins).flatten()
    slot = opens.cumsum(0) - 1
    first = opens.nonzero().squeeze(1)
    count = torch.diff(first, append=first.new_full((1,), B * T))
    token = begins.flatten().nonzero().squeeze(1)
    until = slot[torch.cat([token[1:], token.new_full((1,), B * T)]) - 1] + 1
    of_row = token // T
    ends = torch.cat([of_row[1:], of_row.new_full((1,), B)]) != of_row
    runs = torch.stack([of_row, slot[token], until, ends], dim=1)
    runs = runs[(runs[:, 2] - runs[:, 1]).argsort(descending=True, stable=True)]
    place = slot * C + index - first[slot]
    return Layout(_slots(first, count, T), runs.int(), place, (within[:, -1] + 1) % C)


class _Known(NamedTuple):
    segments: weakref.ref[Tensor]
    version: int
    size: int
    layout: Layout


_KNOWN: list[_Known] = []  # the last one


def layout_of(tokens: Tensor, C: int, phase: Tensor | None, segments: Tensor | None) -> Layout:
    """lay_out, once for all layers, which are given the same documents: a GPU waits while they are counted."""
    if segments is None or phase is not None or torch.is_inference_mode_enabled() or segments.is_inference():
        return lay_out(tokens, C, phase, segments)
    for known in _KNOWN:
        if known.segments() is segments and (known.version, known.size) == (segments._version, C):
            return known.layout
    layout = lay_out(tokens, C, phase, segments)
    _KNOWN[:] = [_Known(weakref.ref(segments), segments._version, C, layout)]
    return layout


def _slots(first: Tensor, count: Tensor, T: int) -> Tensor:
    row = torch.where(first % T == 0, first // T, -1)
    return torch.stack([first, count, row], dim=1).int()


def pack(weights: Sequence[Tensor]) -> Tensor:
    """[*, in, out] of the layers to [*, PAIR]."""
    return torch.cat([w.flatten(-2) for w in weights], dim=-1)


def unpack(x: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The way back, to the widths of these [*, in, out]."""
    shapes = [w.shape[-2:] for w in like]
    parts = x.split([n * m for n, m in shapes], dim=-1)
    return tuple(part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True))


def _turned(weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """With the first layer turned around, or back again: as kernels/deep has it."""
    return weights[0].mT, *weights[1:]


@torch.compiler.disable  # how many documents there are depends on the data
def kernel_online(rule: Online, call: Call) -> tuple[Tensor, State]:
    """Results as of deep_memory."""
    start, q, k, v, gates, state, C, segments = call
    dtype = torch.float32
    layout = layout_of(k, C, None if state is None else state.phase, segments)
    products = torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype))
    with torch.autocast(q.device.type, enabled=False):
        filled = None
        if layout.place is not None:
            filled = (torch.arange(C, device=k.device) < layout.slots[:, 1:2]).view(1, -1)
        given = [x.to(products) for x in (q, k, v)] + [layout.fill(x, C) for x in gates[:3]]

        weights = pack(_turned([w.to(dtype) for w in start.weights]))
        first, base = (weights, None) if start.fades else (None, weights)
        carried = reference = None
        if state is not None:
            M, S, R = ([pack(_turned([w.to(dtype) for w in part]))] if part else [] for part in state.fitted[:3])
            carried = torch.cat([M[0] if base is None else M[0] - base, *S], dim=-1).flatten(0, 1)
            reference = torch.where((state.phase == 0).view(-1, 1, 1), M[0], R[0]).flatten(0, 1)
        scan = Scan._make((*given, first, carried, base, reference, filled, layout.slots, layout.runs))
        o, last, held = deep_scan(scan, C)

        last, held = (x.unflatten(0, (len(k), -1)) for x in (last, held))
        fading, sums = last[..., : weights.shape[-1]], last[..., weights.shape[-1] :]
        if base is not None:
            fading, held = fading + base, held + base
        if reference is not None:  # of a row that is one mini-batch
            rows = torch.arange(len(k), device=k.device).unsqueeze(1)
            alone = (layout.slots[:, 0] // k.shape[1] == rows).sum(1) == 1
            held = torch.where(alone.view(-1, 1, 1), reference.unflatten(0, (len(k), -1)), held)
        like = _turned(start.weights)
        parts = [_turned(unpack(x, like)) if x.shape[-1] else () for x in (fading, sums, held)]
    return o.to(v.dtype), State(Fitted(parts[0], parts[1], parts[2]), layout.phase)


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
