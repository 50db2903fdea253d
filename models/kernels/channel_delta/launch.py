"""Buffers, grids and launch configurations of the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from models.kernels.channel_delta.gradient import gradient
from models.kernels.channel_delta.prepare import prepare
from models.kernels.channel_delta.scans import scan, scan_gradient
from models.kernels.channel_delta.tiles import ORDERS, write_ones
from models.kernels.delta.launch import CHUNK, Configuration

# By kernel, of 16 bits and of 32. block: channels of the keys that a program has or takes at a time, columns of the
# values that a scan's has. Products of 16 bits with fewer than 64 columns may be wrong: docs/kernels.md.
HALF = {
    "prepare": Configuration(64, 4, 2),
    "prepare_again": Configuration(128, 4, 2),
    "scan": Configuration(64, 4, 2),
    "scan_gradient": Configuration(64, 4, 2),
    "gradient": Configuration(64, 4, 2),
}
SINGLE = {
    "prepare": Configuration(32, 4, 1),
    "prepare_again": Configuration(32, 4, 1),
    "scan": Configuration(16, 4, 1),
    "scan_gradient": Configuration(16, 4, 1),
    "gradient": Configuration(16, 4, 1),
}
LOG_CHUNK = CHUNK.bit_length() - 1


class Kept(NamedTuple):
    """What is kept between the passes; prepare.py and scans.py say what is what. Without gradients the last two are
    empty."""

    R: Tensor  # [B H N, C, C]
    attend: Tensor  # [B H N, C, C]
    errors: Tensor  # [B, T, H, V]
    states: Tensor  # [B H N, K, V]


class Faded(NamedTuple):
    """What the scans multiply with beside it: worked out again for the gradient."""

    reads: Tensor  # [B, T, H, K]
    erases: Tensor  # [B, T, H, K]
    writes: Tensor  # [B, T, H, K]
    ended: Tensor  # [B H N, K]


def new_kept(q: Tensor, v: Tensor, keep: bool) -> Kept:
    B, T, H, K = q.shape
    chunks = B * H * -(-T // CHUNK)
    further = (v.shape, (chunks, K, v.shape[-1])) if keep else [(0,)] * 2
    return Kept._make(q.new_empty(shape) for shape in [(chunks, CHUNK, CHUNK)] * 2 + list(further))


class Launch:
    """One call: its tensors, contiguous, and what its kernels have in common."""

    def __init__(self, q: Tensor, k: Tensor, step_size: Tensor, log_decay: Tensor, value_dim: int) -> None:
        self.given = tuple(x.contiguous() for x in (q, k, step_size, log_decay))
        (self.B, self.T, self.H, self.K), self.V = q.shape, value_dim
        self.N = triton.cdiv(self.T, CHUNK)
        half = q.dtype != torch.float32
        least = 64 if half else 16
        self.BK, self.BV = (max(least, triton.next_power_of_2(width)) for width in (self.K, self.V))
        self.configurations = HALF if half else SINGLE
        self.common = {"C": CHUNK, "PRECISION": "tf32" if half else "tf32x3"}
        self.sizes = (self.T, self.N, self.H, self.K, self.V)
        self.ones = q.new_empty(LOG_CHUNK + ORDERS, CHUNK, CHUNK)
        write_ones[(len(self.ones),)](self.ones, CHUNK, LOG_CHUNK)

    def prepare(self, name: str, kept: Kept | None) -> Faded:
        q, configuration = self.given[0], self.configurations[name]
        ended = q.new_empty(self.B * self.H * self.N, self.K, dtype=torch.float32)
        faded = Faded(torch.empty_like(q), torch.empty_like(q), torch.empty_like(q), ended)
        prepare[(self.B * self.H * self.N,)](
            *self.given, self.ones, *faded, *(kept[:2] if kept else (None, None)), *self.sizes[:4], **self.common,
            LOG_C=LOG_CHUNK, BK=min(configuration.block, self.BK), **configuration.options,
        )  # fmt: skip
        return faded

    def scan(self, name: str, kernel, *tensors: Tensor | None) -> None:
        configuration = self.configurations[name]
        BV = min(configuration.block, self.BV)
        kernel[triton.cdiv(self.V, BV), self.B * self.H](
            *tensors, *self.sizes, **self.common, BK=self.BK, BV=BV, **configuration.options
        )

    def forward(self, v: Tensor, first: Tensor, keep: bool) -> tuple[Tensor, Tensor, Kept]:
        """The outputs, the last memory, and what is kept."""
        v, first = v.contiguous(), first.contiguous()
        kept, o, last = new_kept(self.given[0], v, keep), torch.empty_like(v), torch.empty_like(first)
        faded = self.prepare("prepare", kept)
        self.scan("scan", scan, *faded, v, *kept[:2], first, o, last, *(kept[2:] if keep else (None, None)))
        return o, last, kept

    def backward(self, kept: Kept, do: Tensor, dlast: Tensor | None) -> list[Tensor]:
        """The gradients by q, k, v, the step sizes, the log decays and the first memory."""
        do, dlast = do.contiguous(), None if dlast is None else dlast.contiguous()
        R, attend, errors, states = kept
        faded = self.prepare("prepare_again", None)
        dv, dstates = torch.empty_like(do), torch.empty_like(states)
        dfirst = faded.ended.new_empty(self.B, self.H, self.K, self.V)
        self.scan("scan_gradient", scan_gradient, *faded, R, attend, do, dlast, dv, dstates, dfirst)
        dq, dk, step_size, dlog_decay = (torch.empty_like(x) for x in self.given)
        configuration = self.configurations["gradient"]
        BK = min(configuration.block, self.BK)
        dsteps = step_size.new_empty(triton.cdiv(self.K, BK), *step_size.shape)
        gradient[self.B * self.H * self.N, len(dsteps)](
            *self.given, self.ones, do, errors, dv, states, dstates, dq, dk, dsteps, dlog_decay,
            *self.sizes, **self.common, LOG_C=LOG_CHUNK, BK=BK, BV=self.BV, **configuration.options,
        )  # fmt: skip
        return [dq, dk, dv, dsteps.sum(0), dlog_decay, dfirst]
