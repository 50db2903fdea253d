"""phi: the feature maps through which a memory sees keys and queries.

    features(x [B, T, H, K], positions [B, T]) -> [B, T, H, width]

Keys and queries go through the same map, as they must for phi(q) . phi(k) to be a kernel of q and k: a memory that is
linear in the features is a kernel machine of fixed size. A map sees one token at a time. What it draws or learns for a
head belongs to the key head; queries of a group share it.

    kernel                      maps                                positive
    its own                     ReLU, ELU, DPFP, Hedgehog           yes
    its own, of the distance    CosFormer                           up to `length` tokens
    (c + b q.k)^p               Polynomial, Rebased (c = 0)         where p is even
    sum_{j<=p} (b q.k)^j / j!   Taylor                              where p is even
    exp(b q.k)                  Performer, in expectation           yes
    exp(-b |q - k|^2 / 2)       Cosine, in expectation              no

Only a positive kernel may be divided by its sum (`normalizer: true`); the others' sums can vanish. b, the inverse
temperature, sharpens the kernel: phi sees sqrt(b) x. It is a number, or "learned", one per head from 1.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn

from models.precision import wide
from models.sizes import Sizes

WIDEST = 16384  # monomials: at V = 128 a memory of 8 MB per head and sequence


class FeatureMap(nn.Module):
    """What all maps share: `phi`, the map itself, gets x in float32 at least and autocast off; features are in the
    dtype of x, whose range they keep because bfloat16 has float32's.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def phi(self, x: Tensor, positions: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.phi(wide(x), positions).to(x.dtype)

    def flops_per_token(self) -> int:
        """Products of the token's queries and keys with weights."""
        return 0


class Identity(FeatureMap):
    """phi(k) = k: the memory is linear in the keys themselves."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes.key_dim)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x


class ReLU(FeatureMap):
    """phi(x) = max(0, x)^power, of width K: sparse; power 2 sharpens it (So et al. 2021)."""

    def __init__(self, sizes: Sizes, power: int = 1) -> None:
        super().__init__(sizes.key_dim)
        self.power = _at_least_one("power", power)

    def phi(self, x: Tensor, positions: Tensor) -> Tensor:
        return x.relu() ** self.power


class ELU(FeatureMap):
    """phi(x) = 1 + ELU(x), that is x + 1 above zero and e^x below, of width K (Katharopoulos et al. 2020, equation 7).

    e^x is not computed as 1 + (e^x - 1), which float32 rounds to zero below -17: the features stay positive.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes.key_dim)

    def phi(self, x: Tensor, positions: Tensor) -> Tensor:
        return x.clamp(max=0).exp() + x.relu()


class DPFP(FeatureMap):
    """Deterministic parameter-free projection (Schlag et al. 2021, section 5.3): products of the rectified coordinates
    r = [relu(x), relu(-x)] with their neighbours up to `order` (the paper's nu) places away,

        phi(x) = [r_i r_{i-j}] for j = 1..order and i = 1..2K, i - j counted around ,    width 2 K order .

    Sparse and positive. With `feature_norm: sum` these are the features of the fast weight programmer.
    """

    def __init__(self, sizes: Sizes, order: int = 3) -> None:
        if _at_least_one("order", order) >= 2 * sizes.key_dim:
            raise ValueError(f"features.order={order} must be below {2 * sizes.key_dim}, twice key_dim")
        super().__init__(2 * sizes.key_dim * order)
        self.order = order

    def phi(self, x: Tensor, positions: Tensor) -> Tensor:
        r = torch.cat([x.relu(), (-x).relu()], dim=-1)
        return torch.cat([r * r.roll(j, dims=-1) for j in range(1, self.order + 1)], dim=-1)


class Monomials(FeatureMap):
    """phi of the kernel sum_j a_j (b q.k)^j, a_0 .. a_p >= 0: every monomial of the degrees that have a_j > 0, once,

        sqrt(a_j j! / (n_1! ... n_K!)) y_1^n_1 ... y_K^n_K ,    y = sqrt(b) x ,    n_1 + ... + n_K = j ,

    in width sum_j C(K + j - 1, j). setting: what its YAML calls p, for the message of the ValueError that more than
    WIDEST of them raise.
    """

    def __init__(self, sizes: Sizes, a: list[float], setting: str, inverse_temperature: float | str = 1.0) -> None:
        degrees = [j for j, coefficient in enumerate(a) if coefficient]
        _check_width(sizes.key_dim, len(a) - 1, degrees, setting)
        super().__init__(_num_monomials(sizes.key_dim, degrees))
        self.a = a
        self.sharpen = InverseTemperature(sizes, inverse_temperature)
        # Whole numbers, so that no cast of the model rounds them; persistent, because from_pretrained fills no others.
        counts = [n for j in degrees for n in _multinomials(sizes.key_dim, j)]
        self.register_buffer("multinomials", torch.tensor(counts))

    def phi(self, x: Tensor, positions: Tensor) -> Tensor:
        powers = symmetric_powers(self.sharpen(x), len(self.a) - 1)
        kept = [math.sqrt(a) * power for a, power in zip(self.a, powers, strict=True) if a]
        return torch.cat(kept, dim=-1) * self.multinomials.to(x.dtype).sqrt()


