"""Our kernels of test-time training equal the definition: natively on a GPU, by Triton's interpreter on a CPU (float32;
it can't do bfloat16)."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from itertools import pairwise

import pytest
import torch

from models.kernels.ttt import TILE, refusal
from models.parts.sizes import Sizes
from models.regression.deep import TTT
from models.regression.deep.accelerated import kernel_averaged
from models.regression.regressor import Tokens
from tests.kernels.interpreter import run_interpreted
from tests.regression.deep.test_ttt import DOCUMENTS, draw, dual_ttt, largest_error, outcome

Calls = tuple[tuple[int, ...], ...]
CALLS: Calls = ((), (1, 32, 67))


def errors(
    inner_model: str, device: str = "cpu", width: int = 16, dtype: torch.dtype = torch.float32, calls: Calls = CALLS
) -> list[float]:
    """Of outputs, the last state and every gradient, with and without documents, in one call and in several."""
    inputs = [x.float().to(device) for x in draw(inner_model, width=width)]
    found = []
    for segments in (None, DOCUMENTS.to(device)):
        exact = outcome(dual_ttt, inputs, segments=segments)
        for splits in calls:
            ours = outcome(kernel_averaged, inputs, dtype, splits=splits, segments=segments)
            found.append(largest_error(ours, exact))
    return found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_are_the_dual_form_interpreted():
    code = """
    import json
    from tests.kernels.test_ttt import errors
    print("FOUND", json.dumps({name: errors(name) for name in ("linear", "mlp")}))
    """
    found = json.loads(run_interpreted(textwrap.dedent(code), fla=False).split("FOUND")[1])
    assert len(found["linear"]) == len(found["mlp"]) == 2 * len(CALLS)
    assert max(found["linear"] + found["mlp"]) < 1e-5, found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_spans_slabs_and_tiles_do_not_show_interpreted():
    """Sequences are of two spans or one slab otherwise, the hidden layer of one tile. Here spans of one mini-batch or
    two, slabs of one or two, and two tiles."""
    code = """
    import json
    from models.kernels import ttt
    from models.kernels.ttt import mlp
    from tests.kernels.test_ttt import errors

    mlp.OPTIONS |= {name: (32, 4, 1) for name in ("read", "read_gradient", "write_gradient")}
    ttt.TILE, ttt.SLAB = 32, 1
    found = errors("linear", calls=((),)) + errors("mlp", calls=((),))
    ttt.SLAB = 8
    print("FOUND", json.dumps(found + errors("mlp", calls=((),))))
    """
    found = json.loads(run_interpreted(textwrap.dedent(code), fla=False).split("FOUND")[1])
    assert len(found) == 6 and max(found) < 1e-5, found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "inner_model, width", [("linear", 16), ("linear", 64), ("linear", 128), ("mlp", 16), ("mlp", 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_are_the_dual_form(inner_model, width, dtype):
    found = errors(inner_model, "cuda", width, dtype)
    assert max(found) < {torch.float32: 2e-2, torch.bfloat16: 5e-2}[dtype], found  # tensor cores round, to TF32 or bf16


SHAPES = ((1, 0), (5, 0), (40, 9), (1000, 0), (1000, 1))  # tokens of a document, and how many of the first are over


def spans(begins: list[int], length: int) -> list[int]:
    """Where the spans of one row begin: TILE tokens or fewer, in order."""
    edges = begins[:1]
    for begin, end in pairwise([*begins, length]):
        if end - edges[-1] > TILE:
            edges.append(begin)
    return edges


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_spans_take_what_a_tile_holds_interpreted():
    """Documents of one token, of a few, and of many; rows that begin within a mini-batch, and one without any."""
    length = 300
    rows = [[(t + seen) % size for t in range(length)] for size, seen in SHAPES]
    code = f"""
    import json, torch
    from models.kernels.backend import packed
    from models.kernels.ttt import Call, _forward

    def laid_out(rows):
        (B, L), K, x = torch.tensor(rows).shape, 16, torch.ones
        k, norm, start = x(B, L, 1, K), x(1, K), x(1, K * K + K)
        call = Call(k, k, k, x(B, L, 1), x(16), start, norm, norm, None, torch.tensor(rows).int(), start, *[None] * 3)
        *_, starts, edges, counts = _forward(*packed(call))
        return [x.tolist() for x in (starts, edges, counts)]

    print("FOUND", json.dumps([laid_out({rows}), laid_out([[3, 4, 5]])]))
    """
    found, few = json.loads(run_interpreted(textwrap.dedent(code), fla=False).split("FOUND")[1])
    assert few[1:] == [[[3, 3]], [[0, 0]]]
    for row, starts, edges, (num, count) in zip(rows, *found, strict=True):
        opens = [t for t in range(length) if row[t] % 16 == 0]
        documents = [t for t in opens if row[t] == 0 or t == opens[0]]
        assert starts[: num + 1] == [*documents, length]
        assert edges[:count] == spans(opens, length) and set(edges[count:]) == {length}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_bits_in_every_run():
    """With documents, at a model's size."""
    q, k, v = (torch.randn(4, 2048, 8, 128, device="cuda").bfloat16().requires_grad_() for _ in range(3))
    x, segments = torch.randn(4, 2048, 1024, device="cuda"), torch.arange(2048, device="cuda") // 300
    layer = TTT(Sizes(1024, 8, 8, 128, 128), "triton", "linear").to("cuda")
    found = []
    for _ in range(4):
        o, _ = layer(Tokens(x, q, k, v, segments=segments.expand(4, -1)))
        found.append([o, *torch.autograd.grad(o.float().square().sum(), [q, k, v, *layer.parameters()])])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_programs_than_a_gpu_holds_wait_for_one_another():
    """Programs of a head exchange sums, 4,096 here, of which an H100 holds some 300 at a time."""
    B, T, H, K = 64, 100, 16, 64
    q, k, v = (torch.randn(B, T, H, K, device="cuda").bfloat16().requires_grad_() for _ in range(3))
    x, segments, found = torch.randn(B, T, H * K, device="cuda"), torch.arange(T, device="cuda") // 40, []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        layer = TTT(Sizes(H * K, H, H, K, K), backend, "mlp").to("cuda")
        with torch.compiler.set_stance("force_eager"):  # PyTorch's form would be compiled for a minute
            o, _ = layer(Tokens(x, q, k, v, segments=segments.expand(B, -1)))
            found.append([o, *torch.autograd.grad(o.float().square().sum(), [q, k, v, *layer.parameters()])])
    assert all((a - b).float().norm() < 2e-2 * b.float().norm() for a, b in zip(*found, strict=True))


def test_refusals_say_why(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    assert refusal(cuda, torch.bfloat16, 16, (64, 256, 64)) is None
    assert "128" in refusal(cuda, torch.bfloat16, 16, (128, 512, 128))
    assert "4 times the keys' 64, not of 128" in refusal(cuda, torch.bfloat16, 16, (64, 128, 64))
    assert "grad_batch=8" in refusal(cuda, torch.bfloat16, 8, (64, 64))
    assert "float64" in refusal(cuda, torch.float64, 16, (64, 64))
    with pytest.raises(ValueError, match=r"regressor\.backend=triton can't run TTT here: Triton needs a GPU"):
        TTT(Sizes(12, 2, 2, 16, 16), backend="triton").choose(torch.device("cpu"), torch.float32)
