"""TTT-Linear by Triton kernels: scans of what a mini-batch waits for (linear_scans.py), a program a head of a sequence,
and all else for all spans of tokens at once (linear_reads.py). linear_tiles.py has the formulas.

    forward    scan -> u, y, the weights that each span begins with -> read -> o, y and s of the queries
    backward   read_gradient, from these; scan_gradient, backwards -> dl/dz of errors, and the gradient by the weights
               at the end of each span; key_gradient

A head's weights are packed as [W b], P numbers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.kernels.backend import cdiv
from models.kernels.ttt import linear_tiles
from models.kernels.ttt.arguments import Call
from models.kernels.ttt.linear_reads import key_gradient, read, read_gradient, sums
from models.kernels.ttt.linear_scans import scan, scan_gradient

READS = {  # in 16 bits: channels of a product on their way to shared memory at a time, and warps
    "read": (64, 4),
    "read_gradient": (64, 4),
    "key_gradient": (32, 4),
}
SUMS = {"COLUMNS": 16, "ROWS": 256, "BLOCK": 512}  # of a program
STAGES = 3  # of the scans: mini-batches on their way, and the one that is computed


def num_spans(call: Call, tile: int) -> int:
    """The most spans that a row can have: all but its last one have more tokens than `least`."""
    least = tile if call.opening is None else tile - len(call.sizes) + 1
    return -(-call.q.shape[1] // least)


class Linear:
    """One call, and what its kernels have in common. tile: the most tokens of a span."""

    def __init__(self, call: Call, tile: int) -> None:
        self.q, self.k, self.v, self.steps, self.sizes, self.start, *self.norm = call[:8]
        self.init, self.position = call.init, call.position
        (B, L, H, K), C = self.q.shape, len(self.sizes)
        self.rows, self.tile, G = B * H, tile, num_spans(call, tile)
        self.spans = B, H, G
        # with keys of 16 in float32 8 warps met an illegal memory access (Triton 3.7.1)
        self.warps = 8 if K >= 64 else 4
        self.common, self.documents = {"L": L, "H": H, "G": G, "C": C, "K": K}, call.opening is not None
        self.scans = {**self.common, "num_warps": self.warps, "num_stages": STAGES}
        self.opening = self.start if call.opening is None else call.opening

    def forward(self) -> tuple[Tensor, ...]:
        """o, the last weights, and for the backward pass the weights of each span [B, H, G, K, K], u and y [B, L, H,
        K], numbers [B, H, 6, L], of the queries y [B, L, H, K] and s [B, H, L], and starts, edges and counts (scan).
        """
        (B, L, H, K), (o, u, y, read_y) = self.q.shape, (torch.empty_like(self.v) for _ in range(4))
        G, new, number = self.spans[2], self.steps.new_empty, partial(self.q.new_empty, dtype=torch.int32)
        last, numbers, scales = new(B, H, K * K + K), new(B, H, linear_tiles.NUMBERS.value, L), new(B, H, L)
        kept, biases = self.q.new_empty(*self.spans, K, K), new(*self.spans, K)
        starts, edges, counts = number(B, L + 1), number(B, G + 1), number(B, 2)
        scan[(self.rows,)](
            self.k, self.v, self.steps, self.sizes, self.start, *self.norm, self.init, self.position,
            last, kept, biases, u, y, numbers, starts, edges, counts,
            TILE=self.tile, DOCUMENTS=self.documents, **self.scans,
        )  # fmt: skip
        read[(G, self.rows)](
            self.q, self.k, self.sizes, *self.norm, edges, self.position, self.opening, self.start, kept, biases, u, o,
            read_y, scales, **self._reads("read"),
        )  # fmt: skip
        return o, last, kept, u, y, numbers, read_y, scales, starts, edges, counts

    def backward(
        self, do: Tensor, dlast: Tensor | None, kept: Tensor, u: Tensor, y: Tensor, numbers: Tensor,
        read_y: Tensor, scales: Tensor, starts: Tensor, edges: Tensor, counts: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        """The gradients, as the operator has them."""
        (B, H, G), C, K, new = self.spans, len(self.sizes), self.q.shape[-1], self.steps.new_empty
        dq, dk, dv, derrors, dreads, dback = (torch.empty_like(self.q) for _ in range(6))
        dsteps, dstart, dkept = torch.empty_like(self.steps), new(B, H, K * K + K), torch.empty_like(kept)
        dinit = None if self.init is None else torch.empty_like(self.init)
        shared = new(B, H, G + 1, C + 2 * K)  # by sizes, gamma and beta, of each span, and last of the scan
        where = edges, self.position
        read_gradient[G, self.rows](
            self.q, self.k, self.sizes, self.norm[0], *where, self.opening, kept, u, read_y, scales, do,
            dq, shared, derrors, dreads, **self._reads("read_gradient"),
        )  # fmt: skip
        scan_gradient[(self.rows,)](
            self.q, self.k, self.v, self.sizes, *self.norm, self.position, starts, edges, counts,
            y, numbers, derrors, dreads, dlast, dinit, dstart, dkept, dback, dv, dsteps, shared,
            **self.scans,
        )  # fmt: skip
        key_gradient[G, self.rows](
            self.q, self.k, self.sizes, *where, self.opening, kept, u, dreads,
            dkept, dback, dv, dk, **self._reads("key_gradient"),
        )  # fmt: skip
        found = [dq, dk, dv, dsteps, *self._summed(shared, dstart)]
        return found if dinit is None else [*found, dinit]

    def _summed(self, shared: Tensor, dstart: Tensor) -> list[Tensor]:
        """By sizes [H, C], gamma and beta [H, K] and start [H, P], over rows and spans."""
        (B, H, G), C, K, P = self.spans, len(self.sizes), self.q.shape[-1], dstart.shape[2]
        found = [dstart.new_empty(H, n) for n in (C, K, K, P)]
        programs = H * cdiv(C + 2 * K, SUMS["COLUMNS"]) + cdiv(H * P, SUMS["BLOCK"])
        sums[(programs,)](shared, dstart, *found, B, H, G, P, C=C, K=K, **SUMS)
        return found

    def _reads(self, kernel: str) -> dict[str, Any]:
        (part, warps), K = READS[kernel], self.q.shape[-1]
        stages = 3 if K == 128 else 2
        if self.q.dtype == torch.float32:  # operands are twice as large
            part, warps, stages = 32, self.warps, 1
        sizes = {**self.common, "TILE": self.tile, "PART": min(part, K), "DOCUMENTS": self.documents}
        return sizes | {"num_warps": warps, "num_stages": stages}
