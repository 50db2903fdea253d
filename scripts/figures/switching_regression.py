"""Test-time regression without a learned parameter: a nonlinear map, met on keys whose spread switches.

    python scripts/figures/switching_regression.py [--folder figures] [--sequences 64] [--tokens 256]

A reconstruction of the figure in Wang, Shi and Fox's talk (2025), whose exact process is not published. Here
k_t ~ N(c, s^2 I) in 8 dimensions, with s = 1 and c = 0 for the first quarter and s = 0.2 and one random c after it, and
v_t = W_2 sin(1.5 k_t W_1 + b) + 0.05 noise, a map for each sequence. Each estimator predicts v_t at the query k_t from
the pairs before t. "Raw" keys are compared by a Gaussian kernel of their distance; "unit" keys are first brought to
length one, which throws away what the length would tell. Bandwidth h: exp(-|q - k|^2 / 2h). Writes
switching_regression.png and .csv: mean squared errors, and over the last half, by h. A minute on one core.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from models.regression.local.constant import local_constant
from models.regression.local.kernel import Factor, parallel_intention
from models.regression.local.pairs import View, in_blocks
from models.regression.local.polynomial import local_polynomial, monomials

WIDTH, SWITCH, RIDGE = 8, 0.25, 1e-2
BANDWIDTHS = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
SHOWN = 1.0  # the bandwidth of the curves over time
COLOURS = {
    "linear attention / t": "tab:gray",
    "least squares": "tab:brown",
    "softmax (order 0)": "tab:blue",
    "local linear (order 1)": "tab:orange",
    "local quadratic (order 2)": "tab:green",
    "kernel ridge": "tab:purple",
}


def process(sequences: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values [B, T, WIDTH], float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    up, bias = normal(sequences, WIDTH, 2 * WIDTH) / WIDTH**0.5, normal(sequences, 1, 2 * WIDTH)
    down = normal(sequences, 2 * WIDTH, WIDTH) / (2 * WIDTH) ** 0.5
    after = (torch.arange(tokens) >= tokens * SWITCH).double().view(1, -1, 1)
    k = after * 0.5 * normal(sequences, 1, WIDTH) + (1 - 0.8 * after) * normal(sequences, tokens, WIDTH)
    return k, torch.sin(1.5 * k @ up + bias) @ down + 0.05 * normal(sequences, tokens, WIDTH)


def global_fits(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """One linear map for all pairs so far: without and with the inverse. q, k, v [B, T, *]; query t reads up to t."""
    H = (k.unsqueeze(-1) * k.unsqueeze(-2)).cumsum(1)
    G = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(1)
    count = torch.arange(1, q.shape[1] + 1).view(1, -1, 1)
    ridge = RIDGE * torch.eye(WIDTH, dtype=q.dtype)
    return {
        "linear attention / t": (q.unsqueeze(-2) @ G).squeeze(-2) / count,
        "least squares": (q.unsqueeze(-2) @ torch.linalg.solve(H + ridge, G)).squeeze(-2),
    }


def local_fits(q: Tensor, k: Tensor, v: Tensor, bandwidth: float) -> dict[str, Tensor]:
    """A fit for every query. exp(q.k - |k|^2 / 2) is the Gaussian of their distance but for a factor of q that cancels:
    one more channel.
    """
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))  # one head
    beta = q.new_full((1, 1, 1), 1 / bandwidth)
    near_q = torch.cat([q, torch.ones_like(q[..., :1])], dim=-1)
    near_k = torch.cat([k, -k.square().sum(-1, keepdim=True) / 2], dim=-1)
    o = {"softmax (order 0)": in_blocks(local_constant, (near_q, None), (near_k, v, None), (beta,), View(), 64)}
    for order, name in ((1, "local linear (order 1)"), (2, "local quadratic (order 2)")):
        phi_q, phi_k = monomials(q, order, True), monomials(k, order, True)
        ridge = torch.full_like(beta, 1e-3)
        o[name] = in_blocks(local_polynomial, (near_q, phi_q), (near_k, v, phi_k), (beta, ridge), View(), 64)
    B, _, T, K = k.shape
    nothing = Factor(k.new_empty(B, 0, 1, K), k.new_empty(B, 1, 0, 0), k.new_empty(B, 1, 0, K), k.new_zeros(B, 1))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    ridge = k.new_full((B, T, 1), RIDGE)
    o["kernel ridge"] = parallel_intention(q, k, v, beta.flatten(), ridge, View(), nothing)[0].transpose(1, 2)
    return {name: x.squeeze(1) for name, x in o.items()}


def errors(k: Tensor, v: Tensor, unit: bool) -> dict[tuple[str, float | None], Tensor]:
    """(estimator, bandwidth) -> mean squared error at each token but the first, [T - 1]."""
    k = F.normalize(k, dim=-1) if unit else k
    q, k, known, wanted = k[:, 1:], k[:, :-1], v[:, :-1], v[:, 1:]
    reads: dict[tuple[str, float | None], Tensor] = {(name, None): o for name, o in global_fits(q, k, known).items()}
    for h in BANDWIDTHS:
        reads |= {(name, h): o for name, o in local_fits(q, k, known, h).items()}
    return {which: (o - wanted).square().sum(-1).mean(0) for which, o in reads.items()}


def draw(found: dict[str, dict[tuple[str, float | None], Tensor]], tokens: int, path: Path) -> None:
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True)
    smooth = torch.ones(1, 1, 9, dtype=torch.float64) / 9
    for (setting, by_estimator), (over_time, over_bandwidth) in zip(found.items(), axes, strict=True):
        for name, colour in COLOURS.items():
            flat = (name, None) in by_estimator
            curve = by_estimator[name, None if flat else SHOWN]
            curve = F.conv1d(curve.view(1, 1, -1), smooth).flatten()
            over_time.plot(range(5, 5 + len(curve)), curve, color=colour, label=name, linewidth=1.5)
            late = [by_estimator[name, None if flat else h][tokens // 2 :].mean() for h in BANDWIDTHS]
            over_bandwidth.plot(
                BANDWIDTHS,
                late,
                color=colour,
                marker=None if flat else "o",
                linestyle="--" if flat else "-",
                label=name,
            )
        over_time.axvline(tokens * SWITCH, color="black", linewidth=0.8, linestyle=":")
        over_time.set(xlabel="token", ylabel="mean squared error", title=f"{setting} keys, bandwidth h = {SHOWN}")
        over_bandwidth.axvline(SHOWN, color="black", linewidth=0.8, linestyle=":")
        over_bandwidth.set(xlabel="bandwidth h", xscale="log", title=f"{setting} keys, last half of the sequence")
        over_time.set(yscale="log", ylim=(0.01, 20))
    axes[0, 0].annotate("keys narrow", (tokens * SWITCH + 3, 12), fontsize=9)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Switching nonlinear regression, nothing learned (a reconstruction)")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("figures"))
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    k, v = process(arguments.sequences, arguments.tokens)
    found = {name: errors(k, v, unit) for name, unit in (("raw", False), ("unit", True))}
    T = arguments.tokens
    spans = {"before": slice(T // 8, T // 4), "just_after": slice(T // 4, T // 4 + 16), "last_half": slice(T // 2, T)}
    with (arguments.folder / "switching_regression.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["keys", "estimator", "bandwidth", *spans])
        print(f"{'keys':5} {'estimator':26} {'h':>5} " + " ".join(f"{name:>10}" for name in spans))
        for setting, by_estimator in found.items():
            for (name, h), curve in by_estimator.items():
                means = [curve[span].mean().item() for span in spans.values()]
                rows.writerow([setting, name, "" if h is None else h, *(f"{x:.4g}" for x in means)])
                print(f"{setting:5} {name:26} {'' if h is None else h:>5} " + " ".join(f"{x:10.3f}" for x in means))
    draw(found, T, arguments.folder / "switching_regression.png")


if __name__ == "__main__":
    main()
