"""The Omega rule for a network: every token writes the last c pairs once more, not its own alone.

Problem.    A loss over the last c pairs of the document, each weighted by the token that takes the step (Atlas, Behrouz
            et al. 2025, arXiv 2505.23735, equation 9):
                l_t(M) = sum_{r<c} gamma_{t,r} l(f(k_{t-r}; M), v_{t-r}) .
Solution.   D_t = theta_t sum_{r<c} gamma_{t,r} X_{t-r}^T E_{t-r}, all c at the R of token t (rules.py), so that a pair
            of the mini-batch before has another error here than it had there. What is done with D_t is the rule's. A
            chunk needs the errors of C + c - 1 pairs, not of C c: its own, and those before it. With G the weights that
            its tokens or its end give to writes, those of pairs are G times the band of gamma, [C, C + c - 1].
State.      The last c - 1 pairs of the document; zeros, which write nothing, where it has fewer.

Shapes: as in rules.py; c the window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from models.regression.chunks import into_chunks
from models.regression.deep.slots import Slots
from models.regression.linear.omega import windows


def in_slots(
    slots: Slots, k: Tensor, v: Tensor, weights: Tensor, tails: Sequence[Tensor], segments: Tensor | None, dtypes: tuple
) -> tuple[list[Tensor], Tensor, tuple[Tensor, ...]]:
    """The pairs that come before each slot, keys and values [N rows, c - 1, *], the oldest first; the band of every
    slot, [N rows, C, C + c - 1]; and the tails for the next call. weights: gamma [B, T, H, c].  tails: of the state, or
    nothing.  dtypes: of products, and of all else.
    """
    products, dtype = dtypes
    keys, values, weights, *lasting = windows(k, v, weights, tails, dtype, segments)
    past = weights.shape[-1] - 1
    before = (slots.first(x[:, :, 1:].flip(2)).flatten(1, 2) for x in (keys, values))
    gamma = into_chunks(slots.fill(weights), slots.size, dtype)
    return [into_chunks(x, past, products) for x in before], band(gamma), tuple(lasting)


def band(weights: Tensor) -> Tensor:
    """[*, C, c] to [*, C, C + c - 1]: row p has weights p, the last of them first, from column p on."""
    C, c = weights.shape[-2:]
    rows = F.pad(weights.flip(-1), (0, C)).flatten(-2)  # each is one longer than what it becomes, and so moves by one
    return rows[..., : C * (C + c - 1)].unflatten(-1, (C, C + c - 1))
