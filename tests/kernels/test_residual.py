"""The kernels of a residual with its norm equal the definition: natively on a GPU, by Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch import Tensor

from models import block
from models.kernels import residual
from models.parts.norm import RMSNorm, is_plain
from tests.kernels.interpreter import run_interpreted

# rows that fill no program, several programs with a tail, widths of a block and of less
SHAPES = {"one": ((1,), 3), "narrow": ((2, 5), 24), "several": ((3, 7), 64)}
LARGE = ((3, 67), 1000)


def outcome(x: Tensor, y: Tensor, norm: RMSNorm, upstream: list[Tensor], alone: bool) -> list[Tensor]:
    """alone: no gradient comes along the sum."""
    total, n = block.add_and_norm(x, y, norm)
    found = (n,) if alone else (total, n)
    given = [g.to(o.dtype) for g, o in zip(upstream[-len(found) :], found, strict=True)]
    return [total, n, *torch.autograd.grad(found, [x, y, norm.weight], given)]


def errors(
    shape: tuple[int, ...], D: int, dtype: torch.dtype = torch.float32, device: str = "cpu", compiled: str = "",
    alone: bool = False,
) -> list[float]:  # fmt: skip
    """Distances to the definition in float64, relative to the largest value: of the sum, its norm, and the gradients by
    both and the weight. Under autocast where the dtype has 16 bits, and then y has it too.
    """
    torch.manual_seed(0)
    x, *upstream = (torch.randn(*shape, D).to(device) for _ in range(3))
    y, norm = torch.randn(*shape, D).to(device, dtype), RMSNorm(D, 1e-3).to(device)
    torch.nn.init.normal_(norm.weight)
    twin = RMSNorm(D, 1e-3).to(device)
    twin.load_state_dict(norm.state_dict())
    leaves = [z.double().requires_grad_() for z in (x, y)]
    exact = outcome(*leaves, twin.double(), [g.double() for g in upstream], alone)
    function = torch.compile(outcome, fullgraph=True, backend=compiled) if compiled else outcome
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        found = function(x.requires_grad_(), y.requires_grad_(), norm, upstream, alone)
    assert [z.dtype for z in found] == [torch.float32, dtype, torch.float32, dtype, torch.float32]
    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        own = x.clone()
        total, n = block.add_and_norm(own, y, norm, own=True)
    kernels_run = residual.refusal(x.device, x.dtype, D) is None
    assert total.equal(found[0]) and n.equal(found[1]) and (total.data_ptr() == own.data_ptr()) == kernels_run
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_are_the_definition_interpreted():
    code = (
        "import json\nfrom tests.kernels.test_residual import *\nresidual.ROWS = 4\n"
        "found = [errors(*shape) for shape in SHAPES.values()] + [errors(*SHAPES['narrow'], alone=True)]\n"
        "print('FOUND', json.dumps([found, errors(*SHAPES['several'], torch.float16)]))"
    )
    found, half = json.loads(run_interpreted(code, fla=False).split("FOUND")[1])
    assert len(found) == len(SHAPES) + 1 and all(max(case) < 2e-6 for case in found), found
    assert max(half) < 2e-3, half


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [*SHAPES.values(), LARGE], ids=[*SHAPES, "large"])
def test_the_kernels_are_the_definition(shape, dtype, tolerance):
    assert max(errors(*shape, dtype, "cuda")) < tolerance
    assert max(errors(*shape, dtype, "cuda", alone=True)) < tolerance


def test_what_the_kernels_do_not_take(monkeypatch):
    """A norm of another kind or with a hook is called as it is; and what is nobody's sum is not added."""
    norm, x = RMSNorm(4, 1e-6), torch.randn(2, 4)
    assert is_plain(norm) and not is_plain(torch.nn.LayerNorm(4))
    assert block.add_and_norm(x, None, norm)[0] is x
    calls = []
    norm.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(residual, "refusal", lambda *_: None)
    total, n = block.add_and_norm(x, x, norm)
    assert calls and not is_plain(norm) and torch.equal(total, 2 * x) and n.shape == x.shape
    monkeypatch.undo()
    monkeypatch.setattr(residual.backend, "TRITON_INSTALLED", True)
    assert "not 20000" in str(residual.refusal(torch.device("cuda"), torch.float32, 20_000))
