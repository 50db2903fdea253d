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
    # of the linear model alone:
    position: Tensor | None  # [B, L]: how many tokens of its document, or of the mini-batch that goes on, come before
    opening: Tensor | None  # [H, P]: start in the dtype of q, None where no document begins inside
    # of the MLP alone:
    first: Tensor | None  # [B, N + 1]: the first token of each mini-batch, and where the last one ends
    group: Tensor | None  # [B, G + 1]: the first mini-batch of each span of tokens
    fresh: Tensor | None  # [B, N]: which mini-batches begin a document, None where none does

    @property
    def inner_model(self) -> str:
        K = self.q.shape[-1]
        return "linear" if self.start.shape[1] == K * (K + 1) else "mlp"
