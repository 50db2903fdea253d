"""TTT-MLP by Triton kernels: scans of what a mini-batch waits for (mlp_scans.py), a program for 64 hidden units of a
head of a sequence, and all else for all mini-batches at once (mlp_reads.py).

    forward    scan -> weights of every mini-batch -> read -> o
    backward   scan again; read_gradient, from the weights; scan_gradient, backwards -> dl/dW_1, what is left by errors;
               write_gradient

A head's weights are packed as [W_1 b_1 W_2 b_2], P numbers. Weights of every mini-batch in bf16 are 4 KB a token of a
head for keys of 64, and what kernels leave each other going back is 9 KB more. To bound it all kernels take some spans
of C tokens at a time (SLAB); what is kept for the backward pass is the weights at the first of each slab.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels import backend
from models.kernels.ttt import mlp_tiles
from models.kernels.ttt.arguments import Call
from models.kernels.ttt.mlp_reads import read, read_gradient, write_gradient
from models.kernels.ttt.mlp_scans import scan, scan_gradient

OPTIONS = {  # hidden units of a program, or of what it takes at a time; warps and stages
    "scan": (64, 4, 1),
    "scan_gradient": (64, 4, 1),
    "read": (64, 4, 1),
    "read_gradient": (64, 4, 3),
    "write_gradient": (64, 4, 3),
}


class MLP:
    """One call, and what its kernels have in common. slab: spans of C tokens that are taken at a time."""

    def __init__(self, call: Call, slab: int) -> None:
        self.q, self.k, self.v, self.steps, self.sizes, self.start, gamma, beta, init = call[:9]
        first, group, fresh = call.first, call.group, call.fresh
        assert init is not None and first is not None and group is not None
        self.init = init
        self.given = self.steps, self.sizes, gamma, beta, first, group, fresh
        q, start = self.q, self.start
        (B, L, self.H, K), C, N, self.G = q.shape, len(self.sizes), first.shape[1] - 1, group.shape[1] - 1
        self.rows, F = B * self.H, 4 * K
        self.spans = min(slab, self.G)
        self.slabs = [(g, min(g + self.spans, self.G)) for g in range(0, self.G, self.spans)]
        self.tokens = (self.spans + 1) * C  # a slab's last mini-batch may reach into the span after
        self.common = {"L": L, "H": self.H, "N": N, "G": self.G, "SPANS": self.spans, "C": C, "K": K, "F": F}
        self.common |= {"DOCUMENTS": fresh is not None}
        W1, b1, W2, b2 = start.split([K * F, F, F * K, K], dim=1)
        W1 = W1.unflatten(1, (K, F)).mT.flatten(1)
        self.opening, self.opening_biases = torch.cat([W1, W2], 1).to(q.dtype), torch.cat([b1, b2], 1)
        self.weights, self.biases = q.new_empty(self.rows, self.spans, 2 * F * K), self._new(self.spans, F + K)

    def forward(self) -> tuple[Tensor, ...]:
        """o, the last weights, those at the first mini-batch of each slab [B, H, slabs, P], and empty tensors."""
        o, last, (B, H, P) = torch.empty_like(self.v), self.init.clone(), self.init.shape
        kept = last.new_empty(B, H, len(self.slabs), P)
        for i, (g0, g1) in enumerate(self.slabs):
            kept[:, :, i] = last
            self._scan(last, g0, g1)
            read[g1 - g0, self.rows](
                self.q, self.k, self.v, *self.given, self.opening, self.opening_biases, self.weights, self.biases, o,
                g0=g0, **self._options("read"),
            )  # fmt: skip
        return o, last, kept, *(last.new_empty(0) for _ in range(8))

    def backward(self, do: Tensor, dlast: Tensor | None, kept: Tensor, *_: Tensor) -> list[Tensor]:
        """The gradients, as the operator has them."""
        K, C, F, new = self.q.shape[-1], len(self.sizes), self.common["F"], self._new
        # tokens before the first are in no mini-batch
        dq, dk, dv, dsteps = (torch.zeros_like(x) for x in (self.q, self.k, self.v, self.steps))
        dstart, dinit = torch.zeros_like(self.init), torch.zeros_like(self.init) if dlast is None else dlast.clone()
        dsizes, dgamma, dbeta = (new(self.G, n) for n in (C, K, K))
        scan_options, split = self._shared_out("scan_gradient")
        dlast_c = torch.zeros_like(new(split))
        wide = self.q.new_empty(self.rows, self.tokens, mlp_tiles.WIDE.value, F)
        narrow = new(self.tokens, mlp_tiles.NARROW.value, K)
        dkept, dkept_biases = self.q.new_empty(self.rows, self.spans, F * K), new(self.spans, F)
        for i, (g0, g1) in reversed(list(enumerate(self.slabs))):
            grid = g1 - g0, self.rows
            self._scan(kept[:, :, i].clone(memory_format=torch.contiguous_format), g0, g1)
            read_gradient[grid](
                self.q, self.k, self.v, *self.given, self.opening, self.opening_biases, self.weights, self.biases, do,
                dq, dsizes, dgamma, dbeta, wide, narrow, g0=g0, **self._options("read_gradient"),
            )  # fmt: skip
            scan_gradient[(self.rows * split,)](
                self.q, self.k, self.v, *self.given, self.opening, self.weights, wide, narrow,
                dinit, dstart, dlast_c, dkept, dkept_biases, *self._meeting(split), g0=g0, g1=g1, **scan_options,
            )  # fmt: skip
            write_gradient[grid](
                self.k, self.v, *self.given, self.opening, self.weights, wide, narrow, dkept, dkept_biases,
                dk, dv, dsteps, dsizes, dgamma, dbeta, g0=g0, **self._options("write_gradient"),
            )  # fmt: skip
        B = len(self.q)
        dsizes, dgamma, dbeta, dlast_c = (x.sum(1).unflatten(0, (B, -1)) for x in (dsizes, dgamma, dbeta, dlast_c))
        dsizes[..., -1] += dlast_c
        return [dq, dk, dv, dsteps, *(x.sum(0) for x in (dsizes, dgamma, dbeta, dstart)), dinit]

    def _scan(self, last: Tensor, g0: int, g1: int) -> None:
        """Moves the weights `last` over the spans of a slab, and leaves those of its mini-batches behind."""
        options, split = self._shared_out("scan")
        scan[(self.rows * split,)](
            self.k, self.v, *self.given, self.start, last, self.weights, self.biases, *self._meeting(split),
            g0=g0, g1=g1, **options,
        )  # fmt: skip

    def _new(self, *shape: int) -> Tensor:
        return self.steps.new_empty(self.rows, *shape)

    def _meeting(self, split: int) -> tuple[Tensor, Tensor]:
        """Where the programs of a head exchange sums, in turns, and count who has come."""
        sums = self._new(2, split, len(self.sizes) * self.q.shape[-1])
        return sums, torch.zeros(self.rows, dtype=torch.int32, device=sums.device)

    def _shared_out(self, kernel: str) -> tuple[dict[str, Any], int]:
        """The options of a scan, and how many programs a head of a sequence has; one in the interpreter, where programs
        run one after another."""
        options = self._options(kernel)
        if backend.interpreting():
            options["BF"] = self.common["F"]
        return options, self.common["F"] // options["BF"]

    def _options(self, kernel: str) -> dict[str, Any]:
        units, warps, stages = OPTIONS[kernel]
        return {**self.common, "BF": min(units, self.common["F"]), "num_warps": warps, "num_stages": stages}
