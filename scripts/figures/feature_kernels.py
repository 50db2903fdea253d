"""How well features stand for an exponential kernel, without training: error against number and against order.

    python scripts/figures/feature_kernels.py [--folder figures] [--key-dim 64] [--pairs 200] [--draws 50] ...

Error: the root mean square of phi(q).phi(k) - kernel over that of the kernel. The kernel is exp(b q.k), or
exp(-b |q - k|^2 / 2) for random Fourier features; b is the inverse temperature. Random maps: over pairs of random unit
vectors, and the median over draws (positive features have rare large errors, which make a mean over draws jump).
Taylor: over all cosines between -1 and 1; its kernel depends on q.k alone, so vectors of two numbers show what any
others would. Writes feature_kernels.png and feature_kernels.csv to the folder. Half a minute on one core.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from models.parts.features import Cosine, FeatureMap, Performer, Taylor
from models.parts.sizes import Sizes

RANDOM = {  # name: (map, orthogonal, colour)
    "Fourier": (Cosine, False, "tab:orange"),
    "Fourier, orthogonal": (Cosine, True, "tab:red"),
    "positive": (Performer, False, "tab:blue"),
    "positive, orthogonal": (Performer, True, "tab:purple"),
}
SHARPNESS = (1.0, 2.0)  # inverse temperatures of the random maps
TAYLOR_SHARPNESS = (1.0, 2.0, 4.0, 8.0)


class Point(NamedTuple):
    """One point of a curve, and one row of the table."""

    features: str
    inverse_temperature: float
    number: int  # of random features, or the order
    error: float


def relative_error(maps: Sequence[FeatureMap], q: Tensor, k: Tensor, kernel: Tensor) -> float:
    """Its median over the maps. q, k [N, K], kernel [N]."""
    positions, found = torch.arange(len(q)).unsqueeze(0), []
    for features in maps:
        phi_q, phi_k = (features.double()(x[None, :, None], positions)[0, :, 0] for x in (q, k))
        found.append((phi_q * phi_k).sum(-1))
    return ((torch.stack(found) - kernel).square().mean(1).median() / kernel.square().mean()).sqrt().item()


def random_points(key_dim: int, pairs: int, draws: int, most: int) -> list[Point]:
    g, found = torch.Generator().manual_seed(0), []
    q, k = (F.normalize(torch.randn(pairs, key_dim, generator=g, dtype=torch.float64), dim=-1) for _ in range(2))
    numbers = [2**i for i in range(4, most.bit_length())]
    for (name, (make, orthogonal, _)), b, m in product(RANDOM.items(), SHARPNESS, numbers):
        kernel = (b * (q * k).sum(-1) if make is Performer else -b * (q - k).square().sum(-1) / 2).exp()
        maps = [make(Sizes(0, 1, 1, key_dim, 1), m, orthogonal, seed, b) for seed in range(draws)]
        found.append(Point(name, b, m, relative_error(maps, q, k, kernel)))
    return found


def taylor_points(order: int) -> list[Point]:
    cosine = torch.linspace(-1, 1, 401, dtype=torch.float64)
    q = torch.stack([cosine, (1 - cosine.square()).sqrt()], dim=-1)
    k, found = torch.tensor([1.0, 0.0]).expand_as(q).double(), []
    for b, p in product(TAYLOR_SHARPNESS, range(1, order + 1)):
        found.append(
            Point("Taylor", b, p, relative_error([Taylor(Sizes(0, 1, 1, 2, 1), p, b)], q, k, (b * cosine).exp()))
        )
    return found


def draw(points: list[Point], key_dim: int, path: Path) -> None:
    figure = Figure(figsize=(12, 4), layout="constrained")
    *random, taylor = figure.subplots(1, 3)

    def line(features: str, b: float) -> tuple[list[int], list[float]]:
        chosen = [p for p in points if (p.features, p.inverse_temperature) == (features, b)]
        return [p.number for p in chosen], [p.error for p in chosen]

    for ax, b in zip(random, SHARPNESS, strict=True):
        for name, (_, orthogonal, colour) in RANDOM.items():
            ax.plot(*line(name, b), "o-" if orthogonal else "s--", color=colour, label=name, markersize=4)
        numbers, errors = line(name, b)
        guide = [errors[0] / 2 * (numbers[0] / m) ** 0.5 for m in numbers]
        ax.plot(numbers, guide, ":", color="0.5", label="1 / sqrt(m)")
        ax.set_xscale("log", base=2)
        ax.set(title=f"Random features, K = {key_dim}, b = {b:g}", xlabel="number of features m")
        ax.sharey(random[0])
    for i, b in enumerate(TAYLOR_SHARPNESS):
        taylor.plot(*line("Taylor", b), "o-", color=f"C{i}", label=f"b = {b:g}", markersize=4)
    taylor.xaxis.set_major_locator(MaxNLocator(integer=True))
    taylor.set(title="Taylor features", xlabel="order p")
    for ax in (*random, taylor):
        ax.set_yscale("log")
        ax.set_ylabel("relative error of the kernel (rms)")
        ax.grid(alpha=0.3, which="both")
        ax.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("figures"), help="where to write")
    parser.add_argument("--key-dim", type=int, default=64, help="K")
    parser.add_argument("--pairs", type=int, default=200, help="of random unit vectors")
    parser.add_argument("--draws", type=int, default=50, help="of each random map")
    parser.add_argument("--most", type=int, default=2048, help="random features, from 16 by doubling")
    parser.add_argument("--order", type=int, default=16, help="the last of Taylor")
    args = parser.parse_args()
    points = random_points(args.key_dim, args.pairs, args.draws, args.most) + taylor_points(args.order)
    args.folder.mkdir(parents=True, exist_ok=True)
    with open(args.folder / "feature_kernels.csv", "w", newline="") as file:
        csv.writer(file).writerows([Point._fields, *points])
    draw(points, args.key_dim, args.folder / "feature_kernels.png")
    print(f"{args.folder / 'feature_kernels.png'} and .csv")


if __name__ == "__main__":
    main()
