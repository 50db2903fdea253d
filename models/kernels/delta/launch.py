"""Buffers, grids and launch configurations of the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from models.kernels.delta.gradient import gradient
from models.kernels.delta.scans import prepare, scan, scan_gradient
from models.kernels.delta.tiles import ROWS

CHUNK = 64


class Configuration(NamedTuple):
    """block: columns of the values that a scan's program has, or channels of the keys that the gradient takes at a
    time, 0 for a kernel without; warps and stages as Triton's."""

    block: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# By kernel, of 16 bits and of 32.
HALF = {
    "prepare": Configuration(0, 4, 1),
    "scan": Configuration(32, 4, 2),
    "scan_states": Configuration(32, 4, 2),
    "scan_gradient": Configuration(64, 4, 2),
    "gradient": Configuration(32, 4, 3),
}
SINGLE = {
    "prepare": Configuration(0, 4, 1),
    "scan": Configuration(16, 4, 1),
    "scan_states": Configuration(16, 4, 1),
    "scan_gradient": Configuration(16, 4, 1),
    "gradient": Configuration(16, 4, 1),
}


class System(NamedTuple):
    """What the two passes share, of gates, queries and keys alone; scans.py's prepare says what is what."""

    R: Tensor  # [B H N, C, C]
    attend: Tensor  # [B H N, C, C]
    vectors: Tensor  # [B H N, ROWS, C]


def new_system(q: Tensor) -> System:
    B, T, H, _ = q.shape
    chunks = B * H * -(-T // CHUNK)
    R, attend = (q.new_empty(chunks, CHUNK, CHUNK) for _ in range(2))
    return System(R, attend, q.new_empty(chunks, ROWS, CHUNK, dtype=torch.float32))


class Launch:
    """One call: its tensors, contiguous, and what its kernels have in common."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | None) -> None:
        self.q, self.k, self.v, self.step_size = (x.contiguous() for x in (q, k, v, step_size))
        self.log_decay = None if log_decay is None else log_decay.contiguous()
        (self.B, self.T, self.H, self.K), self.V = q.shape, v.shape[-1]
        self.N = triton.cdiv(self.T, CHUNK)
        self.BK, self.BV = (max(16, triton.next_power_of_2(width)) for width in (self.K, self.V))
        half = v.dtype != torch.float32
        self.configurations = HALF if half else SINGLE
        self.common = {"C": CHUNK, "PRECISION": "tf32" if half else "tf32x3"}
        self.sizes = (self.T, self.N, self.H, self.K, self.V)

    def prepare(self) -> System:
        system = new_system(self.q)
        prepare[(self.B * self.H * self.N,)](
            self.q, self.k, self.step_size, self.log_decay, *system, *self.sizes[:4], **self.common,
            BK=self.BK, **self.configurations["prepare"].options,
        )  # fmt: skip
        return system

    def scan(self, name: str, kernel, *tensors: Tensor | None) -> None:
        configuration = self.configurations[name]
        BV = min(configuration.block, self.BV)
        kernel[triton.cdiv(self.V, BV), self.B * self.H](
            *tensors,
            *self.sizes,
            **self.common,
            BK=self.BK,
            BV=BV,
            **configuration.options,
        )

    def forward(self, first: Tensor) -> tuple[Tensor, Tensor, System]:
        system, o, last = self.prepare(), torch.empty_like(self.v), torch.empty_like(first)
        R, attend, vectors = system
        self.scan("scan", scan, self.q, self.k, self.v, R, attend, vectors, first, o, None, None, last)
        return o, last, system

    def backward(self, first: Tensor, system: System, do: Tensor, dlast: Tensor | None) -> list[Tensor]:
        """The gradients by q, k, v, the step sizes, the log decays if there are any, and the first memory."""
        R, attend, vectors = system
        states = self.v.new_empty(self.B * self.H * self.N, self.K, self.V)
        errors, dv, dstates, dfirst = (torch.empty_like(x) for x in (self.v, self.v, states, first))
        self.scan("scan_states", scan, self.q, self.k, self.v, R, attend, vectors, first, None, errors, states, None)
        self.scan("scan_gradient", scan_gradient, self.q, self.k, R, attend, vectors, do, dlast, dv, dstates, dfirst)
        dq, dk, dstep_size = (torch.empty_like(x) for x in (self.q, self.k, self.step_size))
        dlog_decay = None if self.log_decay is None else torch.empty_like(self.log_decay)
        configuration = self.configurations["gradient"]
        gradient[(self.B * self.H * self.N,)](
            self.q, self.k, self.step_size, vectors, do, errors, dv, states, dstates, dq, dk, dstep_size, dlog_decay,
            *self.sizes, **self.common, BK=min(configuration.block, self.BK), WIDTH=self.BK, BV=self.BV,
            **configuration.options,
        )  # fmt: skip
        return [x for x in (dq, dk, dv, dstep_size, dlog_decay, dfirst) if x is not None]
