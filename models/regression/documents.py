"""Packed documents: where one ends, the memory forgets.

Several documents share a row of a batch, and none may see another (`segments`, regressor.py). A memory that decays
needs no code for it: the first token of a document decays the memory by exp(FORGET), which no precision can tell from
zero, and takes its step from there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.regression.regressor import FORGET


def forget_at_starts(log_decay: Tensor | None, segments: Tensor | None, like: Tensor | None = None) -> Tensor | Any:
    """The log decay (or None) with FORGET at the first token of every document that begins inside the call.

    log_decay: [B, T, H] or [B, T, H, K], or None for a memory that never fades; then `like` [B, T, H, *] gives the
    shape of the zeros that documents need. segments: [B, T] integers or None for one document a row. No gradient
    reaches the gate of a first token: what it would have kept is another document's. Token 0 keeps its gate: a state
    that is passed in is its own document's.
    """
    if segments is None or segments.shape[1] == 1:
        return log_decay
    if log_decay is None:
        assert like is not None
        log_decay = torch.zeros(like.shape[:3], dtype=torch.float32, device=like.device)
    starts = torch.zeros_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(starts.view(*starts.shape, *[1] * (log_decay.ndim - 2)), FORGET, log_decay)


def positions(tokens: Tensor, phase: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """For tokens [B, T, ...]: how many of their document came before, or for the document that the call begins with, of
    its mini-batch; and which tokens begin another document, [B, T] both. phase [B]: of the state, None for 0.
    """
    B, T = tokens.shape[:2]
    index = torch.arange(T, device=tokens.device).expand(B, T)
    begins = torch.zeros_like(index, dtype=torch.bool)
    if segments is not None:
        begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    start = torch.where(begins, index, 0).cummax(1).values
    if phase is None:
        return index - start, begins
    return torch.where(start == 0, index + phase.unsqueeze(1), index - start), begins
