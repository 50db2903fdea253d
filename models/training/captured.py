"""A micro-batch's forward and backward pass as one CUDA graph.

A step of a small model is thousands of kernels, which the host starts one by one: with gated_delta and size=340m it
needs longer for that than the GPU for the kernels. A graph is recorded once and then started by one call. It always
reads and writes the same places, so a batch is copied to where the recorded one was, and gradients stay where they are:
what an optimizer is given are these same tensors, step after step. There are two graphs, in the same memory: of a
step's first micro-batch, whose gradients are the first, and of the others, which add to them.

What is recorded is a fixed sequence. Whatever waits for a number from the GPU can't be in it (a solver that looks
whether it is done, for example); then batches of this kind go kernel by kernel, and the reason is printed. Batches of
short rows are of two kinds: most have one document a row, and a mixer that counts documents waits in the others alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

WARM_UP = 3  # micro-batches of a kind before one is recorded: they compile kernels and choose among them

Batch = dict[str, Any]


class Graph(NamedTuple):
    """What starts it, the outputs that it writes, and the memory that it lives in."""

    replay: Callable[[], None]
    outputs: Any
    pool: Any = None


def meet_in_blocks(strategy: Any, context_parallel: int = 1) -> bool:
    """Whether processes wait for each other in each block, as of a sequence that they share or of its parameters."""
    alone = isinstance(strategy, SingleDeviceStrategy) or getattr(strategy, "averages", False)
    return context_parallel > 1 or not alone


def refusal(trainer: L.Trainer, context_parallel: int = 1) -> str | None:
    """Why nothing is recorded in this run, or None."""
    if (device := trainer.strategy.root_device).type != "cuda":
        return f"CUDA graphs need a GPU, this is {device.type}"
    if context_parallel > 1:
        return f"with context_parallel={context_parallel} processes meet in each block, which a graph can't hold"
    if meet_in_blocks(trainer.strategy):
        return "with strategy=fsdp or hsdp processes meet in each block, which a graph can't hold"
    if trainer.precision == "16-mixed":
        return "trainer.precision=16-mixed scales each loss by another number"
    return None


class Captured:
    """forward(batch) -> (loss, outputs), and the gradients of loss added to those of the parameters.

    `self(batch)` does it and returns outputs, whose tensors hold until the next call. The first WARM_UP calls of a kind
    of batch (its shapes, and whether it has documents) go kernel by kernel: to compile for it while it is recorded is
    an error. A batch of another kind is recorded anew, in place of the old one, if it can be. context: of the forward
    pass, that of autocast.
    """

    def __init__(
        self,
        forward: Callable[[Batch], tuple[Tensor, Any]],
        parameters: Iterable[nn.Parameter],
        context: Callable[[], Any],
    ) -> None:
        self.forward, self.context = forward, context
        self.parameters = list(parameters)
        self.records = True  # False: all goes kernel by kernel
        self._ran: Counter[Any] = Counter()  # micro-batches of a kind that were not replayed
        self._refused: set[Any] = set()  # kinds that can't be recorded
        self.reason: str | None = None  # why the last of them can't
        self._batch: Batch = {}
        self._first: Graph | None = None
        self._further: Graph | None = None
        self._trained: list[bool] = []
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def recorded(self) -> bool:
        return self._first is not None

    def __call__(self, batch: Batch) -> Any:
        if not self._fits(batch):
            kind = tuple((name, _kind(x)) for name, x in batch.items())
            self._ran[kind] += 1
            if self.records and kind not in self._refused and self._ran[kind] > WARM_UP:
                self._record(batch, kind)
        if self._first is None or not self._fits(batch):
            return self._run(batch)
        for name, place in self._batch.items():
            if isinstance(place, Tensor):
                place.zero_() if batch[name] is None else place.copy_(batch[name], non_blocking=True)
        graph = self._first if all(p.grad is None for p, _ in self._gradients) else self._adding(self._first)
        graph.replay()
        for p, place in self._gradients:
            p.grad = place
        return graph.outputs

    def _fits(self, batch: Batch) -> bool:
        """Whether it can be copied to where the recorded one is. No `segments` are one document a row, all zero."""
        if self._first is None or [p.requires_grad for p in self.parameters] != self._trained:
            return False
        return all(
            _kind(batch[name]) in (_kind(place), None if isinstance(place, Tensor) else _kind(place))
            for name, place in self._batch.items()
        )

    def _run(self, batch: Batch) -> Any:
        with self.context():
            loss, outputs = self.forward(batch)
        loss.backward()
        return outputs

    def _record(self, batch: Batch, kind: Any) -> None:
        """In the place of what was recorded before, which is kept where this kind can't be."""
        before = [p.grad for p in self.parameters]
        new = {name: x.clone() if isinstance(x, Tensor) else x for name, x in batch.items()}
        try:
            for p in self.parameters:
                p.grad = None
            self._without_waiting(new)
            for p in self.parameters:
                p.grad = None
            self._first, self._further, self._gradients = None, None, []  # their memory is free again
            self._batch, self._trained = new, [p.requires_grad for p in self.parameters]
            self._first = self._graph()
            self._gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]
        except RuntimeError as error:
            self._refused.add(kind)
            self.reason = why = str(error).strip().splitlines()[0]
            print(f"{_called(batch)} is not one CUDA graph, and the GPU may wait for the host: {why}", flush=True)
        for p, gradient in zip(self.parameters, before, strict=True):
            p.grad = gradient

    def _without_waiting(self, batch: Batch) -> None:
        """A pass on a stream of its own, as recording wants it, in which whatever waits for the GPU is an error."""
        torch.cuda.empty_cache()  # what was used on another stream would be held beside it
        stream, mode = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.stream(stream):
                self._run(batch)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.current_stream().wait_stream(stream)

    def _graph(self, pool: Any = None) -> Graph:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph has memory of its own, as much as a pass takes
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):  # other threads may pin memory meanwhile
            outputs = self._run(self._batch)
        return Graph(graph.replay, outputs, graph.pool())

    def _adding(self, first: Graph) -> Graph:
        """The graph that adds to the gradients, which go to the recorded places: zero where there is none yet."""
        if fresh := [place for p, place in self._gradients if p.grad is None]:
            torch._foreach_zero_(fresh)
        for p, place in self._gradients:
            if p.grad is not None and p.grad is not place:
                place.copy_(p.grad)
            p.grad = place
        if self._further is None:
            self._further = self._graph(first.pool)
        return self._further


def _called(batch: Batch) -> str:
    return "a micro-batch" if batch.get("segments") is None else "a micro-batch with documents in its rows"


def _kind(x: Any) -> Any:
    return (x.shape, x.dtype) if isinstance(x, Tensor) else x
