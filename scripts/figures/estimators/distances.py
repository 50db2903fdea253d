"""E5 and E6: keys of length one make softmax a kernel of distance; without its sum it is not stable.

softmax weights are exp(b q.k) / sum; |q - k|^2 = |q|^2 + |k|^2 - 2 q.k, so that with |k| = 1 they are those of the
Gaussian exp(-b |q - k|^2 / 2), whose factor of q cancels. Keys of other lengths are weighted by exp(b |k|^2 / 2) too.
The instability is that of a layer that is trained: its projections learn in-context regression by Adam, once with the
sum of the weights and once without, at several rates.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from models.regression.local.constant import kernel_weights
from scripts.figures.estimators.finding import Finding, curve
from scripts.figures.results import Row

SPREADS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # standard deviations of the logarithm of the keys' lengths
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
BETA, WIDTH = 8.0, 16


def identity(spread: float, g: torch.Generator) -> float:
    """The largest difference of a weight from that of the Gaussian of the distance, over 64 queries and 64 keys."""
    q, k = (F.normalize(torch.randn(1, 1, 64, WIDTH, generator=g, dtype=torch.float64), dim=-1) for _ in range(2))
    k = k * (spread * torch.randn(1, 1, 64, 1, generator=g, dtype=torch.float64)).exp()
    visible, beta = torch.ones(64, 64, dtype=torch.bool), torch.full((1, 1, 1), BETA, dtype=torch.float64)
    softmax = kernel_weights("gaussian", visible, q, k, beta)
    gaussian = (-BETA / 2 * (q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1)).exp()
    return (softmax - gaussian / gaussian.sum(-1, keepdim=True)).abs().max().item()


def trained(kernel: str, rate: float, steps: int, length: int = 64) -> list[float]:
    """Losses of a layer whose projections of q, k, v and o learn y = w.x in context; up to the first that is not
    finite. beta is 1 / sqrt(K), as usual."""
    g = torch.Generator().manual_seed(1)
    weights = [(torch.randn(WIDTH, WIDTH, generator=g) / WIDTH**0.5).requires_grad_() for _ in range(3)]
    optimizer = torch.optim.Adam(weights, lr=rate)
    visible, beta = torch.ones(length, length, dtype=torch.bool).tril(-1), torch.full((1, 1, 1), WIDTH**-0.5)
    losses: list[float] = []
    for _ in range(steps):
        x, w = torch.randn(16, 1, length, WIDTH, generator=g), torch.randn(16, 1, WIDTH, WIDTH, generator=g)
        y = x @ w / WIDTH**0.5
        q, k = x @ weights[0], x @ weights[1]
        o = kernel_weights(kernel, visible[1:], q[:, :, 1:], k, beta) @ y @ weights[2]
        loss = (o - y[:, :, 1:]).square().mean()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def finding(steps: int = 200) -> Finding:
    g = torch.Generator().manual_seed(0)
    apart = {spread: identity(spread, g) for spread in SPREADS}
    runs = {(kernel, rate): trained(kernel, rate, steps) for kernel in ("gaussian", "unnormalized") for rate in RATES}
    names = {"gaussian": "softmax", "unnormalized": "without the sum"}
    table: list[Row] = [
        {"keys' lengths, spread": s, "largest difference of a weight": f"{x:.1e}"} for s, x in apart.items()
    ]
    for rate in RATES:
        row: Row = {"rate": rate}
        for kernel, name in names.items():
            losses = runs[kernel, rate]
            row |= {f"{name}, largest loss": f"{max_finite(losses):.3g}", f"{name}, last loss": last(losses)}
        table.append(row)
    bad = [max_finite(runs["unnormalized", rate]) for rate in RATES]
    good = [max_finite(runs["gaussian", rate]) for rate in RATES]
    checks = [
        (f"at length one the weights are the same to {apart[0.0]:.1e}", apart[0.0] < 1e-12),
        (f"at a spread of 1 they differ by up to {apart[1.0]:.2f}", apart[1.0] > 0.1),
        (
            f"the largest loss of softmax at any rate is {max(good):.3g}, without the sum {max(bad):.3g}",
            max(bad) > 1e3 * max(good),
        ),
    ]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        curve(left, 0, [s or 0.003 for s in SPREADS], [max(x, 1e-17) for x in apart.values()], "difference")
        left.set(xscale="log", yscale="log", xlabel="spread of the keys' lengths (leftmost: none)",
                 ylabel="largest difference of a weight", title="softmax beside the kernel of distance")  # fmt: skip
        for i, (kernel, name) in enumerate(names.items()):
            for rate in (RATES[2], RATES[4]):
                losses = [x for x in runs[kernel, rate] if math.isfinite(x)]
                curve(
                    right,
                    2 * i + (rate == RATES[4]),
                    range(1, 1 + len(losses)),
                    losses,
                    f"{name}, rate {rate:g}",
                    False,
                )
        right.set(yscale="log", xlabel="step", ylabel="loss", title="one layer, trained")
        right.legend(frameon=False, fontsize=8)

    return Finding(
        "Softmax as a kernel of distance, and without its sum",
        "Queries and keys of length one make softmax attention a kernel of distance. Exponential weights that are not "
        "divided by their sum have outputs without a bound, and training with them is not stable.",
        "Above: softmax weights beside those of a Gaussian kernel. Below: losses of one layer in training, by rate.",
        "Wang, Shi and Fox's talk (2025)",
        table,
        draw,
        checks,
    )


def max_finite(losses: list[float]) -> float:
    return max((x for x in losses if math.isfinite(x)), default=math.nan)


def last(losses: list[float]) -> str:
    return f"{losses[-1]:.3g}" if math.isfinite(losses[-1]) else f"none from step {len(losses)} on"
