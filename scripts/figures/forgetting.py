"""Forgetting curves before any training: what seven mixers recall of the same random pairs, against their age.

    python scripts/figures/forgetting.py [--folder docs]

Each mixer is built as model=NAME size=tiny builds it, and its memory is given random pairs: keys of length one, values
of variance one, a half-life of 64 tokens where the recipe has a decay, and gates at the middle of what they learn from.
So all that differs is the rule. Writes forgetting.svg and prints the numbers in it.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from models.mixers.mixer import Mixer
from models.regression.regressor import Tokens
from models.training.probe import reads
from scripts.recipes import composed, mixer_of

PRESETS = ("softmax", "linear", "mamba2", "deltanet", "gated_delta", "titans", "mesa")
TEXTS, LENGTH, HALF_LIFE = 16, 256, 64
AGES = [-1, 0, 1, 2, 4, 8, 16, 32, 64, 128]


def pairs(mixer: Mixer) -> Tokens:
    """The same for all mixers of one size."""
    H, K, V = mixer.num_heads, mixer.key_dim, mixer.value_dim
    draw = torch.Generator().manual_seed(0)
    k, v = (torch.randn(TEXTS, LENGTH, H, width, generator=draw) for width in (K, V))
    k, x = F.normalize(k, dim=-1), torch.zeros(TEXTS, LENGTH, mixer.regressor.hidden_size)
    decay = None if mixer.decay.kind == "none" else torch.full((TEXTS, LENGTH, H), -math.log(2) / HALF_LIFE)
    return Tokens(x, k, k, v, decay)


@torch.no_grad()
def curves(preset: str) -> tuple[Tensor, Tensor]:
    """Loss and recall at AGES, of the pairs that are seen at all of them, on average over heads."""
    torch.manual_seed(0)
    mixer = mixer_of(composed(preset, "size=tiny"))
    for name, p in mixer.regressor.named_parameters():
        if name.endswith(".bias"):
            p.zero_()
    seen, _ = reads(mixer.regressor, pairs(mixer), AGES)
    old = torch.arange(LENGTH) < LENGTH - AGES[-1]
    return seen.loss(old).mean(-1), seen.recall(old).mean(-1)


def draw(found: dict[str, tuple[Tensor, Tensor]]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (preset, (loss, recall)) in enumerate(found.items()):
        for axes, values in ((left, recall), (right, loss)):
            axes.plot(AGES[1:], values[1:], f"C{i}", marker="o", markersize=3, label=preset)
    right.axhline(1.0, color="0.5", linestyle=":", linewidth=1)
    left.set(ylabel="cosine of v and m(k)", title="Recall", ylim=(0, 1.02))
    right.set(ylabel="|v - m(k)|² / |v|²", title="Inner loss", ylim=(0, 2))
    for axes in (left, right):
        axes.set(xlabel="age of the pair, tokens")
        axes.set_xscale("symlog", linthresh=1, linscale=0.4, base=2)
        axes.set_xticks(AGES[1:], [str(age) for age in AGES[1:]])
        axes.set_xlim(0, AGES[-1])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=9, ncols=2)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[2] / "docs")
    arguments = parser.parse_args()
    found = {preset: curves(preset) for preset in PRESETS}
    print(f"{'recall at age':<14}" + "".join(f"{age:>7}" for age in AGES[1:]) + "   loss before, after")
    for preset, (loss, recall) in found.items():
        print(f"{preset:<14}" + "".join(f"{x:7.2f}" for x in recall[1:].tolist()) + f"   {loss[0]:.2f}, {loss[1]:.2f}")
    matplotlib.rcParams["svg.hashsalt"] = "forgetting"  # the same file every time
    draw(found).savefig(arguments.folder / "forgetting.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
