"""How many orders of its Taylor series softmax attention needs, by inverse temperature.

    python scripts/figures/taylor.py [--folder figures] [--model runs/NAME/model]

Softmax weights are exp(x), x = beta q.k. Of order p they are 1 + x + ... + x^p / p!, which a memory of p-th powers of
the keys could hold; both are divided by their sum. Error: |o_p - o| / |o|, root mean squares over queries. Without a
model: 512 random keys of length one in 64 dimensions for each query, one of them at a cosine of 0.8. With a model that
has softmax layers and reads bytes: its own queries, keys and values on this file, causal, a curve for each layer.
Writes taylor.png and taylor.csv. Ten seconds on one core.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from models.language_model import LanguageModel
from models.regression.local.constant import Softmax

BETAS, ORDERS = (1.0, 2.0, 4.0, 8.0, 16.0), range(13)


class Curve(NamedTuple):
    """Errors of orders 0 to 12, and what softmax itself is like there: the mean of the largest weight of each query."""

    name: str
    errors: list[float]
    largest_weight: float


def curve(name: str, x: Tensor, v: Tensor) -> Curve:
    """x [..., T, S], beta q.k, -inf where masked; v [..., S, V]; float64."""
    weights = x.softmax(-1)
    exact, visible = weights @ v, x.isfinite()
    x = x.masked_fill(~visible, 0.0)
    term, total, errors = visible.to(x.dtype), torch.zeros_like(x), []
    for p in ORDERS:
        term = term * x / p if p else term
        total = total + term
        o = (total / total.sum(-1, keepdim=True)) @ v
        errors.append(((o - exact).norm() / exact.norm()).item())
    return Curve(name, errors, weights.amax(-1).mean().item())


def random_keys(num_queries: int = 64, num_keys: int = 512, width: int = 64) -> list[Curve]:
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(num_queries, num_keys, width, generator=g, dtype=torch.float64) for _ in range(2))
    k = F.normalize(k, dim=-1)
    aside = torch.randn(num_queries, width, generator=g, dtype=torch.float64)
    aside = F.normalize(aside - (aside * k[:, 0]).sum(-1, keepdim=True) * k[:, 0], dim=-1)
    q = 0.8 * k[:, 0] + 0.6 * aside
    cosines = q.unsqueeze(1) @ k.mT
    return [curve(f"beta = {beta:g}", beta * cosines, v) for beta in BETAS]


@torch.no_grad()
def of_model(folder: Path, tokens: int = 512) -> list[Curve]:
    """A curve for every softmax layer. Raises ValueError for a model that has none or doesn't read bytes."""
    model = LanguageModel.from_pretrained(folder).double().eval()
    layers = [(i, b.mixer.regressor) for i, b in enumerate(model.blocks) if type(b.mixer.regressor) is Softmax]
    if not layers or any(regressor.kernel != "gaussian" for _, regressor in layers):
        raise ValueError(
            f"--model={folder} has layers {', '.join(model.config.layers)}; only softmax layers have a series"
        )
    if not 256 <= model.config.vocab_size <= 260:
        raise ValueError(f"--model={folder} has a vocabulary of {model.config.vocab_size}; only models that read bytes")
    seen: dict[int, tuple] = {}
    for i, regressor in layers:
        regressor.register_forward_hook(lambda module, args, result, i=i: seen.update({i: args[0][1:4]}))
    model(torch.tensor([list(Path(__file__).read_bytes()[:tokens])]))
    found = []
    for i, regressor in layers:
        q, k, v = (x.transpose(1, 2) for x in seen[i])
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        x = regressor.beta(q).view(-1, 1, 1) * (q @ k.mT)
        future = torch.ones(x.shape[-2:], dtype=torch.bool).triu(1)
        found.append(curve(f"layer {i + 1}", x.masked_fill(future, -torch.inf), v))
    return found


def draw(panels: dict[str, list[Curve]], path: Path) -> None:
    figure = Figure(figsize=(5.5 * len(panels), 4.6), layout="constrained")
    for ax, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, c in enumerate(curves):
            colour = (0.85 - 0.75 * i / max(len(curves) - 1, 1), 0.3, 0.1 + 0.75 * i / max(len(curves) - 1, 1))
            label = f"{c.name} (largest weight {c.largest_weight:.2f})"
            ax.plot(ORDERS, c.errors, color=colour, label=label, marker="o", markersize=3)
        ax.set(xlabel="order", ylabel="relative error of the output", title=title, yscale="log", ylim=(1e-6, 10))
        ax.set_xticks(list(ORDERS))
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("figures"))
    parser.add_argument("--model", type=Path, help="a folder that save_pretrained wrote: also its own attention")
    arguments = parser.parse_args()
    panels = {"random keys": random_keys()}
    if arguments.model:
        try:
            panels[f"trained: {arguments.model.resolve().parent.name}"] = of_model(arguments.model)
        except ValueError as error:
            parser.error(str(error))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with (arguments.folder / "taylor.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["panel", "curve", "largest_weight", *(f"order_{p}" for p in ORDERS)])
        for title, curves in panels.items():
            for c in curves:
                rows.writerow([title, c.name, f"{c.largest_weight:.3g}", *(f"{e:.3g}" for e in c.errors)])
                print(f"{title}, {c.name}, {c.largest_weight:.2f}: " + " ".join(f"{e:.3f}" for e in c.errors))
    draw(panels, arguments.folder / "taylor.png")


if __name__ == "__main__":
    main()
