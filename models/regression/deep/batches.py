"""Deep memories that step at the end of a mini-batch, with any optimiser (optimizers.py).

        D = sum_{i in the mini-batch} theta_i X_i^T E_i ,    M <- W + A (M - W) + r U(D)  at its end,

A the product of its decays and r the sum of its rates. Weights change there only: all tokens of a mini-batch read those
that it began with, o_t = f(q_t), and what one of them writes the others never see. A sequence shorter than a mini-batch
learns nothing. How many tokens are computed at once then makes no difference but of speed; one at a time they are the
definition.

Shapes: as in chunks.py; n of theta 1, or one for each layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.parts.precision import working_dtype
from models.regression.chunks import from_chunks, into_chunks, short
from models.regression.deep.network import Network
from models.regression.deep.optimizers import InnerOptimizer
from models.regression.deep.slots import in_turn, lay_out, scan

Weights = tuple[Tensor, ...]


class Rule(NamedTuple):
    """What there is to say of a memory but its numbers. normed: after every step the columns of M get back the lengths
    that they have at the start.
    """

    network: Network
    optimizer: InnerOptimizer
    normed: bool = False


class Learner(NamedTuple):
    """Of every layer M and D, [*, in, out], and the optimiser's history; sums [*, 1, 3] of the mini-batch's gates. * is
    B, H in a state and rows in the scan.
    """

    weights: Weights
    gradients: Weights
    history: tuple[Weights, ...]
    sums: Tensor


class State(NamedTuple):
    """phase [B]: how many tokens the mini-batch has, 0 where the next token begins one."""

    learner: Learner
    phase: Tensor


class Start(NamedTuple):
    """M at the beginning of a document, and W, or nothing for W = 0: [H, in, out] of every layer. Scale and shift of
    the network's norm [H, 1, V], or nothing.
    """

    weights: Weights
    base: Weights = ()
    norm: Weights = ()


def beginner(rule: Rule, start: Start, B: int, dtype: torch.dtype) -> Learner:
    """What a document begins with, [B, H, *, *]."""
    weights = tuple(w.to(dtype).expand(B, -1, -1, -1) for w in start.weights)
    zeros = [w.new_zeros(w.shape) for w in weights]
    shapes = (rule.optimizer.shapes(*w.shape[2:]) for w in weights)
    history = tuple(
        tuple(zeros[0].new_zeros(B, w.shape[1], *x) for x in each) for w, each in zip(weights, shapes, strict=True)
    )
    return Learner(weights, tuple(zeros), history, zeros[0].new_zeros(B, zeros[0].shape[1], 1, 3))


@torch.compiler.disable  # as chunked_deep
def deep_batches(
    rule: Rule,
    start: Start,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    gates: Tensor,
    state: State | None = None,
    grad_batch: int = 64,
    segments: Tensor | None = None,
    chunk: int = 1,
    remat: int = 0,
    compiled: bool = False,
) -> tuple[Tensor, State]:
    """The rule above, `chunk` tokens at a time; 1 is the definition.

    q, k: [B, T, H, K].  v: [B, T, H, V].  step_size: [B, T, H, n], theta.  gates: [B, T, H, 3], the log decay, the rate
    and the momentum of a token, each summed over its mini-batch.  segments, remat, compiled and the results as in
    chunked_deep. Products are in the dtype of q, k and v, all else in float32 at least.
    """
    (B, T, H), dtype = k.shape[:3], working_dtype(q, k, v)
    if state is None and 1 < T <= grad_batch and torch.is_grad_enabled():
        warnings.warn(
            f"regressor.grad_batch={grad_batch}: a memory that steps at the end of a mini-batch learns nothing from a "
            f"sequence of {T} tokens, and what sets its steps gets no gradient",
            stacklevel=2,
        )
    products = dtype if chunk == 1 else torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype))
    size = 1 if chunk == 1 else min(short(chunk, T), grad_batch)
    slots = lay_out(k, size, grad_batch, None if state is None else state.phase, segments)
    with torch.autocast(q.device.type, enabled=False):
        kinds = ((q, products), (k, products), (v, products), (step_size, dtype), (gates, dtype))
        columns = (
            into_chunks(slots.fill(x), size, kind).unflatten(0, (slots.count, B * H)).unbind() for x, kind in kinds
        )
        first = beginner(rule, start, B, dtype)
        learner = first if state is None else each(lambda x: x.to(dtype), state.learner)
        first, learner = (each(lambda x: x.flatten(0, 1), x) for x in (first, learner))
        base, norm = (tuple(x.to(dtype).repeat(B, 1, 1) for x in part) for part in start[1:])
        step = _compiled(rule) if compiled else partial(advance, rule)
        fixed = [(first, base, norm)] * slots.count
        inputs = zip(fixed, slots.flags(slots.document, H), slots.flags(slots.ends, H), *columns, strict=True)
        outputs, learner = scan(partial(in_turn, step), learner, list(inputs), remat)
    o = from_chunks(torch.cat(outputs), (B, T if slots.place is None else slots.count * size, H))
    return slots.empty(o).to(v.dtype), State(each(lambda x: x.unflatten(0, (B, H)), learner), slots.phase)


def advance(
    rule: Rule,
    learner: Learner,
    fixed: tuple[Learner, Weights, Weights],
    begins: Tensor | None,
    ends: Tensor | bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    gates: Tensor,
) -> tuple[Tensor, Learner]:
    """One chunk: o [rows, C, V], and the learner after it. fixed: what a document begins with, W and the norm. begins,
    ends [rows, 1, 1]: whether it begins another document (None: nowhere), and whether its mini-batch is over with it
    (True, False: for all).
    """
    first, base, norm = fixed
    if begins is not None:
        learner = each(lambda new, now: torch.where(begins, new, now), first, learner)
    weights = [w.to(q.dtype) for w in learner.weights]
    inputs, errors = rule.network.errors(weights, k, v, norm)
    o = rule.network.read([partial(torch.matmul, other=w) for w in weights], q, norm)
    theta = step_size.expand(-1, -1, len(weights)).split(1, dim=-1)
    writes = ((s * x).to(q.dtype).mT @ e for s, x, e in zip(theta, inputs, errors, strict=True))
    gradients = tuple(D + write for D, write in zip(learner.gradients, writes, strict=True))
    learner = learner._replace(gradients=gradients, sums=learner.sums + gates.sum(1, keepdim=True))
    if ends is False:
        return o, learner
    stepped = _step(rule, first.weights, base, learner)
    return o, stepped if ends is True else each(lambda new, now: torch.where(ends, new, now), stepped, learner)


def _step(rule: Rule, first: Weights, base: Weights, learner: Learner) -> Learner:
    """M after the optimiser's step, D and the sums empty again."""
    log_decay, rate, eta = learner.sums.split(1, dim=-1)
    weights, history = [], []
    for i, (w, D) in enumerate(zip(learner.weights, learner.gradients, strict=True)):
        U, remembered = rule.optimizer.direction(D, learner.history[i], eta)
        origin = base[i] if base else 0.0
        w = origin + log_decay.exp() * (w - origin) + rate * U
        if rule.normed:
            w = w * (_lengths(first[i]) / (_lengths(w) + 1e-5))
        weights.append(w)
        history.append(tuple(remembered))
    nothing = tuple(torch.zeros_like(D) for D in learner.gradients)
    return Learner(tuple(weights), nothing, tuple(history), torch.zeros_like(learner.sums))


