"""Compares layers at the sizes of a run, with the kernels and launches that this GPU takes, with PyTorch's form.

    python scripts/launches.py [--only NAME ...] [--sizes 50m 340m] [--rows 2] [--seed 0]
    python scripts/launches.py --only kda --seq-len 4096 --hidden-size 768 --num-heads 6         # of no named size

A kernel of fla's has several launches, of which the fastest is taken, and a compiler's fault can be in one of them
alone (docs/kernels.md). Tests take any launch, and small sizes. So here the layers of a preset go forward and backward
in bf16 over rows of the size's length, with documents in them, as in training. Printed are the distances of the output,
and of the gradient that is furthest off, to those of PyTorch's form in float32, relative to their length, and beside
them those of PyTorch's form in bf16. A layer is wrong where it is more than three times as far off. The exit code is 1
where one is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from omegaconf import OmegaConf
from torch import Tensor

from models.build import build
from models.mixers.layer import Layer
from models.regression.regressor import Regressor
from scripts.benchmarks.contenders import PRESETS, Sizes, batch_of, half, sizes_of
from scripts.recipes import CONF, composed

WORSE, LEAST = 3.0, 2e-3  # times as far off as PyTorch's form in 16 bits is; a distance that is none


class Distance(NamedTuple):
    """Of a tensor, relative to its length: of the kernels' and of PyTorch's in bf16."""

    name: str
    kernels: float
    pytorch: float

    @property
    def wrong(self) -> bool:
        return not self.kernels <= max(WORSE * self.pytorch, LEAST)  # or it is not a number


def by_pytorch(layer: Layer) -> Layer:
    """A copy whose memories are computed by PyTorch's operators."""
    copy = deepcopy(layer)
    for part in copy.modules():
        if isinstance(part, Regressor):
            part.backend = "torch"
    return copy


def kernels_of(layer: Layer, device: torch.device) -> str:
    """The backends of its memories but for PyTorch's."""
    found = (part.choose(device, torch.bfloat16).backend for part in layer.modules() if isinstance(part, Regressor))
    return ", ".join(sorted(set(found) - {"torch"}))


def outcome(layer: Layer, x: Tensor, segments: Tensor | None, autocast: bool) -> dict[str, Tensor]:
    """The output, and the gradients by x and by the parameters."""
    x = x.clone().requires_grad_()
    with half(x.device.type) if autocast else torch.autocast(x.device.type, enabled=False):
        y, _ = layer(x, None, segments)
    named = {"x": x} | dict(layer.named_parameters())
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    gradients = torch.autograd.grad(y, list(named.values()), upstream, allow_unused=True)
    found = {"output": y} | {f"d {name}": g for name, g in zip(named, gradients, strict=True) if g is not None}
    return {name: value.detach().double() for name, value in found.items()}


def distances(layer: Layer, x: Tensor, segments: Tensor | None) -> list[Distance]:
    """A gradient that is small because large terms cancel is known to the rounding of the large ones."""
    plain = by_pytorch(layer)
    with torch.compiler.set_stance("force_eager"):  # some of PyTorch's forms compile themselves, in a minute
        exact, rounded = (outcome(plain, x, segments, autocast) for autocast in (False, True))
    found = outcome(layer, x, segments, autocast=True)
    largest = max(value.norm().item() for name, value in exact.items() if name != "output")

    def off(name: str, value: Tensor) -> float:
        length = exact[name].norm().item()
        return ((value - exact[name]).norm() / max(length, 1e-3 * largest * (name != "output"), 1e-30)).item()

    return [Distance(name, off(name, found[name]), off(name, rounded[name])) for name in exact]


def layers(name: str, sizes: Sizes, seed: int, device: torch.device) -> Iterator[Layer]:
    """One of each kind of the preset's model."""
    cfg = composed(name, f"size={sizes.size}", f"model.hidden_size={sizes.D}", f"model.num_heads={sizes.H}")
    for node in cfg.model.mixers.values():
        settings: Any = OmegaConf.to_container(node, resolve=True)
        torch.manual_seed(seed)
        layer: Layer = build(settings, hidden_size=cfg.model.hidden_size, layer_index=0)
        yield layer.to(device)


def compared(name: str, sizes: Sizes, seed: int, device: torch.device) -> Iterator[str]:
    """A line for each layer that kernels compute; it begins with `wrong` where they are."""
    size, rows = sizes.size, sizes.B
    for layer in layers(name, sizes, seed, device):
        if not (backends := kernels_of(layer, device)):
            continue
        begin = time.perf_counter()
        segments = batch_of(sizes, device.type)["segments"]
        x = torch.randn(rows, sizes.T, sizes.D, generator=torch.Generator().manual_seed(seed)).to(device)
        try:
            found = distances(layer, x, segments)
        except torch.OutOfMemoryError:
            yield f"left out {name:24} {size:6} PyTorch's form has too little memory; try --rows 1"
            continue
        wrong = [each for each in found if each.wrong]
        output, *gradients = found
        furthest = max(wrong or gradients, key=lambda each: each.kernels)
        shown = "; ".join(f"{each.name} {each.kernels:.1e} ({each.pytorch:.1e})" for each in (output, furthest))
        seconds = f"{time.perf_counter() - begin:.0f} s"
        yield f"{'wrong' if wrong else 'right':8} {name:24} {size:6} {backends:10} {shown}, {seconds}"


def asked(size: str, given: argparse.Namespace) -> Sizes:
    """Those of a named size, but for what was typed."""
    sizes = sizes_of(size, given.rows, given.seq_len)
    return sizes._replace(D=given.hidden_size or sizes.D, H=given.num_heads or sizes.H)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PRESETS, default=PRESETS, metavar="NAME")
    parser.add_argument("--sizes", nargs="+", choices=sorted(x.stem for x in (CONF / "size").glob("*.yaml")))
    parser.add_argument("--rows", type=int, default=2, help="of a batch")
    parser.add_argument("--seq-len", type=int, help="tokens of a row (default: the size's)")
    parser.add_argument("--hidden-size", type=int, help="(default: the size's)")
    parser.add_argument("--num-heads", type=int, help="(default: the size's)")
    parser.add_argument("--seed", type=int, default=0, help="of the layer and its input")
    given = parser.parse_args()
    for setting in ("rows", "seq_len", "hidden_size", "num_heads"):
        if (value := getattr(given, setting)) is not None and value < 1:
            parser.error(f"--{setting.replace('_', '-')} {value} must be at least 1")
    each = [asked(size, given) for size in given.sizes or ("50m", "340m")]
    for sizes in each:
        if sizes.D % sizes.H:
            parser.error(f"--num-heads {sizes.H} does not divide --hidden-size {sizes.D}")
    if not torch.cuda.is_available():
        sys.exit("error: kernels are compared on a GPU, and there is none here")
    print("distances to float32: of the kernels' (of PyTorch's form in bf16)")
    wrong = 0
    for sizes in each:
        for name in given.only:
            for line in compared(name, sizes, given.seed, torch.device("cuda")):
                print(line, flush=True)
                wrong += line.startswith("wrong")
    sys.exit(int(wrong > 0))


if __name__ == "__main__":
    main()
