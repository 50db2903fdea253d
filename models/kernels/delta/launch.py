"""Buffers, grids and launch configurations of the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.kernels.backend import cdiv, next_power_of_2
from models.kernels.delta.gradient import gradient
from models.kernels.delta.scans import prepare, scan, scan_gradient
from models.kernels.delta.tiles import ROWS
from models.kernels.spans import joined, num_spans

CHUNK = 64


class Configuration(NamedTuple):
    """block: columns of the values that a scan's program has, or channels of the keys that the gradient takes at a
    time, 0 for a kernel without; warps and stages as Triton's; the most registers of a thread, or None."""

    block: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        found = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return found if self.maxnreg is None else found | {"maxnreg": self.maxnreg}


# By kernel, of 16 bits and of 32. No loop with products has one stage: some of those were wrong (docs/kernels.md).
HALF = {
    "prepare": Configuration(0, 4, 1, 168),
    "scan": Configuration(64, 4, 2),
    "scan_gradient": Configuration(64, 4, 2),
    "gradient": Configuration(32, 4, 3),
    "gradient_narrow": Configuration(64, 4, 2),
}
SINGLE = {
    "prepare": Configuration(0, 4, 1),
    "scan": Configuration(16, 4, 2),
    "scan_gradient": Configuration(16, 4, 2),
    "gradient_narrow": Configuration(16, 4, 2),
}
# Scans of 16 bits and more than 64 columns where programs of 64 would not all run at once, and what they want.
WHOLE = Configuration(128, 8, 2)
WHOLE_SHARED = 170 << 10


class Kept(NamedTuple):
    """What is kept between the passes; scans.py says what is what. Without gradients the last three are empty, as is
    `spans` where rows are not cut into any."""

    R: Tensor  # [B H N, C, C]
    attend: Tensor  # [B H N, C, C]
    vectors: Tensor  # [B H N, ROWS, C]
    spans: Tensor  # [spans, B, H, K, V + K]: b and A, models/kernels/spans.py says of what
    system: Tensor  # [B H N, C, C]
    errors: Tensor  # [B H N, V, C]
    states: Tensor  # [B H N, V, K]


