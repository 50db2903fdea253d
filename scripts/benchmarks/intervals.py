"""Softmax where a query sees an interval of the pairs before it: packed documents, a window."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.attention import attention
from models.regression.local.pairs import View, document_starts
from scripts.benchmarks.timing import Case, same


def softmax_over_intervals(shape: tuple[int, int, int, int], length: int | None, window: int | None = None) -> Case:
    """Over documents whose lengths are drawn, `length` on average, or over a window, on a GPU in bf16; and beside them
    causal softmax over whole rows, another function, with no mask at all.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    B, T = shape[:2]
    segments = None if length is None else (torch.rand(B, T, device="cuda") < 1 / length).cumsum(1)
    view = View(0, document_starts(T, 0, None, segments), window)
    mask = view.visible(slice(0, T), slice(0, T), q.device).unsqueeze(1)
    named: dict[str, Callable[..., Tensor]] = {
        "SDPA with a mask": partial(sdpa, attn_mask=mask),
        "ours, Triton": lambda q, k, v: attention(q * q.shape[-1] ** -0.5, k, v, view.start, window=window)[0],
        "flex_attention": flex_attention(view, B, T),
        "SDPA of whole rows": partial(sdpa, is_causal=True),
    }
    return same([q, k, v], named)


def sdpa(q: Tensor, k: Tensor, v: Tensor, **seen: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **seen).transpose(1, 2)


def flex_attention(view: View, B: int, T: int) -> Callable[..., Tensor]:
    """Torch's, compiled, which passes over blocks of 128 x 128 of which nothing is seen; the list of them is made
    beforehand and not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    start = torch.zeros(B, T, dtype=torch.long, device="cuda") if view.start is None else view.start

    def seen(b: Tensor, h: Tensor, query: Tensor, pair: Tensor) -> Tensor:
        visible = (pair <= query) & (pair >= start[b, query])
        return visible if view.window is None else visible & (pair > query - view.window)

    blocks = create_block_mask(seen, B, None, T, T, device="cuda")

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=blocks).transpose(1, 2)

    return operator
