"""Titans' deep memory by kernels of our own: the rule Online of models/regression/deep/rules.py, in Triton.

A mini-batch takes its gradients at the memory before it, so that mini-batches go one after another, and all else waits
for none: a call is three kernels forward, of which only the scan is sequential,

    coefficients    G and what goes with the weights, from the gates: kernels/momentum's
    scan            X_2, E_1 and E_2 of a mini-batch from N and S before it, and N and S after it
    outputs         what its queries read, from all of these

and five backward, after the coefficients again: what the outputs alone say, the scan's gradient from the last
mini-batch to the first, and the gradients by keys and by what carries on, by W, and by the gates. What the scan leaves
behind is kept between the passes. A document of a head has one program in the scans, or two that exchange sums.

Precision: products of bf16 operands, summed in float32; N, S and their gradients are float32 in the scans and rounded
where they are operands, as what one kernel leaves to another is. float32 inputs are multiplied as sums of three TF32
products.

docs/kernels.md says what was expected and what happened.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels import backend
from models.kernels.backend import packed, unpacked
from models.kernels.deep.arguments import Scan

TAKES = {  # of a recipe
    "depth": (2,),
    "activation": ("silu",),
    "bias": (False,),
    "residual": (False,),
    "layer_norm": (False,),
    "inner_loss": ("l2",),
    "limit_steps": (True,),
}
MINI_BATCHES = (16, 32, 64)
WIDTHS = (16, 32, 64)  # of keys and values
INNER = (16, 32, 64, 128, 256)  # of the hidden layer


def refusal(device: torch.device, dtype: torch.dtype, grad_batch: int, widths: tuple[int, ...]) -> str | None:
    """Why these kernels can't run here, or None if they can. dtype is that of q, k and v; widths those of keys, of the
    hidden layer and of values.

    In 16 bits on an H100 (Triton 3.7.1) mini-batches longer than keys or values are wide, and tiles of the hidden
    layer narrower than they are long, give wrong numbers or an illegal memory access; all others tried are right.
    """
    if (reason := backend.refusal(device, dtype)) is not None:
        return reason
    if dtype == torch.float16:
        return "the kernels take bfloat16 and float32, not float16"
    K, inner, V = widths
    for what, value, allowed in (
        ("mini-batches of", grad_batch, MINI_BATCHES),
        ("keys of width", K, WIDTHS),
        ("values of width", V, WIDTHS),
        ("a hidden layer of", inner, INNER),
    ):
        if value not in allowed:
            return f"the kernels take {what} {', '.join(map(str, allowed))}, not {value}"
    if device.type == "cuda" and dtype == torch.float32 and grad_batch * max(K, V) > 2048:
        return f"in float32 mini-batches of {grad_batch} of vectors of {max(K, V)} do not fit on a multiprocessor"
    if dtype != torch.float32 and min(widths) < grad_batch:
        return f"in 16 bits mini-batches of {grad_batch} are wrong for vectors of {min(widths)}; {min(widths)} is right"
    return None


def deep_scan(scan: Scan, grad_batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """All mini-batches of a call, of C = grad_batch tokens.

    Returns o [B, T, H, V]; N and S after the last document of each row [B H, n PAIR]; N before its last mini-batch [B
    H, PAIR].
    """
    q, k, v, *numbers, filled, slots, runs = scan
    numbers = [x if x is None else x.float() for x in numbers]
    filled = filled if filled is None else filled.to(torch.int8)
    scan = Scan._make((q.to(v.dtype), k.to(v.dtype), v, *numbers, filled, slots, runs))
    given, names = packed(scan)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    o, last, held, *_ = backend.call(_forward, given, names, grad_batch, keep)
    return o, last, held


@torch.library.custom_op("test_time_regression::deep_scan", mutates_args=())
def _forward(
    given: list[Tensor], names: str, grad_batch: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the last N and S, N before that, and what is kept for the backward pass, the fields of Left: empty tensors
    without `keep`."""
    from models.kernels.deep.launch import Launch

    with torch.cuda.device_of(given[0]):
        o, last, left = Launch(unpacked(Scan, given, names), grad_batch).forward(keep)
        return o, *last, *(left if keep else [o.new_empty(0) for _ in left])


@_forward.register_fake
def _(given, names, grad_batch, keep):
    from models.kernels.deep.launch import empty

    scan = unpacked(Scan, given, names)
    last, left = empty(scan, grad_batch, keep)
    o = torch.empty_like(scan.v, memory_format=torch.contiguous_format)
    return o, *last, *(left if keep else [o.new_empty(0) for _ in left])


@torch.library.custom_op("test_time_regression::deep_scan_backward", mutates_args=())
def _backward(
    given: list[Tensor], names: str, grad_batch: int, kept: list[Tensor], do: Tensor | None, dlast: Tensor | None,
    dheld: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    from models.kernels.deep.arguments import Left
    from models.kernels.deep.launch import Launch

    with torch.cuda.device_of(given[0]):
        return Launch(unpacked(Scan, given, names), grad_batch).backward(Left._make(kept), do, dlast, dheld)


@_backward.register_fake
def _(given, names, *_):
    numbers = unpacked(Scan, given, names)[:-3]  # all but filled, slots and runs
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in numbers if x is not None]


def _keep(ctx, inputs, output) -> None:
    given, *ctx.known, _ = inputs
    ctx.save_for_backward(*given, *output[3:])
    ctx.set_materialize_grads(False)  # no zeros for what is kept, which is large


def _gradients(ctx, do: Tensor | None, dlast: Tensor | None, dheld: Tensor | None, *_):
    saved = list(ctx.saved_tensors)  # once: recomputed blocks give them no second time
    given, kept = saved[: len(ctx.known[0].split())], saved[len(ctx.known[0].split()) :]
    found = _backward(given, *ctx.known, kept, do, dlast, dheld)
    return [*found, *[None] * (len(given) - len(found))], None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)
