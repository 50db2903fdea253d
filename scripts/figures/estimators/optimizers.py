"""E8: sign, Adam, Shampoo and Muon as the rule by which a memory learns in context.

A memory m(k), linear or a network of one hidden layer, is shown a sequence of pairs once, `BATCH` at a time, and makes
a step of its optimizer for each such batch (models/regression/deep/optimizers.py). Its error of a batch is taken before
that step. Each optimizer has the rate that is best on the last quarter of other sequences.
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from models.regression.deep.optimizers import INNER_OPTIMIZERS
from scripts.figures.estimators.finding import Finding, curve
from scripts.figures.results import Row, legend

WIDTH, HIDDEN, BATCH, ETA = 16, 32, 4, 0.9
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
NAMES = ("sgd", "momentum", *INNER_OPTIMIZERS)
MAPS = ("linear", "anisotropic", "nonlinear")


def pairs(kind: str, sequences: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and values [N, n, WIDTH], a map for each sequence; both of variance 1. anisotropic: channel i of a key has a
    variance in proportion to 1 / i^2. nonlinear: W_2 tanh(W_1 k)."""
    g = torch.Generator().manual_seed(seed)
    k, W, V = (torch.randn(sequences, n, WIDTH, generator=g) for n in (count, WIDTH, WIDTH))
    if kind == "anisotropic":
        variance = 1 / torch.arange(1, WIDTH + 1) ** 2
        k = k * (variance * WIDTH / variance.sum()).sqrt()
    v = torch.tanh(2 * k @ W / WIDTH**0.5) @ V if kind == "nonlinear" else k @ W
    return k, v / v.square().mean((1, 2), keepdim=True).sqrt()


def along(name: str, rate: float, deep: bool, k: Tensor, v: Tensor) -> Tensor:
    """Squared errors of each batch before its step, [n / BATCH], inf from where the memory has left all bounds."""
    N, n, _ = k.shape
    g = torch.Generator().manual_seed(0)
    shapes = [(WIDTH, HIDDEN), (HIDDEN, WIDTH)] if deep else [(WIDTH, WIDTH)]
    scale = 1.0 if deep else 0.0  # a network of zeros would not learn, and a matrix has no need of chance
    weights = [scale * torch.randn(1, *s, generator=g).expand(N, -1, -1) / s[0] ** 0.5 for s in shapes]
    optimizer = INNER_OPTIMIZERS.get(name)
    kept = [optimizer.shapes(*s) if optimizer else [s] for s in shapes]
    history = [[torch.zeros(N, *s) for s in of] for of in kept]
    eta, errors = torch.full((N, 1, 1), ETA), []
    for begin in range(0, n, BATCH):
        x, y = k[:, begin : begin + BATCH], v[:, begin : begin + BATCH]
        weights = [w.detach().requires_grad_() for w in weights]
        h = x @ weights[0]
        error = ((torch.nn.functional.silu(h) @ weights[1] if deep else h) - y).square()
        errors.append(error.detach().mean())
        gradients = torch.autograd.grad(error.sum() / (2 * BATCH), weights)
        for i, (w, gradient) in enumerate(zip(weights, gradients, strict=True)):
            if optimizer:
                step, history[i] = optimizer.direction(-gradient, history[i], eta)
            else:
                step = history[i][0] = (ETA if name == "momentum" else 0.0) * history[i][0] - gradient
            weights[i] = w.detach() + rate * step.detach()
    found = torch.stack(errors)
    return found.masked_fill(~(found < 1e6), torch.inf)


def finding(sequences: int = 16, count: int = 256, rates: tuple[float, ...] = RATES) -> Finding:
    curves: dict[tuple[str, str, str], Tensor] = {}
    chosen: dict[tuple[str, str, str], float] = {}
    for memory, deep in (("matrix", False), ("network", True)):
        for kind in MAPS:
            other, shown = (pairs(kind, sequences, count, seed) for seed in (1, 2))
            for name in NAMES:
                losses = {rate: late_error(along(name, rate, deep, *other)) for rate in rates}
                best = min(losses, key=losses.__getitem__)
                chosen[memory, kind, name] = best
                curves[memory, kind, name] = along(name, best, deep, *shown)
    table: list[Row] = []
    for memory in ("matrix", "network"):
        for name in NAMES:
            of = {kind: f"{late_error(curves[memory, kind, name]):.2g}" for kind in MAPS}
            table.append({"memory": memory, "optimizer": name} | of | {"rates": rates_of(chosen, memory, name)})
    end = {key: late_error(of) for key, of in curves.items()}
    second = min(("adam", "shampoo", "muon"), key=lambda name: end["matrix", "anisotropic", name])
    checks = [
        (
            f"matrix, anisotropic keys: {second} {end['matrix', 'anisotropic', second]:.2g}, below sgd "
            f"{end['matrix', 'anisotropic', 'sgd']:.2g}",
            end["matrix", "anisotropic", second] < end["matrix", "anisotropic", "sgd"],
        ),
        (
            f"a nonlinear map: the network {min(end['network', 'nonlinear', n] for n in NAMES):.2g}, below the matrix "
            f"{min(end['matrix', 'nonlinear', n] for n in NAMES):.2g}",
            min(end["network", "nonlinear", n] for n in NAMES) < min(end["matrix", "nonlinear", n] for n in NAMES),
        ),
    ]

    def draw(figure: Figure) -> None:
        panels = [(memory, kind) for memory in ("matrix", "network") for kind in MAPS]
        for axes, (memory, kind) in zip(figure.subplots(2, len(MAPS), sharey=True).flat, panels, strict=True):
            for i, name in enumerate(NAMES):
                smooth = curves[memory, kind, name].unfold(0, 4, 4).mean(-1).clamp(max=10)
                x = range(2 * BATCH, 2 * BATCH + 4 * BATCH * len(smooth), 4 * BATCH)
                curve(axes, i, x, smooth.tolist(), name, marked=False)
            axes.set(yscale="log", xlabel="pairs so far", title=f"{memory}, {kind}")
            axes.label_outer()
        figure.supylabel("squared error", fontsize=9)
        legend(figure)

    return Finding(
        "The optimizer inside",
        "A memory may learn in context by any optimizer. One that takes account of the directions' different scales "
        "learns more of the same pairs where the keys' channels differ.",
        "Mean squared error over the last quarter of the pairs, each at its best rate; 1 for a memory that says 0.",
        "Wang, Shi and Fox's talk (2025)",
        table,
        draw,
        checks,
    )


def late_error(curve: Tensor) -> float:
    return curve[-len(curve) // 4 :].mean().item()


def rates_of(chosen: dict[tuple[str, str, str], float], memory: str, name: str) -> str:
    return ", ".join(f"{chosen[memory, kind, name]:g}" for kind in MAPS)
