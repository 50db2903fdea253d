"""The pairs themselves: what the regressors share that fit anew for every query.

They keep keys and values instead of a memory, so their state grows with the sequence, and a query may use the pairs of
its own document, up to its own, and of those the last W with a window: an interval that ends at the query. Its start is
all that has to be known, so a mask of T x T never exists, but where a fused kernel asks for one.

Shapes: B batch, T tokens, S pairs (those of the cache in front), H query heads, G key-value heads, K key width, V value
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.parts.precision import sum_dtype, wide, working_dtype
from models.parts.sizes import Sizes
from models.regression.regressor import Regressor, Tokens


class Pairs(NamedTuple):
    """The key-value cache: k [B, S, G, K], v [B, S, G, V]; first [B], the index of the first pair of the present
    document, None for 0; age [B, S, H], the log of what is left of each pair at the last token, None where none fades.
    (Inside a call, at the last token of the call before, or the first of its own document: no output may know of later
    decays. Differences are the same.)
    """

    k: Tensor
    v: Tensor
    first: Tensor | None = None
    age: Tensor | None = None


class Elsewhere(NamedTuple):
    """In the place of a cache: the pairs of the tokens before lie on other processes (ring.py). position [B]: how many
    tokens of its document came before the first of this process."""

    ring: Any
    position: Tensor


class View(NamedTuple):
    """Which pairs the queries of a call may use: query t is pair past + t, and uses those from start [B or 1, T] (None
    for 0) to itself, and itself in any case, the last `window` of them (None for all). ring: of Elsewhere; start is
    then below 0 where the document began on another process.
    """

    past: int = 0
    start: Tensor | None = None
    window: int | None = None
    ring: Any = None

    def visible(self, queries: slice, pairs: slice, device: torch.device) -> Tensor:
        """The mask for some queries and some pairs, bool [B or 1, queries, pairs]."""
        query = torch.arange(queries.start, queries.stop, device=device).unsqueeze(1) + self.past
        pair = torch.arange(pairs.start, pairs.stop, device=device)
        visible = pair <= query
        if self.window is not None:
            visible &= pair > query - self.window
        visible = visible.unsqueeze(0)
        if self.start is None:
            return visible
        return visible & ((pair >= self.start[:, queries].unsqueeze(-1)) | (pair == query))

    def hides(self, T: int) -> bool:
        """Whether a query of T sees other pairs than all up to its own, or the last ones are not all there is to see:
        whether a mask is needed beside the causal one."""
        window = self.window is not None and self.window < self.past + T
        return self.start is not None or (self.past > 0 and T > 1) or window

    def reach(self, queries: slice) -> slice:
        """The pairs among which are all that these queries may use."""
        low = 0 if self.window is None else max(0, self.past + queries.start + 1 - self.window)
        return slice(low, self.past + queries.stop)


Form = Callable[..., Tensor]
Tensors = tuple[Tensor | Any, ...]  # None for what is absent, which the first never is


@torch.compiler.disable
def in_blocks(
    form: Form,
    queries: Tensors,
    pairs: Tensors,
    shared: Tensors,
    view: View,
    block: int,
) -> Tensor:
    """form(visible, *queries, *pairs, *shared) for `block` queries at a time; its results side by side.

    queries [B, H, T, *], pairs [B, H, S, *]; visible [B or 1, 1, block, S]; form returns [B, H, block, V]. A block sees
    only the pairs that it may reach. Nothing of a block outlives it: the backward computes it once more, so that memory
    is linear in T although form compares every query with every pair.
    """
    call = _Call(form, len(queries), len(pairs), view, block)
    if queries[0].shape[2] <= block:
        return call.on(slice(0, queries[0].shape[2]), (*queries, *pairs, *shared))
    return _InBlocks.apply(call, *queries, *pairs, *shared)


class _Call(NamedTuple):
    """What in_blocks was asked, but for the tensors."""

    form: Form
    num_queries: int
    num_pairs: int
    view: View
    block: int

    def spans(self, tensors: Tensors) -> Iterator[slice]:
        T = tensors[0].shape[2]
        return (slice(a, min(a + self.block, T)) for a in range(0, T, self.block))

    def part(self, index: int, span: slice) -> slice:
        """What the queries of a span need of tensor `index`, along its axis 2."""
        if index < self.num_queries:
            return span
        return self.view.reach(span) if index < self.num_queries + self.num_pairs else slice(None)

    def cut(self, span: slice, tensors: Tensors) -> list[Tensor | Any]:
        parts = ((x, self.part(i, span)) for i, x in enumerate(tensors))
        return [x if x is None or part == slice(None) else x[:, :, part] for x, part in parts]

    def on(self, span: slice, tensors: Tensors) -> Tensor:
        return self.compute(span, self.cut(span, tensors))

    def compute(self, span: slice, parts: list[Tensor | Any]) -> Tensor:
        visible = self.view.visible(span, self.view.reach(span), parts[0].device)
        with torch.autocast(parts[0].device.type, enabled=False):
            return self.form(visible.unsqueeze(1), *parts)


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, *tensors: Tensor | None) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return torch.cat([call.on(span, tensors) for span in call.spans(tensors)], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor) -> tuple[Any, ...]:
        call, tensors = ctx.call, ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        gradients: list[Tensor | Any] = [torch.zeros_like(x) if i in wanted else None for i, x in enumerate(tensors)]
        for span in call.spans(tensors):
            with torch.enable_grad():
                parts: list[Tensor | Any] = [None if x is None else x.detach() for x in call.cut(span, tensors)]
                for i in wanted:
                    parts[i].requires_grad_()
                o = call.compute(span, parts)
            found = torch.autograd.grad(o, [parts[i] for i in wanted], do[:, :, span], allow_unused=True)
            for i, gradient in zip(wanted, found, strict=True):
                if gradient is not None:
                    part = call.part(i, span)
                    (gradients[i] if part == slice(None) else gradients[i][:, :, part]).add_(gradient)
        return None, *gradients


def document_starts(
    T: int, past: int, first: Tensor | None, segments: Tensor | None, skipped: int = 0
) -> Tensor | None:
    """View.start: of each of T queries after `past` pairs, the first pair of its document [B, T]; None for all 0.

    first [B]: the first pair of the document that the cache ends with, and the call begins with; None for 0. segments
    [B, T]: the call's documents, or None. skipped: how many pairs later are taken for the first.
    """
    before = None if first is None else first.unsqueeze(1).expand(-1, T)
    if segments is None:
        return before
    index = torch.arange(past, past + T, device=segments.device)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    inside = torch.where(begins, index + skipped, 0).cummax(1).values
    return inside if before is None else torch.maximum(before, inside)


@torch.library.custom_op("test_time_regression::running_sum", mutates_args=())
def running_sum(x: Tensor) -> Tensor:
    """The sum of the tokens up to each, of [B, T, *]. An operator of its own, which a compiler leaves alone: what comes
    before it, with a bias in it, can't be compiled into the sum of more than 128 numbers on a GPU
    (https://github.com/pytorch/pytorch/issues/180221, torch 2.11)."""
    return x.cumsum(1)


@running_sum.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _sum_backward(ctx, gradient: Tensor) -> Tensor:
    return running_sum(gradient.flip(1)).flip(1)


running_sum.register_autograd(_sum_backward)


def faded(log_decay: Tensor, start: Tensor | None, past: int) -> Tensor:
    """Sums of the log decays [B, T, H] of a document's tokens up to each; of the document that goes on from an earlier
    call, those of this call's. start, past: of View.

    In sum_dtype, and each document by itself: a difference of two sums of a whole row would lose the digits that the
    documents before have taken, 1e-3 after 8,192 tokens in float32.
    """
    log_decay = log_decay.to(sum_dtype(log_decay.device))
    total = running_sum(log_decay)
    if start is None:
        return total
    first = (start - past).unsqueeze(-1).expand_as(total)
    before = (total - log_decay).gather(1, first.clamp(0, total.shape[1] - 1))
    return torch.where(first < 0, total, total - before)


def by_head(x: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """[B, S, G, X] to [B, H, S, X], each key-value head for all its query heads."""
    return x.to(dtype).repeat_interleave(num_heads // x.shape[2], dim=2).transpose(1, 2)


class Nonparametric(Regressor):
    """Keeps the pairs and compares every query with them by an inverse temperature beta.

    inverse_temperature: "learned" is one per head, from first_beta: by default sqrt(K), for keys and queries of length
    one; smaller, and the weights are nearly uniform. A positive number is fixed. "scaled" is K^-0.5, for queries and
    keys that have no norm, or with qk_norm=rms as in Qwen3.
    window: how many of the last pairs take part; None for all.
    block: queries at a time in the PyTorch form, a choice of memory and not of the model; None takes 64 on a CPU and
    256 on a GPU.
    """

    grouped_heads: ClassVar[bool] = True
    function_class = "constant around q"
    fit = "closed form"
    skipped: int = 0  # how many pairs a document begins with that no later query uses

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        inverse_temperature: str | float = "learned",
        window: int | None = None,
        block: int | None = None,
        first_beta: float | None = None,
    ) -> None:
        super().__init__(sizes, backend)
        for name, value in (("window", window), ("block", block)):
            if value is not None and value < 1:
                raise ValueError(f"regressor.{name}={value} must be at least 1, or null for no {name}")
        self.window, self.block = window, block
        self.log_beta = None
        if inverse_temperature == "learned":
            self.log_beta = nn.Parameter(torch.full((self.num_heads,), math.log(first_beta or self.key_dim**0.5)))
        elif inverse_temperature == "scaled":
            self.fixed_beta = self.key_dim**-0.5
        elif isinstance(inverse_temperature, int | float) and inverse_temperature > 0:
            self.fixed_beta = float(inverse_temperature)
        else:
            raise ValueError(
                f"regressor.inverse_temperature={inverse_temperature!r} must be 'learned', 'scaled' or a number above 0"
            )

    def beta(self, q: Tensor) -> Tensor:
        """[H], in float32 at least."""
        if self.log_beta is None:
            return torch.full((self.num_heads,), self.fixed_beta, dtype=working_dtype(q), device=q.device)
        return wide(self.log_beta).exp()

    def queries_at_once(self, q: Tensor) -> int:
        """The block for this device."""
        return self.block or (256 if q.is_cuda else 64)

    def gather(self, tokens: Tokens, state: Pairs | None) -> tuple[Pairs, View]:
        """All pairs, those of the cache in front, and which of them the queries of this call may use."""
        _, _, k, v, log_decay, segments = tokens
        T, past, first = k.shape[1], 0, None
        if self.skipped:
            first = torch.full(k.shape[:1], self.skipped, device=k.device)
        if state is not None:
            past, first = state.k.shape[1], state.first
            k, v = torch.cat([state.k.to(k.dtype), k], dim=1), torch.cat([state.v.to(v.dtype), v], dim=1)
        start = document_starts(T, past, first, segments, self.skipped)
        age = None if log_decay is None else -faded(log_decay, start, past)
        if age is not None and state is not None and state.age is not None:
            age = torch.cat([state.age, age], dim=1)
        return Pairs(k, v, first, age), View(past, start, self.window)

    def keep(self, pairs: Pairs, view: View) -> Pairs:
        """The cache after the call: what later queries may still use."""
        S = pairs.k.shape[1]
        begin = 0 if self.window is None else max(0, S + 1 - self.window)
        first = None if view.start is None else (view.start[:, -1] - begin).clamp(min=0)
        age = None if pairs.age is None else (pairs.age - pairs.age[:, -1:])[:, begin:]
        return Pairs(pairs.k[:, begin:], pairs.v[:, begin:], first, age)

    def forget(self, state: Any, rows: Tensor) -> Any:
        """The pairs of the given rows stay, as those of an earlier document: the cache of a batch has one length."""
        if isinstance(state, Elsewhere):  # whose position tells
            return state
        S = state.k.shape[1]
        first = torch.zeros_like(rows, dtype=torch.long) if state.first is None else state.first
        return state._replace(first=first.masked_fill(rows, S + self.skipped))

    def describe(self, tokens: Tokens) -> dict[str, Tensor]:
        """1 / beta."""
        return {"bandwidth": 1 / self.beta(tokens.q)}

    def num_visible(self, seq_len: int) -> int:
        """How many pairs the queries of a sequence use, all together."""
        window = min(self.window or seq_len, seq_len)
        return window * (window + 1) // 2 + (seq_len - window) * window

    def state_size(self, seq_len: int) -> int:
        pairs = seq_len if self.window is None else min(self.window - 1, seq_len)
        return pairs * self.num_kv_heads * (self.key_dim + self.value_dim)
