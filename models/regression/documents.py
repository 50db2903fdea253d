"""Packed documents: where one ends, the memory forgets.

Several documents share a row of a batch, and none may see another (`segments`, regressor.py). A memory that decays
needs no code for it: the first token of a document decays the memory by exp(FORGET), which no precision can tell from
zero, and takes its step from there.
"""

from __future__ import annotations

from typing import Any

import torch
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
