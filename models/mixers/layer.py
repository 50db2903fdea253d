"""What every mixer is to its block, and what all mixers share: the call, the state, positions within documents.

Shapes: B batch, T tokens, D model width, H heads, W width of the short convolution.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tails = tuple[Tensor | None, ...]


class State(NamedTuple):
    """What a mixer carries from one call to the next. Its size does not depend on T, but for softmax without a window.

    memory     the regressor's
    tails      the last inputs of what acts along the tokens: of the short convolution [B, W-1, channels], of the shift
               of keys [B, 1, channels]; None for what the recipe doesn't have
    position   [B], how many tokens of the present document have been seen
    segment    [B], the number of the present document, or None where segments have never been given
    turn       [B, H], the product of all signs of a signed decay so far, or None where the decay has none
    """

    memory: Any
    tails: Tails
    position: Tensor
    segment: Tensor | None
    turn: Tensor | None = None


class Layer(nn.Module):
    """What mixes the tokens of a block: (x [B, T, D], state=None, segments=None) -> (y [B, T, D], state)."""

    @property
    def rings(self) -> bool:
        """Whether a sequence that lies on several devices can stay where it is (models/context.py)."""
        return False

    def outputs(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """y from no state, where that after the last token is not wanted: it may take time."""
        return self(x, None, segments)[0]

    def emptied(self, state: State) -> State | None:
        """The state after no token in the form of this one, which has no segment: whoever goes on from it finds what
        None would give. None for a mixer that has no such form.
        """
        return None


def positions_of(x: Tensor, position: Tensor | None, segments: Tensor | None) -> Tensor:
    """[B, T]: how many tokens of its own document came before each token."""
    B, T, _ = x.shape
    index = torch.arange(T, device=x.device).expand(B, T)
    first = torch.zeros(B, 1, dtype=torch.long, device=x.device) if position is None else position.unsqueeze(1)
    if segments is None:
        return first + index
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    start = torch.where(starts, index, 0).cummax(1).values
    return torch.where(start == 0, first + index, index - start)


def check_choice(name: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value} is not one of {', '.join(allowed)}")
