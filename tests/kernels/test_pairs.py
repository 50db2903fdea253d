"""The kernels that make queries, keys and values of a projected row are the shell's PyTorch form: natively on a GPU, by
Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor

from models.kernels import backend, pairs
from models.mixers.layer import positions_of
from models.mixers.mixer import Mixer
from tests.kernels.interpreter import run_interpreted
from tests.laws.presets import inputs, mixer, outcome

CONVOLVED = {"conv_size": 4, "activation": "silu", "rotary": None, "num_heads": 1}
GROUPED = {"num_heads": 2, "num_kv_heads": 1}
CASES: dict[str, dict[str, Any]] = {
    "as gated_delta": {**CONVOLVED, "qk_norm": "l2", "output_gate": "silu", "B": 2, "documents": True},
    "as softmax": {**GROUPED, "qk_norm": "l2", "B": 2, "documents": True, "far": 100_000},
    "as qwen3_next": {**GROUPED, "qk_norm": "rms", "rotary_channels": 8, "output_gate": "sigmoid"},
    "a call after a call": {**CONVOLVED, "qk_norm": "rms", "rotary": 100.0, "T": 11, "far": 7},
    "a token after two": {**CONVOLVED, "qk_norm": "l2", "T": 1, "far": 2},
    "two taps, no norm": {**CONVOLVED, "conv_size": 2, "qk_norm": "none", "key_dim": 7, "value_dim": 5},
    "keys alone": {**CONVOLVED, "conv_size": 3, "conv_on": "k", "qk_norm": "l2", "key_dim": 12, "documents": True},
    "nothing at all": {"num_heads": 1, "qk_norm": "none", "rotary": None, "key_dim": 1, "value_dim": 9, "T": 5},
}
WIDE = {"T": 1537, "key_dim": 128, "value_dim": 128, "num_heads": 3, "num_kv_heads": 3}  # on a GPU
LAYERS = {"gated_delta": {}, "retnet": {}, "delta_product": {"conv_size": 2}}


def outcomes(
    form: str, dtype: torch.dtype = torch.float32, rounded: torch.dtype = torch.float32, device: str = "cpu",
    B: int = 1, T: int = 19, documents: bool = False, far: int = 0, **settings: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """What the shell makes of a row and hands on, and the gradients by what it was made of. far: how many tokens of the
    document came before the call. rounded: the dtype that inputs and parameters have been in."""
    settings = {"key_dim": 16, "value_dim": 16} | settings
    m: Mixer = mixer("softmax", "torch", torch.float32, pairs_backend=form, **settings)
    with torch.no_grad():
        for name, parameter in m.named_parameters():
            if "_norm" in name:
                parameter.copy_(torch.linspace(0.5, 2, len(parameter)))
    m = m.to(rounded).to(device, dtype)
    x = inputs(B, T, torch.float32).to(rounded).to(device, dtype).requires_grad_()
    first = torch.tensor([2, 7][:B], device=device).unsqueeze(1)
    segments = (torch.arange(T, device=device) // first) if documents else None
    tails: list[Tensor | None] = [None, None]
    if far and m.convolution is not None:
        tail = torch.randn(B, m.convolution.width - 1, m.convolution.num_channels, generator=torch.manual_seed(1))
        tails[0] = tail.to(rounded).to(device, dtype).requires_grad_()
    positions = positions_of(x, torch.full((B,), far, device=device), segments)
    # as the state has it: nothing of before the document is in the tail
    given = [tail if tail is None else tail * (torch.arange(-tail.shape[1], 0, device=device) >= -far).view(-1, 1)
             for tail in tails]  # fmt: skip
    q, k, v, gate, after, _ = m._pairs(x, positions, tuple(given), segments)
    if gate is not None:  # as it is read, by ones
        gate = m._leave(x, v.new_ones(B, T, m.num_heads, m.value_dim), v, gate)
    made = {"q": q, "k": k, "v": v, "gate": gate, "tail": after[0]}
    made = {name: y for name, y in made.items() if y is not None}
    upstream = [torch.randn(y.shape, generator=torch.Generator().manual_seed(i)) for i, y in enumerate(made.values())]
    leaves = {"x": x, "tail before": tails[0], **{n: p for n, p in m.named_parameters() if n in USED}}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    found = torch.autograd.grad(list(made.values()), list(leaves.values()), [g.to(rounded).to(x) for g in upstream])
    return made | {f"d {name}": g for name, g in zip(leaves, found, strict=True)}


USED = ("projection.weight", "convolution.weight", "q_norm.weight", "k_norm.weight")


def errors(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The distances, relative to the length."""
    assert ours.keys() == exact.keys() and all(ours[name].shape == exact[name].shape for name in ours)
    pairs = {name: (ours[name].double().cpu(), exact[name].double().cpu()) for name in ours}
    return {name: ((a - b).norm() / b.norm().clamp(min=1e-6)).item() for name, (a, b) in pairs.items()}


