"""Maps of exact kernels that are polynomials of q.k."""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations_with_replacement
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parts.features.base import FeatureMap, InverseTemperature, at_least_one, for_heads
from models.parts.sizes import Sizes

WIDEST = 16384  # monomials: at V = 128 a memory of 8 MB per head and sequence


class Monomials(FeatureMap):
    """phi of the kernel sum_j a_j (b q.k)^j, a_0 .. a_p >= 0: every monomial of the degrees that have a_j > 0, once,

        sqrt(a_j j! / (n_1! ... n_K!)) y_1^n_1 ... y_K^n_K ,    y = sqrt(b) x ,    n_1 + ... + n_K = j ,

    in width sum_j C(K + j - 1, j). setting: what its YAML calls p, for the message of the ValueError that more than
    WIDEST of them raise.
    """

    multinomials: Tensor

    def __init__(self, sizes: Sizes, a: list[float], setting: str, inverse_temperature: float | str = 1.0) -> None:
        degrees = [j for j, coefficient in enumerate(a) if coefficient]
        _check_width(sizes.key_dim, len(a) - 1, degrees, setting)
        super().__init__(_num_monomials(sizes.key_dim, degrees))
        self.a, self.positive = a, len(a) % 2 == 1  # even powers are, and sums of exp's series that end in one
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
        at_least_one("degree", degree)
        if offset < 0:
            raise ValueError(f"features.offset={offset} must be at least 0: a kernel has no negative coefficients")
        a = [math.comb(degree, j) * offset ** (degree - j) for j in range(degree + 1)]
        super().__init__(sizes, a, "degree", inverse_temperature)


class Rebased(Monomials):
    """phi(q) . phi(k) = (q' . k')^2 / K, x' = g layer_norm(x) + h, with g and h [K] learned for every head from 1 and
    0: a parabola that learns where its zeros are, of width K (K + 1) / 2 (Aksenov et al. 2024, section 4).
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes, [0.0, 0.0, 1 / sizes.key_dim], "degree")
        self.scale = nn.Parameter(torch.ones(sizes.num_kv_heads, sizes.key_dim))
        self.shift = nn.Parameter(torch.zeros(sizes.num_kv_heads, sizes.key_dim))

    def phi(self, x: Tensor, positions: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:]) * for_heads(self.scale, x) + for_heads(self.shift, x)
        return super().phi(x, positions)


class Taylor(Monomials):
    """phi(q) . phi(k) = sum_{j <= order} (b q.k)^j / j!, softmax's kernel exp(b q.k) up to the order (Based, Arora et
    al. 2024, section 4.1: order 2 and K = 16; b = inverse_temperature).

    Good for |b q.k| up to about the order. Even orders are positive; odd ones are not.
    """

    def __init__(self, sizes: Sizes, order: int = 2, inverse_temperature: float | str = 1.0) -> None:
        at_least_one("order", order)
        super().__init__(sizes, [1 / math.factorial(j) for j in range(order + 1)], "order", inverse_temperature)


def symmetric_powers(x: Tensor, degree: int) -> list[Tensor]:
    """For j = 0..degree all monomials of degree j in x_1..x_K, each once, [..., C(K + j - 1, j)].

    In lexicographic order those without x_1..x_i stand last, so degree j is, for every i, x_i times the end of degree
    j - 1 that begins with x_i. (Slices: three times as fast as gathering by index, whose gradient scatters. A compiler
    makes a kernel of every slice, and of a gathered square, whose gradient gathers too, one.)
    """
    K, powers = x.shape[-1], [torch.ones_like(x[..., :1]), x]
    if torch.compiler.is_compiling() and degree > 1:
        powers.append(_Squares.apply(x))
    for j in range(len(powers), degree + 1):
        ends = [_num_monomials(K - i, [j - 1]) for i in range(K)]
        powers.append(torch.cat([x[..., i : i + 1] * powers[-1][..., -end:] for i, end in enumerate(ends)], dim=-1))
    return powers


class _Squares(torch.autograd.Function):
    """x_i x_j for i <= j. With D the gradient by all x_i x_j, a square's counted twice, dx = D x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        rows, columns = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        return x[..., rows] * x[..., columns]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        K, i = x.shape[-1], torch.arange(x.shape[-1], device=x.device)
        row, column = torch.minimum(i, i[:, None]), torch.maximum(i, i[:, None])
        place = row * (2 * K - row - 1) // 2 + column
        D = dy[..., place] * (1 + (row == column).to(dy.dtype))
        return (D * x.unsqueeze(-2)).sum(-1)


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
