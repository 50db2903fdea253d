"""E10: least squares in the right features fits a parabola without an error.

y = sum_i w_i (x_i^2 - 1) / sqrt(2), from pairs of a vector and a number (data/regression.py). What is fitted is the
smallest solution of the least squares of all pairs so far, without a ridge; the error is that of the next pair.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from data.regression import InContextRegression
from models.parts.features import Cosine, Polynomial
from models.parts.sizes import Sizes
from scripts.figures.estimators.finding import Finding, curve
from scripts.figures.results import Row

D = 8


def maps() -> dict[str, torch.nn.Module]:
    sizes = Sizes(0, 1, 1, D, 1)
    return {
        "x": torch.nn.Identity(),
        "1, x_i^2": torch.nn.Identity(),  # made below: no map of ours, the smallest that holds the function
        "all monomials to degree 2": Polynomial(sizes, 2),
        "64 random cosines": Cosine(sizes, 64),
        "256 random cosines": Cosine(sizes, 256),
    }


def features(name: str, phi: Any, x: Tensor) -> Tensor:
    """[N, n, features], float64."""
    if name == "1, x_i^2":
        return torch.cat([torch.ones_like(x[..., :1]), x**2], dim=-1)
    if isinstance(phi, torch.nn.Identity):
        return x
    with torch.no_grad():
        return phi.double().phi(x.unsqueeze(2), torch.arange(x.shape[1])).squeeze(2)


def finding(sequences: int = 16, pairs: int = 96, every: int = 4) -> Finding:
    task = InContextRegression(2 * pairs, "parabola", size=D, test_length=2 * pairs)
    x, y = (torch.from_numpy(a) for a in task.pairs("validation", pairs, np.arange(sequences)))
    counts = range(every, pairs, every)
    errors: dict[str, list[float]] = {}
    widths: dict[str, int] = {}
    for name, phi in maps().items():
        f = features(name, phi, x)
        widths[name] = f.shape[-1]
        fits = (torch.linalg.lstsq(f[:, :n], y[:, :n, None], driver="gelsd").solution for n in counts)
        errors[name] = [
            ((f[:, n : n + every] @ w).squeeze(-1) - y[:, n : n + every]).square().mean().item()
            for n, w in zip(counts, fits, strict=True)
        ]
    shown = [n for n in (8, 12, 24, 44, 48, 64, 92) if n in counts]
    table: list[Row] = [
        {"features": name, "number": widths[name]}
        | {f"after {n} pairs": f"{errors[name][counts.index(n)]:.1e}" for n in shown}
        for name in errors
    ]
    right = [errors[name][-1] for name in ("1, x_i^2", "all monomials to degree 2")]
    checks = [
        (f"the error in the right features is {max(right):.0e} after all pairs", max(right) < 1e-20),
        (f"in x itself it is {errors['x'][-1]:.2f}, where the values have a variance of 1", errors["x"][-1] > 0.5),
    ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (name, of) in enumerate(errors.items()):
            curve(axes, i, counts, of, f"{name} ({widths[name]})")
        axes.set(yscale="log", xlabel="pairs so far", ylabel="squared error of the next pairs")
        axes.legend(frameon=False, fontsize=8)

    return Finding(
        "A parabola by least squares in features",
        "Least squares in features that hold the function fits it exactly, as soon as there are as many pairs as "
        "features; in others an error stays, however many pairs there are.",
        "Mean squared error of the next pairs, by the pairs so far; the values have a variance of 1.",
        "Wang, Shi and Fox's talk (2025)",
        table,
        draw,
        checks,
    )
