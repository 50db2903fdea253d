"""Products with float32 weights in 16 bits, whose gradients keep the digits that they were summed with.

    y = x W^T ,    dx = dy W ,    dW = dy^T x

Under autocast W is rounded to 16 bits, and so is dW, only to be widened again: a copy of every weight's gradient, and
its digits lost. On a GPU a product of 16-bit numbers is summed in float32 anyway, and can leave dW as it is.

Shapes: N tokens, D inputs, M outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.parts.precision import HALF, product_dtype


def widens(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether `product` is for these: 16-bit products on a GPU with float32 weights that want gradients. (Without them
    autocast rounds a weight once for many calls.)"""
    wanted = torch.is_grad_enabled() and all(w.requires_grad and w.dtype == torch.float32 for w in weights)
    return wanted and x.is_cuda and product_dtype(x) in HALF


def product(x: Tensor, weights: Sequence[Tensor], rows: int = 0) -> Tensor:
    """x [..., D] times the weights [M_i, D] side by side, [..., M]; zeros fill M up to so many rows."""
    dtype, found = product_dtype(x), list(weights)
    with torch.no_grad():
        missing = rows - sum(map(len, found))
        below = [found[0].new_zeros(missing, found[0].shape[1])] if missing > 0 else []
        together = torch.cat([*found, *below]) if len(found) + len(below) > 1 else found[0]
    return _forward(x.to(dtype), together.to(dtype), found)


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T x [M, D] of dy [N, M] and x [N, D], rounded to dtype once."""
    if dy.is_cuda and dy.dtype in HALF and dtype == torch.float32:
        return torch.mm(dy.T, x, out_dtype=torch.float32)
    return (dy.T @ x).to(dtype)


@torch.library.custom_op("test_time_regression::product", mutates_args=())
def _forward(x: Tensor, rounded: Tensor, weights: list[Tensor]) -> Tensor:
    """rounded [M, D]: the weights in the dtype of x. They themselves are here for their gradients alone."""
    return F.linear(x, rounded)


@_forward.register_fake
def _(x, rounded, weights):
    return x.new_empty(*x.shape[:-1], len(rounded))


@torch.library.custom_op("test_time_regression::product_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, rounded: Tensor, input_too: bool) -> tuple[Tensor, Tensor]:
    """The gradients by x, where it is wanted, else nothing in its place; and by the weights side by side, float32."""
    flat = dy.flatten(0, -2)
    dx = (flat @ rounded).view(x.shape) if input_too else x.new_empty(0)
    return dx, weight_gradient(flat, x.flatten(0, -2), torch.float32)


@_backward.register_fake
def _(dy, x, rounded, input_too):
    return x.new_empty(x.shape if input_too else 0), rounded.new_empty(rounded.shape, dtype=torch.float32)


def _keep(ctx, inputs, output) -> None:
    x, rounded, weights = inputs
    ctx.save_for_backward(x, rounded)
    ctx.sizes = [len(w) for w in weights]


def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, None, list[Tensor]]:
    x, rounded = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0]
    dx, dweight = _backward(dy.contiguous(), x, rounded, wanted)
    return dx if wanted else None, None, list(dweight[: sum(ctx.sizes)].split(ctx.sizes))


_forward.register_autograd(_gradients, setup_context=_keep)
