"""The momentum kernels against the recurrences in float64: every rule, its gradients, and gates at their ends."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.kernels import delta, momentum
from models.regression.documents import forget_at_starts
from models.regression.linear import omega
from models.regression.linear.delta import kernel_delta, recurrent_delta
from models.regression.linear.momentum import State, kernel_momentum, recurrent_momentum
from tests.kernels.interpreter import run_interpreted
from tests.laws.presets import mixer

CASES = {  # what differs from one head width of 16, 100 tokens, a decay, momenta of sigmoid(N(0, 1))
    "exact": {},
    "no decay": {"decay": None},
    "documents": {"documents": 23},
    "small gates": {"momentum": -12.0, "decay": 0.0},
    "large gates": {"momentum": 8.0, "decay": 8.0},
    "mini-batches of 4": {"grad_batch": 4},
    "of 16, documents": {"grad_batch": 16, "documents": 23},
    "longer than a chunk": {"grad_batch": 100, "T": 150},
    "as long as a chunk": {"grad_batch": 64, "T": 150, "state": False},
    "aligned keys": {"aligned": 2.0},
    "ragged": {"K": 20, "V": 40, "T": 70},
    "leaky LMS": {"momentum": None, "early": True},
    "leaky LMS, documents": {"momentum": None, "early": True, "documents": 23},
    "delta rule": {"momentum": None, "documents": 23},
    "delta rule, no decay": {"momentum": None, "decay": None},
    "write keys": {"momentum": None, "own_writes": True, "documents": 23},
    "write keys, no decay": {"momentum": None, "own_writes": True, "decay": None},
    "write keys, leaky LMS": {"momentum": None, "own_writes": True, "early": True},
    "write keys, ragged": {"momentum": None, "own_writes": True, "K": 20, "V": 40, "T": 70},
    "windows of 4, no decay": {"window": 4, "T": 50, "decay": None},
    "windows of 3, documents": {"window": 3, "T": 50, "documents": 23},
    "windows, mini-batches of 4, documents": {"window": 4, "T": 50, "grad_batch": 4, "documents": 23},
    "windows, mini-batches of 16": {"window": 3, "T": 50, "grad_batch": 16},
    "windows, mini-batches in chunks": {"window": 4, "T": 50, "grad_batch": 16, "state": False},
    "windows, ragged": {"window": 3, "K": 20, "V": 40, "T": 23},
}
WIDE = {
    "wide": {"K": 128, "V": 128, "T": 300},
    "widest": {"K": 256, "V": 256, "T": 200},
    "wide, write keys": {"momentum": None, "own_writes": True, "K": 128, "V": 128, "T": 300},
    "widest, write keys": {"momentum": None, "own_writes": True, "K": 256, "V": 256, "T": 200},
    "wide, windows": {"window": 3, "K": 128, "V": 128, "T": 100},
}
SPANS = {  # how many spans, and what differs as above
    "exact": (3, {"T": 333, "rows": 1}),
    "no decay": (2, {"T": 193, "decay": None, "rows": 3}),
    "documents": (3, {"T": 260, "documents": 80, "rows": 1}),
    "ragged": (2, {"K": 20, "V": 40, "T": 200, "rows": 1}),
    "leaky LMS, documents": (3, {"momentum": None, "early": True, "T": 200, "documents": 60, "rows": 1}),
    "write keys": (2, {"momentum": None, "own_writes": True, "T": 150, "documents": 23, "rows": 1}),
    "windows of 3": (2, {"window": 3, "T": 70, "documents": 23, "rows": 1}),
}
WIDE_SPANS = {
    "wide": (8, {"K": 128, "V": 128, "T": 2000, "rows": 1}),
    "wide, large gates": (8, {"momentum": 2.0, "decay": 8.0, "K": 128, "V": 128, "T": 2000, "rows": 1}),
    "wide, documents": (3, {"K": 128, "V": 128, "T": 700, "documents": 130}),
    "wide, write keys": (3, {"momentum": None, "own_writes": True, "K": 128, "V": 128, "T": 700}),
}


def errors(
    device: str,
    dtype: torch.dtype,
    K: int = 16,
    V: int = 16,
    T: int = 100,
    momentum: float | None = 0.0,
    decay: float | None = 3.0,
    grad_batch: int = 1,
    documents: int | None = None,
    state: bool = True,
    early: bool = False,
    aligned: float = 0.0,
    window: int = 0,
    own_writes: bool = False,
    rows: int = 2,
) -> list[float]:
    """Of outputs, last matrices and all gradients: the distance to the recurrence of the same rounded inputs, relative
    to its length. momentum and decay: the mean of the gates' logits; None for none. window: that of the Omega rule.
    own_writes: for w = k P / (1 + b k.(k P)) of a positive P, as in preconditioned.py."""
    B, H, g = rows, 2, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(B, *shape, generator=g, dtype=torch.float64).to(device)

    logit = normal(T, H) + (momentum or 0.0)
    step_size = (-logit).sigmoid() * normal(T, H).sigmoid() / grad_batch
    keys = F.normalize(normal(T, H, K) + aligned, dim=-1)
    inputs = [x.to(dtype) for x in (normal(T, H, K), keys, normal(T, H, V))]
    inputs += [step_size, F.logsigmoid(logit), None if decay is None else F.logsigmoid(normal(T, H) + decay)]
    n = state * (3 if grad_batch > 1 else 2)
    inputs += [0.1 * normal(H, K, V) for _ in range(n)]
    if window:
        inputs += [normal(T, H, window).softmax(-1)]
        inputs += [normal(window - 1, H, X).to(dtype) / X**0.5 for X in (K, V)] if state else []
    if own_writes:
        scaled = keys * (0.5 * normal(T, H, K)).exp()
        inputs += [(scaled / (1 + step_size.unsqueeze(-1) * (keys * scaled).sum(-1, keepdim=True))).to(dtype)]
    segments = None if documents is None else (torch.arange(T, device=device) // documents).expand(B, T)

    def call(form: str) -> list[torch.Tensor]:
        exact = form == "exact"
        own = [x if x is None else x.to(torch.float64 if exact else x.dtype).requires_grad_() for x in inputs]
        if not exact:
            own = own[:3] + [x if x is None else x.detach().float().requires_grad_() for x in own[3:]]
        q, k, v, theta, log_momentum, log_decay, *others = own
        matrices, gamma = others[:n], others[n : n + 1]
        if momentum is None:
            gates = (theta, forget_at_starts(log_decay, segments, like=theta), matrices[0])
            rule = recurrent_delta if exact else kernel_delta
            written = {"write_key": own[-1]} if own_writes else {}
            with patch.object(delta, "takes", lambda *_: False):  # what has kernels of its own
                o, last = rule(q, k, v, *gates, **written, gradient_before_decay=early)
            found = [o, last]
        else:
            phase = torch.full((B,), 3, device=device) if grad_batch > 1 else None
            first = State(*matrices, *([phase] if phase is not None else [])) if matrices else None
            rule, pairs = recurrent_momentum if exact else kernel_momentum, []
            if window:
                rule = omega.recurrent_omega if exact else omega.kernel_omega
                first = omega.State(first, *others[n + 1 :]) if state else None
            o, last = rule(q, k, v, *gamma, theta, log_momentum, log_decay, first, grad_batch, segments)
            if window:
                last, *pairs = last
            found = [o, *last.matrices, *pairs]
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in found]
        total = sum((x * w).sum() for x, w in zip(found, weights, strict=True))
        wanted = [x for x in own if x is not None]
        gradients = torch.autograd.grad(total, wanted, allow_unused=True)
        return [*found, *(torch.zeros_like(x) if d is None else d for x, d in zip(wanted, gradients, strict=True))]

    pairs = zip(call("kernel"), call("exact"), strict=True)
    return [((a.double() - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in pairs]


def differences() -> list[float]:
    """Of gradients in a compiled block, and in one that is recomputed, from those of a plain call. What the forward
    pass keeps goes through both."""
    shape, generator = (1, 20, 2), torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, 16, generator=generator).requires_grad_() for _ in range(3)]
    inputs += [torch.full(shape, x).requires_grad_() for x in (0.3, -0.7, -0.1)]

    def block(*x: torch.Tensor) -> torch.Tensor:
        return kernel_momentum(*x)[0].square().sum()

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    forms = block, compiled, partial(checkpoint, block, use_reentrant=False)
    plain, *others = (torch.cat([x.flatten() for x in torch.autograd.grad(form(*inputs), inputs)]) for form in forms)
    return [(x - plain).abs().max().item() for x in others]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_are_the_recurrence():
    """Through the interpreter, float32. (Of several rows: tests/laws/test_backends.py.)"""
    code = """
    import json, torch
    from tests.kernels.test_momentum import CASES, differences, errors
    found = {name: max(errors("cpu", torch.float32, rows=1, **CASES[name])) for name in CASES}
    print("FOUND", json.dumps([found, differences()]))
    """
    found, others = json.loads(run_interpreted(textwrap.dedent(code), fla=False).split("FOUND")[1])
    assert found.keys() == CASES.keys() and all(error < 1e-5 for error in found.values()), found
    assert others == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_rows_in_spans_are_the_recurrence():
    """Through the interpreter, float32."""
    code = """
    import json, torch
    from models.kernels.momentum import launch
    from tests.kernels.test_momentum import SPANS, errors
    found = {}
    for name, (spans, case) in SPANS.items():
        launch.num_spans = lambda *_: spans
        found[name] = max(errors("cpu", torch.float32, **case))
    print("FOUND", json.dumps(found))
    """
    found = json.loads(run_interpreted(textwrap.dedent(code), fla=False).split("FOUND")[1])
    assert found.keys() == SPANS.keys() and all(error < 1e-5 for error in found.values()), found


def launched_as_16_bits() -> None:
    """Launches of float32 get the tiles of 16 bits from here on: 64 wide at least, zeros beside narrow memories."""
    from models.kernels.momentum import launch

    first, choose = launch.Launch.__init__, launch.configurations

    def init(self: launch.Launch, *arguments: object) -> None:
        first(self, *arguments)
        self.least, self.width = 64, max(64, self.width)
        self.configurations = choose(self.width, True, self.matrices_of["CARRIED"])
        self.chunk["BK"] = self.width

    launch.Launch.__init__ = init


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_tiles_wider_than_a_memory():
    """Through the interpreter, float32: what lies beyond a narrow memory is neither read nor written. And fp16, which
    has an eighth of bf16's rounding: what narrow keys have to do with each other is not rounded."""
    code = """
    import json, torch
    from tests.kernels.test_momentum import CASES, errors, launched_as_16_bits
    rounded = max(errors("cpu", torch.float16, **CASES["aligned keys"]))
    launched_as_16_bits()
    names = "exact", "ragged", "mini-batches of 4", "as long as a chunk", "delta rule", "write keys, ragged"
    found = {name: max(errors("cpu", torch.float32, **CASES[name])) for name in names}
    print("FOUND", json.dumps([found, rounded]))
    """
    found, rounded = json.loads(run_interpreted(textwrap.dedent(code), fla=False).split("FOUND")[1])
    assert all(error < 1e-5 for error in found.values()), found
    assert rounded < 5e-3 / 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CASES | WIDE)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=["float32", "bf16"])
