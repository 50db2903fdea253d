"""Cross-entropy of a chunk of logits by our own Triton kernel: what can run here, and the calls.

    nats_i = log sum_v exp(z_iv) - z_iy ,    d nats_i / d z_iv = softmax(z_i)_v - [v = y] ,    both 0 where y = IGNORED

z are the logits as the product left them, in 16 or 32 bits; sums and exponentials are float32. One launch reads a row
twice, first for the sum and then for the gradient, which it writes in the place of the logits. So a logit in bfloat16
costs four bytes of memory traffic: the second reading finds the row in the L2 cache.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels import backend

CHUNK = 2**29  # bytes of logits at a time: each chunk's product is added to the weight's gradient, once through memory
ALIGNED = 64  # rows of logits begin at multiples of so many, whatever the vocabulary: products and loads are wide then
# logits that a program has at a time: many where their second reading shall find them in the cache, and of a warp
GRADIENT_BLOCK, LIKELIEST_BLOCK, WARP_BLOCK = 4096, 1024, 256


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel can't run here, or None if it can. dtype is that of the logits."""
    return backend.refusal(device, dtype)


def new_logits(like: Tensor, num_tokens: int, vocab_size: int) -> Tensor:
    """Room for a chunk's logits [N, V]: for so many tokens, or fewer where those are more than CHUNK."""
    width = -(-vocab_size // ALIGNED) * ALIGNED
    rows = max(1, CHUNK // (width * like.element_size()))
    return like.new_empty(min(num_tokens, rows), width)[:, :vocab_size]


@torch.library.custom_op("test_time_regression::cross_entropy_gradient", mutates_args=("logits",))
def nats_and_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [N, V], its rows contiguous, and targets [N] -> nats [N], float32. The logits become their gradient, in
    their dtype. A target that is neither in the vocabulary nor ignored makes its nats NaN.
    """
    nats = logits.new_empty(len(logits), dtype=torch.float32)
    _launch(logits, targets, nats, None)
    return nats


@nats_and_gradient.register_fake
def _(logits, targets):
    return logits.new_empty(len(logits), dtype=torch.float32)


@torch.library.custom_op("test_time_regression::cross_entropy", mutates_args=())
def nats_and_likeliest(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As above, the logits left as they are; and the index of each row's largest logit [N], the first of equals."""
    nats = logits.new_empty(len(logits), dtype=torch.float32)
    likeliest = torch.empty_like(targets)
    _launch(logits, targets, nats, likeliest)
    return nats, likeliest


@nats_and_likeliest.register_fake
def _(logits, targets):
    return logits.new_empty(len(logits), dtype=torch.float32), torch.empty_like(targets)


def _launch(logits: Tensor, targets: Tensor, nats: Tensor, likeliest: Tensor | None) -> None:
    """With likeliest, or with the gradient."""
    from models.kernels.cross_entropy.kernels import cross_entropy

    (N, V), targets = logits.shape, targets.contiguous()
    most = GRADIENT_BLOCK if likeliest is None else LIKELIEST_BLOCK
    block = min(most, max(16, 1 << (V - 1).bit_length()))
    options: dict[str, Any] = {"BLOCK": block, "num_warps": max(1, block // WARP_BLOCK)}
    if N:
        with torch.cuda.device_of(logits):
            cross_entropy[(N,)](logits, targets, nats, likeliest, logits.stride(0), V, **options)
