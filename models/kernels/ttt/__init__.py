"""Test-time training by our own Triton kernels (linear.py, mlp.py): what they can do here, and the call.

Products take their operands in the dtype of q, k and v, float32 as TF32 on a GPU; sums, norms and weights are float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.kernels import backend

if TYPE_CHECKING:
    from models.regression.ttt.mini_batches import MiniBatches

MINI_BATCH = 16  # the smallest that Triton's products take, and the paper's
WIDTHS = {"linear": (16, 32, 64, 128), "mlp": (16, 32, 64)}  # of keys; wider ones' weights do not fit on chip
GROUP = {"linear": 8, "mlp": 16}  # mini-batches from one that is kept to the next


class Given(NamedTuple):
    """What the backward pass has of the forward one: its inputs without the first weights, which are in kept [B, H, G,
    P], those at the first mini-batch of every group. Shapes as in scan; first [B, N + 1] and group [B, G + 1]: where
    mini-batches begin, and groups of them; fresh [B, N]: whether a mini-batch begins a document, None: none does.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    steps: Tensor
    sizes: Tensor
    start: Tensor
    gamma: Tensor
    beta: Tensor
    first: Tensor
    group: Tensor
    fresh: Tensor | None
    kept: Tensor


def refusal(device: torch.device, dtype: torch.dtype, inner_model: str, key_dim: int, grad_batch: int) -> str | None:
    """Why the kernels can't run here, or None if they can. dtype is that of q, k and v."""
    if (reason := backend.refusal(device, dtype)) is not None:
        return reason
    if dtype == torch.float16:
        return "the kernels take bfloat16 and float32, not float16"
    if grad_batch != MINI_BATCH:
        return f"the kernels take mini-batches of {MINI_BATCH}, not regressor.grad_batch={grad_batch}"
    if key_dim not in WIDTHS[inner_model]:
        return f"the kernels take keys of width {', '.join(map(str, WIDTHS[inner_model]))}, not {key_dim}"
    return None


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
    batches: MiniBatches,
) -> tuple[Tensor, Tensor]:
    """All mini-batches of a call.

    q, k, v [B, L, H, K].  steps [B, L, H]: eta.  sizes [b]: c.  start [H, P] and init [B, H, P]: the packed weights of
    a document that begins inside the call, and of the first one.  gamma, beta [H, K].
    Returns o [B, L, H, K] in the dtype of v, and the weights of the last mini-batch [B, H, P].
    """
    (length, _, K), P = q.shape[1:], start.shape[1]
    inner_model = "linear" if K * (K + 1) == P else "mlp"
    span = MINI_BATCH * GROUP[inner_model]
    edges = (torch.arange(-(-length // span) + 1, device=q.device) * span).clamp(max=length)
    group = torch.searchsorted(batches.first, edges.expand(len(q), -1).contiguous())
    first, group = batches.first.int(), group.int()
    fresh = None if batches.fresh is None else batches.fresh.to(torch.int8).contiguous()
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
    """o, the last weights, and those kept for the backward pass [B, H, G, P]."""
    from models.kernels.ttt.linear import linear_forward
    from models.kernels.ttt.mlp import mlp_forward

    (B, _, H, _), G = q.shape, group.shape[1] - 1
    o, last = torch.empty_like(v), init.clone()
    kept = init.new_empty(B, H, G, init.shape[-1])
    kernel = {"linear": linear_forward, "mlp": mlp_forward}[inner_model]
    with torch.cuda.device_of(q):
        kernel[(B * H,)](
            q, k, v, steps, sizes, start, init, gamma, beta, first, group, fresh, o, last, kept,
            **_sizes(q, first, group, fresh, inner_model),
        )  # fmt: skip
    return o, last, kept


@ttt_scan.register_fake
def _(q, k, v, steps, sizes, start, init, gamma, beta, first, group, fresh, inner_model):
    kept = init.new_empty(*init.shape[:2], group.shape[1] - 1, init.shape[-1])
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
    from models.kernels.ttt.linear import linear_backward
    from models.kernels.ttt.mlp_gradient import mlp_gradient

    options = _sizes(q, first, group, fresh, inner_model) | {"GROUP": GROUP[inner_model]}
    if inner_model == "mlp":
        given = Given(q, k, v, steps, sizes, start, gamma, beta, first, group, fresh, kept)
        with torch.cuda.device_of(q):
            return mlp_gradient(do, dlast, given, options)
    B, _, H, K = q.shape
    dq, dk, dv, dsteps = (torch.zeros_like(x) for x in (q, k, v, steps))  # tokens before the first are in no mini-batch
    dstart, dinit = torch.zeros_like(dlast), dlast.clone()
    dsizes, dgamma, dbeta = (steps.new_empty(B, H, n) for n in (len(sizes), K, K))
    scratch = kept.new_empty(B, H, GROUP[inner_model], kept.shape[-1])
    with torch.cuda.device_of(q):
        linear_backward[(B * H,)](
            q, k, v, steps, sizes, start, gamma, beta, first, group, fresh, kept, do, dlast,
            dq, dk, dv, dsteps, dsizes, dstart, dinit, dgamma, dbeta, scratch, **options,
        )  # fmt: skip
    return [dq, dk, dv, dsteps, dsizes, dstart, dinit, dgamma, dbeta]


@ttt_scan_backward.register_fake
def _(do, dlast, q, k, v, steps, sizes, start, gamma, beta, first, group, fresh, kept, inner_model):
    B, _, H, K = q.shape
    shared = [steps.new_empty(B, H, n) for n in (len(sizes), K, K)]
    weights = [torch.empty_like(dlast) for _ in range(2)]
    return [*(torch.empty_like(x) for x in (q, k, v, steps)), shared[0], *weights, *shared[1:]]


def _sizes(q: Tensor, first: Tensor, group: Tensor, fresh: Tensor | None, inner_model: str) -> dict[str, object]:
    from models.regression.ttt.inner_model import EPS

    _, L, H, K = q.shape
    sizes = {"L": L, "H": H, "N": first.shape[1] - 1, "G": group.shape[1] - 1, "C": MINI_BATCH, "K": K}
    sizes |= {
        "DOCUMENTS": fresh is not None,
        "EPS": EPS,
        "num_warps": 4 if inner_model == "linear" and K <= 64 else 8,
        "num_stages": 1,
    }
    return sizes


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
