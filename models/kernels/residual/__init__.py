"""A residual and the norm after it by our own Triton kernels: what can run here, and the call.

    x' = x + y ,    n = x' r w ,    r = 1 / sqrt(mean(x'^2) + eps)
    dx' += r (w dn - x' r mean(w dn x' r)) ,    dx = dy = dx' ,    dw = sum over tokens of dn x' r

Both ways all is said in one pass over the tokens: x' is written where it is normed, and the gradient that comes along
the residual is added where the norm's is made. Sums and functions are float32. Kept are x', which the layers go on
with, and r.

Shapes: N tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels import backend

WIDEST = 16_384  # a program has a whole row
ROWS = 16  # of a program backward: their sum of the weight's gradient is written once


def refusal(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why the kernels can't run here, or None if they can. dtype is that of x."""
    if (reason := backend.refusal(device, dtype)) is not None:
        return reason
    return None if width <= WIDEST else f"the kernels hold whole rows, up to {WIDEST} wide, not {width}"


def add_and_norm(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, own: bool = False
) -> tuple[Tensor, Tensor]:
    """x and y [..., D] -> x + y in the dtype of x, and its RMS norm times the weight [D] in dtype. own: without
    gradients, the sum may take the place of x."""
    if own and not backend.watched((x, y, weight)):
        return _launch(x, y, weight, eps, dtype, x)[:2]
    return backend.call(_forward, x, y, weight, eps, dtype)[:2]


@torch.library.custom_op("test_time_regression::add_and_norm", mutates_args=())
def _forward(x: Tensor, y: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The third is r."""
    return _launch(x, y, weight, eps, dtype, torch.empty_like(x, memory_format=torch.contiguous_format))


def _launch(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum is written to `total`."""
    from models.kernels.residual import kernels

    assert total.is_contiguous(), "a row follows a row"
    x, y, D = x.contiguous(), y.contiguous(), x.shape[-1]
    out = torch.empty_like(x, dtype=dtype)
    inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if N := inverse.numel():
        block = _block(D)
        with torch.cuda.device_of(x):
            kernels.add_and_norm[(N,)](x, y, weight, total, out, inverse, eps, D, BLOCK=block, num_warps=_warps(block))
    return total, out, inverse


@_forward.register_fake
def _(x, y, weight, eps, dtype):
    inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), inverse


@torch.library.custom_op("test_time_regression::add_and_norm_backward", mutates_args=())
def _backward(
    total: Tensor, inverse: Tensor, weight: Tensor, dtotal: Tensor | None, dout: Tensor, y_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by x, by y (empty where it is that by x) and by the weight."""
    from models.kernels.columns import summed
    from models.kernels.residual import kernels

    D, N = total.shape[-1], inverse.numel()
    dtotal, dout = None if dtotal is None else dtotal.contiguous(), dout.contiguous()
    dx, dy = torch.empty_like(total), _gradient_by_y(total, y_dtype)
    programs, block = -(-N // ROWS), _block(D)
    dweight = total.new_empty(programs, D, dtype=torch.float32)
    if N:
        with torch.cuda.device_of(total):
            kernels.add_and_norm_gradient[(programs,)](
                total, inverse, weight, dtotal, dout, dx, dy if dy.numel() else None, dweight, N, D,
                ROWS=ROWS, BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
    return dx, dy, summed(dweight, weight)


@_backward.register_fake
def _(total, inverse, weight, dtotal, dout, y_dtype):
    return total.new_empty(total.shape), _gradient_by_y(total, y_dtype), weight.new_empty(weight.shape)


def _gradient_by_y(total: Tensor, dtype: torch.dtype) -> Tensor:
    return total.new_empty(0 if dtype == total.dtype else total.shape, dtype=dtype)


def _keep(ctx, inputs, output) -> None:
    _, y, weight, _, _ = inputs
    total, _, inverse = output
    ctx.save_for_backward(total, inverse, weight)
    ctx.y_dtype = y.dtype
    ctx.set_materialize_grads(False)


def _gradients(ctx, dtotal: Tensor | None, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    total, inverse, weight = ctx.saved_tensors
    dout = torch.zeros_like(total) if dout is None else dout
    dx, dy, dweight = _backward(total, inverse, weight, dtotal, dout, ctx.y_dtype)
    return dx, dy if dy.numel() else dx, dweight, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def _block(D: int) -> int:
    return 1 << (D - 1).bit_length()


def _warps(block: int) -> int:
    """Eight numbers a thread, for two loads of 16 bytes."""
    return min(16, max(1, block // 256))