def test_on_a_gpu(name, dtype, tolerance):
    case = {"K": 16, "V": 16, "own_writes": False} | (CASES | WIDE)[name]
    if why := momentum.refusal(torch.device("cuda"), dtype, case["K"], case["V"], case["own_writes"]):
        pytest.skip(f"refused: {why}")
    found = errors("cuda", dtype, **case)
    assert max(found) < tolerance, found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SPANS | WIDE_SPANS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=["float32", "bf16"])
def test_spans_on_a_gpu(name, dtype, tolerance, monkeypatch):
    from models.kernels.momentum import launch

    spans, case = (SPANS | WIDE_SPANS)[name]
    case = {"K": 16, "V": 16, "own_writes": False} | case
    if why := momentum.refusal(torch.device("cuda"), dtype, case["K"], case["V"], case["own_writes"]):
        pytest.skip(f"refused: {why}")
    found = []
    for number in (1, spans, spans):
        monkeypatch.setattr(launch, "num_spans", lambda *_, number=number: number)
        found.append(errors("cuda", dtype, **case))
    plain, first, second = found
    assert first == second
    # what a span does to a memory is rounded where it is an operand, as often as a memory is
    assert max(first) < max(tolerance, 1.5 * max(plain)), found


def finite(device: str, dtype: torch.dtype) -> bool:
    """Whether outputs, memories and gradients are, for all triples of gates in this list, zero and one among them."""
    ends = torch.tensor([0.0, 1e-30, 1e-6, 0.5, 1 - 1e-6, 1.0], device=device)
    theta, momentum, decay = torch.cartesian_prod(ends, ends, ends).view(1, -1, 1, 3).unbind(-1)
    gates = [x.clone().requires_grad_() for x in (theta / 2, momentum.log(), decay.log())]
    torch.manual_seed(0)
    q, k, v = (torch.randn(*theta.shape, 16, device=device) for _ in range(3))
    pairs = [x.to(dtype).requires_grad_() for x in (q, F.normalize(k, dim=-1), v)]
    o, state = kernel_momentum(*pairs, *gates)
    gradients = torch.autograd.grad(o.float().sum(), [*pairs, *gates])
    return all(x.isfinite().all().item() for x in (o, *state.matrices, *gradients))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_gates_of_zero_and_one_are_finite():
    code = "import torch\nfrom tests.kernels.test_momentum import finite\nprint(finite('cpu', torch.float32))"
    assert "True" in run_interpreted(code, fla=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_of_zero_and_one_are_finite_on_a_gpu(dtype):
    assert finite("cuda", dtype)


def test_auto_takes_it_and_only_its_own_rules_can_ask(monkeypatch):
    monkeypatch.setattr(momentum, "refusal", lambda *_, **__: None)
    cuda = torch.device("cuda")
    for backend in ("auto", "triton"):
        for preset in ("titans", "omega", "preconditioned_delta"):
            assert mixer(preset, backend).regressor.choose(cuda, torch.bfloat16).backend == "triton"
    with pytest.raises(ValueError, match="has no such kernel"):
        mixer("gla", "triton").regressor.choose(cuda, torch.bfloat16)


def test_what_it_refuses(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert "Triton" in momentum.refusal(cpu, torch.float32, 64, 64)
    if importlib.util.find_spec("triton") is not None:
        assert momentum.refusal(cuda, torch.bfloat16, 256, 64) is None
        assert "256" in momentum.refusal(cuda, torch.bfloat16, 257, 64)
        assert "values of 64" in momentum.refusal(cuda, torch.bfloat16, 96, 16)
        assert momentum.refusal(cuda, torch.float32, 96, 16) is None
        assert "128 is right" in momentum.refusal(cuda, torch.bfloat16, 256, 256, own_writes=True)
        assert "float64" in momentum.refusal(cuda, torch.float64, 64, 64)
