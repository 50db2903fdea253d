"""Cross-entropy of a linear head without the logits of all tokens: they are made, used and dropped a chunk of tokens at
a time.

        nats_i = log sum_v exp(h_i . w_v) - h_i . w_{y_i} ,    0 where y_i = IGNORED

The gradient of a sum is known as soon as a chunk's logits are, so it is computed on the way forward: no second pass
over the head. (torch 2.13 has F.linear_cross_entropy for this; torch 2.11 and 2.12, which this project also runs on,
have not.)

Shapes: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.parts.precision import wide

IGNORED = -100
LOGITS = 2**26  # at most so many logits at a time: 256 MiB in float32


def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's loss and the likeliest token in its place, without gradients. hidden [N, D], weight [V, D], targets
    [N] -> nats [N], float32 or wider, and predictions [N].
    """
    with torch.no_grad():
        h, w = _compute(hidden, weight)
        size = _chunk_size(weight)
        nats, predictions = [], []
        for a, y in zip(h.split(size), targets.split(size), strict=True):
            logits = _logits(a, w)
            nats.append(_nats(logits, y)[0])
            predictions.append(logits.argmax(-1))
        return torch.cat(nats), torch.cat(predictions)


def sum_nats(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of the tokens' losses, with gradients to hidden and weight. Shapes as in score."""
    return _SumNats.apply(hidden, weight, targets)


class _SumNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        h, w = _compute(hidden, weight)
        needs = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dh, dw = torch.empty_like(h), torch.zeros_like(weight) if needs else None
        total = torch.zeros((), dtype=wide(h).dtype, device=h.device)
        size = _chunk_size(weight)
        with torch.autocast(h.device.type, enabled=False):
            for a, y, da in zip(h.split(size), targets.split(size), dh.split(size), strict=True):
                logits = _logits(a, w)
                nats, log_sum = _nats(logits, y)
                total += nats.sum()
                if dw is None:
                    continue
                # d nats / d logits = softmax - onehot(y), for the tokens that count
                kept = (y != IGNORED).unsqueeze(1)
                p = logits.sub_(log_sum.unsqueeze(1)).exp_()
                p.scatter_add_(1, y.clamp(min=0).unsqueeze(1), p.new_full((len(y), 1), -1.0))
                p = p.mul_(kept).to(h.dtype)
                torch.mm(p, w, out=da)
                dw += (p.T @ a).to(dw.dtype)
        if needs:
            ctx.save_for_backward(dh, dw)
            ctx.dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, None]:
        dh, dw = ctx.saved_tensors
        return (g * dh).to(ctx.dtype), g * dw, None


def _compute(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the product: autocast's where it is on."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return hidden.to(dtype), weight.to(dtype)


def _logits(h: Tensor, w: Tensor) -> Tensor:
    return wide(h @ w.T)


def _nats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """nats [N], 0 where ignored, and log sum exp [N]."""
    log_sum = logits.logsumexp(-1)
    picked = logits.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    return (log_sum - picked).masked_fill(targets == IGNORED, 0), log_sum


def _chunk_size(weight: Tensor) -> int:
    return max(1, LOGITS // weight.shape[0])
