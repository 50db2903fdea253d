"""scripts/launches.py sees where kernels are off, and by how much rounding is allowed to be."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from models.regression.regressor import Regressor
from scripts import launches
from tests.conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """Two short rows, of a model that a CPU computes at once, which is said to have kernels."""
    sizes = launches.sizes_of("tiny")
    monkeypatch.setattr(launches, "sizes_of", lambda _: sizes._replace(T=40))
    monkeypatch.setattr(launches, "kernels_of", lambda *_: "fla")


def lines(name: str) -> list[str]:
    return list(launches.compared(name, "tiny", rows=2, seed=0, device=CPU))


@pytest.mark.parametrize("name", ["gated_delta", "titans_mac"])
def test_what_is_equal_is_right(small, name):
    (line,) = lines(name)
    assert line.startswith("right") and "output 0.0e+00 (0.0e+00)" in line


def test_a_gradient_that_is_off_is_named(small, monkeypatch):
    outcome, calls = launches.outcome, []

    def third_is_wrong(*given, **named):
        found = outcome(*given, **named)
        calls.append(found)
        if len(calls) == 3:
            found["d x"] = -found["d x"]
        return found

    monkeypatch.setattr(launches, "outcome", third_is_wrong)
    (line,) = lines("gated_delta")
    assert line.startswith("wrong") and "d x 2.0e+00" in line


@pytest.mark.parametrize("kernels, pytorch, wrong", [(2.9e-2, 1e-2, False), (3.1e-2, 1e-2, True), (1e-3, 0.0, False)])
def test_three_times_pytorchs_rounding_is_wrong(kernels, pytorch, wrong):
    assert launches.Distance("x", kernels, pytorch).wrong == wrong
    assert launches.Distance("x", float("nan"), pytorch).wrong


def test_a_copy_is_computed_by_pytorch_and_the_layer_stays():
    (layer,) = launches.layers("titans_mac", "tiny", 0, CPU)
    copy = launches.by_pytorch(layer)
    backends = [{part.backend for part in each.modules() if isinstance(part, Regressor)} for each in (copy, layer)]
    assert backends == [{"torch"}, {"auto"}]
    assert launches.kernels_of(copy, CPU) == ""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "scripts/launches.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "on a GPU" in done.stderr
