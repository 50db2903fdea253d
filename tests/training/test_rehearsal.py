"""Before the first step kernels are compiled side by side, and a kind of block is compiled once, at no other cost."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from models.kernels import ahead, tuning
from models.regression.regressor import Choice, Regressor
from models.training import rehearsal
from models.training.recompute import Recompute
from models.training.rehearsal import of_each_kind, rehearse
from tests.training.test_recompute import batch, gradients, model

GPU, HALF = torch.device("cuda"), torch.bfloat16


def hybrid():
    return model("hybrid", "model.num_layers=4")


@pytest.fixture
def kernels(monkeypatch):
    """As on a GPU where all blocks have kernels; whether gradients were wanted when they would be compiled."""
    met, fork = [], torch.random.fork_rng

    @contextmanager
    def compiled():
        met.append(torch.is_grad_enabled())
        yield

    monkeypatch.setattr(rehearsal, "accelerated", lambda *_: True)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: fork([]))
    monkeypatch.setattr(ahead, "compiled", compiled)
    return met


def test_one_block_of_each_kind_is_called(kernels):
    m, calls = hybrid(), []
    for i, block in enumerate(m.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    expected = sorted({kind: i for i, kind in enumerate(m.config.layers)}.values())
    before, state = [p.detach().clone() for p in m.parameters()], torch.get_rng_state()
    rehearse(m, lambda: m.sum_nats(*batch()), GPU, HALF)
    assert calls == expected and kernels == [True]
    assert len(m.blocks) == 4 and all(torch.equal(x, p) for x, p in zip(before, m.parameters(), strict=True))
    assert all(p.grad is None for p in m.parameters()) and torch.equal(state, torch.get_rng_state())


def test_blocks_without_kernels_are_left_out(monkeypatch):
    monkeypatch.setattr(Regressor, "choose", lambda self, *_: Choice("torch", ""))
    assert of_each_kind(hybrid(), GPU, HALF) == []


def test_nothing_is_rehearsed_on_a_cpu():
    rehearse(hybrid(), lambda: pytest.fail("called"), torch.device("cpu"), torch.float32)


def test_nothing_is_rehearsed_where_autograd_looks_for_nan(kernels):
    with torch.autograd.set_detect_anomaly(True):
        rehearse(hybrid(), lambda: pytest.fail("called"), GPU, HALF)


@pytest.mark.parametrize("setting", ["none", "all", 1])
def test_a_kind_of_block_is_compiled_once(setting):
    """Whether it comes first, is recomputed, or neither; and no gradient is another one."""
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph

    m, given = model("gated_delta"), batch()
    before = gradients(m, *given)
    torch.compiler.reset()
    for block in m.blocks:
        block.compile(backend=compiler)
    m.alike = True
    Recompute(m, setting)
    after = gradients(m, *given)
    assert len(graphs) == 1
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-7) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("preset", ["gated_delta", "titans_mac", "mesa", "yaad", "softmax"])
def test_zeros_for_the_first_block_change_no_bit(preset):
    m, given = model(preset), batch()
    before, m.alike = gradients(m, *given), True
    for setting in ("none", "all"):
        Recompute(m, setting)
        after = gradients(m, *given)
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True)), setting


class Function:
    """In place of Triton's JITFunction: what is called, and whether only to be compiled."""

    calls: list = []  # noqa: RUF012, of all

    def run(self, *args, grid, warmup, **options):
        self.calls.append((args, warmup))


def test_kernels_are_compiled_and_not_launched_but_for_places(monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit")
    kernel, launch = Function(), Function.run
    monkeypatch.setattr(jit, "JITFunction", Function)
    monkeypatch.setattr(Function, "calls", [])
    x, places = torch.zeros(2), torch.zeros(2, dtype=torch.int32)

    def call(*args):
        kernel.run(*args, grid=(1,), warmup=False)

    with ahead.compiled():
        call(x, places)
        call((places, (x,)), 3)
        call(places, 3)
        kernel.run(places, grid=(1,), warmup=True)
        assert tuning._unknown == []
    call(x)
    assert [warmup for _, warmup in Function.calls] == [True, True, False, True, False]
    assert Function.run is launch and tuning._unknown is None


def test_the_backward_pass_is_in_the_same_thread(monkeypatch):
    """Whose compiler's mode it is."""
    jit = pytest.importorskip("triton.runtime.jit")
    monkeypatch.setattr(jit, "JITFunction", Function)
    with ahead.compiled():
        assert not torch.autograd.is_multithreading_enabled()
    assert torch.autograd.is_multithreading_enabled()


@pytest.mark.parametrize("known", [True, False])
def test_compilers_are_waited_for_where_kernels_are_timed_then(known, monkeypatch):
    """Timing wants the machine to itself."""
    jit, asynchronous = (pytest.importorskip(f"triton.runtime.{name}") for name in ("jit", "_async_compile"))
    monkeypatch.setattr(jit, "JITFunction", Function)
    done, go_on, kernel = [], threading.Event(), SimpleNamespace(cache={"key": None})

    def work():
        go_on.wait(10)
        done.append(1)

    with ahead.compiled():
        asynchronous.active_mode.get().executor.submit(work)
        if not known:
            tuning._unknown.append((kernel, "key"))
            threading.Timer(0.2, go_on.set).start()
    assert bool(done) is not known and (known or not kernel.cache)
    assert asynchronous.active_mode.get() is None
    go_on.set()
