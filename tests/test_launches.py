"""scripts/launches.py sees where kernels are off, and by how much rounding is allowed to be."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from models.regression.regressor import Regressor
from scripts import launches
from tests.conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """A layer that is said to have kernels."""
    monkeypatch.setattr(launches, "kernels_of", lambda *_: "fla")


SIZES = launches.sizes_of("tiny", batch=2, seq_len=40)  # which a CPU computes at once


def lines(name: str) -> list[str]:
    return list(launches.compared(name, SIZES, seed=0, device=CPU))


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
    (layer,) = launches.layers("titans_mac", SIZES._replace(D=64, H=2), 0, CPU)
    copy = launches.by_pytorch(layer)
    backends = [{part.backend for part in each.modules() if isinstance(part, Regressor)} for each in (copy, layer)]
    assert backends == [{"torch"}, {"auto"}]
    assert launches.kernels_of(copy, CPU) == ""
    assert copy(torch.zeros(1, 4, 64))[0].shape == (1, 4, 64)


def test_sizes_that_are_typed(monkeypatch, capsys):
    given = Namespace(rows=3, seq_len=None, hidden_size=64, num_heads=2)
    assert launches.asked("tiny", given) == SIZES._replace(B=3, T=128, D=64, H=2)
    for typed, why in (
        ("--seq-len 0", "--seq-len 0 must be at least 1"),
        ("--sizes 50m --num-heads 7", "--num-heads 7 does not divide --hidden-size 512"),
    ):
        monkeypatch.setattr("sys.argv", ["launches.py", *typed.split()])
        with pytest.raises(SystemExit):
            launches.main()
        assert why in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "scripts/launches.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "on a GPU" in done.stderr
