"""What scripts/tune.py finds is added to a table that models/kernels/tuning.py reads."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from models.kernels import tuning
from scripts import tune
from tests.conftest import ROOT

PLACE = ((9, 0), "3.7.1", "0.6.0")
KEY = (4, 64, "torch.bfloat16")


@pytest.fixture(autouse=True)
def h200(monkeypatch):
    monkeypatch.setattr(tuning, "here", lambda: PLACE)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")


def kernel(name: str, num_warps: int) -> SimpleNamespace:
    """One that was tuned for KEY."""
    launch = SimpleNamespace(all_kwargs=lambda: {"BK": 64, "num_warps": num_warps})
    return SimpleNamespace(
        base_fn=SimpleNamespace(__module__="fla.ops", __name__=name),
        keys=["H", "K", "BK"],  # as some of fla's, which list what the candidates set
        configs=[SimpleNamespace(kwargs={"BK": 64})],
        cache={KEY: launch},
    )


def test_what_is_found_is_added_and_read_again(tmp_path):
    path = tmp_path / "h200.json"
    path.write_text(tune.written(tune.added(path, tune.launches([(kernel("a", 4), KEY), (kernel("b", 4), KEY)]))))
    path.write_text(tune.written(tune.added(path, tune.launches([(kernel("b", 8), KEY), (kernel("c", 1), KEY)]))))
    table = tuning.read(path)
    assert (table.gpu, table.fits) == ("NVIDIA H200", PLACE)
    found = {name: launch["K=64, bfloat16"]["num_warps"] for name, launch in table.launches.items()}
    assert found == {"fla.ops.a": 4, "fla.ops.b": 8, "fla.ops.c": 1}
    assert len([line for line in path.read_text().splitlines() if "num_warps" in line]) == 3


def test_a_key_of_which_a_part_is_not_known_is_left_out():
    assert tune.launches([(kernel("a", 4), (64, "torch.bfloat16"))]) == {}


@pytest.mark.parametrize("other", [{"gpu": "NVIDIA H100"}, {"triton": "3.8.0"}])
def test_a_table_of_another_machine_is_not_added_to(tmp_path, other):
    path = tmp_path / "other.json"
    table = {"gpu": "NVIDIA H200", "capability": [9, 0], "triton": "3.7.1", "fla": "0.6.0", "launches": {}}
    path.write_text(json.dumps(table | other))
    with pytest.raises(ValueError, match="name another file"):
        tune.added(path, {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "scripts/tune.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "on a GPU" in done.stderr
