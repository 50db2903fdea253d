"""Test-time training by our own Triton kernels (linear.py, mlp.py): what they can do here, and the call.

Products take their operands in the dtype of q, k and v, float32 as TF32 on a GPU; sums, norms and weights are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels import backend

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
GROUP = 8  # the linear model's weights are kept for the backward pass at every 8th span of MINI_BATCH tokens
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    steps: Tensor,
    sizes: Tensor,
    start: Tensor,
    init: Tensor,
    gamma: Tensor,
    beta: Tensor,
    first: Tensor,
    fresh: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All mini-batches of a call.

    q, k, v [B, L, H, K].  steps [B, L, H]: eta.  sizes [b]: c.  start [H, P] and init [B, H, P]: the packed weights of
    a document that begins inside the call, and of the first one.  gamma, beta [H, K].  first [B, N + 1]: the first
    token of each mini-batch, and where the last one ends; fresh [B, N]: which begin a document, None where none does.
    Returns o [B, L, H, K] in the dtype of v, and the weights of the last mini-batch [B, H, P].
    """
    (length, _, K), P = q.shape[1:], start.shape[1]
    inner_model = "linear" if K * (K + 1) == P else "mlp"
    span = MINI_BATCH * (GROUP if inner_model == "linear" else 1)
    edges = (torch.arange(-(-length // span) + 1, device=q.device) * span).clamp(max=length)
    group = torch.searchsorted(first, edges.expand(len(q), -1).contiguous())
    first, group = first.int(), group.int()
    fresh = None if fresh is None else fresh.to(torch.int8).contiguous()
    tensors = (x.contiguous() for x in (q.to(v.dtype), k.to(v.dtype), v, *(x.float() for x in (steps, sizes, start))))
    more = (x.float().contiguous() for x in (init, gamma, beta))
    o, last, _ = ttt_scan(*tensors, *more, first.contiguous(), group, fresh, inner_model)
    return o, last


@torch.library.custom_op("test_time_regression::ttt_scan", mutates_args=())
def ttt_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    steps: Tensor,
    sizes: Tensor,
    start: Tensor,
    init: Tensor,
    gamma: Tensor,
    beta: Tensor,
    first: Tensor,
    group: Tensor,
    fresh: Tensor | None,
    inner_model: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the last weights, and those kept for the backward pass [B, H, *, P]: at the first mini-batch of each group,
    or slab of them."""
    given = q, k, v, steps, sizes, start, gamma, beta, first, group, fresh
    with torch.cuda.device_of(q):
        if inner_model == "mlp":
            from models.kernels.ttt.mlp import MLP

            return MLP(*given, slab(q.shape[0] * q.shape[2])).forward(init)
        from models.kernels.ttt.linear import linear_forward

        (B, _, H, _), G = q.shape, group.shape[1] - 1
        o, last, kept = torch.empty_like(v), torch.empty_like(init), init.new_empty(B, H, G, init.shape[-1])
        linear_forward[(B * H,)](*given, init, o, last, kept, **_sizes(q, first, group, fresh))
    return o, last, kept


@ttt_scan.register_fake
def _(q, k, v, steps, sizes, start, init, gamma, beta, first, group, fresh, inner_model):
    B, H, P = init.shape
    groups = group.shape[1] - 1
    kept = init.new_empty(B, H, -(-groups // slab(B * H)) if inner_model == "mlp" else groups, P)
    return torch.empty_like(v), torch.empty_like(init), kept


@torch.library.custom_op("test_time_regression::ttt_scan_backward", mutates_args=())
def ttt_scan_backward(
    do: Tensor,
    dlast: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    steps: Tensor,
    sizes: Tensor,
    start: Tensor,
    gamma: Tensor,
    beta: Tensor,
    first: Tensor,
    group: Tensor,
    fresh: Tensor | None,
    kept: Tensor,
    inner_model: str,
) -> list[Tensor]:
    """The gradients by q, k, v, steps, sizes, start, init, gamma and beta; by what heads or rows share, of each row."""
    given = q, k, v, steps, sizes, start, gamma, beta, first, group, fresh
    if inner_model == "mlp":
        from models.kernels.ttt.mlp import MLP

        with torch.cuda.device_of(q):
            return MLP(*given, slab(q.shape[0] * q.shape[2])).backward(do, dlast, kept)
    from models.kernels.ttt.linear import linear_backward

    B, _, H, K = q.shape
    dq, dk, dv, dsteps = (torch.zeros_like(x) for x in (q, k, v, steps))  # tokens before the first are in no mini-batch
    dstart, dinit = torch.zeros_like(dlast), dlast.clone()
    dsizes, dgamma, dbeta = (steps.new_empty(B, H, n) for n in (len(sizes), K, K))
    scratch = kept.new_empty(B, H, GROUP, kept.shape[-1])
    with torch.cuda.device_of(q):
        linear_backward[(B * H,)](
            *given, kept, do, dlast, dq, dk, dv, dsteps, dsizes, dstart, dinit, dgamma, dbeta, scratch,
            GROUP=GROUP, **_sizes(q, first, group, fresh),
        )  # fmt: skip
    return [dq, dk, dv, dsteps, dsizes, dstart, dinit, dgamma, dbeta]


@ttt_scan_backward.register_fake
def _(do, dlast, q, k, v, steps, sizes, start, gamma, beta, first, group, fresh, kept, inner_model):
    B, _, H, K = q.shape
    shared = [steps.new_empty(B, H, n) for n in (len(sizes), K, K)]
    weights = [torch.empty_like(dlast) for _ in range(2)]
    return [*(torch.empty_like(x) for x in (q, k, v, steps)), shared[0], *weights, *shared[1:]]


def _sizes(q: Tensor, first: Tensor, group: Tensor, fresh: Tensor | None) -> dict[str, Any]:
    _, L, H, K = q.shape
    sizes: dict[str, Any] = {"L": L, "H": H, "N": first.shape[1] - 1, "G": group.shape[1] - 1, "C": MINI_BATCH, "K": K}
    return sizes | {"DOCUMENTS": fresh is not None, "num_warps": 4 if K <= 64 else 8, "num_stages": 1}


def _keep(ctx, inputs, output):
    q, k, v, steps, sizes, start, _, gamma, beta, first, group, fresh, ctx.inner_model = inputs
    ctx.save_for_backward(q, k, v, steps, sizes, start, gamma, beta, first, group, fresh, output[2])
    ctx.set_materialize_grads(False)  # no zeros for what is kept, which is large


def _backward(ctx, do, dlast, _):
    *given, kept = ctx.saved_tensors
    v, init = given[2], kept[:, :, 0]
    do = torch.zeros_like(v) if do is None else do.contiguous()
    dlast = torch.zeros_like(init) if dlast is None else dlast.contiguous()
    found = ttt_scan_backward(do, dlast, *given, kept, ctx.inner_model)
    dq, dk, dv, dsteps, dsizes, dstart, dinit, dgamma, dbeta = found
    shared = (dsizes.sum((0, 1)), dstart.sum(0), dinit, dgamma.sum(0), dbeta.sum(0))
    return dq, dk, dv, dsteps, *shared, None, None, None, None


ttt_scan.register_autograd(_backward, setup_context=_keep)
