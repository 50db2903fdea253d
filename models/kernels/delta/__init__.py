"""The (gated) delta rule by kernels of our own: models/regression/linear/delta.py's chunked form in Triton.

    prepare     G = L diag(b), the inverse R of (I + K K^T * G below the diagonal), and Q K^T * G
    scan        U = R (V - diag(e^c) K S), O = diag(e^c) Q S + (Q K^T * G) U, and S from chunk to chunk
backward, after the scan again, which then keeps U and S of every chunk and no O,
    scan_gradient   dV and the gradients by S, from chunk to chunk
    gradient        all others, all chunks at once

U here is the error, and what a token writes is b u: so the gradient by the right-hand side of a chunk's system is that
by v, and there is no quotient by a step size. Documents are gates: FORGET at a first token (models/regression/
documents.py). Kept between the passes are the inputs, R and Q K^T * G, which are half of the size of q each.

Precision: products of bf16 (or fp16) operands, summed in float32, R among the operands, its diagonal apart; the memory
is float32 in the scans' registers and rounded where it is an operand. float32 inputs are multiplied as sums of three
TF32 products. Sums of gates are float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels import backend

WIDTHS = {2: (65, 128), 4: (1, 64)}  # of keys and values, by bytes of an operand
SHARED = 160 << 10  # bytes that a program has at most


def takes(dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Whether the kernels compute memories of this shape.

    In 16 bits those of 64 channels had wrong gradients on an H200 (Triton 3.7.1), and those of 65 to 128 are right.
    """
    least, most = WIDTHS.get(dtype.itemsize, (1, 0))
    return least <= min(key_dim, value_dim) and max(key_dim, value_dim) <= most


def refusal(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """Why these kernels can't run here, or None if they can. dtype is that of q, k and v."""
    if (reason := backend.refusal(device, dtype)) is not None:
        return reason
    if not takes(dtype, key_dim, value_dim):
        least, most = WIDTHS[dtype.itemsize]
        return f"in {dtype} the kernels take keys and values {least} to {most} wide, not {key_dim} and {value_dim}"
    if device.type == "cuda" and torch.cuda.is_available():
        return backend.refusal_of_gpu(device, SHARED)
    return None


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | None, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """delta.py's map. Arguments and results as recurrent_delta's, log_decay per head or None; q and k are cast to v's
    dtype."""
    log_decay = None if log_decay is None else log_decay.float()
    o, last, *_ = forward(q.to(v.dtype), k.to(v.dtype), v, step_size.float(), log_decay, memory.float())
    return o, last


@torch.library.custom_op("test_time_regression::delta_rule", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | None, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the memory after the last token, and launch.py's System."""
    from models.kernels.delta.launch import Launch

    with torch.cuda.device_of(q):
        o, last, system = Launch(q, k, v, step_size, log_decay).forward(memory.contiguous())
    return o, last, *system


@forward.register_fake
def _(q, k, v, step_size, log_decay, memory):
    from models.kernels.delta.launch import new_system

    return v.new_empty(v.shape), memory.new_empty(memory.shape), *new_system(q)


@torch.library.custom_op("test_time_regression::delta_rule_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | None, memory: Tensor, system: list[Tensor],
    do: Tensor, dlast: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    from models.kernels.delta.launch import Launch, System

    with torch.cuda.device_of(q):
        launch = Launch(q, k, v, step_size, log_decay)
        dlast = None if dlast is None else dlast.contiguous()
        return launch.backward(memory.contiguous(), System(*system), do.contiguous(), dlast)


@backward.register_fake
def _(q, k, v, step_size, log_decay, memory, *_):
    return [x.new_empty(x.shape) for x in (q, k, v, step_size, log_decay, memory) if x is not None]


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, do: Tensor | None, dlast: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    given, system = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
    do = torch.zeros_like(given[2]) if do is None else do
    found = backward(*given, list(system), do, dlast)
    if given[4] is None:
        found.insert(4, None)
    return tuple(found)


forward.register_autograd(_gradients, setup_context=_keep)
