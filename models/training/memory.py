"""Why training ended, in a sentence: it needs more memory than there is, and which setting to lower, and to what; or
another process of the run is gone."""

from __future__ import annotations

import os

import torch

from data.batch import Batch
from data.module import OtherDataError
from models.training.run import RunError

GIB = 2**30


def why(error: Exception, batch: Batch, recompute: str | int = "all") -> str:
    """Why training ended, in a sentence for its user. What is nothing of theirs is raised again."""
    if isinstance(error, RunError | OtherDataError):
        return str(error)
    if ran_out(error):
        again = "" if recompute == "all" else "; or set recompute=all, with which a block holds its input alone"
        return f"{needs(batch)} ({there(error)}); {lower(batch)}{again}"
    if "gloo/transport" in str(error) or isinstance(error, torch.distributed.DistNetworkError):
        return "another process of this run is gone, and says why if it can; the same command goes on"
    raise error


def ran_out(error: BaseException | None) -> bool:
    """Whether there was too little memory. torch has a class of its own for a GPU, and a bare RuntimeError for a CPU;
    what its compiler tried out on a GPU comes as the cause of a failed compilation."""
    if error is None:
        return False
    own = isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
    return own or ran_out(error.__cause__) or ran_out(getattr(error, "inner_exception", None))


def needs(batch: Batch) -> str:
    sequences = "1 sequence" if batch.micro_batch == 1 else f"{batch.micro_batch} sequences"
    return f"micro_batch={batch.micro_batch}, {sequences} of {batch.seq_len} tokens, needs more memory than there is"


def there(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        mine = torch.cuda.max_memory_allocated()
        return (
            f"{(total - free) / GIB:.1f} of {total / GIB:.1f} GiB are in use, and this run held up to {mine / GIB:.1f}"
        )
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"this machine has {total / GIB:.1f} GiB"


def lower(batch: Batch) -> str:
    """Activations grow with micro_batch; the batch of a step stays the same, in more pieces."""
    each = batch.micro_batch * batch.accumulation
    smaller = [n for n in range(1, batch.micro_batch) if each % n == 0]
    if smaller:
        saved = 1 - smaller[-1] / batch.micro_batch
        return f"set micro_batch={smaller[-1]}, which needs {saved:.0%} less for activations and takes the same steps"
    return f"set seq_len={max(1, batch.seq_len // 2)}, a smaller size=, or strategy=fsdp on more devices"
