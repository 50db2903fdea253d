"""How fast the memories of new models of the ablation's size forget."""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from torch import Tensor

from models.language_model import LanguageModel, LanguageModelConfig
from models.mixers import Mixer
from scripts.figures.estimators.finding import Finding, curve
from scripts.figures.results import Row, legend
from scripts.recipes import composed

MODELS = ("retnet", "mamba2", "gated_delta", "kda", "gla", "rwkv7")
SAME = "[22,2840]"  # RetNet's own, of eight heads
FAR = 64  # tokens, from which on a half-life is long
QUANTILES = {"1 in 10": 0.1, "median": 0.5, "9 in 10": 0.9, "longest hundredth": 0.99}


def half_lives(model: str, start: str | None, size: str, tokens: int) -> tuple[Tensor, float]:
    """Tokens [layers, H, 1 or K] after which half of what was written is left, by the mean of -log gamma along random
    inputs as long as a norm leaves them; and how much of a gamma is the token's: the standard deviation of
    log(-log gamma) along the tokens."""
    words = [] if start is None else [f"model.mixers.main.decay.half_lives={start}"]
    cfg = composed(model, f"size={size}", *words)
    torch.manual_seed(0)
    sizes: Any = OmegaConf.to_container(cfg.model, resolve=True)
    built = LanguageModel(LanguageModelConfig(vocab_size=64, **sizes))
    x = torch.randn(1, tokens, cfg.model.hidden_size)
    with torch.no_grad():
        found = [m.decay(x)[0][0] for m in built.modules() if isinstance(m, Mixer)]
    fading = -torch.stack([f if f.ndim == 3 else f.unsqueeze(-1) for f in found])  # [layers, T, H, 1 or K]
    return math.log(2) / fading.mean(1), fading.log().std(1).mean().item()


def finding(size: str = "50m", tokens: int = 512) -> Finding:
    asked = [*((model, None) for model in MODELS), *((model, SAME) for model in MODELS[1:])]
    found = {(model, start): half_lives(model, start, size, tokens) for model, start in asked}
    table: list[Row] = []
    for (model, start), (lives, noise) in found.items():
        at = lives.flatten().quantile(torch.tensor(list(QUANTILES.values()))).tolist()
        row: Row = {"mixer": model, "start": "its own" if start is None else "22 to 2840"}
        row |= {name: round(x, 1) for name, x in zip(QUANTILES, at, strict=True)}
        row |= {f"above {FAR}": f"{far(lives):.1%}", "whole heads": f"{whole(lives):.1%}"}
        table.append(row | {"by token": round(noise, 2)})

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, start in zip(panels, (None, SAME), strict=True):
            for i, model in enumerate(MODELS):
                lives = found.get((model, start), found[model, None])[0].flatten().sort().values
                share = torch.linspace(0, 1, 101)
                curve(axes, i, lives.quantile(share).tolist(), share.tolist(), model, marked=False)
            axes.axvline(FAR, color="0.7", linewidth=1)
            axes.set(xscale="log", xlabel="half-life, tokens", title="its own start" if start is None else "one start")
        panels[0].set_ylabel("share of heads or channels that are shorter")
        legend(figure)

    return Finding(
        "How fast new memories forget",
        "Mixers begin with memories that last differently long. RetNet's half-lives go to thousands of tokens. Those "
        "that are learned begin short, and where each channel has its own, hardly a head has a memory that is whole.",
        f"Half-lives in tokens, over heads and channels of all layers, of new models of size={size}. Whole heads: half "
        f"of whose channels last longer than {FAR} tokens. By token: how much gammas differ along the tokens, as the "
        "standard deviation of log(-log gamma).",
        "the layers as published: Sun et al. 2023; Dao and Gu 2024; Yang et al. 2024; Kimi Linear 2025",
        table,
        draw,
        [
            (f"retnet: {far(found['retnet', None][0]):.0%} of the heads last longer than {FAR} tokens; "
             + ", ".join(f"{name} {far(found[name, None][0]):.0%}" for name in MODELS[1:]),
             far(found["retnet", None][0]) > 2 * max(far(found[name, None][0]) for name in MODELS[1:])),
            (f"kda has about as many as gated_delta, but dispersed: half of a head's channels last as long in "
             f"{whole(found['kda', None][0]):.1%} of its heads, and in {whole(found['gated_delta', None][0]):.1%}",
             whole(found["kda", None][0]) < whole(found["gated_delta", None][0]) / 2),
            (f"with half_lives={SAME} at least half are as long in every mixer",
             min(far(found[name, SAME][0]) for name in MODELS[1:]) >= 0.5),
        ],
    )  # fmt: skip


def far(lives: Tensor) -> float:
    """The share that is longer than FAR."""
    return (lives > FAR).float().mean().item()


def whole(lives: Tensor) -> float:
    """The share of heads of whose channels half are."""
    return ((lives > FAR).float().mean(-1) >= 0.5).float().mean().item()
