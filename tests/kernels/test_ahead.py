"""A call of which nothing is wanted but its kernels: whatever memory holds, the code around them goes through."""

from __future__ import annotations

import importlib.util

import pytest

from tests.kernels.interpreter import run_interpreted

# kernels that write places, far and near chunks, a memory as context, slots, conjugate gradients, two kinds of block
PRESETS = ["gated_delta", "kda", "titans_mac", "ttt_linear", "tnt", "mesa", "hybrid"]

CALL = """
import torch
from triton.runtime.interpreter import InterpretedFunction
from models.kernels import ahead
from models.regression.regressor import Choice, Regressor
from scripts.benchmarks.contenders import model_of
from scripts.recipes import composed

launch, left_out = InterpretedFunction.run, []

def run(self, *args, grid, warmup, **options):
    given = list(ahead.tensors((args, tuple(options.values()))))
    if any(x.is_floating_point() for x in given):
        left_out.append(self.fn.__name__)
    else:
        launch(self, *args, grid=grid, warmup=warmup, **options)

InterpretedFunction.run = run
Regressor.choose = lambda *_: Choice("triton", "")
torch.use_deterministic_algorithms(True)  # and then new memory is full of NaN, and of the largest integers
settings = "size=tiny", "model.hidden_size=256", "model.num_heads=4", "model.num_layers=4"
model = model_of(composed("PRESET", *settings), 37).train()
model.alike = True
ids = torch.randint(37, (2, 200))
segments = (torch.arange(200) >= 70).long().expand(2, 200)
model.sum_nats(ids, ids.roll(-1, 1), segments).backward()
assert len(set(left_out)) > 8, left_out
print("through")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("preset", PRESETS)
def test_code_around_kernels_goes_through_with_whatever_memory_holds(preset):
    assert "through" in run_interpreted(CALL.replace("PRESET", preset), fla=False)
