"""From a projected row to queries, keys and values in one pass: what the shell of a mixer (models/mixers/mixer.py) does
between its projection and its memory, in Triton.

Of each head, in float32, rounded once as it is stored,

    z_t = sum_{j<W} w_j x_{t-j} ,   j tokens back or not, as far as the document goes      (q, k and v, or k, or none)
    y_t = activation(z_t)
    n_t = y_t / |y_t| , or y_t / rms(y_t) * scale , or y_t                                 (q and k)
    n_t turned by position_t * frequency, two channels at a time                           (q and k)

and the gate, which lies beside q, k and v in the row and has no more than its activation; what lies beyond goes through
as it is. So the gradient of the whole row is written where it belongs, and no copy puts it together. A gate that is
read later, by models/kernels/read_out, is not made here: in its place stands a `link` [B, T, N] without memory, and the
gradient that comes for it is the row's, in which the gate's columns are written already.

Positions count from the start of the document, so that they say where it begins: x_{t-j} is of the same document if j
is at most position_t. What came before the call is the tail of the call before.

Backward everything is worked out anew from x. Each of x, q, k, v and their gradients passes once each way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels import backend
from models.kernels.backend import packed, unpacked
from models.kernels.pairs.arguments import LATER, LEARNED, Call, Recipe, new_link

__all__ = ["LATER", "Call", "Recipe", "pairs", "refusal"]

WIDEST = 256  # of a head
LONGEST = 4  # of a convolution


def refusal(device: torch.device, dtype: torch.dtype, width: int, conv_size: int) -> str | None:
    """Why the kernels can't run here, or None if they can. dtype: of the row. width: of the widest head."""
    if (reason := backend.refusal(device, dtype)) is not None:
        return reason
    if width > WIDEST:
        return f"the kernels hold whole heads, up to {WIDEST} wide, not {width}"
    if conv_size > LONGEST:
        return f"the kernels hold the last {LONGEST} inputs of a convolution, not {conv_size}"
    return None


def pairs(call: Call, recipe: Recipe) -> list[Tensor]:
    """q [B, T, queries, K], k [B, T, keys, K], v [B, T, values, V]; the gate [B, T, gates, V] or its link, where there
    is one; the rest of the row, as it is, where there is a rest; what the next call's tail is, where there is a
    convolution. All in the dtype of x."""
    return backend.call(_forward, *packed(call), *recipe)


@torch.library.custom_op("test_time_regression::pairs", mutates_args=())
def _forward(
    given: list[Tensor], names: str, queries: int, keys: int, values: int, gates: int, key_dim: int, value_dim: int,
    convolved: str, activation: str, gate: str, norm: str, eps: float,
) -> list[Tensor]:  # fmt: skip
    from models.kernels.pairs.launch import Launch

    recipe = Recipe(queries, keys, values, gates, key_dim, value_dim, convolved, activation, gate, norm, eps)
    with torch.cuda.device_of(given[0]):
        return Launch(unpacked(Call, given, names), recipe).forward()


@_forward.register_fake
def _(given, names, *recipe):
    call, known = unpacked(Call, given, names), Recipe(*recipe)
    (B, T, N), K, V = call.x.shape, known.key_dim, known.value_dim
    heads = ((known.queries, K), (known.keys, K), (known.values, V), (known.gates, V))
    made = heads[:3] if known.gate == LATER else heads
    found = [call.x.new_empty(B, T, *size) for size in made if size[0]]
    found += [new_link(call.x)] if known.gate == LATER else []
    if (rest := N - sum(n * width for n, width in heads)) > 0:
        found.append(call.x.new_empty(B, T, rest))
    return found if call.weight is None else [*found, call.x.new_empty(B, call.weight.shape[1] - 1, len(call.weight))]


@torch.library.custom_op("test_time_regression::pairs_backward", mutates_args=("dx",))
def _backward(
    given: list[Tensor], names: str, queries: int, keys: int, values: int, gates: int, key_dim: int, value_dim: int,
    convolved: str, activation: str, gate: str, norm: str, eps: float, gradients: list[Tensor], dx: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Fills dx, the gradient by x; returns those by the tail, the weight and both scales, empty where there is none."""
    from models.kernels.pairs.launch import Launch

    recipe = Recipe(queries, keys, values, gates, key_dim, value_dim, convolved, activation, gate, norm, eps)
    with torch.cuda.device_of(given[0]):
        return Launch(unpacked(Call, given, names), recipe).backward(gradients, dx)


@_backward.register_fake
def _(given, names, *_):
    call = unpacked(Call, given, names)
    found = (getattr(call, name) for name in LEARNED)
    return tuple(call.x.new_empty(0) if y is None else y.new_empty(y.shape) for y in found)


def _keep(ctx, inputs, output) -> None:
    given, *ctx.known = inputs
    ctx.save_for_backward(*given)
    ctx.shapes, ctx.tail = [y.shape for y in output], "weight" in inputs[1].split()
    ctx.set_materialize_grads(False)


def _gradients(ctx, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    given, names, recipe = list(ctx.saved_tensors), ctx.known[0], Recipe(*ctx.known[1:])
    found = list(gradients)
    if ctx.tail and found[-1] is None:  # where nothing comes after, nothing comes from there
        found.pop()
    there = [given[0].new_zeros(shape) if x is None else x for x, shape in zip(found, ctx.shapes, strict=False)]
    dx = there.pop(recipe.made).contiguous() if recipe.gate == LATER else torch.empty_like(given[0])
    others = dict(zip(LEARNED, _backward(given, *ctx.known, there, dx), strict=True))
    return [dx if name == "x" else others.get(name) for name in names.split()], *[None] * len(ctx.known)


_forward.register_autograd(_gradients, setup_context=_keep)
