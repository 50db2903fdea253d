"""Blocks that are computed a second time in the backward pass, so that what they save is not held until then.

A block that is recomputed holds its input alone (Chen et al. 2016), and costs one more forward pass. Which blocks:

    none    no block
    all     every block
    n       the first n blocks
    auto    on a GPU as few as fit into its memory: no more than `all` would, and none where all fits; elsewhere none

`auto` measures, once, before the first step: one forward and backward pass over the first batch, in which all blocks
are recomputed but the last of each kind, tells the peak and what a block of each kind saves. So it knows the kernels,
the compiler and the strategy of this very run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from models.block import nothing
from models.language_model import LanguageModel

GIB = 2**30
USABLE = 0.92  # of the memory that is free or ours: the rest is lost between allocations of different sizes


class Recompute:
    """transformers' gradient_checkpointing_func, for the chosen blocks alone. saved: bytes that each
    block of the last pass held after it, where it is measured."""

    def __init__(self, model: LanguageModel, setting: str | int) -> None:
        self.model, self.setting = model, setting
        self.index = {block: i for i, block in enumerate(model.blocks)}
        counts = {"auto": 0, "none": 0, "all": len(self.index)}
        self.chosen = set(range(counts[setting] if isinstance(setting, str) else setting))
        self.allocated: Callable[[], int] | None = None
        self.saved: dict[int, int] = {}
        model.gradient_checkpointing = True
        model._gradient_checkpointing_func = self

    def begin(
        self, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, device: torch.device, more: int = 0
    ) -> str:
        """Before the first step: what is recomputed, a line to say, empty where nothing is to be said. `loss` is that
        of the first batch, in the precision of the run. more: bytes that a step holds beside those of one pass.
        """
        if self.setting == "auto" and device.type == "cuda":
            return choose(self, loss, optimizer, more).said(len(self.index))
        if not self.chosen:
            return ""
        count = f"{len(self.chosen)} of {len(self.index)} blocks are recomputed in the backward pass"
        return f"memory    {count} (recompute={self.setting})"

    def __call__(self, forward: Any, *inputs: Any) -> Any:
        i = self.index[forward.__self__]
        if i in self.chosen:
            x, y, *others = inputs
            inputs = (x if y is None else x + y, None, *others)  # one tensor is held, not two
            if self.model.alike:
                forward = partial(_with_nothing, forward)
        before = self.allocated() if self.allocated else 0
        if i in self.chosen:
            # the random state can't be asked for while a CUDA graph is recorded
            random = not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
            outputs = checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=random)
        else:
            outputs = forward(*inputs)
        if self.allocated:
            self.saved[i] = self.allocated() - before
        return outputs


def _with_nothing(forward: Any, x: Tensor, _: None, *others: Any) -> Any:
    """The zeros are made when the block is called, each time, and not held."""
    return forward(x, nothing(x), *others)


class Plan(NamedTuple):
    """Bytes: what the step needs with the chosen number of recomputed blocks and with none, and what there is."""

    chosen: list[int]
    needs: int
    needs_without: int
    available: int

    def said(self, num_blocks: int) -> str:
        """One line for the start of a run."""
        without, needs, there = (f"{x / GIB:.1f}" for x in (self.needs_without, self.needs, self.available))
        if not self.chosen:
            return f"memory    {without} of {there} GiB, as measured: no block is recomputed"
        return (
            f"memory    {len(self.chosen)} of {num_blocks} blocks are recomputed in the backward pass (recompute=auto):"
            f" a step needs {needs} GiB so, {without} without, and there are {there}"
        )


def measure(
    recompute: Recompute, kinds: list[str], loss: Callable[[], Tensor], gpu: Any = torch.cuda
) -> tuple[list[int], int, set[int]]:
    """What each block saves beyond what a recomputed one holds, in bytes; the peak of the pass; and which blocks were
    not recomputed in it. kinds: the name of each block's mixer. Gradients are left in the parameters.
    """
    last = {kind: i for i, kind in enumerate(kinds)}  # by then compiled and tuned
    plain = set(last.values())
    recompute.chosen, recompute.allocated = set(range(len(kinds))) - plain, gpu.memory_allocated
    gpu.reset_peak_memory_stats()
    try:
        loss().backward()
    finally:
        recompute.allocated = None
    # a recomputed block holds its output, the next one's input; one alone of its kind is compared with any other
    held = [min((recompute.saved[i] for i in recompute.chosen), default=0)] * len(kinds)
    held = [recompute.saved[i] if i in recompute.chosen else held[i] for i in range(len(kinds))]
    saved = [max(0, recompute.saved[last[kind]] - held[i]) for i, kind in enumerate(kinds)]
    return saved, gpu.max_memory_allocated(), plain


def plan(saved: list[int], peak: int, plain: set[int], more: int, available: int) -> Plan:
    """The fewest blocks, from the first, with which a step fits; all but `plain` where none does.

    A step needs the measured peak, what is not yet allocated (`more`: the optimizer's state), and what the blocks save
    that were recomputed when the peak was measured and will not be.
    """
    candidates = [i for i in range(len(saved)) if i not in plain]
    without = needs = peak + more + sum(saved[i] for i in candidates)
    chosen: list[int] = []
    for i in candidates:
        if needs <= available:
            break
        chosen.append(i)
        needs -= saved[i]
    return Plan(chosen, needs, without, available)


def choose(recompute: Recompute, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, more: int) -> Plan:
    """Measures, decides for all ranks alike, and leaves no gradients."""
    with torch.random.fork_rng([torch.cuda.current_device()]):
        saved, peak, plain = measure(recompute, recompute.model.config.layers, loss)
    for p in recompute.model.parameters():
        p.grad = None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    allowed = torch.cuda.get_per_process_memory_fraction() * total  # all, unless this process is told to take less
    available = int(USABLE * min(free + torch.cuda.memory_reserved(), allowed))
    found = plan(saved, peak, plain, _state_to_come(optimizer) + more, available)
    if torch.distributed.is_initialized():
        count = torch.tensor(len(found.chosen), device="cuda")
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
        candidates = [i for i in range(len(saved)) if i not in plain]
        found = found._replace(chosen=candidates[: int(count.item())])
    recompute.chosen = set(found.chosen)
    return found


def _state_to_come(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of AdamW's two moments, which its first step allocates; 0 where a checkpoint has brought them."""
    if optimizer.state:
        return 0
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    local = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
    return sum(2 * p.numel() * p.element_size() for p in local)
