"""Law 8: every accelerated backend equals the PyTorch form, on the CPU by Triton's interpreter (float32), on a GPU as
it is."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from functools import partial
from typing import Any

import pytest
import torch

from models.mixers import memory_context
from tests.kernels.interpreter import run_interpreted
from tests.laws.presets import ELSEWHERE, HIDDEN, PRESETS, inputs, mixer, outcome, parts, recipe

ACCELERATED = [
    (p, name) for p in PRESETS for name in mixer(p).regressor.accelerators(torch.device("cuda"), torch.float32)
]


def takes(preset: str, backend: str, dtype: torch.dtype) -> bool:
    return mixer(preset).regressor.accelerators(torch.device("cuda"), dtype)[backend] is None


# what takes 16 bits alone (mesa's solve) is tried with float16 in tests/kernels
IN_FLOAT32 = [each for each in ACCELERATED if takes(*each, torch.float32) or not takes(*each, torch.bfloat16)]


def errors(
    preset: str, backend: str, device: str, dtype: torch.dtype = torch.float32, T: int = 300, interpreted: bool = False
) -> list[float]:
    """Of outputs, memory and every gradient: the distance to the PyTorch form's, of the same rounded queries, keys and
    values, relative to its length; with documents and without. Interpreted: fewer of all, since it is slow. The PyTorch
    form is not compiled, which takes a minute where it compiles itself."""
    found, heads = [], 1 if interpreted else 2
    x = inputs(2, T, torch.float32).to(device)
    documents = (torch.arange(T, device=device) // 9).expand(2, -1)
    for segments in [documents] if interpreted else [documents, None]:
        forms = [mixer(preset, name, torch.float32, **small(preset, heads)).to(device) for name in ("torch", backend)]
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            with torch.compiler.set_stance("force_eager"):
                exact = outcome(forms[0], x, segments=segments)
            ours = outcome(forms[1], x, segments=segments)
        # a gradient that is small because large terms cancel is known to the rounding of the large ones
        largest = max(b.norm().item() for b in exact)
        pairs = zip(ours, exact, strict=True)
        found += [((a - b).norm() / max(b.norm().item(), 0.1 * largest)).item() for a, b in pairs]
    return found


def length(preset: str) -> int:
    """One chunk of fla's and a rest; of mini-batches of 16, or segments of 8, a few and a rest. An interpreted token of
    theirs takes up to a tenth of a second."""
    node = recipe(preset)
    few = "segment" in node or parts(node)[0]["regressor"].get("grad_batch", 1) >= 16
    return 38 if few else 70


def small(preset: str, heads: int) -> dict[str, Any]:
    """Triton's products want 16 at least. Without the output norm, which divides by q.k where a document has one pair
    and makes a rounding of any size of one where they are orthogonal: that is the shell's, not the kernel's."""
    width = HIDDEN // heads
    settings = {"num_heads": heads, "key_dim": width, "value_dim": width, "output_norm": False}
    given = parts(recipe(preset))[0]["regressor"]
    settings |= {"regressor__local_batches": [16], "regressor__shard": 32} if "local_batches" in given else {}
    return settings | ({"regressor__grad_batch": 16} if given.get("grad_batch", 1) > 16 else {})


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_8_interpreted_kernels_equal_the_pytorch_form(half):
    """Many in one process: importing the kernels takes longer than running one. (Tests of two
    heads, and without documents, are in tests/kernels.)"""
    own = [str(conf / "mixer" / f"{PRESETS[0]}.yaml") for conf in ELSEWHERE]  # the child is told of --recipe
    code = """
    from pathlib import Path
    from tests.laws import presets
    for path in %r:
        presets.only(Path(path))
    from tests.laws.test_backends import *
    print("FOUND", json.dumps({name: max(errors(*name.split(), "cpu", T=length(name.split()[0]), interpreted=True))
        for name in %r}))
    """
    if not (names := [f"{preset} {backend}" for preset, backend in IN_FLOAT32[half::2]]):
        pytest.skip("no kernels")
    printed = run_interpreted(textwrap.dedent(code % (own, names)), timeout=600)
    found = json.loads(printed.split("FOUND")[1])
    assert found.keys() == set(names) and all(error < 1e-4 for error in found.values()), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset, backend", ACCELERATED)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-2), (torch.bfloat16, 5e-2)], ids=["float32", "bf16"])
def test_8_kernels_equal_the_pytorch_form(preset, backend, dtype, tolerance):
    """Within what the products' rounding gives: TF32 on a GPU of today, and bf16 of everything around the kernel."""
    if why := mixer(preset, **small(preset, 2)).regressor.accelerators(torch.device("cuda"), dtype)[backend]:
        pytest.skip(f"refused: {why}")
    found = errors(preset, backend, "cuda", dtype)
    assert max(found) < tolerance, found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", [preset for preset in ("titans_mlp", "ttt_mlp", "deltaformer") if preset in PRESETS])
def test_8_the_compiled_pytorch_form_is_the_form(preset):
    """Of those that compile themselves on a GPU; of titans_mac the compiled form stands beside the kernels above."""
    m, x = mixer(preset, "torch", torch.float32, **small(preset, 2)).cuda(), inputs(2, 300, torch.float32).cuda()
    documents = (torch.arange(300, device="cuda") // 9).expand(2, -1)
    found = outcome(m, x, segments=documents)
    with torch.compiler.set_stance("force_eager"):
        exact = outcome(m, x, segments=documents)
    largest = max(b.norm().item() for b in exact)
    distances = [(a - b).norm() / max(b.norm().item(), 0.1 * largest) for a, b in zip(found, exact, strict=True)]
    assert max(distances) < 1e-3, distances


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_8_a_compiled_mixer_is_the_mixer(preset, monkeypatch):
    """What Dynamo makes of it, which Inductor is then handed on a GPU, in two chunks and a token: outputs, and the
    gradients by inputs and parameters. (Torch 2.11's fails at a named tuple that _replace has made, and loses the
    gradient by an output of an autograd.Function that was changed in place.)"""
    torch.compiler.reset()
    eager = partial(torch.compile, backend="eager", dynamic=False)
    monkeypatch.setattr(memory_context, "compiled_turn", lambda: eager(memory_context.MemoryAsContext.turn))
    m, segments = mixer(preset), (torch.arange(17) // 9).expand(2, -1)
    x = inputs(2, 17).requires_grad_()

    def found(layer):
        o = layer(x, None, segments)[0]
        return o, *torch.autograd.grad(
            o.square().sum(), [x, *m.parameters()], allow_unused=True, materialize_grads=True
        )

    for a, b in zip(found(eager(m)), found(m), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12 * b.detach().abs().max().item())
