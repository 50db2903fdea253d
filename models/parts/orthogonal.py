"""The nearest orthogonal matrix, nearly: what Muon steps by, in the optimizer of the model and inside a memory."""

from __future__ import annotations

from torch import Tensor

Coefficients = tuple[tuple[float, float, float], ...]  # a, b and c of each step
JORDAN: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5
FITTED: Coefficients = (  # step by step, as LaCT's published code has them: nearer to one
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthogonal(G: Tensor, coefficients: Coefficients = JORDAN) -> Tensor:
    """U V^T, nearly, of G = U S V^T [..., rows, columns]: five steps of X <- a X + (b A + c A^2) X, A = X X^T, with
    Jordan's coefficients, which bring singular values between 0.01 and 1 into about (0.7, 1.2). bfloat16 on a GPU."""
    X = G.bfloat16() if G.is_cuda else G
    X = X.mT if G.shape[-2] > G.shape[-1] else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in coefficients:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if G.shape[-2] > G.shape[-1] else X).to(G.dtype)
