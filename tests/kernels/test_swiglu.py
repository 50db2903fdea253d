"""The kernels of SwiGLU equal the definition: natively on a GPU, by Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.block import SwiGLU
from tests.kernels.interpreter import run_interpreted

# inner widths of less than a block, of a whole one, of several with a tail
SHAPES = {"narrow": ((2, 5), 8, 12), "a whole block": ((7,), 8, 64), "blocks and a tail": ((3, 2, 2), 16, 150)}

LARGE = ((2, 65), 256, 2368)


def outcome(layer: SwiGLU, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream)]


def errors(
    shape: tuple[int, ...], D: int, F: int, dtype: torch.dtype = torch.float32, device: str = "cpu", compiled: str = ""
) -> list[float]:
    """Distances to the definition in float64, relative to the largest value: of the output and of the gradients by x
    and both weights. The weights are float32 under autocast where the dtype has 16 bits.
    """
    torch.manual_seed(0)
    layer, x, upstream = SwiGLU(D, F).to(device), torch.randn(*shape, D, device=device), torch.randn(*shape, D)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=2 * weight.shape[1] ** -0.5)
    twin = SwiGLU(D, F).to(device)
    twin.load_state_dict(layer.state_dict())
    exact = outcome(twin.double(), x.double(), upstream.to(x).double())
    if compiled:
        layer.compile(fullgraph=True, backend=compiled)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        y = layer(x.requires_grad_())
    found = [y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream.to(y))]
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True)]


def kept(layer: SwiGLU, x: Tensor) -> int:
    """Numbers that the layer keeps for its backward pass, beside x and its weights."""
    sizes: dict[int, int] = {}
    own = {w.data_ptr() for w in (x, *layer.parameters())}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(sizes.values())


def beside() -> dict[str, Any]:
    """Of a frozen output no gradient; an adapter or a hook on the output is heeded; without gradients nothing new."""
    torch.manual_seed(0)
    layer, x = SwiGLU(8, 12), torch.randn(3, 8)
    y, calls = layer(x), []
    layer.output.weight.requires_grad_(False)
    frozen = torch.autograd.grad(layer(x).sum(), layer.up.weight)[0].isfinite().all().item()
    with torch.no_grad():
        same = torch.allclose(layer(x), y, atol=1e-6)
    numbers = kept(layer, x)
    layer.output.register_forward_hook(lambda *_: calls.append(1))
    hooked = torch.allclose(layer(x), y, atol=1e-6)
    return {"frozen": frozen, "same": same, "kept": numbers, "hooked": hooked, "calls": len(calls)}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_are_the_definition_interpreted():
    """In a compiled graph without a break too."""
    code = (
        "import json\nfrom models.kernels import swiglu\nfrom tests.kernels.test_swiglu import *\nswiglu.BLOCK = 64\n"
        "found = {name: errors(*shape) for name, shape in SHAPES.items()}\n"
        "found['compiled'] = errors(*SHAPES['narrow'], compiled='aot_eager')\n"
        "half = errors(*SHAPES['blocks and a tail'], torch.float16)\n"
        "print('FOUND', json.dumps([found, half, beside()]))"
    )
    found, half, seen = json.loads(run_interpreted(code, fla=False).split("FOUND")[1])
    assert found.keys() == SHAPES.keys() | {"compiled"}
    assert all(max(case) < 2e-6 for case in found.values()), found
    assert max(half) < 4e-3, half
    assert seen == {"frozen": True, "same": True, "kept": 3 * 24, "hooked": True, "calls": 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("shape", [*SHAPES.values(), LARGE], ids=[*SHAPES, "large"])
def test_the_kernels_are_the_definition(shape, dtype, tolerance):
    found = errors(*shape, dtype, "cuda")
    assert max(found) < tolerance, found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_are_the_definition_compiled():
    found = errors(*LARGE, torch.bfloat16, "cuda", "inductor")
    assert max(found) < 3e-2, found
