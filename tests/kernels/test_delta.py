"""The kernels of the delta rule against the recurrence in float64: outputs, last memory and every gradient."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from models.kernels import delta, fla, momentum
from models.parts.sizes import Sizes
from models.regression.documents import forget_at_starts
from models.regression.linear.delta import Delta, recurrent_delta
from tests.kernels.interpreter import run_interpreted

CASES = {  # what differs from one head width of 16, 100 tokens, a decay
    "gated": {},
    "no decay": {"decay": None},
    "documents": {"documents": 23},
    "documents, no decay": {"documents": 23, "decay": None},
    "large gates": {"decay": 8.0},
    "small gates": {"decay": -12.0},
    "aligned keys": {"aligned": 2.0},
    "ragged": {"K": 20, "V": 40, "T": 70},
    "short": {"T": 3},
}
WIDE = {
    "wide": {"K": 128, "V": 128, "T": 300, "documents": 130},
    "wide, many heads": {"K": 128, "V": 128, "T": 130, "rows": 40},  # one program of the scans for all values
    "wide, no decay": {"K": 128, "V": 128, "T": 300, "decay": None},
    "64": {"K": 64, "V": 64, "T": 300},
    "wide, ragged": {"K": 96, "V": 80, "T": 130},
    "wide keys": {"K": 128, "V": 16, "T": 130},
    "wide values": {"K": 16, "V": 128, "T": 130},
}
SPANS = {  # how many spans, and what differs as above
    "gated": (3, {"T": 333, "rows": 3}),
    "as many as chunks": (4, {"T": 193, "rows": 1}),
    "documents": (3, {"T": 400, "documents": 150, "rows": 1}),
    "documents, no decay": (2, {"T": 260, "documents": 23, "decay": None, "rows": 3}),
    "large gates": (4, {"T": 530, "decay": 8.0, "rows": 1}),
    "aligned keys": (2, {"T": 200, "aligned": 2.0, "rows": 1}),
    "ragged": (3, {"K": 20, "V": 40, "T": 330, "rows": 1}),
}
WIDE_SPANS = {
    "wide": (8, {"K": 128, "V": 128, "T": 2000, "rows": 1}),
    "wide, large gates": (8, {"K": 128, "V": 128, "T": 4100, "decay": 8.0, "rows": 1}),
    "wide, documents": (4, {"K": 128, "V": 128, "T": 700, "documents": 130, "rows": 3}),
    "64": (3, {"K": 64, "V": 64, "T": 700}),
    "wide, ragged": (3, {"K": 96, "V": 80, "T": 520}),
}


def errors(
    device: str,
    dtype: torch.dtype,
    K: int = 16,
    V: int = 16,
    T: int = 100,
    decay: float | None = 3.0,
    documents: int | None = None,
    aligned: float = 0.0,
    rows: int = 2,
    rule=delta.delta_rule,
) -> list[float]:
    """Of outputs, last memory and all gradients: the distance to the recurrence of the same rounded inputs, relative to
    its length. decay: the mean of the gates' logits; None for none."""
    B, H, g = rows, 2, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(B, *shape, generator=g, dtype=torch.float64).to(device)

    keys = F.normalize(normal(T, H, K) + aligned, dim=-1)
    inputs = [x.to(dtype) for x in (normal(T, H, K), keys, normal(T, H, V))]
    inputs += [normal(T, H).sigmoid().float(), None if decay is None else F.logsigmoid(normal(T, H) + decay).float()]
    inputs += [0.1 * normal(H, K, V).float()]
    segments = None if documents is None else (torch.arange(T, device=device) // documents).expand(B, T)

    def call(exact: bool) -> list[torch.Tensor]:
        own = [x if x is None else x.to(torch.float64 if exact else x.dtype).requires_grad_() for x in inputs]
        q, k, v, b, log_decay, memory = own
        gates = b, forget_at_starts(log_decay, segments, like=b.unsqueeze(-1)), memory
        found = list((recurrent_delta if exact else rule)(q, k, v, *gates))
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in found]
        total = sum((x * w).sum() for x, w in zip(found, weights, strict=True))
        return [*found, *torch.autograd.grad(total, [x for x in own if x is not None])]

    pairs = zip(call(False), call(True), strict=True)
    return [((a.double() - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in pairs]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_are_the_recurrence():
    """Through the interpreter, float32."""
    code = """
    import json, torch
    from tests.kernels.test_delta import CASES, errors
    print("FOUND", json.dumps({name: max(errors("cpu", torch.float32, rows=1, **CASES[name])) for name in CASES}))
    """
    found = json.loads(run_interpreted(textwrap.dedent(code), fla=False).split("FOUND")[1])
    assert found.keys() == CASES.keys() and all(error < 1e-5 for error in found.values()), found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_rows_in_spans_are_the_recurrence():
    """Through the interpreter, float32. What is made without data has the shapes of what is made with them."""
    code = """
    import json, torch
    from torch._subclasses import FakeTensorMode
    from models.kernels import delta
    from models.kernels.delta import launch
    from tests.kernels.test_delta import SPANS, errors
    found = {}
    for name, (spans, case) in SPANS.items():
        launch.num_spans = lambda *_: spans
        found[name] = max(errors("cpu", torch.float32, **case))
    given = *torch.randn(3, 1, 300, 2, 16), *torch.rand(2, 1, 300, 2), torch.zeros(1, 2, 16, 16), True
    shapes = [[x.shape for x in delta.forward(*given)]]
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in given]
        shapes.append([x.shape for x in delta.forward(*given)])
    print("FOUND", json.dumps([found, shapes]))
    """
    found, shapes = json.loads(run_interpreted(textwrap.dedent(code), fla=False).split("FOUND")[1])
    assert found.keys() == SPANS.keys() and all(error < 1e-5 for error in found.values()), found
    assert shapes[0] == shapes[1] and [3, 1, 2, 16, 32] in shapes[0], shapes


def times_the_error(device: str, dtype: torch.dtype, spans: int, **case) -> list[float]:
    """Of outputs, last memory and all gradients: how many times the error without spans that with spans is."""
    from models.kernels.delta import launch

    found, chosen = [], launch.num_spans
    for number in (spans, 1):
        launch.num_spans = lambda *_, number=number: number
        found.append(errors(device, dtype, decay=8.0, rows=1, **case))
    launch.num_spans = chosen
    return [x / y for x, y in zip(*found, strict=True)]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_spans_keep_the_digits():
    """Through the interpreter, fp16, gates near 1: what a span does to a memory is rounded as often as the memory."""
    code = """
    import json, torch
    from tests.kernels.test_delta import times_the_error
    case = {"spans": 6, "K": 64, "V": 64, "T": 1536}
    print("FOUND", json.dumps([times_the_error("cpu", torch.float16, aligned=x, **case) for x in (0.0, 1.0)]))
    """
    found = json.loads(run_interpreted(textwrap.dedent(code), fla=False).split("FOUND")[1])
    assert all(times < 1.5 for case in found for times in case), found


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_few_rows_of_many_chunks_are_cut_into_spans(monkeypatch):
    """By programs of a scan and chunks of a row, for 132 multiprocessors."""
    from models.kernels import spans

    gpu, x = SimpleNamespace(multi_processor_count=132), SimpleNamespace(is_cuda=True, device=None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    found = {(programs, chunks): spans.num_spans(x, programs, chunks) for programs in (2, 16, 32, 64, 512)
             for chunks in (32, 128, 1024)}  # fmt: skip
    cut = {case: number for case, number in found.items() if number > 1}
    assert cut == {(2, 128): 4, (2, 1024): 32, (16, 128): 4, (16, 1024): 8, (32, 128): 4, (32, 1024): 4}
    assert spans.num_spans(torch.zeros(1), 2, 1024) == 1


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", CASES | WIDE)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["float32", "bf16"])
def test_on_a_gpu(name, dtype, tolerance):
    case = {"K": 16, "V": 16} | (CASES | WIDE)[name]
    if why := delta.refusal(torch.device("cuda"), dtype, case["K"], case["V"]):
        pytest.skip(f"refused: {why}")
    found = errors("cuda", dtype, **case)
    assert max(found) < tolerance, found


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", SPANS | WIDE_SPANS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["float32", "bf16"])
def test_spans_on_a_gpu(name, dtype, tolerance, monkeypatch):
    from models.kernels.delta import launch

    spans, case = (SPANS | WIDE_SPANS)[name]
    case = {"K": 16, "V": 16} | case
    if why := delta.refusal(torch.device("cuda"), dtype, case["K"], case["V"]):
        pytest.skip(f"refused: {why}")
    monkeypatch.setattr(launch, "num_spans", lambda *_: spans)
    found = errors("cuda", dtype, **case)
    assert max(found) < tolerance, found


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("aligned", [0.0, 1.0])
def test_spans_keep_the_digits_on_a_gpu(aligned):
    found = times_the_error("cuda", torch.bfloat16, 8, K=128, V=128, T=8192, aligned=aligned)
    assert all(times < 1.5 for times in found), found


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("spans", [1, 5])
def test_the_same_bits_in_every_run_and_in_a_graph(spans, monkeypatch):
    from models.kernels.delta import launch

    monkeypatch.setattr(launch, "num_spans", lambda *_: spans)
    torch.manual_seed(0)
    q, k, v = (F.normalize(torch.randn(4, 1000, 4, 128, device="cuda"), dim=-1).bfloat16() for _ in range(3))
    b, log_decay = torch.rand(4, 1000, 4, device="cuda"), -torch.rand(4, 1000, 4, device="cuda")
    given = [x.requires_grad_() for x in (q, k, v, b, log_decay, torch.zeros(4, 4, 128, 128, device="cuda"))]

    def call() -> list[torch.Tensor]:
        o, last = delta.delta_rule(*given)
        return [o, last, *torch.autograd.grad([o, last], given, [o.detach(), last.detach()])]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        first, second = call(), call()
        with torch.no_grad():
            alone = delta.delta_rule(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        third = call()
    graph.replay()
    torch.cuda.synchronize()
    for found in (second, third, alone):
        assert all(torch.equal(x, y) for x, y in zip(first, found, strict=found is not alone))


def test_auto_takes_it_where_it_computes_the_rule(monkeypatch):
    for kernels in (delta, momentum):
        monkeypatch.setattr(kernels, "refusal", lambda *_, **__: None)
    for name in ("refusal_gated_delta", "refusal_leaky_delta"):
        monkeypatch.setattr(fla, name, lambda *_: None)
    monkeypatch.setattr(delta, "faster", lambda _: True)

    def taken(width: int, decay: str, **settings) -> str:
        regressor = Delta(Sizes(2 * width, 2, 2, width, width), **settings)
        regressor.decay_kind = decay
        return regressor.choose(torch.device("cuda"), torch.bfloat16).backend

    assert taken(128, "head") == taken(128, "none") == taken(128, "none", gradient_before_decay=True) == "triton"
    assert taken(256, "head") == taken(128, "head", gradient_before_decay=True) == "fla"
    monkeypatch.setattr(fla, "FLASH_QLA", True)  # which is asked for by hand, and has no kernel without a decay
    assert (taken(128, "head"), taken(128, "none")) == ("fla", "triton")
    monkeypatch.setattr(delta, "faster", lambda _: False)
    assert taken(128, "none") == "fla"


def test_what_it_refuses(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "Triton" in delta.refusal(torch.device("cpu"), torch.float32, 64, 64)
    assert delta.takes(torch.bfloat16, 128, 16) and not delta.takes(torch.bfloat16, 128, 256)
    assert delta.takes(torch.float32, 64, 64) and not delta.takes(torch.float32, 128, 64)
    assert not delta.takes(torch.float64, 16, 16)
    if importlib.util.find_spec("triton") is not None:
        cuda = torch.device("cuda")
        assert delta.refusal(cuda, torch.bfloat16, 128, 128) is None
        assert "up to 64 wide, not 128 and 64" in delta.refusal(cuda, torch.float32, 128, 64)
        assert "float64" in delta.refusal(cuda, torch.float64, 64, 64)
