"""Test-time training by our own Triton kernels (linear.py, mlp.py): what they can do here, and the call.

Products take their operands in the dtype of q, k and v, float32 as TF32 on a GPU; sums, norms and weights are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels import backend
from models.kernels.backend import packed, unpacked
from models.kernels.ttt.arguments import Call

TAKES = {  # of a recipe
    "depth": (1, 2),
    "activation": ("gelu_tanh",),
    "bias": (True,),
    "residual": (True,),
    "layer_norm": (True,),
    "inner_loss": ("l2",),
    "limit_steps": (False,),
}
HIDDEN = 4  # the hidden layer's width over that of keys
MINI_BATCH = 16  # the smallest that Triton's products take, and the paper's
WIDTHS = {"linear": (16, 32, 64, 128), "mlp": (16, 32, 64)}  # of keys; wider ones' weights do not fit on chip
TILE = 64  # tokens that the linear model's kernels take at a time
SLAB = 4096  # spans of MINI_BATCH tokens that the MLP's kernels take at a time, of all heads of all sequences


def refusal(device: torch.device, dtype: torch.dtype, grad_batch: int, widths: tuple[int, ...]) -> str | None:
    """Why the kernels can't run here, or None if they can. dtype is that of q, k and v; widths those of keys, of the
    hidden layer where there is one, and of values.
    """
    if (reason := backend.refusal(device, dtype)) is not None:
        return reason
    if dtype == torch.float16:
        return "the kernels take bfloat16 and float32, not float16"
    if grad_batch != MINI_BATCH:
        return f"the kernels take mini-batches of {MINI_BATCH}, not regressor.grad_batch={grad_batch}"
    K, *hidden, _ = widths
    if K not in WIDTHS["mlp" if hidden else "linear"]:
        return f"the kernels take keys of width {', '.join(map(str, WIDTHS['mlp' if hidden else 'linear']))}, not {K}"
    if hidden not in ([], [HIDDEN * K]):
        return f"the kernels take a hidden layer of {HIDDEN} times the keys' {K}, not of {hidden[0]}"
    return None


def slab(rows: int) -> int:
    """Spans of a slab, for B H rows."""
    return max(SLAB // rows, 1)


def spans(K: int, P: int, documents: bool) -> int:
    """Tokens of a span, in which the mini-batches begin that the kernels take at a time."""
    if K * (K + 1) != P:
        return MINI_BATCH
    return TILE - MINI_BATCH if documents else TILE  # the last one goes on for less than MINI_BATCH


def scan(
    q: Tensor, k: Tensor, v: Tensor, steps: Tensor, sizes: Tensor, start: Tensor, gamma: Tensor,
    beta: Tensor, init: Tensor, first: Tensor, position: Tensor, fresh: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All mini-batches of a call, arguments as in Call. Returns o [B, L, H, K] in the dtype of v, and the weights of
    the last mini-batch [B, H, P].
    """
    length, span = q.shape[1], spans(q.shape[-1], start.shape[1], fresh is not None)
    edges = (torch.arange(-(-length // span) + 1, device=q.device) * span).clamp(max=length)
    group = torch.searchsorted(first, edges.expand(len(q), -1).contiguous())
    tensors = (x.contiguous() for x in (q.to(v.dtype), k.to(v.dtype), v))
    numbers = (x.float().contiguous() for x in (steps, sizes, start, gamma, beta, init))
    places = (x.int().contiguous() for x in (first, group, position))
    fresh = None if fresh is None else fresh.to(torch.int8).contiguous()
    o, last, *_ = _forward(*packed(Call._make((*tensors, *numbers, *places, fresh))))
    return o, last


def _kernels(call: Call) -> Any:
    if call.inner_model == "mlp":
        from models.kernels.ttt.mlp import MLP

        return MLP(call, slab(call.q.shape[0] * call.q.shape[2]))
    from models.kernels.ttt.linear import Linear

    return Linear(call, TILE, spans(call.q.shape[-1], call.start.shape[1], call.fresh is not None))


@torch.library.custom_op("test_time_regression::ttt_scan", mutates_args=())
def _forward(given: list[Tensor], names: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the last weights, and what is kept for the backward pass: of the MLP the weights at the first mini-batch of
    each slab [B, H, *, P] and four empty tensors; of the linear model what Linear.forward says."""
    call = unpacked(Call, given, names)
    with torch.cuda.device_of(call.q):
        return _kernels(call).forward()


@_forward.register_fake
def _(given, names):
    call = unpacked(Call, given, names)
    (B, H, P), G, K = call.init.shape, call.group.shape[1] - 1, call.q.shape[-1]
    if call.inner_model == "mlp":
        kept = call.init.new_empty(B, H, -(-G // slab(B * H)), P), *(call.init.new_empty(0) for _ in range(4))
    else:
        from models.kernels.ttt.linear_tiles import NUMBERS

        biases, numbers = call.init.new_empty(B, H, G, K), call.init.new_empty(B, H, NUMBERS.value, call.q.shape[1])
        kept = call.q.new_empty(B, H, G, K, K), biases, torch.empty_like(call.v), torch.empty_like(call.v), numbers
    return torch.empty_like(call.v), torch.empty_like(call.init), *kept


@torch.library.custom_op("test_time_regression::ttt_scan_backward", mutates_args=())
def _backward(given: list[Tensor], names: str, kept: list[Tensor], do: Tensor, dlast: Tensor) -> list[Tensor]:
    """The gradients by all tensors up to init; by what heads or rows share, of each row."""
    call = unpacked(Call, given, names)
    with torch.cuda.device_of(call.q):
        return _kernels(call).backward(do, dlast, *kept)


@_backward.register_fake
def _(given, names, *others):
    call = unpacked(Call, given, names)
    (B, H, _), K = call.init.shape, call.q.shape[-1]
    dsizes, dgamma, dbeta = (call.steps.new_empty(B, H, n) for n in (len(call.sizes), K, K))
    dstart, dinit = torch.empty_like(call.init), torch.empty_like(call.init)
    return [*(torch.empty_like(x) for x in call[:4]), dsizes, dstart, dgamma, dbeta, dinit]


def _keep(ctx, inputs, output):
    given, ctx.names = inputs
    ctx.save_for_backward(*given, *output[2:])
    ctx.set_materialize_grads(False)  # no zeros for what is kept, which is large


def _gradients(ctx, do, dlast, *_):
    saved = ctx.saved_tensors  # once: recomputed blocks give them no second time
    given, kept = saved[:-5], saved[-5:]
    call = unpacked(Call, given, ctx.names)
    do = torch.zeros_like(call.v) if do is None else do.contiguous()
    dlast = torch.zeros_like(call.init) if dlast is None else dlast.contiguous()
    *each, dsizes, dstart, dgamma, dbeta, dinit = _backward(list(given), ctx.names, list(kept), do, dlast)
    shared = [dsizes.sum((0, 1)), dstart.sum(0), dgamma.sum(0), dbeta.sum(0), dinit]
    return [*each, *shared, *[None] * (len(given) - 9)], None


_forward.register_autograd(_gradients, setup_context=_keep)
