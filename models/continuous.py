"""A language model whose tokens are vectors, and which says a number: for in-context regression (data/regression.py).

    reads x E ,    says f = h . w_0 ,    loss = sum (y - f)^2 / 2

E [C, D] is the embedding: a token that is a one-hot vector would be read as a language model reads it. w_0 is the first
row of the head, the channel of the answer. The loss is -log p of a normal distribution of variance 1, but for a
constant.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from models.cache import Cache
from models.language_model import LanguageModel
from models.loss import IGNORED
from models.mixers.layer import State


class Continuous(LanguageModel):
    """Tokens [B, T, C] in the place of ids, answers [B, T] in that of targets. config.vocab_size is C."""

    def hidden(
        self, input_ids: Tensor, segments: Tensor | None = None, cache: Cache | None = None, keep: bool = True
    ) -> tuple[Tensor, list[State]]:
        states = self._states(cache)
        (hidden,) = self._layers(self._embedded(input_ids), segments, states, keep=keep)
        return hidden, cast("list[State]", states)

    def _embedded(self, given: Tensor) -> Tensor:
        return given @ self.embedding.weight

    def _answers(self, hidden: Tensor) -> Tensor:
        return (hidden @ self.head.weight[0]).float()

    def sum_nats(self, input_ids: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        return _errors(self._answers(self.hidden(input_ids, segments, keep=False)[0]), targets).sum()

    def score(self, input_ids: Tensor, targets: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Half the squared error of each answer [B, T], 0 where ignored, and the answer. No gradients."""
        with torch.no_grad():
            answers = self._answers(self.hidden(input_ids, segments)[0])
            return _errors(answers, targets), answers


def _errors(answers: Tensor, targets: Tensor) -> Tensor:
    return (0.5 * (answers - targets).square()).masked_fill(targets == IGNORED, 0)
