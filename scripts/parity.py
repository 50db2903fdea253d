"""The published layers beside ours, with the same weights, in float64:

    python scripts/parity.py                                 # every comparison
    python scripts/parity.py --only kda_published qwen3      # these alone
    python scripts/parity.py --write                         # and the table of docs/published.md

A row is a layer of a model of conf/model, NAME_published where there is one, with the settings that its line names, at
a small size: outputs and the gradients of the input, for two rows of 37 random tokens. The difference is the largest of
all numbers, over the largest of the published layer's. Theirs are layers of transformers and of fla by their own
PyTorch code (scripts/published), or their formulas. It takes half a minute on one core of a CPU, and needs fla and
Triton for fla's.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from models.block import InPlace
from models.build import build
from models.mixers.mixer import Mixer
from scripts.published import by_fla, by_formula, by_transformers
from scripts.published.plain import Layer
from scripts.published.weights import Weights
from scripts.recipes import composed

PAGE = Path(__file__).resolve().parent.parent / "docs" / "published.md"
BEGIN, END = "<!-- table: python scripts/parity.py --write -->", "<!-- end of table -->"
ROWS, TOKENS = 2, 37
AS_IT_IS = {"softmax": "qwen3", "mamba": "mamba", "in_place": "in_place"}  # the model where it is not NAME_published


class Row(NamedTuple):
    """One comparison, by the name of our model, and its largest relative differences of outputs and of the gradients of
    the input.
    """

    name: str
    theirs: str
    outputs: float
    gradients: float


Built = tuple[Layer, Callable[[Any], Weights]]


def comparisons() -> Iterator[tuple[str, str, dict[str, Any], Callable[[], Built]]]:
    """Name, what theirs is, overrides of our mixer, and what builds theirs."""
    for name, peer in by_fla.PEERS.items():
        yield name, f"{peer.layer[1]} of fla", peer.ours, partial(by_fla.built, peer)
    for name, other in by_transformers.PEERS.items():
        yield name, f"{other.kind[1]} of transformers", other.ours, partial(by_transformers.built, other)
    for name, formula in by_formula.PEERS.items():
        yield name, f"{formula.name}, by its formulas", formula.ours, formula.built


def published(name: str) -> str:
    """The model that is compared in place of a preset, and what is said of its settings behind a comma."""
    preset, comma, settings = name.partition(",")
    return AS_IT_IS.get(preset, f"{preset}_published") + comma + settings


@cache
def model_of(name: str) -> DictConfig:
    """The config of a model, small."""
    return composed(name, "model.hidden_size=32", "model.num_heads=2")


def layer_of(name: str, overrides: dict[str, Any]) -> Mixer | InPlace:
    """Our published form of a preset, or its feed-forward layer where that is what it adds."""
    return InPlace(32, 48, **overrides).double() if name == "in_place" else mixer_of(name, overrides)


def mixer_of(name: str, overrides: dict[str, Any]) -> Mixer:
    """Our published form of a preset, small and in float64."""
    cfg = copy.deepcopy(model_of(published(name).split(",")[0]))
    for key, value in overrides.items():
        OmegaConf.update(cfg, f"model.mixers.main.{key}", value, force_add=True)
    node = OmegaConf.to_container(cfg.model.mixers.main, resolve=True)
    return build(node, hidden_size=32, layer_index=0).double()


def compared(name: str, theirs: str, overrides: dict[str, Any], build_theirs: Callable[[], Built]) -> Row:
    torch.manual_seed(0)
    layer, weights_for = build_theirs()
    ours = layer_of(name, overrides)
    copied = weights_for(ours)
    assert copied.keys() == dict(ours.named_parameters()).keys(), copied.keys() ^ dict(ours.named_parameters()).keys()
    ours.load_state_dict(dict(ours.named_buffers()) | copied)
    x = torch.randn(ROWS, TOKENS, 32, dtype=torch.float64, requires_grad=True)
    expected, found = outcome(layer, x), outcome(lambda x: ours(x)[0], x)
    return Row(published(name), theirs, *(difference(a, b) for a, b in zip(found, expected, strict=True)))


def outcome(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and the gradient of a fixed function of them."""
    y = layer(x)
    assert y.dtype == torch.float64, y.dtype
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return y, torch.autograd.grad((y * weights).sum(), x)[0]


def difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def table(rows: list[Row]) -> str:
    lines = ["| model | beside | outputs | gradients |", "| --- | --- | --- | --- |"]
    return "\n".join(lines + [f"| {r.name} | {r.theirs} | {r.outputs:.0e} | {r.gradients:.0e} |" for r in rows])


def written(page: str, rows: list[Row]) -> str:
    """The page with its table anew."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.partition(END)[2]}"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models of the table, or presets")
    parser.add_argument("--write", action="store_true", help=f"write the table into docs/{PAGE.name}")
    given = parser.parse_args(words)
    models = {name: published(name).split(",")[0] for name in (name.split(",")[0] for name, *_ in comparisons())}
    if unknown := sorted(set(given.only or ()) - models.keys() - set(models.values())):
        sys.exit(f"error: --only {unknown[0]} is not one of {', '.join(sorted(models.values()))}")
    if given.only and given.write:
        sys.exit("error: --write writes the whole table; leave --only out")
    rows = []
    for one in comparisons():
        preset = one[0].split(",")[0]
        if not given.only or {preset, models[preset]} & set(given.only):
            rows.append(compared(*one))
            print(table(rows).splitlines()[-1], flush=True)
    if given.write:
        PAGE.write_text(written(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
