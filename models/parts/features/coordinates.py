"""Maps that rectify: cheap, and positive but for the identity and the layer. Their kernels are their own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parts.features.base import FeatureMap, at_least_one, product
from models.parts.sizes import Sizes

LAYERS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class Identity(FeatureMap):
    """phi(k) = k: the memory is linear in the keys themselves."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes.key_dim)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x


class ReLU(FeatureMap):
    """phi(x) = max(0, x)^power, of width K: sparse; power 2 sharpens it (So et al. 2021)."""

    positive = True

    def __init__(self, sizes: Sizes, power: int = 1) -> None:
        super().__init__(sizes.key_dim)
        self.power = at_least_one("power", power)

    def phi(self, x: Tensor, positions: Tensor) -> Tensor:
        return x.relu() ** self.power


class ELU(FeatureMap):
    """phi(x) = 1 + ELU(x), that is x + 1 above zero and e^x below, of width K (Katharopoulos et al. 2020, equation 7).

    e^x is not computed as 1 + (e^x - 1), which float32 rounds to zero below -17: the features stay positive.
    """

    positive = True

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes.key_dim)

    def phi(self, x: Tensor, positions: Tensor) -> Tensor:
        return x.clamp(max=0).exp() + x.relu()


class CosFormer(FeatureMap):
    """phi(x) = relu(x) [cos(a_t), sin(a_t)], a_t = pi t / (2 length), of width 2K (Qin et al. 2022, section 3.2): the
    kernel relu(q) . relu(k) cos(a_t - a_i) fades with the distance t - i, to zero at `length` tokens.

    Further apart it is negative, so `length` is the longest sequence that the memory will see.
    """

    positive = True

    def __init__(self, sizes: Sizes, length: int) -> None:
        super().__init__(2 * sizes.key_dim)
        self.length = at_least_one("length", length)

    def phi(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = (positions.to(x.dtype) * (math.pi / 2 / self.length))[:, :, None, None]
        return torch.cat([x.relu() * angles.cos(), x.relu() * angles.sin()], dim=-1)


class DPFP(FeatureMap):
    """Deterministic parameter-free projection (Schlag et al. 2021, section 5.3): products of the rectified coordinates
    r = [relu(x), relu(-x)] with their neighbours up to `order` (the paper's nu) places away,

        phi(x) = [r_i r_{i-j}] for j = 1..order and i = 1..2K, i - j counted around ,    width 2 K order .

    Sparse and positive. With `feature_norm: sum` these are the features of the fast weight programmer.
    """

    positive = True

    def __init__(self, sizes: Sizes, order: int = 3) -> None:
        if at_least_one("order", order) >= 2 * sizes.key_dim:
            raise ValueError(f"features.order={order} must be below {2 * sizes.key_dim}, twice key_dim")
        super().__init__(2 * sizes.key_dim * order)
        self.order = order

    def phi(self, x: Tensor, positions: Tensor) -> Tensor:
        r = torch.cat([x.relu(), (-x).relu()], dim=-1)
        return torch.cat([r * r.roll(j, dims=-1) for j in range(1, self.order + 1)], dim=-1)


class Hedgehog(FeatureMap):
    """phi(x) = softmax([W x, -W x]), W [K, K] learned for every head from the identity, of width 2K: positive, of sum
    one, and as spiky as the data want it (Zhang et al. 2024, section 4; there W imitates a softmax layer first).
    """

    positive = True

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(2 * sizes.key_dim)
        self.num_heads = sizes.num_heads + sizes.num_kv_heads
        self.weight = nn.Parameter(torch.eye(sizes.key_dim).repeat(sizes.num_kv_heads, 1, 1))

    def phi(self, x: Tensor, positions: Tensor) -> Tensor:
        y = product(self.weight, x)
        return torch.cat([y, -y], dim=-1).softmax(-1)

    def flops_per_token(self) -> int:
        return 2 * self.num_heads * self.weight[0].numel()


class MLP(FeatureMap):
    """phi(x) = s(W x), W [width, K] learned for every head: the first layer of a network, of which a memory that is
    linear in phi then learns the last one within the sequence, by whatever rule it has (compare regression/deep/mlp.py,
    where both layers learn there).

    expansion: the width over K.  activation: silu | gelu | relu.  Rows of W are normal with variance 1 at the start,
    so that keys of length one see the activation bend.
    """

    def __init__(self, sizes: Sizes, expansion: int = 4, activation: str = "silu") -> None:
        super().__init__(at_least_one("expansion", expansion) * sizes.key_dim)
        if activation not in LAYERS:
            raise ValueError(f"features.activation={activation} is not one of {', '.join(LAYERS)}")
        self.activation, self.positive = LAYERS[activation], activation == "relu"
        self.num_heads = sizes.num_heads + sizes.num_kv_heads
        self.weight = nn.Parameter(torch.randn(sizes.num_kv_heads, self.width, sizes.key_dim))

    def phi(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.activation(product(self.weight, x))

    def flops_per_token(self) -> int:
        return 2 * self.num_heads * self.weight[0].numel()
