"""Deep memories by models/kernels/deep: what mlp.chunked_deep does, a document of a head for every program.

A document begins with the start whatever came before it, so that none waits for another of its row. Mini-batches lie in
slots (slots.py) of their own size, and every slot but the first of a call begins one; that one takes its gradients at
the references of the state.

Shapes: B batch, T tokens, H heads, P documents, N slots; weights are packed as in models/kernels/deep, PAIR numbers,
and with momenta SIZE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.deep import Scan, deep_scan
from models.regression.deep.chunks import Start, State
from models.regression.deep.slots import Slots, lay_out


class Documents(NamedTuple):
    """runs [P, 4]: of every document its row, its first slot, the one after its last, and the last that has tokens.
    last [B]: which is the last one of each row.
    """

    runs: Tensor
    last: Tensor


def documents(slots: Slots, B: int, device: torch.device) -> Documents:
    """The documents of B rows, in order. What a row has of empty slots belongs to its last one."""
    N, rows = slots.count, torch.arange(B, device=device)
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
def kernel_deep(
    start: Start,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_momentum: Tensor | None,
    log_decay: Tensor | None = None,
    state: State | None = None,
    grad_batch: int = 64,
    segments: Tensor | None = None,
) -> tuple[Tensor, State]:
    """The map of a network of two layers, silu and the loss l2, with limited steps. Arguments and results as in
    mlp.recurrent_deep; mini-batches and widths as models/kernels/deep has them.
    """
    (B, T, H), C, dtype = k.shape[:3], grad_batch, torch.float32
    slots = lay_out(k, C, C, None if state is None else state.phase, segments)
    runs, last_run = documents(slots, B, k.device)
    products = torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype))

    def places(x: Tensor | None) -> Tensor | None:
        """[B, N C, ...] of tokens [B, T, ...], zeros where none is."""
        if x is None:
            return None
        x = slots.fill(x)
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, slots.count * C - x.shape[1]))

    with torch.autocast(q.device.type, enabled=False):
        filled = None if slots.place is None and slots.count * C == T else places(k.new_ones(B, T))
        given = [
            places(x) for x in (q.to(products), k.to(products), v.to(products), step_size, log_momentum, log_decay)
        ]

        first = pack([w.to(dtype) for w in start.weights])
        base = torch.zeros_like(first) if start.fades else first
        momenta = [] if log_momentum is None else [torch.zeros_like(first)]
        begin, reference = torch.cat([first - base, *momenta], dim=-1).expand(len(runs), -1, -1), None
        if state is not None:
            M, S, R = (pack([w.to(dtype) for w in part]) if part else None for part in state[:3])
            goes_on = torch.cat([M - base, *([] if S is None else [S])], dim=-1)[runs[:, 0]]
            begin = torch.where((runs[:, 1] == 0).view(-1, 1, 1), goes_on, begin)
            reference = torch.where((state.phase == 0).view(-1, 1, 1), M, R)
        weights = (begin.flatten(0, 1), None if start.fades else base)
        handed = None if reference is None else reference.flatten(0, 1)
        o, last, held = deep_scan(Scan(*given, *weights, handed, filled, runs), C)

        last, held = (x.unflatten(0, (-1, H))[last_run] for x in (last, held))
        M, S = last[..., : base.shape[-1]] + base, last[..., base.shape[-1] :]
        R = held + base
        if reference is not None:
            R = torch.where((runs[last_run, 3] == 0).view(-1, 1, 1), reference, R)
        parts = (unpack(x, start.weights) if x.shape[-1] else () for x in (M, S, R))
    o = o[:, :T] if slots.place is None else slots.empty(o)
    named = dict(zip(("weights", "momenta", "references"), parts, strict=True))
    return o.to(v.dtype), start.state(state, B, dtype, log_momentum is not None)._replace(**named, phase=slots.phase)