def new_kept(q: Tensor, v: Tensor, keep: bool) -> Kept:
    B, T, H, K = q.shape
    chunks = B * H * -(-T // CHUNK)
    R, attend = (q.new_empty(chunks, CHUNK, CHUNK) for _ in range(2))
    vectors = q.new_empty(chunks, ROWS, CHUNK, dtype=torch.float32)
    V = v.shape[-1]
    shapes = ((chunks, CHUNK, CHUNK), (chunks, V, CHUNK), (chunks, V, K)) if keep else [(0,)] * 3
    return Kept(R, attend, vectors, new_affine(q, V), *(q.new_empty(shape) for shape in shapes))


def spans_of(q: Tensor, value_dim: int) -> int:
    """How many spans each row is cut into."""
    B, T, H, _ = q.shape
    columns = (SINGLE if q.dtype == torch.float32 else HALF)["scan"].block
    return num_spans(q, cdiv(value_dim, columns) * B * H, cdiv(T, CHUNK))


def new_affine(q: Tensor, value_dim: int) -> Tensor:
    """Where b and A of all spans are left, with nothing in it; empty where there is but one span."""
    (B, _, H, K), spans = q.shape, spans_of(q, value_dim)
    shape = (spans, B, H, K, value_dim + K) if spans > 1 else (0,)
    return q.new_empty(shape, dtype=torch.float32)


def many(q: Tensor, shared: int) -> bool:
    """Whether there are more programs of a scan by halves than multiprocessors, of which each has one at a time, and
    room for one of the whole, which wants so many bytes of shared memory."""
    if not q.is_cuda:
        return False
    gpu: Any = torch.cuda.get_device_properties(q.device)
    halves = 2 * q.shape[0] * q.shape[2]
    return halves > gpu.multi_processor_count and gpu.shared_memory_per_block_optin >= shared


class Launch:
    """One call: its tensors, contiguous, and what its kernels have in common."""

    def __init__(self, q: Tensor, k: Tensor, value_dim: int) -> None:
        self.q, self.k, self.V = q.contiguous(), k.contiguous(), value_dim
        self.B, self.T, self.H, self.K = q.shape
        self.N = cdiv(self.T, CHUNK)
        half = q.dtype != torch.float32
        least = 64 if half else 16  # products of 16 bits with fewer columns may be wrong: docs/kernels.md
        self.BK, self.BV = (max(least, next_power_of_2(width)) for width in (self.K, self.V))
        self.configurations = HALF if half else SINGLE
        self.common = {"C": CHUNK, "PRECISION": "tf32" if half else "tf32x3"}
        self.sizes = (self.T, self.N, self.H, self.K, self.V)
        self.spans = spans_of(q, value_dim)

    def scan(self, name: str, kernel, *tensors: Tensor | None, columns: int | None = None) -> None:
        """columns: of the memories, None for those of the values."""
        configuration = self.configurations[name]
        if self.BV > configuration.block >= 64 and many(self.q, WHOLE_SHARED):
            configuration = WHOLE
        BV = min(configuration.block, self.BV)
        kernel[cdiv(columns or self.V, BV), self.spans * self.B * self.H](
            *tensors,
            None if self.spans == 1 else self.spans,
            *self.sizes,
            **self.common,
            BK=self.BK,
            BV=BV,
            **configuration.options,
        )

    def forward(
        self, v: Tensor, step_size: Tensor, log_decay: Tensor | None, first: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Kept]:
        """The outputs, the last memory, and what is kept."""
        v, step_size, first = v.contiguous(), step_size.contiguous(), first.contiguous()
        log_decay = None if log_decay is None else log_decay.contiguous()
        kept, o = new_kept(self.q, v, keep), torch.empty_like(v)
        R, attend, vectors, affine, *further = kept
        system, errors, states = further if keep else (None, None, None)
        prepare[(self.B * self.H * self.N,)](
            self.q, self.k, step_size, log_decay, R, attend, system, vectors, *self.sizes[:4], **self.common,
            BK=self.BK, **self.configurations["prepare"].options,
        )  # fmt: skip
        given = self.q, self.k, v, R, attend, vectors
        if self.spans > 1:
            self.scan("scan", scan, *given, None, None, affine, None, None, columns=self.V + self.K)
            first = joined(first, affine)
        last = torch.empty_like(first)
        self.scan("scan", scan, *given, first, o, last, errors, states)
        return o, last if self.spans == 1 else last[-1], kept

    def backward(self, kept: Kept, do: Tensor, dlast: Tensor | None, decayed: bool) -> list[Tensor]:
        """The gradients by q, k, v, the step sizes, the log decays if there are any, and the first memory."""
        R, attend, vectors, affine, system, errors, states = kept
        do, dlast = do.contiguous(), None if dlast is None else dlast.contiguous()
        dv, dstates = torch.empty_like(do), torch.empty_like(states)
        dfirst = vectors.new_empty(self.spans, self.B, self.H, self.K, self.V)
        given = self.q, self.k, R, attend, vectors, do
        if self.spans > 1:
            self.scan("scan_gradient", scan_gradient, *given, None, None, None, dfirst)
            dlast = joined(dlast, affine, dfirst)
        self.scan("scan_gradient", scan_gradient, *given, dlast, dv, dstates, dfirst)
        dq, dk = (torch.empty_like(x) for x in (self.q, self.k))
        dstep_size, dlog_decay = (vectors.new_empty(self.q.shape[:3]) for _ in range(2))
        configuration = self.configurations["gradient" if self.BK > 64 else "gradient_narrow"]
        gradient[(self.B * self.H * self.N,)](
            self.q, self.k, attend, system, vectors, do, errors, dv, states, dstates, dq, dk, dstep_size,
            dlog_decay if decayed else None, *self.sizes, **self.common, BK=min(configuration.block, self.BK),
            WIDTH=self.BK, BV=self.BV, **configuration.options,
        )  # fmt: skip
        return [dq, dk, dv, dstep_size, *([dlog_decay] if decayed else []), dfirst[0]]
