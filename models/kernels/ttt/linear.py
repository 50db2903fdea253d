"""TTT-Linear by Triton kernels: scans of what a mini-batch waits for (linear_scans.py), a program a head of a sequence,
and all else for all spans of tokens at once (linear_reads.py). linear_tiles.py has the formulas.

    forward    scan -> u, y, the weights that each span begins with -> read -> o
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

READS = {  # in 16 bits: channels of a product on their way to shared memory at a time, warps, stages
    "read": (64, 4, 2),
    "read_gradient": (64, 4, 2),
    "key_gradient": (32, 4, 2),
}


class Linear:
    """One call, and what its kernels have in common. tile, span: tokens of a program, and of a span."""

    def __init__(self, call: Call, tile: int, span: int) -> None:
        self.q, self.k, self.v, self.steps, self.sizes, self.start, *self.norm = call[:8]
        self.init, self.first, self.group, self.fresh = call.init, call.first, call.group, call.fresh
        (B, L, H, K), G = self.q.shape, self.group.shape[1] - 1
        self.rows, self.spans, self.tile = B * H, (B, H, G), tile
        # with keys of 16 in float32 8 warps met an illegal memory access (Triton 3.7.1)
        self.warps = 8 if K >= 64 else 4
        self.common = {"L": L, "H": H, "G": G, "C": len(self.sizes), "K": K, "DOCUMENTS": self.fresh is not None}
        self.scans = {**self.common, "N": self.first.shape[1] - 1, "SPAN": span}
        self.scans |= {"num_warps": self.warps, "num_stages": 1}
        W, b = self.start.split([K * K, K], dim=1)
        self.opening = W.to(self.q.dtype).contiguous(), b.contiguous()
        edges = self.first.gather(1, self.group.long())
        self.where = self.sizes, *self.norm, edges, call.position

    def forward(self) -> tuple[Tensor, ...]:
        """o, the last weights, and for the backward pass the weights of each span [B, H, G, K, K], their biases [B, H,
        G, K], u and y [B, L, H, K], and numbers [B, H, 6, L].
        """
        (B, L, H, K), (o, u, y) = self.q.shape, (torch.empty_like(self.v) for _ in range(3))
        last, numbers = torch.empty_like(self.init), self.steps.new_empty(B, H, linear_tiles.NUMBERS.value, L)
        kept, biases = self.q.new_empty(*self.spans, K, K), self.init.new_empty(*self.spans, K)
        scan[(self.rows,)](
            self.k, self.v, self.steps, self.sizes, self.start, *self.norm, self.init, self.first, self.group,
            self.fresh, last, kept, biases, u, y, numbers, **self.scans,
        )  # fmt: skip
        read[(self.spans[2], self.rows)](
            self.q, self.k, *self.where, *self.opening, kept, biases, u, o, **self._reads("read")
        )
        return o, last, kept, biases, u, y, numbers

    def backward(
        self, do: Tensor, dlast: Tensor, kept: Tensor, biases: Tensor, u: Tensor, y: Tensor, numbers: Tensor
    ) -> list[Tensor]:
        """The gradients by all tensors of the call up to init; by what heads or rows share, of each row."""
        (B, _, H, K), C, grid = self.q.shape, len(self.sizes), (self.spans[2], self.rows)
        dq, dk, dv, derrors, dreads, dback = (torch.empty_like(self.q) for _ in range(6))
        dsteps, dstart, dinit = torch.empty_like(self.steps), torch.zeros_like(dlast), dlast.clone()
        dsizes, dgammas, dbetas = (self.steps.new_zeros(*self.spans, n) for n in (C, K, K))
        each = [self.steps.new_empty(B, H, n) for n in (1, K, K)]
        dkept, dbiases = torch.empty_like(kept), torch.empty_like(biases)
        read_gradient[grid](
            self.q, self.k, *self.where, *self.opening, kept, biases, u, do,
            dq, dsizes, dgammas, dbetas, derrors, dreads, **self._reads("read_gradient"),
        )  # fmt: skip
        scan_gradient[(self.rows,)](
            self.q, self.k, self.v, self.sizes, *self.norm, self.first, self.group, self.fresh,
            y, numbers, derrors, dreads, dinit, dstart, dkept, dbiases, dback, dv, dsteps, *each,
            **self.scans,
        )  # fmt: skip
        key_gradient[grid](
            self.q, self.k, self.sizes, *self.where[3:], self.opening[0], kept, u, dreads,
            dkept, dback, dv, dk, **self._reads("key_gradient"),
        )  # fmt: skip
        dsizes, dgamma, dbeta = (x.sum(2) for x in (dsizes, dgammas, dbetas))
        dsizes[..., -1:] += each[0]
        return [dq, dk, dv, dsteps, dsizes, dstart, dgamma + each[1], dbeta + each[2], dinit]

    def _reads(self, kernel: str) -> dict[str, Any]:
        part, warps, stages = READS[kernel]
        if self.q.dtype == torch.float32:  # operands are twice as large
            part, warps, stages = 32, self.warps, 1
        sizes = {**self.common, "TILE": self.tile, "PART": min(part, self.q.shape[-1])}
        return sizes | {"num_warps": warps, "num_stages": stages}
