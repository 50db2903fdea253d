"""The kernels of the read-out equal the shell's PyTorch form: natively on a GPU, by Triton's interpreter on a CPU. That
the gate's gradient arrives in the row's, test_pairs.py sees in whole layers."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from models.kernels import read_out
from models.mixers.mixer import GATES
from models.parts.norm import RMSNorm
from tests.kernels.interpreter import run_interpreted

# (B, T), H, V, gate, norm
CASES: dict[str, tuple[Any, ...]] = {
    "one": ((1, 1), 1, 3, "silu", True),
    "three heads": ((2, 5), 3, 12, "silu", True),
    "no norm": ((1, 9), 2, 16, "sigmoid", False),
    "several programs": ((2, 7), 5, 16, "sigmoid", True),
}
LARGE = ((2, 65), 7, 128, "silu", True)


def errors(
    tokens: tuple[int, int], H: int, V: int, gate: str, norm: bool,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> list[float]:  # fmt: skip
    """Distances to the definition in float64, relative to the largest value: of what is read, and the gradients by o,
    by the gate and by the norm's weight.
    """
    torch.manual_seed(0)
    first, width = 3, 3 + H * V + 2
    o, row = torch.randn(*tokens, H, V).to(device, dtype), torch.randn(*tokens, width).to(device, dtype)
    upstream, scale = torch.randn(*tokens, H * V).to(device, dtype), torch.randn(V).to(device)
    leaves = [x.double().requires_grad_() for x in (o, row, scale)]
    y = torch.nn.functional.rms_norm(leaves[0], (V,), leaves[2], 1e-3) if norm else leaves[0]
    y = y.flatten(-2) * GATES[gate](leaves[1][..., first : first + H * V])
    exact = [y, *torch.autograd.grad(y, leaves if norm else leaves[:2], upstream.double())]
    o, scale, link = o.requires_grad_(), scale.requires_grad_(), row.new_empty(1).expand(row.shape).requires_grad_()
    weight = RMSNorm(V, 1e-3).to(device).weight
    weight.data.copy_(scale.data)
    y = read_out.read_out(o, read_out.Gate(row, link, first, gate), weight if norm else None, 1e-3)
    found = [y, *torch.autograd.grad(y, [o, link, weight] if norm else [o, link], upstream)]
    found[2], exact[2] = (x[..., first : first + H * V] for x in (found[2], exact[2]))  # the others are nobody's yet
    return [_error(a, b) for a, b in zip(found, exact, strict=True)]


def _error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_are_the_definition_interpreted():
    code = (
        "import json\nfrom tests.kernels.test_read_out import *\nread_out.ROWS, read_out.NUMBERS = 4, 32\n"
        "found = {name: errors(*case) for name, case in CASES.items()}\n"
        "print('FOUND', json.dumps([found, errors(*CASES['several programs'], torch.float16)]))"
    )
    found, half = json.loads(run_interpreted(code, fla=False).split("FOUND")[1])
    assert found.keys() == CASES.keys() and all(max(case) < 2e-6 for case in found.values()), found
    assert max(half) < 2e-3, half


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("case", [*CASES.values(), LARGE], ids=[*CASES, "large"])
def test_the_kernels_are_the_definition(case, dtype, tolerance):
    found = errors(*case, dtype, "cuda")
    assert max(found) < tolerance, found


def test_refusals_say_why(monkeypatch):
    monkeypatch.setattr(read_out.backend, "TRITON_INSTALLED", True)
    assert read_out.refusal(torch.device("cuda"), torch.bfloat16, 128) is None
    assert "not 2000" in str(read_out.refusal(torch.device("cuda"), torch.bfloat16, 2000))
