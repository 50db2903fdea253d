"""Landmark features: kernel regression in a memory of fixed size.

phi(x) = (kappa(Z, Z) + eps I)^{-1/2} kappa(Z, x) ,    kappa(z, x) = exp(-beta |z - x|^2 / 2) ,

with m landmarks Z. Then phi(q) . phi(k) = kappa(q, Z) (kappa(Z, Z) + eps I)^{-1} kappa(Z, k), Nystroem's approximation
of kappa (Williams and Seeger 2001), exact where Z holds the keys; least squares in phi is kernel ridge regression on
the span of the landmarks, with a state of m^2 instead of T^2. Nystroemformer (Xiong et al. 2021) and Skyformer (Chen
et al. 2021) take their landmarks from the whole sequence, which no causal model may; these are learned.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parts.features.base import FeatureMap, at_least_one
from models.parts.precision import wide
from models.parts.sizes import Sizes
from models.parts.solves import cholesky


class Nystrom(FeatureMap):
    """The features above, with landmarks per head that are learned, on the unit sphere like the keys they meet.

    num_landmarks: m, the width of the features.
    inverse_temperature: beta. "learned" is one per head, from sqrt(K); a positive number is fixed.
    jitter: eps. float32 knows the eigenvalues of kappa(Z, Z) to about m 6e-8, and its square root those of 1e-4 well.
    """

    def __init__(
        self,
        sizes: Sizes,
        num_landmarks: int = 64,
        inverse_temperature: str | float = "learned",
        jitter: float = 1e-4,
    ) -> None:
        super().__init__(at_least_one("num_landmarks", num_landmarks))
        if jitter <= 0:
            raise ValueError(f"features.jitter={jitter} must be positive")
        self.jitter, self.num_heads, self.key_dim = jitter, sizes.num_heads, sizes.key_dim
        self.landmarks = nn.Parameter(F.normalize(torch.randn(sizes.num_heads, num_landmarks, sizes.key_dim), dim=-1))
        self.log_beta = None
        if inverse_temperature == "learned":
            self.log_beta = nn.Parameter(torch.full((sizes.num_heads,), 0.5 * math.log(sizes.key_dim)))
        elif isinstance(inverse_temperature, int | float) and inverse_temperature > 0:
            self.beta = float(inverse_temperature)
        else:
            raise ValueError(
                f"features.inverse_temperature={inverse_temperature!r} must be 'learned' or a positive number"
            )

    def phi(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, T, H, K] to [B, T, H, m]. Whitened by the Cholesky factor, kappa(Z, Z) + eps I = L L^T: L^-1 is the
        inverse root up to a rotation, and has a gradient where eigenvalues meet. No product of features sees the
        rotation, nor least squares with one ridge for all; with a ridge per channel, which model=nystrom learns, it
        decides which directions they are.
        """
        beta = self.beta if self.log_beta is None else wide(self.log_beta).exp().view(-1, 1, 1)
        Z = F.normalize(self.landmarks.to(x.dtype), dim=-1)
        eye = torch.eye(self.width, dtype=x.dtype, device=x.device)
        between = (Z.unsqueeze(-2) - Z.unsqueeze(-3)).square().sum(-1)
        L = cholesky((-beta / 2 * between).exp() + self.jitter * eye)
        y = x.transpose(1, 2)
        distance = (1 + y.square().sum(-1, keepdim=True) - 2 * y @ Z.mT).clamp(min=0.0)
        phi = torch.linalg.solve_triangular(L, (-beta / 2 * distance).exp().mT, upper=False)
        return phi.permute(0, 3, 1, 2)

    def flops_per_token(self) -> int:
        """Of keys and queries the products with the landmarks; the triangular solve, m^2 a token, is left out."""
        return 2 * 2 * self.num_heads * self.width * self.key_dim
