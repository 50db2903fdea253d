"""Cross-entropy of a linear head without the logits of all tokens: they are made, used and dropped a chunk of tokens at
a time.

        nats_i = log sum_v exp(h_i . w_v) - h_i . w_{y_i} ,    0 where y_i = IGNORED

The gradient of a sum is known as soon as a chunk's logits are, so it is computed on the way forward: no second pass
over the head. The products h . w are rounded to the dtype of h; what is made of them is float32 at least, and so is
the sum over chunks that the weight's gradient is. On a GPU one kernel reads a chunk's logits and leaves their gradient
in their place (models/kernels/cross_entropy); the PyTorch form is the definition. (torch 2.13 has
F.linear_cross_entropy; torch 2.11 and 2.12, which this project also runs on, have not. docs/kernels.md compares them.)

Shapes: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.kernels import cross_entropy
from models.parts.precision import HALF, wide, working_dtype

IGNORED = -100
LOGITS = 2**26  # the PyTorch form has at most so many logits at a time: 256 MiB in float32


def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's loss and the likeliest token in its place, without gradients. hidden [N, D], weight [V, D], targets
    [N] -> nats [N], float32 or wider, and predictions [N].
    """
    with torch.no_grad():
        h, w = _compute(hidden, weight)
        kernel = _has_kernel(h)
        nats, predictions = [], []
        for logits, y, _ in _chunks(h, w, targets, kernel):
            if kernel:
                each, likeliest = cross_entropy.nats_and_likeliest(logits, y)
            else:
                logits = wide(logits)
                each, likeliest = _nats(logits, y)[0], logits.argmax(-1)
            nats.append(each)
            predictions.append(likeliest)
        return torch.cat(nats), torch.cat(predictions)


def sum_nats(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of the tokens' losses, with gradients to hidden and weight. Shapes as in score."""
    return _SumNats.apply(hidden, weight, targets)


class _SumNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if not any(ctx.needs_input_grad):
            return score(hidden, weight, targets)[0].sum()
        h, w = _compute(hidden, weight)
        kernel = _has_kernel(h)
        dh, dw = torch.empty_like(h), torch.zeros_like(weight, dtype=working_dtype(weight))
        total = torch.zeros((), dtype=working_dtype(h), device=h.device)
        with torch.autocast(h.device.type, enabled=False):
            for logits, y, rows in _chunks(h, w, targets, kernel):
                nats, p = _with_gradient_by_kernel(logits, y) if kernel else _with_gradient(logits, y)
                total += nats.sum()
                torch.mm(p, w, out=dh[rows])
                _add_product(dw, p.T, h[rows])
        ctx.save_for_backward(dh, dw)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, None]:
        dh, dw = ctx.saved_tensors
        hidden, weight = ctx.dtypes
        return (g * dh).to(hidden), (g * dw).to(weight), None


def _compute(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the product: autocast's where it is on."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return hidden.to(dtype), weight.to(dtype)


def _has_kernel(h: Tensor) -> bool:
    return cross_entropy.refusal(h.device, h.dtype) is None


def _chunks(h: Tensor, w: Tensor, targets: Tensor, kernel: bool) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Logits, targets, and which tokens they are of. All logits that a kernel gets are in the same place."""
    N, V = len(h), len(w)
    room = cross_entropy.new_logits(h, N, V) if kernel else None
    size = max(1, LOGITS // V) if room is None else len(room)
    for start in range(0, max(N, 1), max(size, 1)):
        rows = slice(start, min(start + size, N))
        a = h[rows]
        logits = a @ w.T if room is None else torch.mm(a, w.T, out=room[: len(a)])
        yield logits, targets[rows], rows


def _with_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """nats [N], and d nats / d logits = softmax - onehot(y) in the dtype of the logits, for the tokens that count."""
    dtype, logits = logits.dtype, wide(logits)
    nats, log_sum = _nats(logits, targets)
    kept = (targets != IGNORED).unsqueeze(1)
    p = logits.sub_(log_sum.unsqueeze(1)).exp_()
    p.scatter_add_(1, targets.clamp(min=0).unsqueeze(1), p.new_full((len(p), 1), -1.0))
    return nats, p.mul_(kept).to(dtype)


def _with_gradient_by_kernel(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return cross_entropy.nats_and_gradient(logits, targets), logits


def _nats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """nats [N], 0 where ignored, and log sum exp [N]."""
    log_sum = logits.logsumexp(-1)
    picked = logits.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    return (log_sum - picked).masked_fill(targets == IGNORED, 0), log_sum


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total += x y. On a GPU a product of 16-bit numbers is added as cuBLAS has summed it, in float32."""
    if x.is_cuda and x.dtype in HALF and total.dtype == torch.float32:
        torch.addmm(total, x, y, out_dtype=torch.float32, out=total)
    else:
        total += (x @ y).to(total.dtype)
