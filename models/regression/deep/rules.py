"""How a memory learns from the tokens of a mini-batch: what their writes do to its weights, and when.

Problem.    All tokens of a mini-batch take their gradients at the same weights R, so that what each wants to write is
            known at once: D_i = -theta_i dl_i/dW (R) = theta_i X_i^T E_i (network.py). What D does to W is the rule.
Online.     Weights change with every token. S is a momentum, eta its factor; what fades goes back to W_0 (Titans,
            Behrouz et al. 2025, equations 13 to 16):
                S_t = eta_t S_{t-1} + D_t ,    W_t = W_0 + a_t (W_{t-1} - W_0) + S_t .
            R is what the mini-batch before has left.
Averaged.   Who reads weighs the whole mini-batch anew, by its own place p in it (TTT, Sun et al. 2024, section 2.4):
                S_t = S_{t-1} + D_t ,    W_t = R + c_p S_t ,    the next R is R + c_b S_b , with S = 0.
AtEnd.      All tokens read R, and an optimiser (optimizers.py) steps where the mini-batch ends (LaCT, Zhang et al.
            2025):
                S_t = S_{t-1} + D_t ,    W_t = R ,    the next R is W_0 + A (R - W_0) + r U(S_b) , with S = 0,
            A the product of the mini-batch's decays and r the sum of its rates.
Dual form.  Of a chunk, which is a mini-batch or a part of one, X and E are known at once. With N = W - W_0, what fades,
            all that the first two rules read and carry on is a combination, with numbers of the gates alone, of N and S
            at the chunk's beginning and of its writes. W_0 apart, a layer makes of its input y at place t
                z_t = A_t y N + f_t y S + sum_{i<=t} G_ti (y . X_i) E_i ,
            a few products of batches of small matrices, and no weights of a single token. Online has N and S one above
            the other, [rows, 2 in, out], so that one product reads both. Averaged has A = 1, f = c and G_ti = c_t
            theta_i, and S = 0 where a mini-batch begins.

A rule states its token (`learn`, the definition) and its chunk (`weigh`, `products`, `carry`).

Shapes: * is B, H in a state and rows = B H in a scan; N chunks, C tokens of one, in and out of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from models.regression.deep.network import Network, SwiGLU
from models.regression.deep.optimizers import InnerOptimizer
from models.regression.linear.coefficients import of_gates
from models.regression.linear.mixtures import product, spread

Weights = tuple[Tensor, ...]
Pairs = Sequence[tuple[Tensor, Tensor]]  # X [rows, C, in] and E [rows, C, out] of every layer
Flag = Tensor | bool  # of rows [rows, 1, 1], or of all


class Start(NamedTuple):
    """Where a document begins: weights M_0 [H, in, out] of every layer. fades: whether they fade as well (W_0 = 0, not
    M_0). norm: scale and shift [H, 1, V] of the network's layer norm, or nothing.
    """

    weights: Weights
    fades: bool = False
    norm: Weights = ()


class Gates(NamedTuple):
    """What the tokens of a call say of their steps. step_size: theta [B, T, H], or one for each layer [B, T, H, n].
    log_momentum, log_decay: natural logs of eta and a [B, T, H], <= 0; None for eta = 0 and for a = 1. share: c [b].
    sums [B, T, H, 3]: what an optimiser takes, the log decay, the rate and the momentum of a token, each summed over
    its mini-batch. window [B, T, H, c]: the weights of the pairs that a token writes (windows.py), the newest first;
    None for its own alone.
    """

    step_size: Tensor
    log_momentum: Tensor | None = None
    log_decay: Tensor | None = None
    share: Tensor | Any = None
    sums: Tensor | None = None
    window: Tensor | None = None


class Fitted(NamedTuple):
    """What is learned. Of every layer weights W, sums S and references R, [*, in, out] each, and an optimiser's
    history; and the gates that it sums, [*, 1, 3]. Nothing, (), for what a rule does not have.
    """

    weights: Weights
    sums: Weights = ()
    references: Weights = ()
    history: tuple[Weights, ...] = ()
    gates: Weights = ()


class Fixed(NamedTuple):
    """What a scan does not change: what a document begins with; W_0, or nothing for W_0 = 0; the norm's scale and
    shift.
    """

    first: Fitted
    base: Weights
    norm: Weights


class Chunk(NamedTuple):
    """What a rule is told of a chunk, or of a token: what it begins with, what never changes, and what its pairs are at
    R. opens: whether it begins a mini-batch; None if all do, so that no token before it is of its mini-batch. ends:
    whether a mini-batch is over with it. given: by `tokens` of a token, by `weigh` of a chunk.
    """

    fitted: Fitted
    fixed: Fixed
    pairs: Pairs
    opens: Flag | None
    ends: Flag | Any
    given: tuple[Any, ...]


@dataclass(frozen=True)
class Rule:
    """A network, and how it learns."""

    network: Network | SwiGLU
    refers: ClassVar[bool] = False  # whether it keeps R; else its weights are R
    closes: ClassVar[bool] = False  # whether anything happens where a mini-batch ends that coefficients can't tell
    copies: ClassVar[int] = 1  # numbers that are kept and written for each weight
    at_once: ClassVar[int] = 4  # chunks of a compiled call, which takes as long to begin as several small kernels take

    def begin(self, start: Start, B: int, dtype: torch.dtype) -> Fitted:
        """What a document begins with, [B, H, *, *]."""
        weights = tuple(w.to(dtype).expand(B, -1, -1, -1) for w in start.weights)
        return Fitted(weights, _zeros(weights))

    def kept(self, weights: Weights) -> Weights:
        """What is kept of the weights of a start."""
        return weights

    def held(self, weights: Weights, references: Weights, first: Weights) -> Weights:
        """The weights that are read, of those that are kept; first: M_0."""
        return weights

    def at(self, references: Weights, fixed: Fixed) -> Weights:
        """The weights at which a mini-batch takes its gradients."""
        return references

    def tokens(self, gates: Gates, place: Tensor) -> tuple[Any, ...]:
        """What `learn` and `weigh` are given, [B, T, H] or [B, T, H, n] each. place [B, T]: of tokens in their
        mini-batches.
        """
        raise NotImplementedError

    def learn(self, token: Chunk) -> tuple[Sequence[Tensor], Fitted]:
        """The weights that a token reads, and what the next begins with."""
        raise NotImplementedError

    def weigh(self, *given: Any) -> tuple[Any, ...]:
        """What `products` and `carry` are given, of all chunks, [N rows, *, *]: from what tokens are, [N rows, C, n],
        zero where there is no token.
        """
        return given

    def of_window(self, band: Tensor, given: tuple[Any, ...], dual: bool) -> tuple[Any, ...]:
        """What `learn`, or in the dual form `products` and `carry`, are given of the C + c - 1 pairs of windows.py."""
        raise NotImplementedError

    def enter(self, fitted: Fitted, base: Weights) -> Fitted:
        """As chunks have it."""
        return fitted

    def leave(self, fitted: Fitted, base: Weights) -> Fitted:
        """The way back."""
        return fitted

    def products(self, chunk: Chunk) -> list[Callable[[Tensor], Tensor]]:
        """Of every layer what it makes of its inputs y [rows, C, in], where tokens read."""
        raise NotImplementedError

    def carry(self, chunk: Chunk) -> Fitted:
        """What the next chunk begins with."""
        raise NotImplementedError


@dataclass(frozen=True)
class Online(Rule):
    """momentum: whether there is an S. A chunk has N and S of a layer as one matrix, [rows, n in, out], which Fitted
    calls its weights.
    """

    momentum: bool = True
    refers: ClassVar[bool] = True

    def begin(self, start: Start, B: int, dtype: torch.dtype) -> Fitted:
        weights, sums, *_ = super().begin(start, B, dtype)
        return Fitted(weights, sums if self.momentum else (), weights)

    def tokens(self, gates: Gates, place: Tensor) -> tuple[Any, ...]:
        return torch.ones_like(gates.step_size), *gates[:3]

    def learn(self, token: Chunk) -> tuple[Sequence[Tensor], Fitted]:
        now, (_, theta, log_eta, log_a) = token.fitted, token.given
        M, base, writes = now.weights, token.fixed.base or _zeros(now.weights), _writes(theta, token.pairs)
        if log_eta is not None:
            writes = tuple(log_eta.exp() * s + write for s, write in zip(now.sums, writes, strict=True))
        if log_a is not None:
            M = tuple(w + log_a.exp() * (m - w) for w, m in zip(base, M, strict=True))
        M = tuple(m + write for m, write in zip(M, writes, strict=True))
        return M, Fitted(M, writes if self.momentum else (), now.references)

    def weigh(self, *given: Any) -> tuple[Tensor, ...]:
        """A mixture for what tokens read, another for what the chunk carries on."""
        read, carry = of_gates(*given)
        return (*read, *carry)

    def of_window(self, band: Tensor, given: tuple[Any, ...], dual: bool) -> tuple[Any, ...]:
        if dual:
            read, writes, states, carried = given
            return read, product(writes, band), states, product(carried, band)
        ones, theta, *gates = given
        return ones, product(band.mT, theta), *gates

    def enter(self, fitted: Fitted, base: Weights) -> Fitted:
        fading = tuple(m - w for m, w in zip(fitted.weights, base, strict=True)) if base else fitted.weights
        parts = zip(fading, *([fitted.sums] if fitted.sums else []), strict=True)
        return Fitted(tuple(torch.cat(x, dim=1) for x in parts), (), fitted.references)

    def leave(self, fitted: Fitted, base: Weights) -> Fitted:
        parts = [x.tensor_split(2 if self.momentum else 1, dim=1) for x in fitted.weights]
        weights, sums = tuple(x[0] for x in parts), tuple(x[1] for x in parts if len(x) == 2)
        weights = tuple(w + m for w, m in zip(base, weights, strict=True)) if base else weights
        return Fitted(weights, sums, fitted.references)

    def products(self, chunk: Chunk) -> list[Callable[[Tensor], Tensor]]:
        fitted, base, (read, writes, *_) = chunk.fitted, chunk.fixed.base, chunk.given

        def of_layer(layer: int, y: Tensor) -> Tensor:
            inputs, errors = chunk.pairs[layer]
            z = product(product(y, inputs.mT) * writes.to(y.dtype), errors)
            z = z + product(spread(y, read).to(y.dtype), fitted.weights[layer].to(y.dtype))
            return z + product(y, base[layer].to(y.dtype)) if base else z

        return [partial(of_layer, layer) for layer in range(len(chunk.pairs))]

    def carry(self, chunk: Chunk) -> Fitted:
        states, writes = chunk.given[2:]
        following = []
        for X, (y, e) in zip(chunk.fitted.weights, chunk.pairs, strict=True):
            parts = X.split(y.shape[-1], dim=1)
            kept = [
                sum(states[:, i : i + 1, j : j + 1] * parts[j] for j in range(i, len(parts))) for i in range(len(parts))
            ]
            following.append(torch.cat(kept, dim=1) + product(spread(y, writes.mT).to(e.dtype).mT, e))
        return Fitted(tuple(following), (), chunk.fitted.references)


class Summed(Rule):
    """A rule that sums up writes, and steps at the end of a mini-batch."""

    closes: ClassVar[bool] = True

    def learn(self, token: Chunk) -> tuple[Sequence[Tensor], Fitted]:
        summed = self.add(token)
        return self.read(summed, *token.given), self.close(summed, token)

    def carry(self, chunk: Chunk) -> Fitted:
        return self.close(self.add(chunk), chunk)

    def add(self, chunk: Chunk) -> Fitted:
        """With what the tokens sum up."""
        fitted, writes = chunk.fitted, _writes(chunk.given[0], chunk.pairs)
        sums = tuple(s + write for s, write in zip(fitted.sums, writes, strict=True))
        return Fitted(fitted.weights, sums, (), fitted.history, fitted.gates)

    def close(self, fitted: Fitted, chunk: Chunk) -> Fitted:
        return fitted if chunk.ends is False else where(chunk.ends, self.step(fitted, chunk), fitted)

    def read(self, fitted: Fitted, *given: Any) -> Weights:
        """The weights that a token reads, its own write among the sums."""
        return fitted.weights

    def step(self, fitted: Fitted, chunk: Chunk) -> Fitted:
        """The next mini-batch's first."""
        raise NotImplementedError


