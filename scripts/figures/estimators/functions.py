"""E13: errors along the sequence for the five functions of data/regression.py, by estimators that learned nothing.

What the trained models of the sweep `regression` should come near to, and what each estimator can hold. Those with one
number to choose have the one that is best on the last quarter of other sequences.
"""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from data.regression import FUNCTIONS, InContextRegression
from scripts.figures.estimators.finding import Finding, curve
from scripts.figures.results import Row, legend
from scripts.figures.switching_regression import WIDTH, global_fits, local_fits

BANDWIDTHS, STEPS = (1.0, 3.0, 10.0, 30.0, 100.0), (0.25, 0.5, 1.0, 1.5)
LOCAL = ("softmax (order 0)", "local linear (order 1)", "kernel ridge")


def delta(q: Tensor, k: Tensor, v: Tensor, step: float) -> Tensor:
    """S <- S + step k (v - k S) / |k|^2, read at q after each write."""
    S, reads = k.new_zeros(len(k), k.shape[-1], v.shape[-1]), []
    for t in range(k.shape[1]):
        key = k[:, t : t + 1]
        S = S + step / key.square().sum(-1, keepdim=True) * key.mT @ (v[:, t : t + 1] - key @ S)
        reads.append(q[:, t : t + 1] @ S)
    return torch.cat(reads, dim=1)


def predictions(x: Tensor, y: Tensor) -> dict[str, dict[float, Tensor]]:
    """Estimator -> its number -> what it says of each pair but the first."""
    q, k, v = x[:, 1:], x[:, :-1], y[:, :-1]
    found: dict[str, dict[float, Tensor]] = {name: {0.0: o} for name, o in global_fits(q, k, v).items()}
    found["delta rule"] = {step: delta(q, k, v, step) for step in STEPS}
    for h in BANDWIDTHS:
        for name, o in local_fits(q, k, v, h).items():
            if name in LOCAL:
                found.setdefault(name, {})[h] = o
    return found


def squared(function: str, split: str, sequences: int, pairs: int) -> dict[str, dict[float, Tensor]]:
    """Errors by the number of pairs seen, [pairs - 1]."""
    task = InContextRegression(2 * pairs, function, size=WIDTH, test_length=2 * pairs)
    x, y = (torch.from_numpy(a) for a in task.pairs(split, pairs, np.arange(sequences)))
    each = predictions(x, y[..., None])
    return {name: {h: (o - y[:, 1:, None]).square().mean((0, 2)) for h, o in of.items()} for name, of in each.items()}


def finding(sequences: int = 48, pairs: int = 64) -> Finding:
    errors: dict[str, dict[str, Tensor]] = {}
    for function in FUNCTIONS:
        tuned, found = (squared(function, split, sequences, pairs) for split in ("train", "validation"))
        losses = {name: {h: x[-pairs // 4 :].mean().item() for h, x in of.items()} for name, of in tuned.items()}
        errors[function] = {name: found[name][min(of, key=of.__getitem__)] for name, of in losses.items()}
    names = list(errors["linear"])
    late = {(f, name): errors[f][name][-pairs // 4 :].mean().item() for f in FUNCTIONS for name in names}
    table: list[Row] = [{"estimator": name} | {f: f"{late[f, name]:.2g}" for f in FUNCTIONS} for name in names]

    def below(function: str, first: str, second: str) -> tuple[str, bool]:
        a, b = late[function, first], late[function, second]
        return f"{function}: {first} {a:.2g}, below {second} {b:.2g}", a < b

    checks = [
        below("linear", "least squares", "delta rule"),
        below("linear", "delta rule", "linear attention / t"),
        below("anisotropic", "least squares", "delta rule"),
        below("switching", "delta rule", "least squares"),
        below("piecewise", "local linear (order 1)", "least squares"),
        below("parabola", "kernel ridge", "least squares"),
    ]

    def draw(figure: Figure) -> None:
        for axes, function in zip(figure.subplots(1, len(FUNCTIONS), sharey=True), FUNCTIONS, strict=True):
            for i, name in enumerate(names):
                smooth = errors[function][name].unfold(0, 4, 4).mean(-1)
                curve(axes, i, range(4, 4 + 4 * len(smooth), 4), smooth.clamp(min=1e-4).tolist(), name, marked=False)
            axes.set(yscale="log", ylim=(1e-4, 5), xlabel="pairs so far", title=function)
            axes.label_outer()
        figure.axes[0].set_ylabel("squared error")
        legend(figure)

    return Finding(
        "In-context regression, nothing learned",
        "Which functions are found in context depends on what is fitted: least squares finds a linear map as soon as "
        "there are enough pairs, a delta rule forgets one that has changed, local fits follow what is not linear.",
        f"Mean squared error over the last quarter of {pairs} pairs in {WIDTH} dimensions; 1 for one that says 0.",
        "Wang, Shi and Fox's talk (2025); Garg et al. 2022 for the task",
        table,
        draw,
        checks,
    )
