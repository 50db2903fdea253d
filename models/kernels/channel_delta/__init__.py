"""The delta rule with a decay per channel by kernels of our own: models/regression/linear/delta.py's map in Triton.

    fade        queries and keys as the chunk's first and last memory meet them; log decays, rounded and bounded
    scores      the inverse R of I + A, and what queries find in the keys of their chunk
    scan        U = R (V - K' S), O = Q' S + attend U, and S from chunk to chunk
backward, after fade again,
    scan_gradient   dV and the gradients by S, from chunk to chunk
    gradient        all others, all chunks at once

It is models/kernels/delta's plan. Where no channel of a chunk fades too far, products between its tokens are those of
what the scans multiply with. far.py has the scores and the gradient of other chunks, from blocks of tokens where that
is so, and from borders between them. Kept between the passes are q and k, the gates in as many bits, R and `attend`,
half of the size of q each, and U and S, which are as large as v and twice that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.kernels import backend

WIDTHS = {2: (65, 128), 4: (1, 64)}  # of keys and values, by bytes of an operand: those that ran on a GPU
SHARED = 168 << 10  # bytes that a program has at most


class Gates(NamedTuple):
    """Log decays that the kernels make: -exp(log_rate) softplus(raw + bias), and at a document's first token, but for a
    call's, what forgets. raw [B, T, H, K], bias [H K], log_rate [H], segments [B, T] or None."""

    raw: Tensor
    bias: Tensor
    log_rate: Tensor
    segments: Tensor | None


def refusal(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """Why these kernels can't run here, or None if they can. dtype is that of q, k and v."""
    if (reason := backend.refusal(device, dtype)) is not None:
        return reason
    least, most = WIDTHS[dtype.itemsize]
    if min(key_dim, value_dim) < least or max(key_dim, value_dim) > most:
        return f"in {dtype} the kernels take keys and values {least} to {most} wide, not {key_dim} and {value_dim}"
    if device.type == "cuda" and torch.cuda.is_available():
        return backend.refusal_of_gpu(device, SHARED)
    return None


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | Gates, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """delta.py's map. Arguments and results as recurrent_delta's, log_decay [B, T, H, K]; q and k are cast to v's
    dtype, as is what log decays are made of."""
    given = (q.to(v.dtype), k.to(v.dtype), v, step_size.float())
    gates: tuple[Tensor | None, ...]
    if isinstance(log_decay, Gates):
        raw, bias, log_rate, segments = log_decay
        gates = (raw.to(v.dtype), bias.float(), log_rate.float(), segments)
    else:
        gates = (log_decay.float(), None, None, None)
    o, last, *_ = backend.call(forward, *given, *gates, memory.float(), torch.is_grad_enabled())
    return o, last


@torch.library.custom_op("test_time_regression::channel_delta_rule", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor, bias: Tensor | None,
    log_rate: Tensor | None, segments: Tensor | None, memory: Tensor, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, the memory after the last token, and launch.py's Kept. log_decay: with a bias what it is made of, `raw`."""
    from models.kernels.channel_delta.launch import Launch

    with torch.cuda.device_of(q):
        gates = (log_decay, bias, log_rate, segments)
        o, last, kept = Launch(q, k, step_size, v.shape[-1]).forward(v, gates, memory, keep)
    return o, last, *kept


@forward.register_fake
def _(q, k, v, step_size, log_decay, bias, log_rate, segments, memory, keep):
    from models.kernels.channel_delta.launch import new_kept

    return v.new_empty(v.shape), memory.new_empty(memory.shape), *new_kept(q, v, keep)


@torch.library.custom_op("test_time_regression::channel_delta_rule_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, step_size: Tensor, log_rate: Tensor | None, segments: Tensor | None, kept: list[Tensor],
    do: Tensor, dlast: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """The gradients by q, k, v, the step sizes, the log decays or what they are made of, with rates by the bias and by
    the rates, and by the first memory."""
    from models.kernels.channel_delta.launch import Kept, Launch

    with torch.cuda.device_of(q):
        return Launch(q, k, step_size, do.shape[-1]).backward(Kept(*kept), log_rate, segments, do, dlast)


@backward.register_fake
def _(q, k, step_size, log_rate, segments, kept, do, dlast):
    B, _, H, K = q.shape
    gates = [step_size.new_empty(q.shape)]
    if log_rate is not None:
        gates = [torch.empty_like(q), step_size.new_empty(H * K), step_size.new_empty(H)]
    steps, dfirst = step_size.new_empty(step_size.shape), step_size.new_empty(B, H, K, do.shape[-1])
    return [*(x.new_empty(x.shape) for x in (q, k, do)), steps, *gates, dfirst]


def _keep(ctx, inputs, output) -> None:
    q, k, v, step_size, _, _, log_rate, segments, *_ = inputs
    ctx.shape = v.shape
    ctx.save_for_backward(q, k, step_size, log_rate, segments, *output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, do: Tensor | None, dlast: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, step_size, log_rate, segments, *kept = ctx.saved_tensors
    if do is None:
        do = q.new_zeros(ctx.shape)
    *found, dfirst = backward(q, k, step_size, log_rate, segments, kept, do, dlast)
    return *found, *[None] * (8 - len(found)), dfirst, None


forward.register_autograd(_gradients, setup_context=_keep)