@dataclass(frozen=True)
class Averaged(Summed):
    """The step at a mini-batch's end is the sum, times the last c."""

    def tokens(self, gates: Gates, place: Tensor) -> tuple[Any, ...]:
        """theta; c; and c of the last token of a mini-batch, 0 of the others."""
        b, c = len(gates.share), gates.share[place]
        return gates.step_size, *(x.unsqueeze(-1).expand_as(gates.step_size) for x in (c, c * (place == b - 1)))

    def read(self, fitted: Fitted, *given: Any) -> Weights:
        return tuple(w + given[1] * s for w, s in zip(fitted.weights, fitted.sums, strict=True))

    def weigh(self, *given: Any) -> tuple[Any, ...]:
        """And what tokens read of the writes of their chunk."""
        theta, c, _ = given
        return *given, (c * theta.mT).tril()

    def products(self, chunk: Chunk) -> list[Callable[[Tensor], Tensor]]:
        fitted, (_, c, _, writes) = chunk.fitted, chunk.given

        def of_layer(layer: int, y: Tensor) -> Tensor:
            inputs, errors = chunk.pairs[layer]
            z = product(product(y, inputs.mT) * writes.to(y.dtype), errors)
            z = z + product(y, fitted.weights[layer].to(y.dtype))
            return z if chunk.opens is None else z + product((c * y).to(y.dtype), fitted.sums[layer].to(y.dtype))

        return [partial(of_layer, layer) for layer in range(len(chunk.pairs))]

    def step(self, fitted: Fitted, chunk: Chunk) -> Fitted:
        c = chunk.given[2].sum(1, keepdim=True)
        moved = (w + c * s for w, s in zip(fitted.weights, fitted.sums, strict=True))
        return Fitted(tuple(moved), _zeros(fitted.sums))


