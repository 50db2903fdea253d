"""Retention by a norm: a memory whose weights are divided by how large they have become.

Problem.    Follow the regularised leader (Miras, Behrouz et al. 2025, arXiv 2504.13173, section 5): all gradients so
            far, and the price 1/2 |W|_q^2 on the weights in place of |W|_2^2. A large q is the price of the largest.
Solution.   A_t is what the rule Online (rules.py) would have for its weights, of gradients at W; and
                W_t = A_t (|M_0|_q / |A_R|_q)^(q - 2) .
            The norm is of all weights of a head together, and A_R is A where the mini-batch begins, as the paper
            applies it at the end of a chunk. q = 2 is Online.
Differs.    The paper divides by |A|^(q - 2) alone. Here the start's norm stands above, so that a document begins with
            M_0, and where A fades to M_0 so does W; with regressor.forget_to=zero, where A fades to 0, W would grow.

Shapes: as in rules.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.regression.deep.rules import Chunk, Fitted, Fixed, Online, Weights


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


def _first(fixed: Fixed) -> Weights:
    """M_0; chunks have a start that does not fade as the origin of all weights."""
    return fixed.base or fixed.first.weights


def _power(w: Tensor, q: float) -> Tensor:
    return w.abs().pow(q).sum((-2, -1), keepdim=True)
