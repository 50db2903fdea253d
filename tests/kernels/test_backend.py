"""An operator's function is called by itself only where nothing looks at the operator."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models.kernels import backend

RUN: list[str] = []


@torch.library.custom_op("test_time_regression_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    RUN.append("function")
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


twice.register_autograd(lambda ctx, dy: 2 * dy)


@pytest.fixture
def through(monkeypatch):
    """How many calls went to the operator."""
    calls: list[int] = []
    whole = type(twice).__call__
    monkeypatch.setattr(type(twice), "__call__", lambda self, *given: calls.append(1) or whole(self, *given))
    return calls


def test_without_gradients_the_function_is_called(through):
    x = torch.ones(3)
    with torch.no_grad():
        assert backend.call(twice, x).equal(2 * x) and not through
        assert backend.call(twice, torch.nn.Parameter(x)).equal(2 * x) and not through
    with torch.inference_mode():
        assert backend.call(twice, x).equal(2 * x) and not through


def test_gradients_come_by_the_operator(through):
    x = torch.ones(3, requires_grad=True)
    backend.call(twice, x).sum().backward()
    assert through == [1] and x.grad.equal(torch.full((3,), 2.0))


def test_whoever_looks_sees_the_operator(through):
    with torch.no_grad():
        with FakeTensorMode():
            fake = torch.empty(3)
        assert type(backend.call(twice, fake)) is type(fake) and through == [1]  # known by its shape, and not run
        with FlopCounterMode(display=False):
            backend.call(twice, torch.ones(3))
        assert through == [1, 1]
        with torch.autograd.forward_ad.dual_level():
            backend.call(twice, torch.ones(3))
        assert through == [1] * 3
        assert backend.call(twice, torch._neg_view(torch.ones(3))).equal(torch.full((3,), -2.0)) and len(through) == 4
        with torch.profiler.profile() as profiler:
            backend.call(twice, torch.ones(3))
        assert any("twice" in event.key for event in profiler.key_averages()) and len(through) == 5
        assert backend.watched(([torch.ones(3), fake],)) and not backend.watched(([torch.ones(3)], "x y", None))
        through.clear()
        torch.vmap(lambda x: backend.call(twice, x))(torch.ones(2, 3))
        assert through == [1]


def test_the_compiler_sees_the_operator():
    seen = []

    def look(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with torch.no_grad():
        found = torch.compile(lambda x: backend.call(twice, x) + 1, backend=look, fullgraph=True)(torch.ones(3))
    assert found.equal(torch.full((3,), 3.0))
    assert any("twice" in str(target) for target in seen), seen
