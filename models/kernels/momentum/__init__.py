"""Titans' linear memory by kernels of our own: the chunked form of models/regression/linear/momentum.py in Triton.
Without momentum it is delta.py's; with write keys of their own it is preconditioned.py's; with several writes a token
it is omega.py's.

What a chunk needs is one triangular system and a few products with its coefficients; what one chunk hands to the next
is a pair of matrices. So a call is four kernels forward, of which the scan alone is sequential,

    coefficients    G and the vectors that go with the matrices, of the gates alone
    systems         Q W^T, K W^T, and the inverse R of (I + K W^T * G_ref)
    scan            U = R (V - diag(a) K M - diag(f) K S), and M, S from chunk to chunk
    outputs         O = diag(a) Q M + diag(f) Q S + (Q W^T * G) U

and three backward: the scan's gradient, from the last chunk to the first, then the gradients by tokens and by
coefficients, and that of the coefficients by the gates, of all chunks at once. Coefficients, products, U, M and S are
kept between the passes (Kept, rule.py). W are the keys that U is written under: K, unless others are given. The
formulas and their gradients are those of momentum.py and mixtures.py; the shapes are written at every pointer.

Precision: products of bf16 (or fp16) operands, summed in float32; matrices are float32 in the scans' registers and
rounded where they are operands. Coefficients are float32, and made without products. R has twice the digits of an
operand, as have the errors that it multiplies: products of two float32 tiles are sums of three, which keep 16 bits of
each factor. float32 inputs are multiplied as sums of three TF32 products, which loses two bits.

Launch configurations are chosen, not searched: docs/kernels.md says how and what they gave.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels import backend
from models.kernels.backend import packed, unpacked
from models.kernels.momentum.rule import CHUNK, EMPTY, EXACT, Call, Kept, Rule

__all__ = ["CHUNK", "EMPTY", "Call", "Rule", "momentum_delta", "refusal"]


def refusal(
    device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, own_writes: bool = False
) -> str | None:
    """Why these kernels can't run here, or None if they can. dtype is that of q, k and v. own_writes: with write_key.

    In 16 bits on an H100 (Triton 3.6 and 3.7.1) outputs are wrong by half of their length where values of 16 stand
    beside keys of 64 and more, whatever the launch configuration, and right in all shapes tried that are let through.
    With write keys of their own, keys 256 wide end in an illegal memory access, and in float32 they do not fit.
    """
    if (reason := backend.refusal(device, dtype)) is not None:
        return reason
    if key_dim > 256:
        return f"a memory of keys {key_dim} wide does not fit on a multiprocessor; 256 does"
    if own_writes and key_dim > 128:
        return f"write keys of their own are wrong or do not fit for keys {key_dim} wide; 128 is right"
    if dtype != torch.float32 and value_dim < min(key_dim, 64):
        right = f"values of {min(key_dim, 64)} and more are right"
        return f"in 16 bits they are wrong for values {value_dim} wide beside keys {key_dim} wide; {right}"
    return None


def momentum_delta(call: Call, rule: Rule = EXACT) -> tuple[Tensor, Tensor]:
    """momentum.py's map. Returns o [B, T, H, V] and the matrices after the last token, float32."""
    q, k, v, *numbers, write_key, source = call
    assert write_key is None or not (rule.momentum or rule.carried)
    write_key, source = None if write_key is None else write_key.to(v.dtype), None if source is None else source.int()
    numbers = [None if x is None else x.float() for x in numbers]
    call = Call._make((q.to(v.dtype), k.to(v.dtype), v, *numbers, write_key, source))
    return backend.call(_forward, *packed(call), *rule)[:2]


@torch.library.custom_op("test_time_regression::momentum_delta", mutates_args=())
def _forward(
    given: list[Tensor], names: str, momentum: bool, carried: bool, solve: bool, decayed: bool, writes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs, the last matrices, and what is kept."""
    from models.kernels.momentum.launch import Launch

    rule = Rule(momentum, carried, solve, decayed, writes)
    with torch.cuda.device_of(given[0]):
        o, last, kept = Launch(unpacked(Call, given, names), rule).forward()
    return o, last, *kept


@_forward.register_fake
def _(given, names, *rule):
    from models.kernels.momentum.launch import new_kept

    call, rule = unpacked(Call, given, names), Rule(*rule)
    return (
        torch.empty_like(call.v, memory_format=torch.contiguous_format),
        torch.empty_like(call.matrices),
        *new_kept(call, rule),
    )


@torch.library.custom_op("test_time_regression::momentum_delta_backward", mutates_args=())
def _backward(
    given: list[Tensor], kept: list[Tensor], names: str, momentum: bool, carried: bool, solve: bool, decayed: bool,
    writes: int, do: Tensor, dlast: Tensor,
) -> list[Tensor]:  # fmt: skip
    """The gradients by all tensors but the source."""
    from models.kernels.momentum.launch import Launch

    rule = Rule(momentum, carried, solve, decayed, writes)
    with torch.cuda.device_of(given[0]):
        return Launch(unpacked(Call, given, names), rule).backward(do, dlast, Kept(*kept))


@_backward.register_fake
def _(given, kept, names, *_):
    numbers = unpacked(Call, given, names)._replace(source=None)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in numbers if x is not None]


def _keep(ctx, inputs, output) -> None:
    given, *ctx.known = inputs
    ctx.save_for_backward(*given, *output[2:])
    ctx.set_materialize_grads(False)  # no zeros for what is kept, which is large


def _gradients(ctx, do: Tensor | None, dlast: Tensor | None, *_: None) -> tuple[Any, ...]:
    saved, n = list(ctx.saved_tensors), len(Kept._fields)  # once: recomputed blocks give them no second time
    given, kept = saved[:-n], saved[-n:]
    call = unpacked(Call, given, ctx.known[0])
    do = torch.zeros_like(call.v) if do is None else do
    dlast = torch.zeros_like(call.matrices) if dlast is None else dlast
    found = _backward(given, kept, *ctx.known, do, dlast)
    return [*found, *[None] * (len(given) - len(found))], *[None] * len(ctx.known)


_forward.register_autograd(_gradients, setup_context=_keep)
