"""What leaves a mixer, by our own Triton kernels: each head at its norm, times the gate.

    y = o r w * act(g) ,    r = 1 / sqrt(mean(o^2) + eps) ,    or without the norm y = o * act(g)

The gate g is read where the projection left it, in a row with queries, keys and values, and its gradient is written to
its place in the gradient of the row. Nothing is copied for that: the pairs' kernels (models/kernels/pairs) hand on a
`link`, which has the row's shape and no memory; its gradient is the row's, the gate's columns written, and the pairs'
backward pass fills in the others. Arithmetic is float32, rounded once.

Shapes: B batch, T tokens, H heads, V value width, N columns of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.kernels import backend

WIDEST = 1024  # of a head
NUMBERS = 1024  # that a program has at a time, if a head is no wider
ROWS = 8  # tokens of a program backward


class Gate(NamedTuple):
    """A gate that was not made yet. row [B, T, N], what the projection made; link, see above; first: the gate's first
    column; activation: silu | sigmoid.
    """

    row: Tensor
    link: Tensor
    first: int
    activation: str


def refusal(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why the kernels can't run here, or None if they can. dtype is that of the row, width that of a head."""
    if (reason := backend.refusal(device, dtype)) is not None:
        return reason
    return None if width <= WIDEST else f"the kernels hold whole heads, up to {WIDEST} wide, not {width}"


def read_out(o: Tensor, gate: Gate, weight: Tensor | None, eps: float) -> Tensor:
    """o [B, T, H, V] -> y [B, T, H V] in the dtype of the row. weight [V], None for no norm."""
    return backend.call(_forward, o, gate.row, gate.link, weight, gate.first, gate.activation, eps)


@torch.library.custom_op("test_time_regression::read_out", mutates_args=())
def _forward(o: Tensor, row: Tensor, link: Tensor, weight: Tensor | None, first: int, gate: str, eps: float) -> Tensor:
    from models.kernels.read_out import kernels

    o, (B, T, H, V) = o.contiguous(), o.shape
    assert row.is_contiguous(), "a row follows a row"
    out = row.new_empty(B, T, H * V)
    if o.numel():
        tile = _tile(H, V)
        with torch.cuda.device_of(o):
            kernels.read_out[B * T, -(-H // tile["BG"])](
                o, row, weight, out, first, row.shape[-1], eps, H=H, V=V, GATE=gate, **tile
            )
    return out


@_forward.register_fake
def _(o, row, link, weight, first, gate, eps):
    B, T, H, V = o.shape
    return row.new_empty(B, T, H * V)


@torch.library.custom_op("test_time_regression::read_out_backward", mutates_args=())
def _backward(
    o: Tensor, row: Tensor, weight: Tensor | None, dout: Tensor, first: int, gate: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by o, by the link, of which the gate's columns alone are written, and by the weight."""
    from models.kernels.columns import summed
    from models.kernels.read_out import kernels

    o, dout, (B, T, H, V) = o.contiguous(), dout.contiguous(), o.shape
    do, drow, tile = torch.empty_like(o), torch.empty_like(row), _tile(H, V)
    grid = (-(-B * T // ROWS), -(-H // tile["BG"]))
    dweight = o.new_empty(grid[0] * grid[1], V, dtype=torch.float32)
    if o.numel():
        with torch.cuda.device_of(o):
            kernels.read_out_gradient[grid](
                o, row, weight, dout, do, drow, dweight, first, row.shape[-1], B * T, eps,
                H=H, V=V, GATE=gate, ROWS=ROWS, **tile,
            )  # fmt: skip
    return do, drow, o.new_empty(0) if weight is None else summed(dweight, weight)


@_backward.register_fake
def _(o, row, weight, dout, first, gate, eps):
    dweight = o.new_empty(0) if weight is None else torch.empty_like(weight)
    return o.new_empty(o.shape), row.new_empty(row.shape), dweight


def _keep(ctx, inputs, output) -> None:
    o, row, _, weight, *ctx.known = inputs
    ctx.save_for_backward(o, row, weight)


def _gradients(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    o, row, weight = ctx.saved_tensors
    do, drow, dweight = _backward(o, row, weight, dout, *ctx.known)
    return do, None, drow, None if weight is None else dweight, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def _tile(H: int, V: int) -> dict[str, int]:
    """Heads and columns of a program, and its warps: eight numbers a thread, for a load of 16 bytes."""
    BV = 1 << (V - 1).bit_length()
    BG = min(1 << (H - 1).bit_length(), max(1, NUMBERS // BV))
    return {"BG": BG, "BV": BV, "num_warps": max(1, BG * BV // 256)}
