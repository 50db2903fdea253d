"""What the kernels of test-time training are given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """Mini-batches that begin in a call, all tensors contiguous. P: the packed weights of a head."""

    q: Tensor  # [B, L, H, K], of one dtype with
    k: Tensor  # [B, L, H, K]
    v: Tensor  # [B, L, H, K]
    steps: Tensor  # [B, L, H]: eta
    sizes: Tensor  # [b]: c
    start: Tensor  # [H, P]: of a document that begins inside the call
    gamma: Tensor  # [H, K]
    beta: Tensor  # [H, K]
    init: Tensor | None  # [B, H, P]: of the first one, None for `start` (the linear model alone)
    first: Tensor  # [B, N + 1]: the first token of each mini-batch, and where the last one ends
    # of the MLP alone:
    group: Tensor | None  # [B, G + 1]: the first mini-batch of each span of tokens
    # of the linear model alone:
    edges: Tensor | None  # [B, G + 1]: the first token of each span of mini-batches, and where the last one ends
    spans: Tensor | None  # [B, N]: the span of each mini-batch
    counts: Tensor | None  # [B]: how many mini-batches begin in each row
    position: Tensor  # [B, L]: how many tokens of its document, or of the mini-batch that goes on, come before each
    fresh: Tensor | None  # [B, N]: which mini-batches begin a document, None where none does

    @property
    def inner_model(self) -> str:
        K = self.q.shape[-1]
        return "linear" if self.start.shape[1] == K * (K + 1) else "mlp"