@dataclass(frozen=True)
class AtEnd(Summed):
    """optimizer: of optimizers.py. normed: after every step the columns of W get back the lengths of the start's."""

    optimizer: InnerOptimizer
    normed: bool = False
    at_once: ClassVar[int] = 1

    def begin(self, start: Start, B: int, dtype: torch.dtype) -> Fitted:
        weights, sums, *_ = super().begin(start, B, dtype)
        zeros, H = sums[0].new_zeros, sums[0].shape[1]
        shapes = (self.optimizer.shapes(*w.shape[2:]) for w in weights)
        history = tuple(tuple(zeros(B, H, *shape) for shape in each) for each in shapes)
        return Fitted(weights, sums, (), history, (zeros(B, H, 1, 3),))

    def tokens(self, gates: Gates, place: Tensor) -> tuple[Any, ...]:
        return gates.step_size, gates.sums

    def of_window(self, band: Tensor, given: tuple[Any, ...], dual: bool) -> tuple[Any, ...]:
        theta, sums = given
        return product(band.mT, theta), sums

    def products(self, chunk: Chunk) -> list[Callable[[Tensor], Tensor]]:
        return [partial(product, y=w.to(chunk.pairs[0][0].dtype)) for w in chunk.fitted.weights]

    def add(self, chunk: Chunk) -> Fitted:
        weights, sums, _, history, gates = super().add(chunk)
        return Fitted(weights, sums, (), history, (gates[0] + chunk.given[1].sum(1, keepdim=True),))

    def step(self, fitted: Fitted, chunk: Chunk) -> Fitted:
        fixed = chunk.fixed
        log_decay, rate, eta = fitted.gates[0].split(1, dim=-1)
        weights, history = [], []
        for i, (w, D) in enumerate(zip(fitted.weights, fitted.sums, strict=True)):
            U, remembered = self.optimizer.direction(D, fitted.history[i], eta)
            origin = fixed.base[i] if fixed.base else 0.0
            w = origin + log_decay.exp() * (w - origin) + rate * U
            if self.normed:
                w = w * (_lengths(fixed.first.weights[i]) / (_lengths(w) + 1e-5))
            weights.append(w)
            history.append(tuple(remembered))
        return Fitted(tuple(weights), _zeros(fitted.sums), (), tuple(history), _zeros(fitted.gates))


