"""What a training takes, told without its numbers: torch's fake tensors have shapes, types and storages, and no data.

weights, gradients, optimizer   exact: the parameters, as many gradients, and what one step of the optimizer leaves
activations                     what autograd keeps of one micro-batch between forward and backward: each kind of layer
                                is run once and counted as often as it occurs, and the head

The activations are those of PyTorch's own forms, run operation by operation. Triton's and fla's kernels and
torch.compile keep less. What is alive for a moment only, within one operation, is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from data.batch import Batch
from models.build import build
from models.language_model import LanguageModel, LanguageModelConfig
from models.regression.regressor import Regressor

NEEDS_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


class Memory(NamedTuple):
    """Bytes on one device. activations: None where they can't be told, which `unknown` explains."""

    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    unknown: str

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)


class Planned:
    """A model without numbers, with what can be asked of it. precision: Lightning's."""

    def __init__(self, config: LanguageModelConfig, precision: str) -> None:
        self.mode, self.precision = FakeTensorMode(allow_non_fake_inputs=True), str(precision)
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(weights_dtype(self.precision))
            with self.mode:
                self.model = LanguageModel(config)
        finally:
            torch.set_default_dtype(before)

    def memory(self, optimizer: Any, batch: Batch, shards: int = 1) -> Memory:
        """optimizer: its config. shards: devices that share weights, gradients and optimizer (strategy=fsdp)."""
        weights = num_bytes(self.model.parameters())
        state = self._optimizer_state(optimizer)
        activations, unknown = None, ""
        try:
            activations = self._activations(batch)
        except NEEDS_NUMBERS:
            unknown = "they can't be told: a layer looks at numbers to decide what it computes"
        return Memory(weights // shards, weights // shards, state // shards, activations, unknown)

    def _optimizer_state(self, config: Any) -> int:
        with self.mode:
            optimizer = build(config)(self.model)
            for p in self.model.parameters():
                p.grad = torch.empty_like(p)
            optimizer.step()
            found = num_bytes(x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
            for p in self.model.parameters():
                p.grad = None
        return found

    def _activations(self, batch: Batch) -> int:
        model, D = self.model, self.model.config.hidden_size
        shape = (batch.micro_batch, batch.seq_len // batch.context)
        mixed = "mixed" in self.precision or self.precision in ("bf16", "16")
        with self.mode, torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            x = torch.empty(*shape, D, dtype=model.embedding.weight.dtype, requires_grad=True)
            ids = torch.zeros(shape, dtype=torch.long)
            total = kept_by_autograd(model, lambda: model._sum_nats(model.norm(x), ids))
            for layer, count in Counter(model.config.layers).items():
                block = model.blocks[model.config.layers.index(layer)]
                with plain_forms(block):
                    total += count * kept_by_autograd(block, partial(block, x))
        return total


def weights_dtype(precision: str) -> torch.dtype:
    """What Lightning makes of the weights: they are as wide as the products where no `mixed` says otherwise."""
    whole = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64, "64": torch.float64}
    return whole.get(precision, torch.float32)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def kept_by_autograd(module: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of the storages that forward() leaves for the backward pass, each once, but for those of parameters."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, Any] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other takes its place in memory
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


@contextmanager
def plain_forms(module: nn.Module) -> Iterator[None]:
    """Within it the regressors of a module run by PyTorch's own forms: kernels can't run on nothing."""
    regressors = [m for m in module.modules() if isinstance(m, Regressor)]
    before = [r.backend for r in regressors]
    try:
        for r in regressors:
            r.backend = "torch"
        yield
    finally:
        for r, backend in zip(regressors, before, strict=True):
            r.backend = backend
