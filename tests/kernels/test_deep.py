"""Titans' deep memory by our kernels: outputs and every gradient of the layer, each relative to its own length, with a
start that has something in all of its layers."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from typing import Any

import pytest
import torch

from models.kernels import deep
from tests.kernels.interpreter import run_interpreted
from tests.laws.presets import inputs, mixer, outcome

SHAPES = {"narrow": (2, 16, 16), "middle": (1, 32, 64), "wide": (1, 64, 64)}  # heads, keys and values, mini-batch


def errors(device: str, shape: str, T: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """Of the Triton form, to the PyTorch form, with and without documents; without, of one row on a CPU, where kernels
    are interpreted."""
    rows = inputs(2, T, dtype).to(device)
    documents = (torch.arange(T, device=device) // 40).expand(2, -1)
    found = distances(shape, rows if device == "cuda" else rows[:1])
    return found + distances(shape, rows, segments=documents)


def distances(shape: str, x: torch.Tensor, splits: tuple[int, ...] = (), **given: Any) -> list[float]:
    """In calls that end at `splits`, with the last memory in what gradients are taken of; given: documents, and
    settings of the layer."""
    heads, width, grad_batch = SHAPES[shape]
    sizes = {"num_heads": heads, "key_dim": width, "value_dim": width, "regressor__grad_batch": grad_batch}
    segments, pair = given.pop("segments", None), []
    for backend in ("triton", "torch"):
        layer = mixer("titans_mlp", backend, x.dtype, **sizes, **given)
        torch.manual_seed(3)
        with torch.no_grad():
            for weight in layer.regressor.start:
                weight += 0.3 * torch.randn_like(weight)
        with torch.compiler.set_stance("force_eager"):  # a minute for each form that PyTorch would compile
            pair.append(outcome(layer.to(x.device), x, splits, segments, memory=bool(splits)))
    return [((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in zip(*pair, strict=True)]


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


@pytest.mark.slow
@pytest.mark.parametrize("forget_to", ["start", "zero"])
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_interpreted_kernels_go_on_with_a_state(forget_to):
    """In the midst of a mini-batch, at the end of one and of a document, and with the gradients that cross calls; a
    start that fades is what documents begin with, else W."""
    code = """
    import json, torch
    from tests.kernels.test_deep import distances
    from tests.laws.presets import inputs
    documents = torch.stack([torch.arange(60) // 60, torch.arange(60) // 23])
    x = inputs(2, 60, torch.float32)
    found = distances("narrow", x, (20, 23, 32), segments=documents, regressor__forget_to=%r)
    print("FOUND", json.dumps(found))
    """
    found = json.loads(run_interpreted(textwrap.dedent(code % forget_to), fla=False).split("FOUND")[1])
    assert max(found) < 1e-5, found


@pytest.mark.slow
@pytest.mark.parametrize("split", [2, 4])
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_interpreted_programs_that_share_a_document_meet(split):
    """With parts of the hidden layer of 64, as on a GPU, in threads of their own."""
    code = """
    import json, torch
    from types import SimpleNamespace
    from models.kernels.deep import launch
    from tests.kernels.interpreter import side_by_side
    from tests.kernels.test_deep import errors
    side_by_side(%d, "scan", "scan_gradient")
    launch.WHOLE, launch.backend = (64 // %d, 4, 1), SimpleNamespace(interpreting=lambda: False)
    print("FOUND", json.dumps(errors("cpu", "narrow", 54)))
    """
    found = json.loads(run_interpreted(textwrap.dedent(code % (split, split)), fla=False).split("FOUND")[1])
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