def where(condition: Flag, new: Any, now: Any) -> Any:
    """Of trees of (named) tuples of tensors, alike. A CPU is asked whether any row is new: most often none is, and no
    weights are copied. (A GPU would have to be waited for; and fake tensors, which count memory, know no numbers, nor
    does a compiler.)
    """
    if isinstance(condition, bool):
        return new if condition else now
    ask = type(condition) is Tensor and condition.device.type == "cpu" and not torch.compiler.is_compiling()
    if ask and not condition.any():
        return each(lambda x: x.view_as(x), now)
    return each(lambda x, y: torch.where(condition, x, y), new, now)


def each(function: Callable[..., Tensor], *trees: Any) -> Any:
    """The function of every tensor of a tree of (named) tuples, or of those at the same place in several."""
    if isinstance(trees[0], Tensor):
        return function(*trees)
    parts, kind = [each(function, *x) for x in zip(*trees, strict=True)], type(trees[0])
    return kind(*parts) if hasattr(kind, "_fields") else tuple(parts)


def _zeros(weights: Weights) -> Weights:
    return tuple(torch.zeros_like(w) for w in weights)


def _writes(theta: Tensor, pairs: Pairs) -> Weights:
    """D of every layer, summed over the tokens. theta [rows, C, n], n = 1 or one for each layer."""
    steps = theta.expand(-1, -1, len(pairs)).split(1, dim=-1)
    return tuple(product((s * x).to(e.dtype).mT, e) for s, (x, e) in zip(steps, pairs, strict=True))


def _lengths(w: Tensor) -> Tensor:
    return w.norm(dim=-2, keepdim=True)
