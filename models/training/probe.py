"""The inner regression of a mixer, seen from outside: what its memory gets right, before a pair is written and after.

A regressor gives o_t = m_t(q_t), the memory after token t read at a query, and a query changes no other read. So any
m_t(k_i) is had by another query, in the parallel form of training. With q_t = k_{t-a} every token reads what is left of
the pair that is a tokens old: a = 0 is after the write, a = -1 before it, m_{t-1}(k_t). With unit vectors in place of
the values, o_t = sum_i w_ti v_i tells the weights w. Each is a row of one batch, of one call. Nothing here knows a
mixer.

Keys are read as they are stored, at their own positions. What else a read depends on (parallax's probe, a mixed query,
the turn of a signed decay) is that of the token that reads.

Shapes: B texts, T tokens, H heads, K and V widths of keys and values, n pairs a token, A ages, R rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models.mixers.mixer import Mixer
from models.parts.precision import wide
from models.regression.local.pairs import Pairs
from models.regression.memory import Memory
from models.regression.regressor import Regressor, Tokens


class Reads(NamedTuple):
    """Of every pair at every age, sums over its n keys [A, B, T, H], by the token that wrote it: |v - m(k)|^2, |v|^2,
    v . m(k) and |m(k)|^2. seen [A, B, T]: whether its document has a token that old.
    """

    error: Tensor
    value: Tensor
    product: Tensor
    read: Tensor
    seen: Tensor

    def loss(self, pairs: Tensor | None = None) -> Tensor:
        """Sum of |v - m(k)|^2 / sum of |v|^2 over the pairs given, bool [T], and seen: [A, H]. NaN for none."""
        return self._over(pairs, self.error) / self._over(pairs, self.value)

    def recall(self, pairs: Tensor | None = None) -> Tensor:
        """The cosine of what is read and the values, over all of them as one vector: [A, H]. NaN for none, 0 where
        nothing is read.
        """
        product, value, read = (self._over(pairs, x) for x in (self.product, self.value, self.read))
        return torch.where((read == 0) & (value > 0), 0.0, product / (value * read).sqrt())

    def _over(self, pairs: Tensor | None, x: Tensor) -> Tensor:
        kept = self.seen if pairs is None else self.seen & pairs
        return (x * kept.unsqueeze(-1)).sum((1, 2))


def read_at(regressor: Regressor, tokens: Tokens, queries: Tensor, values: Tensor | None = None) -> tuple[Tensor, Any]:
    """m_t at queries [R, B, T, H, K]: [R, B, T, H, V]; and the state after the last token, of R B rows. values
    [R, B, T n, G, V]: others to be written, row by row.
    """
    rows = len(queries)
    call = tokens.each(lambda x: x.repeat(rows, *[1] * (x.ndim - 1)))._replace(q=queries.flatten(0, 1))
    if values is not None:
        call = call._replace(v=values.flatten(0, 1))
    o, state = regressor(call)
    return o.unflatten(0, (rows, -1)), state


def of_heads(x: Tensor, tokens: Tokens) -> Tensor:
    """Keys or values [B, T n, G, *] for every query head and pair of a token: [B, T, n, H, *]."""
    T, H = tokens.q.shape[1:3]
    return x.repeat_interleave(H // x.shape[2], dim=2).unflatten(1, (T, -1))


def reads(regressor: Regressor, tokens: Tokens, ages: list[int], turn: Tensor | None = None) -> tuple[Reads, Any]:
    """Every pair read at its own key, at these ages; and the state after the last token, of B rows. turn [B, T, H]: the
    product of the signs of a signed decay up to each token.
    """
    B, T = tokens.q.shape[:2]
    k, v = of_heads(tokens.k, tokens), of_heads(tokens.v, tokens)
    n, index = k.shape[2], torch.arange(T, device=k.device)
    rows: list[Tensor] = []
    seen: list[Tensor] = []
    for age in ages:
        queries = k.roll(age, 1)
        if turn is not None:
            queries = queries * (turn.roll(age, 1) * turn).unsqueeze(2).unsqueeze(-1)
        rows += queries.unbind(2)
        reader = index + age
        inside = ((reader >= 0) & (reader < T) & ((age >= 0) | (index > 0))).expand(B, T)
        if tokens.segments is not None:
            inside = inside & (tokens.segments == tokens.segments.roll(-age, 1))
        seen.append(inside)
    o, state = read_at(regressor, tokens, torch.stack(rows))
    o = wide(o.unflatten(0, (len(ages), n)))
    value, sums = v.to(o.dtype), []
    for each, age in zip(o, ages, strict=True):
        m = each.roll(-age, 2).permute(1, 2, 0, 3, 4)  # [B, T, n, H, V], at the pair's own token
        parts = ((value - m).square(), value.square(), value * m, m.square())
        sums.append([x.sum((2, -1)) for x in parts])
    return Reads._make(map(torch.stack, (*zip(*sums, strict=True), seen))), _rows(state, slice(0, B))


def weights(regressor: Regressor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """w [B, T, H, T n] of o_t = c_t + sum_i w_ti v_i at the tokens' own queries, and c [B, T, H, V], which is not zero
    where a memory holds pairs of its own. For a regressor whose reads are such sums (Regressor.weighs_values).
    """
    (B, S, G, V), q = tokens.v.shape, tokens.q
    blocks = -(-S // V)
    units = torch.eye(blocks * V, dtype=tokens.v.dtype, device=q.device)[:S].view(S, blocks, V).transpose(0, 1)
    values = torch.cat([units, torch.zeros_like(units[:1])]).view(blocks + 1, 1, S, 1, V)
    o, _ = read_at(regressor, tokens, q.expand(blocks + 1, *q.shape), values.expand(-1, B, -1, G, -1))
    w = (o[:-1] - o[-1]).permute(1, 2, 3, 0, 4).flatten(-2)[..., :S]
    return w, o[-1]


def spread(w: Tensor) -> tuple[Tensor, Tensor]:
    """Of weights [B, T, H, T n], with p_ti = |w_ti| / sum_i |w_ti| and all pairs of a token counted as one: the entropy
    of p in nats, and the reach, sum_i p_ti (t - i). [B, T, H] both, zero where all weights are.
    """
    T = w.shape[1]
    p = w.float().abs().unflatten(-1, (T, -1)).sum(-1)
    p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    index = torch.arange(T, device=w.device)
    age = (index.view(-1, 1, 1) - index).to(p.dtype)
    return torch.special.entr(p).sum(-1), (p * age).sum(-1)


def matrices(regressor: Regressor, state: Any) -> dict[str, Tensor]:
    """What the tokens have taught a memory of fixed size: the matrices of its state less those of an empty one, by the
    names that the state gives them, [B, H, *, *]. {} for a regressor that keeps the pairs.
    """
    if not isinstance(regressor, Memory):
        return {}

    def kept(name: str, x: Tensor) -> bool:  # not what is a copy of an earlier state, nor a number for each head
        return x.ndim == 4 and min(x.shape[2:]) > 1 and not name.startswith(("reference", "history"))

    first = next(_tensors(state))[1]
    empty = regressor.forget(state, torch.ones(len(first), dtype=torch.bool, device=first.device))
    pairs = zip(*(_tensors(getattr(x, "fitted", x)) for x in (state, empty)), strict=True)
    return {name: now - then for (name, now), (_, then) in pairs if kept(name, now)}


def _tensors(node: Any, name: str = "memory") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested tuples but for pairs, with their fields' names, and places where a field has several."""
    if isinstance(node, Tensor):
        yield name, node
    elif isinstance(node, tuple) and not isinstance(node, Pairs):
        fields = getattr(node, "_fields", None) or [f"{name}_{i}" for i in range(len(node))]
        for field, value in zip(fields, node, strict=True):
            yield from _tensors(value, field)


