"""The nearest orthogonal matrix, nearly: what Muon steps by, in the optimizer of the model and inside a memory."""

from __future__ import annotations

from torch import Tensor


def orthogonal(G: Tensor) -> Tensor:
    """U V^T, nearly, of G = U S V^T [..., rows, columns]: five steps of X <- a X + (b A + c A^2) X, A = X X^T, with
    Jordan's coefficients, which bring singular values between 0.01 and 1 into about (0.7, 1.2). bfloat16 on a GPU."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16() if G.is_cuda else G
    X = X.mT if G.shape[-2] > G.shape[-1] else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if G.shape[-2] > G.shape[-1] else X).to(G.dtype)
