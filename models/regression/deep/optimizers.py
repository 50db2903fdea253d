"""Inner optimisers: what a memory may do with the summed gradient of a mini-batch.

        D = -sum of theta dl/dW [in, out]  ->  U, the direction of the step, of spectral norm about 1 or less

    sign      sign(D) / sqrt(in out)                                                     (Bernstein et al. 2018)
    adam      m^ / (sqrt(v^) + eps) / sqrt(in out), m and v the averages of D and D^2,
              m^ and v^ without the bias of their start                                  (Kingma and Ba 2015)
    shampoo   L^-1/4 D R^-1/4, L and R the sums of D D^T and D^T D                       (Gupta et al. 2018)
    muon      U V^T of B = eta B + D = U S V^T, by five Newton-Schulz steps              (Jordan et al. 2024)

All but adam's eps are blind to the scale of D, so how far to step is said apart. The sign has no gradient: an outer
model sees that of D / |D| in its place, which is as long.

Shapes: rows any number of matrices, D [rows, in, out].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.parts.orthogonal import JORDAN, Coefficients, orthogonal

TINY = 1e-12  # below every sum of squares that matters, above float32's smallest


class InnerOptimizer:
    """direction(D, history, eta [rows, 1, 1]) -> U, history. The history begins with zeros of `shapes`. Without any it
    is the sign's.
    """

    has_momentum = False  # whether it uses eta

    def shapes(self, n: int, m: int) -> list[tuple[int, int]]:
        """Of what is remembered for an n x m matrix."""
        return []

    def direction(self, D: Tensor, history: Sequence[Tensor], eta: Tensor) -> tuple[Tensor, list[Tensor]]:
        raise NotImplementedError

    def flops(self, n: int, m: int) -> int:
        """Of products, for one step of an n x m matrix."""
        return 0


class Sign(InnerOptimizer):
    """sign(D) / sqrt(in out), with the gradient of D / |D|."""

    def direction(self, D: Tensor, history: Sequence[Tensor], eta: Tensor) -> tuple[Tensor, list[Tensor]]:
        seen = D * (D.square().sum((-2, -1), keepdim=True) + TINY).rsqrt()
        return seen + (D.sign() / (D.shape[-2] * D.shape[-1]) ** 0.5 - seen).detach(), []


class Adam(InnerOptimizer):
    """m^ / (sqrt(v^) + eps) / sqrt(in out); the history is m, v and the number of steps."""

    betas, eps = (0.9, 0.95), 1e-6

    def shapes(self, n: int, m: int) -> list[tuple[int, int]]:
        return [(n, m), (n, m), (1, 1)]

    def direction(self, D: Tensor, history: Sequence[Tensor], eta: Tensor) -> tuple[Tensor, list[Tensor]]:
        (mean, square, count), (a, b) = history, self.betas
        mean, square, count = a * mean + (1 - a) * D, b * square + (1 - b) * D.square(), count + 1
        root = (square / (1 - b**count)).clamp(min=1e-30).sqrt() + self.eps  # at 0 without the infinite derivative
        return mean / (1 - a**count) / root / (D.shape[-2] * D.shape[-1]) ** 0.5, [mean, square, count]


class Shampoo(InnerOptimizer):
    """With `damping` times the mean eigenvalue added to L and R."""

    damping, iterations = 1e-2, 20

    def shapes(self, n: int, m: int) -> list[tuple[int, int]]:
        return [(n, n), (m, m)]

    def direction(self, D: Tensor, history: Sequence[Tensor], eta: Tensor) -> tuple[Tensor, list[Tensor]]:
        left, right = history[0] + D @ D.mT, history[1] + D.mT @ D
        return self._root(left) @ D @ self._root(right), [left, right]

    def _root(self, A: Tensor) -> Tensor:
        """(A + damping)^-1/4 by the coupled Newton iteration (Iannazzo 2006): with Y = I / c and Z = A / c^4 at first,
        T = (5 I - Z) / 4, Y <- Y T, Z <- T^4 Z, which goes to I. A step brings an eigenvalue of Z well below 1 to 2.44
        times itself, so that twenty are enough for one of 1e-5. Eigenvectors, whose derivatives are infinite where
        eigenvalues meet, are not needed.
        """
        I = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        mean = A.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        A = A + (self.damping * mean + TINY) * I
        norm = A.square().sum((-2, -1), keepdim=True).sqrt()
        Y, Z = I * norm.pow(-0.25), A / norm
        for _ in range(self.iterations):
            T = (5 * I - Z) / 4
            square = T @ T
            Y, Z = Y @ T, square @ square @ Z
        return Y

    def flops(self, n: int, m: int) -> int:
        return 2 * sum(n * m * x + (4 * self.iterations) * x**3 + n * m * x for x in (n, m))


class Muon(InnerOptimizer):
    """U V^T of B = eta B + D; the history is B. coefficients: of the Newton-Schulz steps."""

    has_momentum = True

    def __init__(self, coefficients: Coefficients = JORDAN) -> None:
        self.coefficients = coefficients

    def shapes(self, n: int, m: int) -> list[tuple[int, int]]:
        return [(n, m)]

    def direction(self, D: Tensor, history: Sequence[Tensor], eta: Tensor) -> tuple[Tensor, list[Tensor]]:
        D = eta * history[0] + D
        return orthogonal(D, self.coefficients), [D]

    def flops(self, n: int, m: int) -> int:
        small, large = min(n, m), max(n, m)
        return 5 * 2 * (2 * small**2 * large + small**3)


INNER_OPTIMIZERS = {"sign": Sign(), "adam": Adam(), "shampoo": Shampoo(), "muon": Muon()}