def _rows(node: Any, rows: slice) -> Any:
    """Of all tensors of a state these rows."""
    if isinstance(node, Tensor):
        return node[rows]
    if not isinstance(node, tuple):
        return node
    parts = [_rows(value, rows) for value in node]
    return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)


def effective_rank(M: Tensor) -> Tensor:
    """(sum s^2)^2 / sum s^4 of the singular values s of M [..., a, b], the participation ratio: r for r that are equal.
    Zero for M = 0.
    """
    M = M / M.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(M.dtype).tiny)
    with torch.autocast(M.device.type, enabled=False):
        squares = M.mT @ M if M.shape[-1] < M.shape[-2] else M @ M.mT
    norm = M.square().sum((-2, -1))
    return norm.square() / squares.square().sum((-2, -1)).clamp(min=torch.finfo(M.dtype).tiny)


class Watched(NamedTuple):
    """A mixer and what its regressor was given, over all calls of a forward pass, as one sequence. name: the mixer's in
    its layer, "" for a layer that has one. turn [B, T, H]: the product of a signed decay's signs up to each token.
    """

    layer: int
    name: str
    mixer: Mixer
    tokens: Tokens
    turn: Tensor | None


@contextmanager
def watching(blocks: Any, look: Callable[[Watched], None]) -> Iterator[None]:
    """In the next forward pass of a model's blocks `look` is told of every mixer, as soon as its layer's is through and
    the layer's parameters, where they are sharded, are still gathered.
    """
    with ExitStack() as stack:
        for layer, block in enumerate(blocks):
            stack.enter_context(_watching(layer, block.mixer, look))
        yield


@contextmanager
def _watching(layer: int, whole: nn.Module, look: Callable[[Watched], None]) -> Iterator[None]:
    hooks: list[RemovableHandle] = []
    notes: list[tuple[str, Mixer, list[Tokens], list[Tensor]]] = []

    def through(*_: Any) -> None:
        for hook in hooks:  # before `look` calls anything of the layer
            hook.remove()
        for name, mixer, calls, signs in notes:
            turn = torch.cat(signs, dim=1).cumprod(1) if signs else None
            look(Watched(layer, name, mixer, _joined(calls), turn))

    for name, mixer in whole.named_modules():
        if isinstance(mixer, Mixer):
            calls, signs = _Given(), _Signs()
            hooks.append(mixer.regressor.register_forward_hook(calls.hook))
            if mixer.decay.kind == "signed":
                hooks.append(mixer.decay.register_forward_hook(signs.hook))
            notes.append((name, mixer, calls, signs))
    hooks.append(whole.register_forward_hook(through))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Given(list[Tokens]):
    """What a regressor is given, call by call."""

    def hook(self, module: nn.Module, given: Any, made: Any) -> None:
        self.append(given[0])


class _Signs(list[Tensor]):
    """The signs that a decay gives."""

    def hook(self, module: nn.Module, given: Any, made: Any) -> None:
        self.append(made[1])


def _joined(calls: list[Tokens]) -> Tokens:
    """Calls that follow one another, as one."""
    return calls[0].each(lambda *x: torch.cat(x, dim=1), *calls[1:])
