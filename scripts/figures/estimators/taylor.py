"""E7: how many orders of its Taylor series softmax needs, by inverse temperature (scripts/figures/taylor.py)."""

from __future__ import annotations

from matplotlib.figure import Figure

from scripts.figures.estimators.finding import Finding, curve
from scripts.figures.results import Row, legend
from scripts.figures.taylor import ORDERS, random_keys

FEW, GOOD = 2, 0.05  # orders that a memory can hold, and an error that is small


def finding(num_queries: int = 64, num_keys: int = 512) -> Finding:
    curves = random_keys(num_queries, num_keys)
    table: list[Row] = []
    for found in curves:
        row: Row = {"keys": found.name, "largest weight": found.largest_weight}
        table.append(row | {f"order {p}": f"{found.errors[p]:.2g}" for p in (1, 2, 3, 4, 6, 8, 12)})
    flat, sharp = curves[0], curves[-1]
    checks = [
        (f"{flat.name}: order {FEW} has an error of {flat.errors[FEW]:.3f}", flat.errors[FEW] < GOOD),
        (f"{sharp.name}: order {FEW} has an error of {sharp.errors[FEW]:.3f}", sharp.errors[FEW] > 0.5),
    ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, found in enumerate(curves):
            curve(axes, i, ORDERS, found.errors, f"{found.name} (largest weight {found.largest_weight:.2f})")
        axes.set(yscale="log", ylim=(1e-8, 3), xlabel="order", ylabel="relative error of the output")
        legend(figure)

    return Finding(
        "The Taylor series of softmax",
        "A memory can hold the first orders of softmax's series. They are enough where weights are flat, and not where "
        "a few keys take all.",
        "Relative error of the output by the order of the series, for random keys of length one in 64 dimensions.",
        "Wang, Shi and Fox's talk (2025); Arora et al. 2024 (Based)",
        table,
        draw,
        checks,
    )
