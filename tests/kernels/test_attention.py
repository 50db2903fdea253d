"""The kernels of softmax equal the definition: natively on a GPU, by Triton's interpreter on a CPU.

What users of peers ran into is among the cases:
  * documents of a packed row that see each other: https://github.com/axolotl-ai-cloud/axolotl/pull/3796
  * gradients that are wrong where the mask depends on data: https://github.com/pytorch/pytorch/issues/158212
  * widths that are no power of two: https://github.com/pytorch/pytorch/issues/133321
"""

from __future__ import annotations

import importlib.util
import json
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import attention as kernels
from models.kernels import backend
from models.regression.local import ring
from models.regression.local.constant import recurrent_local_constant
from models.regression.local.pairs import Pairs, View, document_starts
from tests.kernels.interpreter import run_interpreted

NAMES = ("o", "q", "k", "v", "age")
CASES: dict[str, dict[str, Any]] = {
    "ragged, grouped heads": {"T": 37, "H": 2, "G": 1, "K": 12, "V": 20},
    "documents": {"B": 2, "T": 37, "documents": 5},
    "documents, grouped heads, a window": {"B": 2, "T": 35, "H": 2, "G": 1, "window": 9, "documents": 17},
    "documents after a cache, in a window": {"B": 2, "T": 21, "past": 23, "window": 17, "documents": 5},
    "a window": {"T": 40, "window": 17},
    "documents of which each begins with a pair that no other uses": {"T": 37, "documents": 5, "skipped": 1},
    "weights that fade, documents, grouped heads": {"T": 37, "H": 2, "G": 1, "documents": 11, "fades": True},
    "weights that fade after a cache": {"T": 21, "past": 20, "fades": True},
}


def draw(
    B: int = 1, T: int = 40, H: int = 1, G: int = 1, K: int = 16, V: int = 16, past: int = 0, fades: bool = False
) -> list[Tensor]:
    """q, k, v, and ages where weights fade, in float64."""
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(B, n, m, K), dim=-1).double() for n, m in ((T, H), (past + T, G)))
    v = torch.randn(B, past + T, G, V).double()
    age = torch.rand(B, past + T, H).cumsum(1).double()
    return [q * K**0.5, k, v, *([age / 4] if fades else [])]


