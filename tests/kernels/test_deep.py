"""Titans' deep memory by our kernels: outputs and every gradient of the layer, each relative to its own length, with a
start that has something in all of its layers."""

from __future__ import annotations

import importlib.util
import json
import textwrap

import pytest
import torch

from models.kernels import deep
from tests.kernels.interpreter import run_interpreted
from tests.laws.presets import inputs, mixer, outcome

SHAPES = {"narrow": (2, 16, 16), "middle": (1, 32, 64), "wide": (1, 64, 64)}  # heads, keys and values, mini-batch


def errors(device: str, shape: str, T: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """Of the Triton form, to the PyTorch form, with and without documents; without, of one row on a CPU, where kernels
    are interpreted."""
    heads, width, grad_batch = SHAPES[shape]
    sizes = {"num_heads": heads, "key_dim": width, "value_dim": width, "regressor__grad_batch": grad_batch}
    rows, found = inputs(2, T, dtype).to(device), []
    documents = (torch.arange(T, device=device) // 40).expand(2, -1)
    for x, segments in ((rows if device == "cuda" else rows[:1], None), (rows, documents)):
        pair = []
        for backend in ("triton", "torch"):
            layer = mixer("titans_mlp", backend, dtype, **sizes)
            torch.manual_seed(3)
            with torch.no_grad():
                for weight in layer.regressor.start:
                    weight += 0.3 * torch.randn_like(weight)
            with torch.compiler.set_stance("force_eager"):  # a minute for each form that PyTorch would compile
                pair.append(outcome(layer.to(device), x, segments=segments, memory=False))
        found += [((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in zip(*pair, strict=True)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("shape, T", [("narrow", 54), ("wide", 100)])
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_interpreted_kernels_are_the_pytorch_form(shape, T):
    code = """
    import json
    from tests.kernels.test_deep import errors
    print("FOUND", json.dumps(errors("cpu", %r, %d)))
    """
    found = json.loads(run_interpreted(textwrap.dedent(code % (shape, T)), fla=False).split("FOUND")[1])
    assert max(found) < 1e-5, found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "shape, dtype, tolerance",
    [("narrow", torch.float32, 1e-3), ("middle", torch.float32, 1e-3), ("wide", torch.bfloat16, 3e-2)],
)
def test_on_a_gpu(shape, dtype, tolerance):
    """float32 in products of three TF32; in bf16 both forms round."""
    found = errors("cuda", shape, T=1000, dtype=dtype)
    assert max(found) < tolerance, found


def test_what_they_refuse(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cuda = torch.device("cuda")
    assert "Triton" in deep.refusal(torch.device("cpu"), torch.float32, 64, (64, 256, 64))
    if importlib.util.find_spec("triton") is not None:
        assert deep.refusal(cuda, torch.bfloat16, 64, (64, 256, 64)) is None
        assert "128" in deep.refusal(cuda, torch.bfloat16, 64, (128, 512, 128))
        assert "mini-batches of 64 are wrong for vectors of 32" in deep.refusal(cuda, torch.bfloat16, 64, (32, 128, 32))
        assert "float32" in deep.refusal(cuda, torch.float32, 64, (64, 256, 64))
        assert "mini-batches of 16, 32, 64, not 8" in deep.refusal(cuda, torch.bfloat16, 8, (64, 256, 64))
    regressor = mixer("titans_mlp", "auto", regressor__depth=3).regressor
    assert "depth=2" in regressor.accelerators(cuda, torch.bfloat16)["triton"]
