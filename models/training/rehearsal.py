"""Before the first step, a call of a few blocks of which nothing is wanted but that their kernels are compiled.

They are compiled side by side (models/kernels/ahead.py), of one block of each kind, with the embedding before and the
loss behind them, forward and backward, for the shapes of the first batch. In the step itself each would
be compiled when it is called, one after another. Blocks without kernels of their own are left out: they may want much
memory where torch.compile does not fuse them, and have little to compile here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from models.block import Block
from models.kernels import ahead
from models.language_model import LanguageModel
from models.mixers.baselines import Baseline
from models.regression.regressor import Regressor


def rehearse(model: LanguageModel, loss: Callable[[], Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """loss: of the first batch, in the precision of the run, whose products are in dtype. On a GPU alone, and not where
    autograd looks for NaN, which memory may hold. Leaves no gradients."""
    if device.type != "cuda" or torch.is_anomaly_enabled() or not (few := of_each_kind(model, device, dtype)):
        return
    eager = torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng([device]), eager, only(model, few), ahead.compiled():
        loss().backward()
    for p in model.parameters():
        p.grad = None
    torch.cuda.empty_cache()


def start_compilers() -> None:
    """The processes of torch.compile, which take seconds to begin: while they do it compiles in this one. It would
    start them when it first has something for them."""
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()


def of_each_kind(model: LanguageModel, device: torch.device, dtype: torch.dtype) -> list[Block]:
    """Blocks with kernels, one of each kind."""
    each = dict(zip(model.config.layers, model.blocks, strict=True))
    return [block for block in each.values() if accelerated(block, device, dtype)]


def accelerated(block: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all its memories are computed by kernels."""
    memories = [part for part in block.modules() if isinstance(part, Regressor | Baseline)]
    return all(memory.choose(device, dtype).backend in ("fla", "triton") for memory in memories)


@contextmanager
def only(model: LanguageModel, blocks: list[Block]) -> Iterator[None]:
    """The model with these of its blocks."""
    every = model.blocks
    model.blocks = cast("Sequence[Block]", nn.ModuleList(blocks))
    try:
        yield
    finally:
        model.blocks = every
