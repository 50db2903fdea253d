"""The (gated) delta rule by kernels of our own: models/regression/linear/delta.py's chunked form in Triton.

    prepare     A = K K^T * L below the diagonal, the inverse R of I + A diag(b), and Q K^T * L
    scan        U = R (V - diag(e^c) K S), O = diag(e^c) Q S + (Q K^T * L) diag(b) U, and S from chunk to chunk
backward,
    scan_gradient   dV and the gradients by S, from chunk to chunk
    gradient        all others, all chunks at once

U here is the error, and what a token writes is b u: so the gradient by the right-hand side of a chunk's system is that
by v, and there is no quotient by a step size. Documents are gates: FORGET at a first token (models/regression/
documents.py). Kept between the passes are q, k, the three tiles of every chunk, half of the size of q each, and U and
S, which are as large as v and twice that.

Few rows of many chunks are cut into spans, which are scanned side by side (models/kernels/spans.py).

Precision: products of bf16 (or fp16) operands, summed in float32, R among the operands, its diagonal apart; the memory
is float32 in the scans' registers and rounded where it is an operand. float32 inputs are multiplied as sums of three
TF32 products. Sums of gates are float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels import backend

WIDTHS = {2: 128, 4: 64}  # of keys and values at most, by bytes of an operand
SHARED = {2: 130 << 10, 4: 165 << 10}  # bytes that a program has at most


def takes(dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Whether the kernels compute memories of this shape."""
    return max(key_dim, value_dim) <= WIDTHS.get(dtype.itemsize, 0)


def refusal(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """Why these kernels can't run here, or None if they can. dtype is that of q, k and v."""
    if (reason := backend.refusal(device, dtype)) is not None:
        return reason
    if not takes(dtype, key_dim, value_dim):
        most = WIDTHS[dtype.itemsize]
        return f"in {dtype} the kernels take keys and values up to {most} wide, not {key_dim} and {value_dim}"
    if device.type == "cuda" and torch.cuda.is_available():
        return backend.refusal_of_gpu(device, SHARED[dtype.itemsize])
    return None


def faster(device: torch.device) -> bool:
    """Whether these kernels are known to be faster than fla's: on Hopper, for whose products they are laid out."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.major == 9


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | None, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """delta.py's map. Arguments and results as recurrent_delta's, log_decay per head or None; q and k are cast to v's
    dtype."""
    log_decay = None if log_decay is None else log_decay.float()
    keep = torch.is_grad_enabled()
    given = (q.to(v.dtype), k.to(v.dtype), v, step_size.float(), log_decay, memory.float())
    o, last, *_ = backend.call(forward, *given, keep)
    return o, last


@torch.library.custom_op("test_time_regression::delta_rule", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | None, memory: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the memory after the last token, and launch.py's Kept."""
    from models.kernels.delta.launch import Launch

    with torch.cuda.device_of(q):
        o, last, kept = Launch(q, k, v.shape[-1]).forward(v, step_size, log_decay, memory, keep)
    return o, last, *kept


@forward.register_fake
def _(q, k, v, step_size, log_decay, memory, keep):
    from models.kernels.delta.launch import new_kept

    return v.new_empty(v.shape), memory.new_empty(memory.shape), *new_kept(q, v, keep)


@torch.library.custom_op("test_time_regression::delta_rule_backward", mutates_args=())
def backward(q: Tensor, k: Tensor, kept: list[Tensor], do: Tensor, dlast: Tensor | None, decayed: bool) -> list[Tensor]:
    """The gradients by q, k, v, the step sizes, the log decays if there are any, and the first memory."""
    from models.kernels.delta.launch import Kept, Launch

    with torch.cuda.device_of(q):
        return Launch(q, k, do.shape[-1]).backward(Kept(*kept), do, dlast, decayed)


@backward.register_fake
def _(q, k, kept, do, dlast, decayed):
    B, _, H, K = q.shape
    gates = [q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(1 + decayed)]
    memory = q.new_empty(B, H, K, do.shape[-1], dtype=torch.float32)
    return [q.new_empty(q.shape), k.new_empty(k.shape), do.new_empty(do.shape), *gates, memory]


def _keep(ctx, inputs, output) -> None:
    q, k, v, _, log_decay, *_ = inputs
    ctx.decayed, ctx.shape = log_decay is not None, v.shape
    ctx.save_for_backward(q, k, *output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, do: Tensor | None, dlast: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, *kept = ctx.saved_tensors
    if do is None:
        do = q.new_zeros(ctx.shape)
    found = backward(q, k, kept, do, dlast, ctx.decayed)
    if not ctx.decayed:
        found.insert(4, None)
    return *found, None


forward.register_autograd(_gradients, setup_context=_keep)
