"""The kernels of local linear attention equal the definition: natively on a GPU, by Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import backend
from models.kernels import local_linear as kernels
from models.regression.local.pairs import Pairs, View, document_starts
from models.regression.local.polynomial import recurrent_local_polynomial
from tests.kernels.interpreter import run_interpreted

NAMES = ("o", "q", "k", "v", "beta", "ridge")
CASES: dict[str, dict[str, Any]] = {
    "ragged, grouped heads": {"T": 37, "H": 2, "G": 1, "K": 12, "V": 20},
    "documents": {"B": 2, "T": 37, "documents": True},
    "documents after a cache, in a window": {"B": 2, "T": 21, "past": 23, "window": 17, "documents": True},
    "a window": {"T": 53, "window": 24},
    "one token after a cache": {"T": 1, "past": 40},
    "a tiny ridge": {"T": 40, "ridge": 1e-3},
}


def draw(
    B: int = 1, T: int = 40, H: int = 1, G: int = 1, K: int = 16, V: int = 16, past: int = 0, ridge: float = 0.1
) -> list[Tensor]:
    """q, k, v, beta, ridge in float64; keys share a mean, as learned ones do."""
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(B, n, m, K) + 0.5, dim=-1).double() for n, m in ((T, H), (past + T, G)))
    v = torch.randn(B, past + T, G, V).double()
    return [q, k, v, torch.linspace(1, 2, H).double() * K**0.5, torch.linspace(1, 2, H).double() * ridge]


def errors(
    past: int = 0, window: int | None = None, documents: bool = False, dtype: torch.dtype = torch.float32,
    device: str = "cpu", **sizes: Any,
) -> dict[str, float]:  # fmt: skip
    """Of the output and of all gradients: the distance to the definition's, relative to its length. The definition gets
    what is left of the inputs in dtype, in float64."""
    inputs = [x.to(device, dtype if x.ndim == 4 else None) for x in draw(past=past, **sizes)]
    B, T = inputs[0].shape[:2]
    segments = torch.stack([torch.arange(T, device=device) // (5 + 7 * b) for b in range(B)]) if documents else None
    first = torch.full((B,), 2, device=device) if past else None
    view = View(past, document_starts(T, past, first, segments), window)

    def outcome(form, *dtypes: torch.dtype) -> list[Tensor]:
        leaves = [x.to(d).requires_grad_() for x, d in zip(inputs, dtypes, strict=True)]
        o = form(*leaves)
        upstream = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(o)
        return [x.double() for x in (o, *torch.autograd.grad(o, leaves, upstream))]

    exact = outcome(lambda q, k, v, *s: recurrent_local_polynomial(q, Pairs(k, v), *s, view), *[torch.float64] * 5)
    kernel = outcome(lambda *x: kernels.local_linear(*x, view.start, past, window), *[dtype] * 3, *[torch.float32] * 2)
    return {n: ((a - b).norm() / b.norm()).item() for n, a, b in zip(NAMES, kernel, exact, strict=True)}


def test_the_formulas_of_the_backward():
    """As the docstring has them, against autograd through the definition, in float64."""
    inputs = [x.requires_grad_() for x in draw(T=30, K=5, V=3, ridge=0.03)]
    o = recurrent_local_polynomial(inputs[0], Pairs(*inputs[1:3]), *inputs[3:])
    q, k, v, do = (x.detach()[0, :, 0] for x in (*inputs[:3], torch.randn_like(o)))
    exact = torch.autograd.grad(o, inputs, do.view_as(o))
    beta, ridge = (x.item() for x in inputs[3:])

    w = (beta * q @ k.T).masked_fill(torch.ones(30, 30).triu(1).bool(), -torch.inf).softmax(-1)
    x = k - (w @ k).unsqueeze(1)  # [T, T, K]
    A = torch.einsum("ti,tia,tib->tab", w, x, x) + ridge * torch.eye(5).double()
    u = torch.linalg.solve(A, q - w @ k)
    f, a = 1 + torch.einsum("tik,tk->ti", x, u), do @ v.T
    z = torch.linalg.solve(A, torch.einsum("ti,tik->tk", w * a, x))
    e = a - (w * a).sum(-1, keepdim=True) - torch.einsum("tik,tk->ti", x, z)
    ds = w * (e * f - (w * e * f).sum(-1, keepdim=True))
    d_keys = (w * e).T @ u - (w * f).T @ z + beta * ds.T @ q
    found = z + beta * ds @ k, d_keys, (w * f).T @ do, (q * (ds @ k)).sum(), -(z * u).sum()
    assert torch.allclose((w * f) @ v, o[0, :, 0], atol=1e-10)
    for name, ours, theirs in zip(NAMES[1:], found, exact, strict=True):
        assert torch.allclose(ours, theirs.view_as(ours), rtol=1e-9, atol=1e-10), name


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_are_the_definition_interpreted():
    """In blocks of 16 queries and keys. Then with operands rounded to TF32, which the kernels do themselves: at a tiny
    ridge that costs the outputs no more than its eps, and of the gradients only those that are differences of terms as
    large as 1 / ridge."""
    code = """
    from tests.kernels.test_local_linear import *
    kernels.INTERPRETED = (16, 16, 4, 1)
    exact = {name: errors(**case) for name, case in CASES.items()}
    kernels._rounding = lambda dtype: ("tf32", 2.0**-12)
    print("FOUND", json.dumps([exact, errors(T=64), errors(T=64, ridge=1e-3)]))
    """
    exact, rounded, tiny = json.loads(run_interpreted(textwrap.dedent(code), fla=False).split("FOUND")[1])
    assert exact.keys() == CASES.keys()
    for name, case in exact.items():
        assert all(error < (1e-4 if "ridge" in CASES[name] else 1e-5) for error in case.values()), (name, case)
    assert all(1e-5 < error < 2e-3 for error in rounded.values()), rounded
    assert all(1e-5 < tiny[name] < 2e-3 for name in ("o", "q", "v")), tiny
    assert all(tiny[name] < 2e-2 for name in ("k", "beta", "ridge")), tiny


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_a_graph_is_not_broken():
    code = """
    from tests.laws.presets import inputs, mixer
    import torch
    sizes = {"key_dim": 16, "value_dim": 16, "pairs_backend": "triton"}
    m, x = mixer("local_linear", "triton", torch.float32, **sizes), inputs(1, 9, torch.float32)
    def gradient(f):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(f(leaf)[0].square().sum(), leaf)[0]
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    print("FOUND", (gradient(compiled) - gradient(m)).abs().max().item())
    """
    assert float(run_interpreted(textwrap.dedent(code), fla=False).split("FOUND")[1]) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [c for c in CASES if c != "a tiny ridge"])
@pytest.mark.parametrize("K, V", [(64, 64), (128, 128), (48, 80)])
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float32, 3e-3), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)],
    ids=["float32", "float16", "bf16"],
)
def test_the_kernels_are_the_definition(dtype, tolerance, case, K, V):
    """Every case with two heads on one pair of keys and values: what the kernels are compiled for is then the same."""
    sizes = CASES[case] | {"T": CASES[case]["T"] * 5, "past": CASES[case].get("past", 0) * 5}
    sizes |= {"B": 2, "H": 2, "G": 1, "K": K, "V": V}
    found = errors(**sizes, dtype=dtype, device="cuda")
    allowed = {name: tolerance * (4 if name in ("beta", "ridge") else 1) for name in NAMES}  # sums that may cancel
    assert all(error < allowed[name] for name, error in found.items()), found


def test_refusals_say_why(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(backend, "TRITON_INSTALLED", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.refusal(cpu, torch.float32, 128, 64) is None
    assert "float64" in kernels.refusal(cpu, torch.float64, 64, 64)
    assert "not 256 and 64" in kernels.refusal(cpu, torch.float32, 256, 64)
    assert "interpreter" in kernels.refusal(cpu, torch.bfloat16, 64, 64)
    monkeypatch.delenv("TRITON_INTERPRET")

    class Properties:
        major, shared_memory_per_block_optin = 8, 101_376

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert kernels.refusal(cuda, torch.bfloat16, 64, 64) is None
    assert "163 KB" in kernels.refusal(cuda, torch.bfloat16, 128, 64)
    Properties.major = 7
    assert "capability 8" in kernels.refusal(cuda, torch.float32, 64, 64)
