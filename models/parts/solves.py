"""Factors and solutions of many small systems at once. A system that has none is NaN all over, where torch.linalg
raises: an exception would end a run, and a loss that is not finite is a step that is left out and counted
(models/training/guards.py). Matrices with a NaN or an infinity have none.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cholesky(A: Tensor) -> Tensor:
    """L with L L^T = A [..., N, N], lower; NaN where A is not positive definite."""
    L, info = torch.linalg.cholesky_ex(A)
    return _nan_where(info != 0, L)


def solve(A: Tensor, b: Tensor) -> Tensor:
    """x with A x = b, for A [..., N, N] and b [..., N]; NaN where A is singular."""
    x, info = torch.linalg.solve_ex(A, b.unsqueeze(-1))
    return _nan_where(info != 0, x).squeeze(-1)


def inverse(A: Tensor) -> Tensor:
    """A^-1 [..., N, N]; NaN where A is singular."""
    inverse, info = torch.linalg.inv_ex(A)
    return _nan_where(info != 0, inverse)


def pseudo_inverse(A: Tensor, rtol: float) -> Tensor:
    """A^+ of symmetric matrices [..., N, N]; eigenvalues below rtol times the largest are none. NaN where A is not
    finite."""
    lost = ~A.detach().isfinite().all(-1).all(-1)
    A = A.masked_fill(lost[..., None, None], 0.0)
    return _nan_where(lost, torch.linalg.pinv(A, rtol=rtol, hermitian=True))


def _nan_where(lost: Tensor, x: Tensor) -> Tensor:
    """x lies column by column, as LAPACK has it, and stays so: what solves with it would have to copy it back."""
    return x.mT.masked_fill(lost[..., None, None], torch.nan).mT