def errors(
    past: int = 0, window: int | None = None, documents: int = 0, skipped: int = 0,
    dtype: torch.dtype = torch.float32, device: str = "cpu", **sizes: Any,
) -> dict[str, float]:  # fmt: skip
    """Of the output and of all gradients: the distance to the definition's, relative to its length. The definition gets
    what is left of the inputs in dtype, in float64. documents: tokens of each in the first row, of the others more."""
    inputs = [x.to(device, dtype if i < 3 else torch.float32) for i, x in enumerate(draw(past=past, **sizes))]
    (B, T, H, _), segments = inputs[0].shape, None
    if documents:
        segments = torch.stack([torch.arange(T, device=device) // (documents + 7 * b) for b in range(B)])
    first = torch.full((B,), 2 if past else skipped, device=device) if past or skipped else None
    view = View(past, document_starts(T, past, first, segments, skipped), window)
    beta = torch.ones(H, device=device, dtype=torch.float64)

    def outcome(form, dtypes: list[torch.dtype]) -> list[Tensor]:
        leaves = [x.to(d).requires_grad_() for x, d in zip(inputs, dtypes, strict=False)]
        o = form(*leaves)
        upstream = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(o)
        return [x.double() for x in (o, *torch.autograd.grad(o, leaves, upstream))]

    def definition(q: Tensor, k: Tensor, v: Tensor, age: Tensor | None = None) -> Tensor:
        return recurrent_local_constant(q, Pairs(k, v, age=age), beta, view)

    exact = outcome(definition, [torch.float64] * 4)
    found = outcome(
        lambda q, k, v, age=None: kernels.attention(q, k, v, view.start, past, window, age)[0],
        [*[dtype] * 3, torch.float32],
    )
    return {n: ((a - b).norm() / b.norm()).item() for n, a, b in zip(NAMES, found, exact, strict=False)}


def errors_of_round(
    d: int, window: int | None = None, documents: int = 0, fades: bool = False, device: str = "cpu", T: int = 21
) -> float:
    """Of what a process of a ring computes in round d, and of its gradients: between the kernels and PyTorch."""
    B, H, G = 2, 2, 1
    q, k, v, *age = (x.float().to(device) for x in draw(B, T, H, G, 16, 16, fades=fades))
    start = None
    if documents:  # the first goes back to round 2
        start = torch.arange(T, device=device).expand(B, -1) // documents * documents
        start = start.masked_fill(start == 0, -T - 3)
    calls = [ring._Call(ring.Ring(None, 4, 3), start, window, 8, triton) for triton in (True, False)]
    block = [x[:, T - calls[0].sent(T) :] if d else x for x in (k, v, *age)]
    ages = age[0] + 0.3 * d if age else None
    level = torch.rand(B, T, H, device=device) + 3
    found = []
    for call in calls:
        view = call.view(d, T)
        o, L = ring._forward(call, view, q, block, ages)
        seen = (L > -1e20).unsqueeze(-1)
        gradients = ring._backward(call, view, q, block, ages, torch.cos(q), torch.sin(q), level)
        found.append([o * seen, L.clamp(min=-100), *gradients])
    pairs = list(zip(*found, strict=True))
    return max(((a - b).norm() / b.norm().clamp(min=1e-3)).item() for a, b in pairs)


ROUNDS: list[dict[str, Any]] = [{"d": 0, "documents": 8}, {"d": 1}, {"d": 1, "documents": 8}, {"d": 2, "documents": 8},
    {"d": 1, "window": 9}, {"d": 2, "window": 50, "documents": 8}, {"d": 1, "documents": 8, "fades": True},
    {"d": 1, "window": 9, "fades": True}]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_are_the_definition_interpreted():
    """In blocks of 16 queries and keys. And the graph of a mixer is not broken by them: of a window, whose two means
    are put together by their log sums. And the rounds of a ring."""
    code = """
    from tests.kernels.test_attention import *
    from tests.laws.presets import inputs, mixer
    kernels.INTERPRETED = kernels.Launch(16, 16, 4, 1)
    cases = {name: errors(**case) for name, case in CASES.items()}

    def gradient(f):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(f(leaf, None, segments)[0].square().sum(), leaf)[0]

    x, segments = inputs(1, 20, torch.float32), (torch.arange(20) // 7).unsqueeze(0)
    m, plain = (mixer("sliding_window", name, torch.float32, key_dim=16, value_dim=16) for name in ("triton", "torch"))
    found, exact = gradient(torch.compile(m, fullgraph=True, backend="aot_eager")), gradient(plain)
    rounds = [errors_of_round(**case) for case in ROUNDS]
    print("FOUND", json.dumps([cases, ((found - exact).norm() / exact.norm()).item(), rounds]))
    """
    cases, graph, rounds = json.loads(run_interpreted(textwrap.dedent(code), fla=False).split("FOUND")[1])
    assert cases.keys() == CASES.keys()
    for name, case in cases.items():
        assert all(error < 1e-5 for error in case.values()), (name, case)
    assert graph < 1e-5
    assert max(rounds) < 1e-5, rounds


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "dtype, K, V, tolerance",
    [
        (torch.bfloat16, 128, 128, 1e-2),
        (torch.bfloat16, 64, 64, 1e-2),
        (torch.float16, 256, 192, 2e-3),
        (torch.float32, 48, 80, 1e-5),
        (torch.float32, 128, 128, 1e-5),
    ],
    ids=["bf16-128", "bf16-64", "float16-256-192", "float32-48-80", "float32-128"],
)
def test_the_kernels_are_the_definition(dtype, K, V, tolerance):
    """Every case with two heads on one pair of keys and values: what the kernels are compiled for is then the same."""
    found = {}
    for name, case in CASES.items():
        longer = {size: case[size] * 7 for size in ("T", "past", "window", "documents") if size in case}
        found[name] = errors(**case | longer | {"H": 2, "G": 1, "K": K, "V": V}, dtype=dtype, device="cuda")
    assert all(error < tolerance for case in found.values() for error in case.values()), found
    if dtype == torch.float32:
        rounds = [errors_of_round(**case, device="cuda", T=150) for case in ROUNDS]
        assert max(rounds) < tolerance, rounds


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_run_has_the_same_bits():
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 1024, 4, 128, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    start = document_starts(1024, 0, None, (torch.arange(1024, device="cuda") // 300).expand(4, -1))
    runs = []
    for _ in range(3):
        o = kernels.attention(q, k, v, start)[0]
        runs.append((o, *torch.autograd.grad(o, (q, k, v), o)))
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run, strict=True))


def test_refusals_say_why(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(backend, "TRITON_INSTALLED", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.refusal(cpu, torch.float32, 128, 64) is None
    assert "float64" in kernels.refusal(cpu, torch.float64, 64, 64)
    assert "128 wide in torch.float32, not 256 and 64" in kernels.refusal(cpu, torch.float32, 256, 64)
    assert kernels.refusal(cpu, torch.float16, 256, 64) is None
    assert "not 512 and 64" in kernels.refusal(cpu, torch.float16, 512, 64)
    monkeypatch.delenv("TRITON_INTERPRET")

    class Properties:
        major, shared_memory_per_block_optin = 8, 101_376

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert "163 KB" in kernels.refusal(cuda, torch.bfloat16, 128, 64)
    Properties.shared_memory_per_block_optin = 232_448
    assert kernels.refusal(cuda, torch.bfloat16, 128, 64) is None
    Properties.major = 7
    assert "capability 8" in kernels.refusal(cuda, torch.float32, 64, 64)
