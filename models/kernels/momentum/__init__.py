"""Titans' linear memory by kernels of our own: the chunked form of models/regression/linear/momentum.py in Triton.
Without momentum it is delta.py's; with write keys of their own it is preconditioned.py's; with several writes a token
it is omega.py's.

What a chunk needs is one triangular system and a few products with its coefficients; what one chunk hands to the next
is a pair of matrices. So a call is three kernels forward, the middle one alone sequential,

    coefficients    G, the inverse R of (I + K W^T * G_ref), and the vectors that go with the matrices
    scan            U = R (V - diag(a) K M - diag(f) K S), and M, S from chunk to chunk
    outputs         O = diag(a) Q M + diag(f) Q S + (Q W^T * G) U

and five backward, after the first two again, so that nothing but the inputs is kept between the passes. W are the keys
that U is written under: K, unless others are given. The formulas and their gradients are those of momentum.py and
mixtures.py; the shapes are written at every pointer.

Precision: products of bf16 (or fp16) operands, summed in float32; matrices are float32 in the scans' registers and
rounded where they are operands. float32 inputs are multiplied as sums of three TF32 products, which loses two bits.

Launch configurations are chosen, not searched: docs/kernels.md says how and what they gave.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels import backend
from models.kernels.momentum.rule import CHUNK, EMPTY, EXACT, Rule

__all__ = ["CHUNK", "EMPTY", "Rule", "momentum_delta", "refusal"]


def refusal(
    device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, own_writes: bool = False
) -> str | None:
    """Why these kernels can't run here, or None if they can. dtype is that of q, k and v. own_writes: with write_key.

    In 16 bits on an H100 (Triton 3.6 and 3.7.1) outputs are wrong by half of their length where values of 16 stand
    beside keys of 64 and more, whatever the launch configuration, and right in all shapes tried that are let through.
    With write keys of their own, keys 256 wide end in an illegal memory access.
    """
    if (reason := backend.refusal(device, dtype)) is not None:
        return reason
    if key_dim > 256:
        return f"a memory of keys {key_dim} wide does not fit on a multiprocessor; 256 does"
    if dtype != torch.float32 and own_writes and key_dim > 128:
        return f"in 16 bits write keys of their own are wrong for keys {key_dim} wide; 128 is right"
    if dtype != torch.float32 and value_dim < min(key_dim, 64):
        right = f"values of {min(key_dim, 64)} and more are right"
        return f"in 16 bits they are wrong for values {value_dim} wide beside keys {key_dim} wide; {right}"
    return None


def momentum_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_momentum: Tensor | None,
    log_decay: Tensor | None,
    matrices: Tensor,
    source: Tensor | None = None,
    rule: Rule = EXACT,
    write_key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """momentum.py's map. q, k [B, T, H, K] and v [B, T, H, V] of one dtype; step_size, log_momentum, log_decay
    [B, T, H]; matrices [B, H, n, K, V], what the call begins with; source [B, T]: the token of the call after which a
    gradient is taken, -1 for the call's first memory, less for the reference carried into it, EMPTY for zero; None for
    the token before. write_key [B, T, H, K], for rules without momentum: w in the write w^T u, None for k.
    Returns o [B, T, H, V] and the matrices after the last token, float32.
    """
    assert write_key is None or not (rule.momentum or rule.carried)
    q, k, write_key = q.to(v.dtype), k.to(v.dtype), None if write_key is None else write_key.to(v.dtype)
    gates = (None if x is None else x.float() for x in (step_size, log_momentum, log_decay))
    source = None if source is None else source.int()
    return _forward(q, k, v, *gates, matrices.float(), write_key, source, *rule)


@torch.library.custom_op("test_time_regression::momentum_delta", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_momentum: Tensor | None,
    log_decay: Tensor | None,
    matrices: Tensor,
    write_key: Tensor | None,
    source: Tensor | None,
    momentum: bool,
    carried: bool,
    solve: bool,
    decayed: bool,
    writes: int,
) -> tuple[Tensor, Tensor]:
    from models.kernels.momentum.launch import Launch

    rule = Rule(momentum, carried, solve, decayed, writes)
    with torch.cuda.device_of(q):
        return Launch(q, k, v, step_size, log_momentum, log_decay, matrices, write_key, source, rule).forward()


@_forward.register_fake
def _(q, k, v, step_size, log_momentum, log_decay, matrices, *others):
    return torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(matrices)


@torch.library.custom_op("test_time_regression::momentum_delta_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_momentum: Tensor | None,
    log_decay: Tensor | None,
    matrices: Tensor,
    write_key: Tensor | None,
    source: Tensor | None,
    momentum: bool,
    carried: bool,
    solve: bool,
    decayed: bool,
    writes: int,
    do: Tensor,
    dlast: Tensor,
) -> list[Tensor]:
    from models.kernels.momentum.launch import Launch

    rule = Rule(momentum, carried, solve, decayed, writes)
    given = (q, k, v, step_size, log_momentum, log_decay, matrices, write_key, source)
    with torch.cuda.device_of(q):
        return Launch(*given, rule).backward(do, dlast)


@_backward.register_fake
def _(*given):  # a gradient of every tensor but the last, the source
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given[:8] if x is not None]


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.rule = inputs[9:]


def _gradients(ctx, do: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    found = iter(_backward(*inputs, *ctx.rule, do, dlast))
    return (*(None if x is None else next(found) for x in inputs[:8]), *(None,) * (1 + len(ctx.rule)))


_forward.register_autograd(_gradients, setup_context=_keep)
