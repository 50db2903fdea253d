"""Golden numbers of deep memories: outputs and gradients of the four presets in float64, kept as text, so that another
form of the code can be held to the numbers of the one before.

    python -m tests.golden.test_deep --write    # writes deep.txt anew, after a change that is meant to change numbers

A line is a preset, a tensor, its length, and its product with a fixed direction of length one. Every parameter has
moved from its start; rows have documents, and mini-batches that are cut by them, by calls and by the end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.laws.presets import inputs, mixer

FILE = Path(__file__).with_name("deep.txt")
T, CALLS = 150, (70, 41, 39)
PRESETS: dict[str, dict[str, int]] = {
    "titans_mlp": {"regressor__grad_batch": 24},
    "ttt_linear": {},
    "ttt_mlp": {},
    "lact": {"regressor__grad_batch": 16, "regressor__window": 20},
}


def numbers(preset: str) -> Iterator[tuple[str, float, float]]:
    """Of the output, the input's gradient and every parameter's: name, length, and product with a direction."""
    g = torch.Generator().manual_seed(0)
    layer = mixer(preset, "torch", torch.float64, **PRESETS[preset])
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    x = inputs(2, T, torch.float64).requires_grad_()
    documents = torch.stack([torch.arange(T) // 40, (torch.arange(T) > 20).long() + (torch.arange(T) > 97)])
    o, state = [], None
    for part, segments in zip(x.split(CALLS, dim=1), documents.split(CALLS, dim=1), strict=True):
        y, state = layer(part, state, segments)
        o.append(y)
    o = torch.cat(o, dim=1)
    parameters = dict(layer.named_parameters())
    gradients = torch.autograd.grad(
        (o * torch.randn(o.shape, generator=g, dtype=o.dtype)).sum(), [x, *parameters.values()]
    )
    for name, found in zip(["output", "input", *parameters], [o, *gradients], strict=True):
        direction = torch.randn(found.shape, generator=g, dtype=found.dtype)
        yield name, found.norm().item(), ((found * direction).sum() / direction.norm()).item()


@pytest.mark.parametrize("preset", PRESETS)
def test_outputs_and_gradients_are_those_that_were_kept(preset):
    kept = {
        name: (float(x), float(y)) for p, name, x, y in map(str.split, FILE.read_text().splitlines()) if p == preset
    }
    found = {name: values for name, *values in numbers(preset)}
    assert found.keys() == kept.keys()
    for name, (length, product) in kept.items():
        now = found[name]
        assert abs(now[0] - length) < 1e-10 * length and abs(now[1] - product) < 1e-10 * length, name


if __name__ == "__main__" and "--write" in sys.argv:
    lines = (f"{preset} {name} {x:.16g} {y:.16g}" for preset in PRESETS for name, x, y in numbers(preset))
    FILE.write_text("\n".join(lines) + "\n")
