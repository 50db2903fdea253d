"""Maps that draw directions at random, and are right in expectation about exponential kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.parts.features.base import FeatureMap, InverseTemperature, at_least_one, for_heads, product
from models.parts.sizes import Sizes


class RandomFeatures(FeatureMap):
    """What the random maps share: W [m, K] for every head, its rows from N(0, I), and sqrt(b) x.

    The kernel is right in expectation; its error falls like 1 / sqrt(m). orthogonal: the rows, in blocks of K, are at
    right angles and as long as independent ones (Yu et al. 2016; Choromanski et al. 2021), which takes 10 to 20 % off
    the error between random unit vectors (K = 32), though hardly any where q and k are nearly the same. seed: of the
    draw, which differs from head to head and is the same in every layer. It is no parameter, and saved with them.
    """

    directions: Tensor

    def __init__(
        self,
        sizes: Sizes,
        num_features: int = 128,
        orthogonal: bool = False,
        seed: int = 0,
        inverse_temperature: float | str = 1.0,
    ) -> None:
        super().__init__(at_least_one("num_features", num_features))
        self.num_heads = sizes.num_heads + sizes.num_kv_heads
        self.sharpen = InverseTemperature(sizes, inverse_temperature)
        # On the CPU in float32, whatever the defaults: the same numbers everywhere.
        self.draw(sizes, orthogonal, torch.Generator("cpu").manual_seed(seed))

    def draw(self, sizes: Sizes, orthogonal: bool, generator: torch.Generator) -> None:
        """Registers what is random."""
        W = _directions(sizes.num_kv_heads, self.width, sizes.key_dim, orthogonal, generator)
        self.register_buffer("directions", W)

    def flops_per_token(self) -> int:
        return 2 * self.num_heads * self.directions[0].numel()


class Cosine(RandomFeatures):
    """Random Fourier features (Rahimi and Recht 2007): phi(x) = sqrt(2/m) cos(W sqrt(b) x + c), c uniform in
    [0, 2 pi). phi(q) . phi(k) is exp(-b |q - k|^2 / 2) in expectation, and of either sign.
    """

    phases: Tensor

    def draw(self, sizes: Sizes, orthogonal: bool, generator: torch.Generator) -> None:
        super().draw(sizes, orthogonal, generator)
        turns = torch.rand(sizes.num_kv_heads, self.width, generator=generator, device="cpu", dtype=torch.float32)
        self.register_buffer("phases", 2 * math.pi * turns)

    def phi(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = product(self.directions, self.sharpen(x)) + for_heads(self.phases, x)
        return math.sqrt(2 / self.width) * angles.cos()


class Performer(RandomFeatures):
    """Positive random features (Choromanski et al. 2021, lemma 1): phi(x) = exp(W y - |y|^2 / 2) / sqrt(m), y = sqrt(b)
    x. phi(q) . phi(k) is exp(b q.k) in expectation, softmax's kernel. orthogonal: their FAVOR+.

    The variance grows like exp(b |q + k|^2): b of more than about 2 takes very many features. No maximum is taken off
    the exponents, as is usual: over keys it would look into the future. With keys and queries of length one (qk_norm:
    l2) none is needed: they stay below sqrt(b) |w|, about sqrt(b K), for every row w of W, and float32 ends at 88.
    """

    positive = True

    def phi(self, x: Tensor, positions: Tensor) -> Tensor:
        y = self.sharpen(x)
        exponents = product(self.directions, y) - y.square().sum(-1, keepdim=True) / 2
        return exponents.exp() / math.sqrt(self.width)


def _directions(heads: int, num_features: int, key_dim: int, orthogonal: bool, generator: torch.Generator) -> Tensor:
    """W [heads, num_features, key_dim] of RandomFeatures."""
    independent = torch.randn(heads, num_features, key_dim, generator=generator, device="cpu", dtype=torch.float32)
    if not orthogonal:
        return independent
    n = -(-num_features // key_dim)
    blocks = torch.randn(heads, n, key_dim, key_dim, generator=generator, device="cpu", dtype=torch.float32)
    Q, R = torch.linalg.qr(blocks)
    Q = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # uniform over the rotations (Mezzadri 2007)
    return Q.mT.flatten(1, 2)[:, :num_features] * independent.norm(dim=-1, keepdim=True)
