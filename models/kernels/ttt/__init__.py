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
KEPT = 9  # tensors, for the backward pass
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


def scan(
    q: Tensor, k: Tensor, v: Tensor, steps: Tensor, sizes: Tensor, start: Tensor, gamma: Tensor, beta: Tensor,
    init: Tensor | None, position: Tensor, batches: tuple[Tensor, Tensor | None] | None, documents: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All mini-batches of a call, arguments as in Call; without `init` the first one begins with `start`. batches:
    first and fresh, of the MLP alone. documents: whether any may begin inside. Returns o [B, L, H, K] in the dtype of
    v, and the weights of the last mini-batch [B, H, P].
    """
    where = []
    if batches is None:
        where += [position.int().contiguous(), start.to(v.dtype).contiguous() if documents else None, *[None] * 3]
    else:
        length, first, fresh = q.shape[1], batches[0].int().contiguous(), batches[1]
        edges = (torch.arange(-(-length // MINI_BATCH) + 1, device=q.device) * MINI_BATCH).clamp(max=length)
        group = torch.searchsorted(first, edges.int().expand(len(q), -1).contiguous()).int()
        where += [None, None, first, group, None if fresh is None else fresh.to(torch.int8).contiguous()]
        init = start.expand(len(q), -1, -1) if init is None else init
    tensors = (x.contiguous() for x in (q.to(v.dtype), k.to(v.dtype), v))
    numbers = (x.float().contiguous() for x in (steps, sizes, start, gamma, beta))
    init = None if init is None else init.float().contiguous()
    o, last, *_ = backend.call(_forward, *packed(Call._make((*tensors, *numbers, init, *where))))
    return o, last


def _kernels(call: Call) -> Any:
    if call.inner_model == "mlp":
        from models.kernels.ttt.mlp import MLP

        return MLP(call, slab(call.q.shape[0] * call.q.shape[2]))
    from models.kernels.ttt.linear import Linear

    return Linear(call, TILE)


@torch.library.custom_op("test_time_regression::ttt_scan", mutates_args=())
def _forward(
    given: list[Tensor], names: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the last weights, and what is kept for the backward pass: of the MLP the weights at the first mini-batch of
    each slab [B, H, *, P] and empty tensors; of the linear model what Linear.forward says."""
    call = unpacked(Call, given, names)
    with torch.cuda.device_of(call.q):
        return _kernels(call).forward()


@_forward.register_fake
def _(given, names):
    call = unpacked(Call, given, names)
    B, L, H, K = call.q.shape
    P, new = call.start.shape[1], call.start.new_empty
    if call.group is not None:
        G = call.group.shape[1] - 1
        kept = new(B, H, -(-G // slab(B * H)), P), *(new(0) for _ in range(KEPT - 1))
    else:
        from models.kernels.ttt.linear import num_spans
        from models.kernels.ttt.linear_tiles import NUMBERS

        G = num_spans(call, TILE)
        u, y, read_y = (torch.empty_like(call.v) for _ in range(3))
        numbers, scales = new(B, H, NUMBERS.value, L), new(B, H, L)
        edges = [call.q.new_empty(B, n, dtype=torch.int32) for n in (L + 1, G + 1, 2)]
        kept = call.q.new_empty(B, H, G, K, K), u, y, numbers, read_y, scales, *edges
    return torch.empty_like(call.v), new(B, H, P), *kept


@torch.library.custom_op("test_time_regression::ttt_scan_backward", mutates_args=())
def _backward(given: list[Tensor], names: str, kept: list[Tensor], do: Tensor, dlast: Tensor | None) -> list[Tensor]:
    """The gradients by q, k, v and the steps; those by sizes, of each head [H, b], gamma, beta and start; and by init,
    if there is one."""
    call = unpacked(Call, given, names)
    with torch.cuda.device_of(call.q):
        return _kernels(call).backward(do, dlast, *kept)


@_backward.register_fake
def _(given, names, *others):
    call = unpacked(Call, given, names)
    by_sizes = call.sizes.new_empty(call.q.shape[2], len(call.sizes))
    found = [*(torch.empty_like(x) for x in call[:4]), by_sizes]
    found += [torch.empty_like(x) for x in (call.gamma, call.beta, call.start)]
    return found if call.init is None else [*found, torch.empty_like(call.init)]


def _keep(ctx, inputs, output):
    given, ctx.names = inputs
    ctx.save_for_backward(*given, *output[2:])
    ctx.set_materialize_grads(False)  # no zeros for what is kept, which is large


def _gradients(ctx, do, dlast, *_):
    saved = ctx.saved_tensors  # once: recomputed blocks give them no second time
    given, kept = saved[:-KEPT], saved[-KEPT:]
    call = unpacked(Call, given, ctx.names)
    do = torch.zeros_like(call.v) if do is None else do.contiguous()
    dlast = None if dlast is None else dlast.contiguous()
    made = _backward(list(given), ctx.names, list(kept), do, dlast)
    dq, dk, dv, dsteps, dsizes, dgamma, dbeta, dstart, *dinit = made
    found = [dq, dk, dv, dsteps, dsizes.sum(0), dstart, dgamma, dbeta, *dinit]
    return [*found, *[None] * (len(given) - len(found))], None


_forward.register_autograd(_gradients, setup_context=_keep)
