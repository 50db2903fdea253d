"""TTT-Linear by Triton kernels: scans of what a mini-batch waits for (linear_scans.py), a program a head of a sequence,
and all else for all spans of tokens at once (linear_reads.py). linear_tiles.py has the formulas.

    forward    scan -> u, y, the weights that each span begins with -> read -> o, y and s of the queries
    backward   read_gradient, from these; scan_gradient, backwards -> dl/dz of errors, and the gradient by the weights
               at the end of each span; key_gradient

A head's weights are packed as [W b], P numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels.ttt import linear_tiles
from models.kernels.ttt.arguments import Call
from models.kernels.ttt.linear_reads import key_gradient, read, read_gradient
from models.kernels.ttt.linear_scans import scan, scan_gradient

READS = {  # in 16 bits: channels of a product on their way to shared memory at a time, and warps
    "read": (64, 4),
    "read_gradient": (64, 4),
    "key_gradient": (32, 4),
}


class Linear:
    """One call, and what its kernels have in common. tile: the most tokens of a span."""

    def __init__(self, call: Call, tile: int) -> None:
        self.q, self.k, self.v, self.steps, self.sizes, self.start, *self.norm = call[:8]
        self.init, self.places = call.init, (call.first, call.spans, call.counts, call.fresh)
        assert call.edges is not None
        (B, L, H, K), G = self.q.shape, call.edges.shape[1] - 1
        self.rows, self.spans, self.tile = B * H, (B, H, G), tile
        # with keys of 16 in float32 8 warps met an illegal memory access (Triton 3.7.1)
        self.warps = 8 if K >= 64 else 4
        self.common = {"L": L, "H": H, "G": G, "C": len(self.sizes), "K": K, "DOCUMENTS": call.fresh is not None}
        self.scans = {**self.common, "N": call.first.shape[1] - 1}
        self.scans |= {"num_warps": self.warps, "num_stages": 1}
        self.opening = self.start if call.fresh is None else self.start.to(self.q.dtype)  # operands of the spans
        self.where = call.edges, call.position

    def forward(self) -> tuple[Tensor, ...]:
        """o, the last weights, and for the backward pass the weights of each span [B, H, G, K, K], their biases [B, H,
        G, K], u and y [B, L, H, K], numbers [B, H, 6, L], and of the queries y [B, L, H, K] and s [B, H, L].
        """
        (B, L, H, K), (o, u, y, read_y) = self.q.shape, (torch.empty_like(self.v) for _ in range(4))
        new = self.steps.new_empty
        last, numbers, scales = new(B, H, K * K + K), new(B, H, linear_tiles.NUMBERS.value, L), new(B, H, L)
        kept, biases = self.q.new_empty(*self.spans, K, K), new(*self.spans, K)
        scan[(self.rows,)](
            self.k, self.v, self.steps, self.sizes, self.start, *self.norm, self.init, *self.places,
            last, kept, biases, u, y, numbers, **self.scans,
        )  # fmt: skip
        read[(self.spans[2], self.rows)](
            self.q, self.k, self.sizes, *self.norm, *self.where, self.opening, self.start, kept, biases, u, o,
            read_y, scales, **self._reads("read"),
        )  # fmt: skip
        return o, last, kept, biases, u, y, numbers, read_y, scales

    def backward(
        self, do: Tensor, dlast: Tensor | None, kept: Tensor, _: Tensor, u: Tensor, y: Tensor, numbers: Tensor,
        read_y: Tensor, scales: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        """The gradients, as the operator has them."""
        (B, H, G), C, K, new = self.spans, len(self.sizes), self.q.shape[-1], self.steps.new_zeros
        dq, dk, dv, derrors, dreads, dback = (torch.empty_like(self.q) for _ in range(6))
        dsteps, dstart, dkept = torch.empty_like(self.steps), new(B, H, K * K + K), torch.empty_like(kept)
        dinit = None if self.init is None else torch.empty_like(self.init)
        shared = new(B, H, G + 1, C + 2 * K)  # by sizes, gamma and beta, of each span, and last of the scan
        read_gradient[G, self.rows](
            self.q, self.k, self.sizes, self.norm[0], *self.where, self.opening, kept, u, read_y, scales, do,
            dq, shared, derrors, dreads, **self._reads("read_gradient"),
        )  # fmt: skip
        scan_gradient[(self.rows,)](
            self.q, self.k, self.v, self.sizes, *self.norm, *self.places,
            y, numbers, derrors, dreads, dlast, dinit, dstart, dkept, dback, dv, dsteps, shared,
            **self.scans,
        )  # fmt: skip
        key_gradient[G, self.rows](
            self.q, self.k, self.sizes, *self.where, self.opening, kept, u, dreads,
            dkept, dback, dv, dk, **self._reads("key_gradient"),
        )  # fmt: skip
        found = [dq, dk, dv, dsteps, shared.sum(2), dstart]
        return found if dinit is None else [*found, dinit]

    def _reads(self, kernel: str) -> dict[str, Any]:
        (part, warps), K = READS[kernel], self.q.shape[-1]
        stages = 3 if K == 128 else 2
        if self.q.dtype == torch.float32:  # operands are twice as large
            part, warps, stages = 32, self.warps, 1
        sizes = {**self.common, "TILE": self.tile, "PART": min(part, K)}
        return sizes | {"num_warps": warps, "num_stages": stages}
