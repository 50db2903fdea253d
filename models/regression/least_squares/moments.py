"""What least squares keeps of the past: the second moments of keys, and of keys with values.

Normal equations square the condition number of their pairs, so moments, and all that is computed with them, have twice
the digits of the pairs: float64 for float32, float32 for 16 bits (doubled_dtype in models/parts/precision.py). Pairs in
float64 have moments in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.parts.precision import doubled_dtype


class Moments(NamedTuple):
    """The state: H [B, H, K, K] and G [B, H, K, V]; and where the ridge fades (recursive.py) the logarithm of what is
    left of it, [B, H]. float64 where q, k and v are float32.
    """

    keys: Tensor
    pairs: Tensor
    log_ridge: Tensor | None = None


def first_moments(q: Tensor, k: Tensor, v: Tensor, moments: Moments | None) -> Moments:
    """The moments to begin with, zeros for None, with twice the digits of q, k [B, T, H, K] and v [B, T, H, V]."""
    dtype = doubled_dtype(k.device, q.dtype, k.dtype, v.dtype)
    if moments is not None:
        return Moments._make(x if x is None else x.to(dtype) for x in moments)
    B, _, H, K = k.shape
    return Moments(*(torch.zeros(B, H, K, X, dtype=dtype, device=k.device) for X in (K, v.shape[-1])))


def forget(moments: Moments, rows: Tensor) -> Moments:
    """With those of the given rows (bool [B]) emptied, and their ridge whole."""
    return Moments._make(x if x is None else x.masked_fill(rows.view(-1, *[1] * (x.ndim - 1)), 0.0) for x in moments)
