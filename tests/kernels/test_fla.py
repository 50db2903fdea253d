"""fla's kernels equal the definition: natively on a GPU, by Triton's interpreter on a CPU (float32; it can't do
bfloat16)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from models.kernels import backend, fla
from models.regression.linear.linear import recurrent_linear
from models.regression.regressor import FORGET
from tests.kernels.interpreter import run_interpreted
from tests.regression.linear.test_delta import NAMES, draw, values_and_gradients

ROUTES = ("chunk_gated_delta_rule", "chunk_kda")
TOLERANCE = 5e-5  # FORGET takes a few digits of fla's cumulative sums


def errors(route: str, device: str = "cpu", tokens: int = 70) -> dict[str, float]:
    """Largest difference between a route and the recurrence, relative to the largest value; documents in a chunk
    included."""
    inputs = [x.to(device) for x in draw(tokens, dtype=torch.float32, width=16, heads=1)]
    inputs[4] = inputs[4].clone()
    inputs[4][:, [3, 4, 20, 66]] = FORGET
    from models.regression.linear.delta import recurrent_delta

    fla.route_gated_delta = lambda *_: route
    exact, form = (values_and_gradients(f, inputs) for f in (recurrent_delta, fla.gated_delta))
    return {n: ((form[n] - exact[n]).abs().max() / exact[n].abs().max()).item() for n in NAMES}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_are_the_recurrence_interpreted():
    code = f"from tests.kernels.test_fla import errors\nprint('RESULT', [errors(route) for route in {ROUTES}])"
    found = eval(run_interpreted(code).split("RESULT")[1])
    assert len(found) == len(ROUTES) and all(e < TOLERANCE for of_route in found for e in of_route.values()), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("route", ROUTES)
def test_kernels_are_the_recurrence(route, monkeypatch):
    device = torch.device("cuda")
    if route == ROUTES[0] and not fla.route_gated_delta(device).startswith(route):
        pytest.skip(fla.route_gated_delta(device))
    monkeypatch.setattr(fla, "route_gated_delta", fla.route_gated_delta)  # errors() replaces it
    found = errors(route, "cuda", tokens=200)
    assert all(e < 5e-3 for e in found.values()), found  # tensor cores round float32 to TF32


def test_refusals_say_why(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(fla, "INSTALLED", True)
    monkeypatch.setattr(backend, "TRITON_INSTALLED", True)
    assert fla.refusal_gated_delta(cuda, torch.bfloat16, 128, 128) is None
    assert "256" in fla.refusal_gated_delta(cuda, torch.bfloat16, 512, 128)
    assert "float64" in fla.refusal_gated_delta(cuda, torch.float64, 64, 64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter" in fla.refusal_gated_delta(cpu, torch.bfloat16, 64, 64)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "Triton" in fla.refusal_linear(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("decay", [None, "head", "channel"])
def test_odd_widths_get_zeros_beside_them(decay, monkeypatch):
    """linear_published has a value more than keys, for the sum of the weights."""

    def even(q, k, v, g=None, scale=1.0, initial_state=None, output_final_state=True):
        assert scale == 1.0 and output_final_state and not (k.shape[-1] % 2 or v.shape[-1] % 2)
        return recurrent_linear(q, k, v, g, initial_state)

    ops = SimpleNamespace(chunk_simple_gla=even, chunk_gla=even)
    for name in ("fla", "fla.ops", "fla.ops.simple_gla", "fla.ops.gla"):
        monkeypatch.setitem(sys.modules, name, ops)
    (q, k), v = (torch.randn(2, 7, 2, 5) for _ in range(2)), torch.randn(2, 7, 2, 9)
    memory, shape = torch.randn(2, 2, 5, 9), {"head": (2, 7, 2), "channel": (2, 7, 2, 5)}
    log_decay = None if decay is None else -torch.rand(shape[decay])
    for x, y in zip(fla.linear(q, k, v, log_decay, memory), recurrent_linear(q, k, v, log_decay, memory), strict=True):
        assert torch.allclose(x, y, atol=1e-6)


def test_routes(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(fla, "_broken_on_hopper", lambda _: None)
    assert fla.route_gated_delta(cuda) == "chunk_gated_delta_rule"
    assert fla.route_gated_delta(cuda, "none", dtype=torch.bfloat16) == "chunk_delta_rule"
    assert fla.route_gated_delta(cuda, "none", dtype=torch.float32) == "chunk_gated_delta_rule"
    assert fla.route_gated_delta(cuda, "channel") == "chunk_kda"
    assert fla.route_leaky_delta(cuda) == "chunk_comba"
    monkeypatch.setattr(fla, "_broken_on_hopper", lambda _: "Triton 3.6.0 on Hopper")
    assert fla.route_leaky_delta(cuda).startswith("chunk_kda") and "3.6.0" in fla.route_leaky_delta(cuda)
    assert fla.route_gated_delta(cuda).startswith("chunk_kda") and "3.6.0" in fla.route_gated_delta(cuda)


@pytest.mark.slow
def test_importing_the_models_does_not_import_fla():
    code = "import sys, models.regression.linear; assert not {'fla', 'triton'} & {m.split('.')[0] for m in sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_what_is_wrong_on_a_gpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(fla, "_broken_on_hopper", lambda device: None)
    cuda, wide = torch.device("cuda"), (96, 64)
    assert fla.refusal_gated_delta(cuda, torch.bfloat16, *wide) is None
    assert "shared memory" in fla.refusal_gated_delta(cuda, torch.float32, *wide)
    for refusal in (fla.refusal_leaky_delta, fla.refusal_write_key):
        assert "chunk_comba" in refusal(cuda, torch.bfloat16, 64, 64)
        assert refusal(cuda, torch.float32, 64, 64) is None
