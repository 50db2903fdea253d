"""What least squares keeps of the past: the second moments of keys, and of keys with values."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from models.precision import working_dtype
from models.regression.memory import first_memory


class Moments(NamedTuple):
    """The state: H [B, H, K, K] and G [B, H, K, V]; and where the ridge fades (recursive.py) the logarithm of what is
    left of it, [B, H].
    """

    keys: Tensor
    pairs: Tensor
    log_ridge: Tensor | None = None


def first_moments(k: Tensor, v: Tensor, moments: Moments | None) -> Moments:
    """The moments to begin with, zeros for None, in float32 at least. k [B, T, H, K], v [B, T, H, V]."""
    keys, pairs, log_ridge = moments or (None, None, None)
    return Moments(first_memory(k, k, keys).to(working_dtype(k, v)), first_memory(k, v, pairs), log_ridge)


def forget(moments: Moments, rows: Tensor) -> Moments:
    """With those of the given rows (bool [B]) emptied, and their ridge whole."""
    return Moments(*(x if x is None else x.masked_fill(rows.view(-1, *[1] * (x.ndim - 1)), 0.0) for x in moments))
