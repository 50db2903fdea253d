"""Retention by other prices than |W|_2^2: a norm of the weights, or their entropy.

Problem.    Follow the regularised leader (Miras, Behrouz et al. 2025, arXiv 2504.13173, section 5): all gradients so
            far, and the price 1/2 |W|_q^2 on the weights in place of |W|_2^2. A large q is the price of the largest.
Solution.   A_t is what the rule Online (rules.py) would have for its weights, of gradients at W; and
                W_t = A_t (|M_0|_q / |A_R|_q)^(q - 2) .
            The norm is of all weights of a head together, and A_R is A where the mini-batch begins, as the paper
            applies it at the end of a chunk. q = 2 is Online.
Differs.    The paper divides by |A|^(q - 2) alone. Here the start's norm stands above, so that a document begins with
            M_0, and where A fades to M_0 so does W; with regressor.forget_to=zero, where A fades to 0, W would grow.

Entropy.    What all inputs give to one output is a mass that gradients move about (Memora, equations 21 and 27): of
            every column of S = (S+, S-), of mass one, the next is the
                argmin_S  theta <S, G> + a KL(S | S_{t-1}) + (1 - a) KL(S | S_0) ,    G the gradient by S ,
            which is softmax of what the rule Online has for logits A [2 in, out]:
                A_t = A_0 + a_t (A_{t-1} - A_0) + (X, -X)^T theta E / u ,    W = u in (S+ - S-) ,    S = softmax(A) .
            Large weights take large steps, and weights near zero stay there. All tokens of a mini-batch read W of its
            beginning: a softmax of weights has no dual form. Where u is large beside the weights S is nearly uniform,
            and W moves as by gradient descent.
Differs.    Weights of both signs, as two of one sign each (Kivinen and Warmuth 1997); in the paper W = S is positive,
            of the mass c of a whole slice, and logits fade to zero. There the first token of a chunk takes its step
            through the softmax, and the others theirs linearly, from there. S_0 is near M_0: A_0 = asinh(M_0 / u), and
            its negative.

Shapes: as in rules.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from models.regression.deep.rules import Chunk, Fitted, Fixed, Online, Start, Weights
from models.regression.linear.mixtures import product


@dataclass(frozen=True)
class Normed(Online):
    """Online, read and referred to at its weights divided by their norm."""

    q: float = 4.0

    def share(self, references: Weights, first: Weights) -> Tensor:
        """(|M_0|_q / |A_R|_q)^(q - 2) [*, 1, 1]."""
        of_first, now = (sum(_power(w, self.q) for w in part) for part in (first, references))
        return torch.as_tensor(of_first / now).pow(1 - 2 / self.q)

    def held(self, weights: Weights, references: Weights, first: Weights) -> Weights:
        share = self.share(references, first)
        return tuple(share * w for w in weights)

    def at(self, references: Weights, fixed: Fixed) -> Weights:
        return self.held(references, references, _first(fixed))

    def learn(self, token: Chunk) -> tuple[Sequence[Tensor], Fitted]:
        A, fitted = super().learn(token)
        return self.held(tuple(A), token.fitted.references, _first(token.fixed)), fitted

    def products(self, chunk: Chunk) -> list[Callable[[Tensor], Tensor]]:
        share = self.share(chunk.fitted.references, _first(chunk.fixed))

        def shared(layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda y: share.to(y.dtype) * layer(y)

        return [shared(layer) for layer in super().products(chunk)]


@dataclass(frozen=True)
class Entropic(Online):
    """Gradient descent without momentum on A [*, 2 in, out], read and referred to as the W of its mini-batch's
    beginning. units: u of every layer.
    """

    units: tuple[float, ...] = ()
    copies: ClassVar[int] = 2

    def begin(self, start: Start, B: int, dtype: torch.dtype) -> Fitted:
        weights, *_ = super().begin(start, B, dtype)
        logits = self.kept(weights)
        return Fitted(logits, (), logits)

    def kept(self, weights: Weights) -> Weights:
        """A_0: W of it is near M_0, and zero where that is."""
        halves = ((w / u).asinh() for w, u in zip(weights, self.units, strict=True))
        return tuple(torch.cat([h, -h], dim=-2) for h in halves)

    def held(self, weights: Weights, references: Weights, first: Weights) -> Weights:
        return self.masses(references)

    def masses(self, logits: Weights) -> Weights:
        """W of A."""
        found = []
        for A, u in zip(logits, self.units, strict=True):
            positive, negative = A.softmax(dim=-2).tensor_split(2, dim=-2)
            found.append(u * positive.shape[-2] * (positive - negative))
        return tuple(found)

    def at(self, references: Weights, fixed: Fixed) -> Weights:
        return self.masses(references)

    def learn(self, token: Chunk) -> tuple[Sequence[Tensor], Fitted]:
        _, fitted = super().learn(self.of_logits(token))
        return self.masses(token.fitted.references), fitted

    def products(self, chunk: Chunk) -> list[Callable[[Tensor], Tensor]]:
        dtype = chunk.pairs[0][0].dtype
        return [partial(product, y=w.to(dtype)) for w in self.masses(chunk.fitted.references)]

    def carry(self, chunk: Chunk) -> Fitted:
        return super().carry(self.of_logits(chunk))

    def of_logits(self, chunk: Chunk) -> Chunk:
        """What is written to A: X and -X, in units of u."""
        pairs = [(torch.cat([x, -x], dim=-1) / u, e) for u, (x, e) in zip(self.units, chunk.pairs, strict=True)]
        return Chunk(chunk.fitted, chunk.fixed, pairs, chunk.opens, chunk.ends, chunk.given)


def _first(fixed: Fixed) -> Weights:
    """M_0; chunks have a start that does not fade as the origin of all weights."""
    return fixed.base or fixed.first.weights


def _power(w: Tensor, q: float) -> Tensor:
    return w.abs().pow(q).sum((-2, -1), keepdim=True)
