"""Deep memories in PyTorch: rules.py over the tokens of a call, one after another or in chunks.

Shapes: B batch, T tokens, H heads, K and V widths of keys and values, C tokens of a chunk, rows = B H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.parts.precision import working_dtype
from models.regression.chunks import from_chunks, into_chunks, short
from models.regression.deep.rules import Chunk, Fitted, Fixed, Flag, Gates, Rule, Start, each, where
from models.regression.deep.slots import in_turn, lay_out, scan
from models.regression.deep.windows import in_slots
from models.regression.documents import positions
from models.regression.linear.mixtures import product


class State(NamedTuple):
    """fitted: [B, H, *, *]. phase [B]: how many tokens the mini-batch has, 0 where the next token begins one. pairs:
    keys and values of a window (windows.py), [B, c - 1, H, *].
    """

    fitted: Fitted
    phase: Tensor
    pairs: tuple[Tensor, ...] = ()


class Call(NamedTuple):
    """What a form computes with.

    q, k: [B, T, H, K].  v: [B, T, H, V].  grad_batch: b, the tokens of a mini-batch.  segments: [B, T], documents.
    """

    start: Start
    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    state: State | None = None
    grad_batch: int = 64
    segments: Tensor | None = None


@torch.compiler.disable  # it compiles its own step; and how many slots documents fill depends on the data
def deep_memory(
    rule: Rule, call: Call, chunk: int | None = None, remat: int = 0, compiled: bool = False
) -> tuple[Tensor, State]:
    """The rule, token by token: the definition. Or by its dual form, `chunk` tokens at a time, or a mini-batch if that
    is shorter. T need not be a multiple of anything. remat: as in slots.scan.  compiled: chunks by torch.compile.

    Returns o [B, T, H, V] in the dtype of v, and the state after the last token. The definition is computed in float32
    at least; a chunk's products in the dtype of q, k and v, and its coefficients and weights in float32 at least.
    """
    start, q, k, v, gates, state, grad_batch, segments = call
    (B, T, H), dtype, dual = k.shape[:3], working_dtype(q, k, v), chunk is not None
    size, products = 1, dtype
    if chunk is not None:
        size = min(short(chunk, T), grad_batch)
        size = -(-grad_batch // -(-grad_batch // size)) if size < grad_batch and size < T else size
        products = torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype))
    phase = None if state is None else state.phase
    slots = lay_out(k, size, grad_batch, phase, segments, rule.at_once if compiled else 1)

    def columns(x: Tensor | None) -> Sequence[Any]:
        return [None] * slots.num if x is None else x.unflatten(0, (slots.num, B * H)).unbind()

    with torch.autocast(q.device.type, enabled=False):
        pairs = [into_chunks(slots.fill(x), size, products) for x in (q, k, v)]
        told = rule.tokens(gates, positions(k, phase, segments)[0] % grad_batch)
        given: Any = tuple(None if x is None else into_chunks(slots.fill(x), size, dtype) for x in told)
        tails: tuple[Tensor, ...] = ()
        fixed = of_rows(rule, start, B, dtype)
        fitted = fixed.first if state is None else each(lambda x: x.to(dtype).flatten(0, 1), state.fitted)
        steps: Any = partial(in_turn, partial(advance, rule, dual))
        if dual:
            given, steps = rule.weigh(*given), compiled_steps(rule) if compiled else steps
            fitted, fixed = rule.enter(fitted, fixed.base), Fixed(rule.enter(fixed.first, fixed.base), *fixed[1:])
            fitted = each(partial(_Later.apply, v), fitted) if compiled else fitted
        if gates.window is not None:
            seen = () if state is None else state.pairs
            before, band, tails = in_slots(slots, k, v, gates.window, seen, segments, (products, dtype))
            pairs[1:] = [torch.cat(x, dim=1) for x in zip(before, pairs[1:], strict=True)]
            given = rule.of_window(band, given, dual)
        # a chunk as long as a mini-batch begins one, but for the first of a call
        opens = slots.batch if rule.refers or size < grad_batch or state is not None else None
        flags = (slots.document, opens, slots.ends if rule.closes or not dual else None)
        rows = (slots.flags(x, H, alike=compiled) for x in flags)
        inputs = zip([fixed] * slots.num, *rows, *map(columns, (*pairs, *given)), strict=True)
        outputs, fitted = scan(steps, fitted, list(inputs), remat, rule.at_once)
        fitted = rule.leave(fitted, fixed.base) if dual else fitted
    o = from_chunks(torch.cat(outputs), (B, T if slots.place is None else slots.num * size, H))
    return slots.empty(o).to(v.dtype), State(each(lambda x: x.unflatten(0, (B, H)), fitted), slots.phase, tails)


def of_rows(rule: Rule, start: Start, B: int, dtype: torch.dtype) -> Fixed:
    """For the rows of B sequences."""
    base, norm = (tuple(x.to(dtype).repeat(B, 1, 1) for x in part) for part in (start.weights, start.norm))
    first = each(lambda x: x.flatten(0, 1), rule.begin(start, B, dtype))
    return Fixed(first, () if start.fades else rule.kept(base), norm)


def advance(
    rule: Rule,
    dual: bool,
    fitted: Fitted,
    fixed: Fixed,
    begins: Flag | None,
    opens: Tensor | None,
    ends: Flag | Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *given: Any,
) -> tuple[Tensor, Fitted]:
    """One chunk by its dual form, or one token by the definition: o [rows, C, V], and what the next begins with.

    begins, opens, ends: whether it begins another document (None: nowhere) and a mini-batch (None: everywhere), and
    whether a mini-batch is over with it. given: what the rule weighs the chunk by, or what its token says.
    """
    if begins is not None:
        fitted = where(begins, fixed.first, fitted)
    R = rule.leave(fitted, fixed.base).weights if dual else fitted.weights
    if rule.refers:
        R = R if opens is None else where(~opens, fitted.references, R)
        fitted = Fitted(fitted.weights, fitted.sums, R)
    at = [r.to(q.dtype) for r in rule.at(R, fixed)]
    pairs = list(zip(*rule.network.errors(at, k, v, fixed.norm), strict=True))
    chunk = Chunk(fitted, fixed, pairs, opens, ends, given)
    if dual:
        return rule.network.read(rule.products(chunk), q, fixed.norm), rule.carry(chunk)
    weights, fitted = rule.learn(chunk)
    return rule.network.read([partial(product, y=w) for w in weights], q, fixed.norm), fitted


class _Later(torch.autograd.Function):
    """x, as what the chunks after the first ones begin with: a tensor of its own, and with a gradient where v has one.
    Else the first chunks would be compiled apart from the others."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[None, Tensor]:
        return None, dx


@cache
def compiled_steps(rule: Rule) -> Callable[..., tuple[list[Tensor], Fitted]]:
    """Some chunks in turn, by torch.compile. (Dynamo of torch 2.11 stumbles over a named tuple's _replace.)"""

    def steps(fitted: Fitted, inputs: Sequence[Sequence[Any]]) -> tuple[list[Tensor], Fitted]:
        return in_turn(partial(advance, rule, True), fitted, inputs)

    return torch.compile(steps, dynamic=False)