class Polynomial(Monomials):
    """phi(q) . phi(k) = (offset + b q.k)^degree: all monomials up to the degree, or of that degree alone where the
    offset is 0. Least squares in these features fits any polynomial of the degree exactly (b = inverse_temperature).
    """

    def __init__(
        self, sizes: Sizes, degree: int = 2, offset: float = 1.0, inverse_temperature: float | str = 1.0
    ) -> None:
        _at_least_one("degree", degree)
        if offset < 0:
            raise ValueError(f"features.offset={offset} must be at least 0: a kernel has no negative coefficients")
        a = [math.comb(degree, j) * offset ** (degree - j) for j in range(degree + 1)]
        super().__init__(sizes, a, "degree", inverse_temperature)


class Taylor(Monomials):
    """phi(q) . phi(k) = sum_{j <= order} (b q.k)^j / j!, softmax's kernel exp(b q.k) up to the order (Based, Arora et
    al. 2024, section 4.1: order 2 and K = 16; b = inverse_temperature).

    Good for |b q.k| up to about the order. Even orders are positive; odd ones are not.
    """

    def __init__(self, sizes: Sizes, order: int = 2, inverse_temperature: float | str = 1.0) -> None:
        _at_least_one("order", order)
        super().__init__(sizes, [1 / math.factorial(j) for j in range(order + 1)], "order", inverse_temperature)


class InverseTemperature(nn.Module):
    """sqrt(b) x, so that a kernel of q.k becomes one of b q.k."""

    def __init__(self, sizes: Sizes, inverse_temperature: float | str) -> None:
        super().__init__()
        self.log_beta = None
        if inverse_temperature == "learned":
            self.log_beta = nn.Parameter(torch.zeros(sizes.num_kv_heads))
        elif isinstance(inverse_temperature, int | float) and inverse_temperature > 0:
            self.root = math.sqrt(inverse_temperature)
        else:
            raise ValueError(
                f"features.inverse_temperature={inverse_temperature!r} must be 'learned' or a positive number"
            )

    def forward(self, x: Tensor) -> Tensor:
        return x * (
            self.root if self.log_beta is None else _for_heads((wide(self.log_beta) / 2).exp(), x).unsqueeze(-1)
        )


def symmetric_powers(x: Tensor, degree: int) -> list[Tensor]:
    """For j = 0..degree all monomials of degree j in x_1..x_K, each once, [..., C(K + j - 1, j)].

    In lexicographic order those without x_1..x_i stand last, so degree j is, for every i, x_i times the end of degree
    j - 1 that begins with x_i. (Slices: three times as fast as gathering by index, whose gradient scatters.)
    """
    K, powers = x.shape[-1], [torch.ones_like(x[..., :1]), x]
    for j in range(2, degree + 1):
        ends = [_num_monomials(K - i, [j - 1]) for i in range(K)]
        powers.append(torch.cat([x[..., i : i + 1] * powers[-1][..., -end:] for i, end in enumerate(ends)], dim=-1))
    return powers


@cache
def _multinomials(key_dim: int, degree: int) -> list[int]:
    """degree! / (n_1! ... n_K!) of every monomial, in the order of symmetric_powers."""
    return [
        math.factorial(degree) // math.prod(math.factorial(chosen.count(i)) for i in set(chosen))
        for chosen in combinations_with_replacement(range(key_dim), degree)
    ]


def _num_monomials(key_dim: int, degrees: list[int]) -> int:
    return sum(math.comb(key_dim + j - 1, j) for j in degrees)


def _check_width(key_dim: int, degree: int, degrees: list[int], setting: str) -> None:
    """Raises ValueError for more than WIDEST monomials, with the degree and the key_dim that would do."""
    if (width := _num_monomials(key_dim, degrees)) <= WIDEST:
        return
    lower = max(p for p in range(degree) if _num_monomials(key_dim, list(range(p + 1))) <= WIDEST)
    narrower = max(K for K in range(1, key_dim) if _num_monomials(K, degrees) <= WIDEST)
    raise ValueError(
        f"features.{setting}={degree} makes {width:,} features of key_dim={key_dim}, more than {WIDEST:,}; "
        f"{setting}={lower} at this key_dim or key_dim={narrower} at this {setting} would do"
    )


def _for_heads(parameter: Tensor, x: Tensor) -> Tensor:
    """parameter [G, ...] of the key heads for the heads of x [B, T, H, K]: [H, ...]."""
    return wide(parameter).repeat_interleave(x.shape[2] // len(parameter), dim=0)


def _at_least_one(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"features.{name}={value} must be a whole number of at least 1")
    return value
