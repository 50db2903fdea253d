"""A captured micro-batch is the same as one that is not: on a CPU with a stand-in for the graph, on a GPU with it."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils._pytree import tree_leaves

from models.language_model import LanguageModel, LanguageModelConfig
from models.training import captured
from models.training.captured import WARM_UP, Captured, Graph
from models.training.parallel import DDP, Sharded
from tests.laws.presets import recipe
from tests.training.test_interruptions import Fit, fit, one_thread  # noqa: F401

STEPS, PIECES = 6, 2


class StandIn(Captured):
    """Records the call itself, on the places that a graph would read and write."""

    def _without_waiting(self, batch: dict[str, Any]) -> None:
        self._run(batch)

    def _graph(self, pool: Any = None) -> Graph:
        first, before = pool is None, [p.grad if p.grad is None else p.grad.clone() for p in self.parameters]
        outputs = self._run(self._batch)
        places = [p.grad for p in self.parameters]
        if not first:  # a recording computes nothing
            torch._foreach_copy_(places, before)

        def replay() -> None:
            if first:
                for p in self.parameters:
                    p.grad = None
            for place, x in zip(tree_leaves(outputs), tree_leaves(self._run(self._batch)), strict=True):
                place.copy_(x)
            if first:
                torch._foreach_copy_(places, [p.grad for p in self.parameters])

        return Graph(replay, outputs, "memory")


def trained(make: Any, device: str, steps: int = STEPS) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of a few steps of two micro-batches, some without documents, one step refused; and the weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 2, "vocab_size": 50}
    model = LanguageModel(LanguageModelConfig(**sizes, mixers={"main": recipe("gated_delta")}, pattern=["main"]))
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def forward(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        loss = model.sum_nats(**batch) / PIECES
        return loss, loss.detach()

    call, losses = make(forward, model.parameters(), nullcontext), []
    for step in range(steps):
        for piece in range(PIECES):
            ids = torch.randint(0, 50, (2, 33), generator=torch.Generator().manual_seed(2 * step + piece)).to(device)
            segments = None if step % 3 == 2 else (torch.arange(32, device=device) // 11).expand(2, -1)
            batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "segments": segments}
            losses.append(call(batch).item())
        if step != 3:
            optimizer.step()
        optimizer.zero_grad()
    assert getattr(call, "reason", None) is None
    assert not isinstance(call, Captured) or call.recorded
    return losses, [p.detach().clone() for p in model.parameters()]


def plainly(forward: Any, parameters: Any, context: Any) -> Any:
    def call(batch: dict[str, Any]) -> torch.Tensor:
        loss, outputs = forward(batch)
        loss.backward()
        return outputs

    return call


def test_a_recorded_micro_batch_is_the_same():
    losses, weights = trained(StandIn, "cpu")
    expected, plain = trained(plainly, "cpu")
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_is_the_same():
    losses, weights = trained(Captured, "cuda")
    expected, plain = trained(plainly, "cuda")
    assert losses == pytest.approx(expected, rel=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(weights, plain, strict=True))


def test_what_waits_for_the_gpu_is_not_recorded(capsys, monkeypatch):
    layer = nn.Linear(2, 1)

    class Waits(StandIn):
        def _graph(self) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    call = Waits(lambda batch: (layer(batch["x"]).sum(), batch["x"].sum()), layer.parameters(), nullcontext)
    for _ in range(WARM_UP + 2):
        call({"x": torch.ones(3, 2)})
    assert torch.equal(layer.weight.grad, torch.full((1, 2), 3.0 * (WARM_UP + 2)))
    said = capsys.readouterr().out
    assert said.count("a micro-batch is not one CUDA graph") == 1 and "not permitted when stream" in said


def test_a_batch_of_another_kind_is_compiled_before_it_is_recorded():
    """Short rows of long documents have `segments` now and then. What compiles while it is recorded waits for the GPU,
    which was taken for a reason never to record. https://github.com/pytorch/pytorch/issues/185074"""
    layer, compiled = nn.Linear(2, 1), set()

    class Compiles(StandIn):
        def _without_waiting(self, batch: dict[str, Any]) -> None:
            if captured._kind(batch["segments"]) not in compiled:
                raise RuntimeError("backend='inductor' raised: called a synchronizing CUDA operation")

    def forward(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        compiled.add(captured._kind(batch["segments"]))
        return layer(batch["x"]).sum(), batch["x"].sum()

    call, documents = Compiles(forward, layer.parameters(), nullcontext), torch.zeros(3, dtype=torch.int64)
    for segments in [None] * (WARM_UP + 1) + [documents] * WARM_UP:
        call({"x": torch.ones(3, 2), "segments": segments})
    assert call.recorded and call.reason is None and call._batch["segments"] is None
    for segments in (documents, None, documents):  # the next one is recorded, and one without documents fits it
        call({"x": torch.ones(3, 2), "segments": segments})
    assert call.recorded and call.reason is None and call._batch["segments"].equal(documents)
    assert torch.equal(layer.weight.grad, torch.full((1, 2), 3.0 * (2 * WARM_UP + 4)))


def test_a_kind_that_waits_leaves_the_graph_of_the_other(capsys):
    """A deep memory counts the slots of its documents, and so waits where a row has several. Most short rows don't."""
    layer = nn.Linear(2, 1)

    class Counts(StandIn):
        def _without_waiting(self, batch: dict[str, Any]) -> None:
            if batch["segments"] is not None:
                raise RuntimeError("called a synchronizing CUDA operation")

    def forward(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return layer(batch["x"]).sum(), batch["x"].sum()

    documents = torch.zeros(3, dtype=torch.int64)
    for before, after in ((None, documents), (documents, None)):  # whichever comes first
        call, layer.weight.grad = Counts(forward, layer.parameters(), nullcontext), None
        for segments in [before] * (WARM_UP + 2) + [after] * (WARM_UP + 2) + [None]:
            assert call({"x": torch.ones(3, 2), "segments": segments}).item() == 6
        assert call.recorded and call._batch["segments"] is None and "synchronizing" in str(call.reason)
        assert torch.equal(layer.weight.grad, torch.full((1, 2), 3.0 * (2 * WARM_UP + 5)))
        said = capsys.readouterr().out
        assert said.count("is not one CUDA graph") == said.count("a micro-batch with documents in its rows") == 1


def test_a_run_with_recorded_micro_batches_is_the_same(tmp_path, monkeypatch):
    """All of it, with Lightning's own order of gradients and steps: losses, norms and weights, bit for bit."""
    plain = fit(tmp_path / "plain")
    monkeypatch.setattr("models.training.module.Captured", StandIn)
    monkeypatch.setattr("models.training.module.refusal", lambda *_: None)
    graphs = Fit(tmp_path / "graphs")
    graphs.module.cuda_graph = True
    graphs.run()
    assert graphs.module.captured.recorded
    names = ("train/loss", "train/gradient_norm", "validation/nats")
    told = [[{name: row.get(name) for name in names} for row in found.rows] for found in (plain, graphs)]
    assert told[0] == told[1]
    weights = [found.module.state_dict() for found in (plain, graphs)]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())


def test_refusals_say_why():
    def said(kind: type, device: str, precision: str, context_parallel: int = 1) -> str | None:
        strategy = kind.__new__(kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "root_device", torch.device(device))
            return captured.refusal(SimpleNamespace(strategy=strategy, precision=precision), context_parallel)

    assert said(SingleDeviceStrategy, "cuda", "bf16-mixed") is None
    assert "this is cpu" in str(said(SingleDeviceStrategy, "cpu", "32-true"))
    assert said(DDP, "cuda", "bf16-mixed") is None
    assert "context_parallel=2" in str(said(DDP, "cuda", "bf16-mixed", 2))
    assert "strategy=fsdp" in str(said(Sharded, "cuda", "bf16-mixed"))
    assert "16-mixed" in str(said(SingleDeviceStrategy, "cuda", "16-mixed"))