def _lengths(W: Tensor) -> Tensor:
    return W.norm(dim=-2, keepdim=True)


def forget(rule: Rule, start: Start, state: State, rows: Tensor) -> State:
    """The state with the memories of the given rows (bool [B]) as a document begins with them."""
    first = State(beginner(rule, start, len(rows), state.learner.sums.dtype), torch.zeros_like(state.phase))
    return restart(first, state, rows)


def restart(first: Any, state: Any, rows: Tensor) -> Any:
    """A state, all of whose tensors have a row for each sequence, with some of its rows from another."""
    return each(lambda new, now: torch.where(rows.view(-1, *[1] * (now.ndim - 1)), new, now), first, state)


def flops_of_steps(rule: Rule, weights: Iterable[Tensor], count: int) -> int:
    """Of so many steps, for weights [H, in, out]."""
    return count * sum(len(w) * rule.optimizer.flops(*w.shape[1:]) for w in weights)


def size(rule: Rule, weights: Iterable[Tensor]) -> int:
    """Numbers of a learner, for weights [H, in, out]."""
    return sum(
        3 * len(w) * (i == 0) + 2 * w.numel() + len(w) * sum(n * m for n, m in rule.optimizer.shapes(*w.shape[1:]))
        for i, w in enumerate(weights)
    )


@cache
def _compiled(rule: Rule) -> Callable[..., Any]:
    return torch.compile(partial(advance, rule), dynamic=False)


def each(function: Callable[..., Tensor], *trees: Any) -> Any:
    """The function of every tensor of a tree of (named) tuples, or of those at the same place in several."""
    if isinstance(trees[0], Tensor):
        return function(*trees)
    parts, kind = [each(function, *x) for x in zip(*trees, strict=True)], type(trees[0])
    return kind(*parts) if hasattr(kind, "_fields") else tuple(parts)
