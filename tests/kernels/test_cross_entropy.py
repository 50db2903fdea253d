"""The kernel of cross-entropy equals the definition: natively on a GPU, by Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util
import json
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import loss
from models.kernels import backend, cross_entropy
from tests.kernels.interpreter import run_interpreted

# vocabularies of less than a block, of a whole one, of several with a tail; tokens that are no multiple of a chunk
CASES: dict[str, dict[str, Any]] = {
    "bytes": {"V": 257, "rows": 16},
    "a whole block": {"V": 64, "block": 64, "rows": 37},
    "blocks and a tail": {"V": 333, "block": 64, "rows": 8},
    "all ignored": {"V": 50, "ignored": slice(None)},
    "one token": {"V": 50, "N": 1, "ignored": slice(0)},
    "far apart": {"V": 129, "block": 64, "scale": 30.0},
}


def draw(N: int = 37, D: int = 32, V: int = 50, scale: float = 1.0, ignored: slice = slice(2, None, 7)):
    """hidden [N, D], weight [V, D], targets [N]: logits of a few units of scale."""
    torch.manual_seed(0)
    y = torch.randint(V, (N,))
    y[ignored] = loss.IGNORED
    return scale * torch.randn(N, D), torch.randn(V, D) * D**-0.5, y


def errors(dtype: torch.dtype = torch.float32, device: str = "cpu", rows: int = 64, block: int = 0, **sizes: Any):
    """Distances to what float64 makes of the same logits, which have the dtype: of the sum, of each token's nats, of
    both gradients, relative to their largest value; and the number of other predictions. rows: of a chunk.
    """
    h, w, y = (x.to(device) for x in draw(**sizes))
    h, w = h.to(dtype), w.to(dtype)
    blocks = {"GRADIENT_BLOCK": block, "LIKELIEST_BLOCK": block} if block else {}
    chunk = rows * -(-len(w) // 64) * 64 * h.element_size()
    with patch.multiple(cross_entropy, CHUNK=chunk, **blocks):
        h.requires_grad_(), w.requires_grad_()
        found = loss.sum_nats(h, w, y)
        dh, dw = torch.autograd.grad(3 * found, (h, w))
        each, likeliest = loss.score(h, w, y)
        with torch.no_grad():  # the same products: of other shapes cuBLAS rounds otherwise
            logits = torch.cat([z.double() for z, _, _ in loss._chunks(h, w, y, True)])
    with torch.no_grad():
        exact = F.cross_entropy(logits, y, ignore_index=loss.IGNORED, reduction="none")
        p = (logits.softmax(-1) - F.one_hot(y.clamp(min=0), len(w))) * (y != loss.IGNORED).unsqueeze(1)
        pairs = (found, exact.sum()), (each, exact), (dh, 3 * p @ w.double()), (dw, 3 * p.T @ h.double())
        distances = [((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in pairs]
        return [*distances, (likeliest != logits.argmax(-1)).sum().item()]


def outside() -> list[Tensor]:
    """nats of targets that are no token, and what stands beside the logits in memory before and after."""
    room = torch.randn(4, 100)
    before, y = room.clone(), torch.tensor([3, 70, -1, loss.IGNORED])
    nats = cross_entropy.nats_and_gradient(room[:, :70], y)
    return [nats.isnan().tolist(), torch.equal(room[:, 70:], before[:, 70:]), room[3, :70].abs().max().item()]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernel_is_the_definition_interpreted():
    code = (
        "import json, torch\nfrom tests.kernels.test_cross_entropy import *\n"
        "found = {name: errors(**case) for name, case in CASES.items()}\n"
        "half = errors(torch.float16, V=257)\nprint('FOUND', json.dumps([found, half, outside()]))"
    )
    found, half, (wrong, untouched, ignored) = json.loads(run_interpreted(code, fla=False).split("FOUND")[1])
    assert found.keys() == CASES.keys()
    for name, case in found.items():
        assert all(error < 2e-6 for error in case), (name, case)
    assert max(half[:2]) < 2e-6 and max(half[2:]) < 2e-3, half  # gradients of logits and tokens are rounded
    assert wrong == [False, True, True, False] and untouched and ignored == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize(
    "case", [*CASES.values(), {"N": 999, "D": 256, "V": 50257, "rows": 400}], ids=[*CASES, "GPT-2's vocabulary"]
)
def test_the_kernel_is_the_definition(case, dtype):
    total, each, dh, dw, others = errors(dtype, "cuda", **case)
    eps = torch.finfo(dtype).eps
    assert max(total, each) < 3e-6 and max(dh, dw) < max(4 * eps, 1e-5) and others == 0, (total, each, dh, dw, others)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gradient_of_a_weight_in_bfloat16_is_summed_in_float32(monkeypatch):
    """However many chunks: sums in bfloat16 made others' training diverge,
    https://github.com/linkedin/Liger-Kernel/issues/512."""
    many, few = (errors(torch.bfloat16, "cuda", N=4096, V=320, rows=rows)[3] for rows in (16, 4096))
    assert many < 1.5 * few


def test_a_weight_in_bfloat16_without_the_kernel(monkeypatch):
    """The same of the definition, on a CPU."""
    h, w, y = draw(N=512)
    h, w = h.bfloat16(), w.bfloat16().requires_grad_()
    whole = torch.autograd.grad(loss.sum_nats(h, w, y), w)[0]
    monkeypatch.setattr(loss, "LOGITS", 4 * 50)
    in_chunks = torch.autograd.grad(loss.sum_nats(h, w, y), w)[0]
    assert in_chunks.dtype == torch.bfloat16
    assert (in_chunks - whole).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * whole.abs().max()


def test_refusals_say_why(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(backend, "TRITON_INSTALLED", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "this is cpu" in cross_entropy.refusal(cpu, torch.float32)
    assert "not torch.float64" in cross_entropy.refusal(torch.device("cuda"), torch.float64)
    assert cross_entropy.refusal(torch.device("cuda"), torch.bfloat16) is None
