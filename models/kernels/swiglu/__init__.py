"""SwiGLU's second half by our own Triton kernels: what can run here, and the call.

    h = silu(a) * b ,    y = h W^T ,    silu(a) = a s ,    s = 1 / (1 + exp(-a))
    dh = dy W ,    da = dh b s (1 + a (1 - s)) ,    db = dh a s ,    dW = dy^T h

a and b are the halves of one tensor, as are da and db, which are therefore never joined. h, which dW wants, is computed
again beside them and not kept. Sums and functions are float32, and h is rounded once.

Shapes: N tokens, F inner width, D width of the output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import backend
from models.parts.product import weight_gradient

BLOCK, NUM_WARPS = 1024, 4  # columns that a program has of a row


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels can't run here, or None if they can. dtype is that of a and b."""
    return backend.refusal(device, dtype)


def gated_output(ab: Tensor, weight: Tensor) -> Tensor:
    """ab [..., 2 F] and weight [D, F] -> y [..., D] in the dtype of ab. The weight's gradient is rounded to its own."""
    return backend.call(_forward, ab, weight.detach().to(ab.dtype), weight)


@torch.library.custom_op("test_time_regression::gated_output", mutates_args=())
def _forward(ab: Tensor, rounded: Tensor, weight: Tensor) -> Tensor:
    """rounded: the weight in the dtype of ab. It itself is here for its gradient alone."""
    from models.kernels.swiglu.kernels import gate

    ab = ab.contiguous()
    h = ab.new_empty(*ab.shape[:-1], ab.shape[-1] // 2)
    _launch(gate, h, ab, h)
    return F.linear(h, rounded)


@_forward.register_fake
def _(ab, rounded, weight):
    return ab.new_empty(*ab.shape[:-1], len(weight))


@torch.library.custom_op("test_time_regression::gated_output_backward", mutates_args=())
def _backward(dy: Tensor, ab: Tensor, rounded: Tensor, dtype: torch.dtype, weight_too: bool) -> tuple[Tensor, Tensor]:
    """The gradients by ab and, where it is wanted, by the weight, of this dtype; else nothing in its place."""
    from models.kernels.swiglu.kernels import gate_gradient

    dy, ab = dy.flatten(0, -2), ab.contiguous()
    dh, dab = dy @ rounded, ab.new_empty(ab.shape)
    _launch(gate_gradient, dh, ab, dh, dab)  # h takes the place of its gradient
    return dab, weight_gradient(dy, dh, dtype) if weight_too else rounded.new_empty(0, dtype=dtype)


@_backward.register_fake
def _(dy, ab, rounded, dtype, weight_too):
    return ab.new_empty(ab.shape), rounded.new_empty(rounded.shape if weight_too else 0, dtype=dtype)


def _keep(ctx, inputs, output):
    *kept, weight = inputs
    ctx.save_for_backward(*kept)
    ctx.dtype = weight.dtype


def _gradients(ctx, dy):
    wanted = ctx.needs_input_grad[2]
    dab, dweight = _backward(dy.contiguous(), *ctx.saved_tensors, ctx.dtype, wanted)
    return dab, None, dweight if wanted else None


_forward.register_autograd(_gradients, setup_context=_keep)


def _launch(kernel: Any, h: Tensor, *tensors: Tensor) -> None:
    """One program for BLOCK columns of a row of h."""
    inner = h.shape[-1]
    block = min(BLOCK, max(16, 1 << (inner - 1).bit_length()))
    if h.numel():
        grid = (h.numel() // inner, -(-inner // block))
        with torch.cuda.device_of(h):
            kernel[grid](*tensors, inner, BLOCK=block, num_warps=NUM_WARPS)