def layer_errors(preset: str, T: int = 9, **settings: Any) -> float:
    """Of a whole layer in three calls, one of a token, documents in it: outputs, memory, and all gradients."""
    x, documents = inputs(1, T, torch.float32), (torch.arange(T) // 5).expand(1, -1)
    ours, exact = (
        outcome(mixer(preset, "torch", torch.float32, pairs_backend=form, **settings), x, (T - 2, T - 1), documents)
        for form in ("triton", "torch")
    )
    largest = max(b.norm().item() for b in exact)
    return max(((a - b).norm() / max(b.norm().item(), 0.1 * largest)).item() for a, b in zip(ours, exact, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_are_the_pytorch_form_interpreted():
    """Programs of few tokens, so that there are several; then whole layers, in calls."""
    code = """
    from tests.kernels.test_pairs import *
    from models.kernels.pairs import launch
    launch.FORWARD, launch.LEAST = launch.Shape(16, 4, 8, 4, 4), 8
    launch.BACKWARD, launch.BACKWARD_ALONE = launch.Shape(16, 4, 8, 2, 4), launch.Shape(8, 4, 16, 1, 1)
    found = {name: errors(outcomes("triton", **case), outcomes("torch", **case)) for name, case in CASES.items()}
    layers = {preset: layer_errors(preset, num_heads=1, **settings) for preset, settings in LAYERS.items()}
    print("FOUND", json.dumps([found, layers]))
    """
    found, layers = json.loads(run_interpreted(textwrap.dedent(code), fla=False).split("FOUND")[1])
    assert found.keys() == CASES.keys()
    for name, case in found.items():
        assert all(error < 3e-6 for error in case.values()), (name, case)
    assert all(error < 1e-5 for error in layers.values()), layers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_the_pytorch_form_in_float32(case):
    settings = CASES[case] | {"T": 5 * CASES[case].get("T", 19), "device": "cuda"}
    found = errors(outcomes("triton", **settings), outcomes("torch", **settings))
    assert all(error < 1e-5 for error in found.values()), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_in_bf16_they_are_as_near_to_float32_as_pytorch_is(case):
    settings, half = CASES[case] | WIDE | {"device": "cuda"}, torch.bfloat16
    exact = outcomes("torch", rounded=half, **settings)
    ours, theirs = (errors(outcomes(form, half, half, **settings), exact) for form in ("triton", "torch"))
    assert all(ours[name] < 1.2 * theirs[name] + 1e-4 for name in ours), (ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_run_has_the_same_bits():
    settings = CASES["as gated_delta"] | WIDE | {"device": "cuda", "dtype": torch.bfloat16}
    first, second = outcomes("triton", **settings), outcomes("triton", **settings)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_refusals_say_why(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(backend, "TRITON_INSTALLED", True)
    assert pairs.refusal(cuda, torch.bfloat16, 256, 4) is None
    assert "not 272" in str(pairs.refusal(cuda, torch.bfloat16, 272, 4))
    assert "last 4 inputs of a convolution, not 5" in str(pairs.refusal(cuda, torch.bfloat16, 64, 5))
    assert mixer("gated_delta").choose(cuda, torch.bfloat16) == ("triton", "")
    assert mixer("gated_delta").choose(cpu, torch.float32) == ("torch", "no GPU")
    assert mixer("gated_delta", pairs_backend="torch").choose(cuda, torch.bfloat16) == ("torch", "as asked")
    assert "float64" in mixer("gated_delta").choose(cuda, torch.float64).reason
    assert "pairs=shift" in mixer("gated_delta", pairs="shift").choose(cuda, torch.float32).reason
    assert "way of its own" in mixer("memory_mosaic").choose(cuda, torch.float32).reason
    with pytest.raises(ValueError, match="pairs_backend=triton can't run Mixer here: Triton needs a GPU, this is cpu"):
        mixer("gated_delta", pairs_backend="triton").choose(cpu, torch.float32)
    with pytest.raises(ValueError, match="pairs_backend=fla is not one of auto, triton, torch"):
        mixer("gated_delta", pairs_backend="fla")
