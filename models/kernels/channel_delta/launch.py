"""Buffers, grids and launch configurations of the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.kernels.backend import cdiv, next_power_of_2
from models.kernels.channel_delta.far import far_gradient, far_scores, far_scores_gradient
from models.kernels.channel_delta.gradient import gradient
from models.kernels.channel_delta.prepare import fade, scores
from models.kernels.channel_delta.scans import scan, scan_gradient
from models.kernels.channel_delta.tiles import ORDERS, write_ones
from models.kernels.columns import summed
from models.kernels.delta.launch import CHUNK, WHOLE, Configuration, many, new_affine, spans_of
from models.kernels.spans import joined

# By kernel, of 16 bits and of 32. block: channels of the keys that a program has or takes at a time, columns of the
# values that a scan's has. Products of 16 bits with fewer than 64 columns may be wrong: docs/kernels.md.
HALF = {
    "fade": Configuration(64, 4, 2, 128),
    "scores": Configuration(128, 4, 1, 168),
    "scan": Configuration(64, 4, 2),
    "scan_gradient": Configuration(64, 4, 2),
    "gradient": Configuration(64, 4, 2),
    "far_scores": Configuration(128, 4, 2),
    "far_scores_gradient": Configuration(0, 4, 2),
    "far_gradient": Configuration(64, 4, 2),
}
SINGLE = {
    "fade": Configuration(32, 4, 1),
    "scores": Configuration(64, 4, 1),
    "scan": Configuration(16, 4, 1),
    "scan_gradient": Configuration(16, 4, 1),
    "gradient": Configuration(16, 4, 1),
    "far_scores": Configuration(64, 4, 1),
    "far_scores_gradient": Configuration(0, 4, 1),
    "far_gradient": Configuration(16, 4, 2),
}
WHOLE_SHARED = 201 << 10  # of a scan by delta/launch.py's WHOLE
LOG_CHUNK = CHUNK.bit_length() - 1


class Kept(NamedTuple):
    """What is kept between the passes; prepare.py and scans.py say what is what. Without gradients the last two are
    empty, as is `spans` where rows are not cut into any."""

    gates: Tensor  # [B, T, H, K], in 16 bits fp16: 3 digits of log decays of any size
    R: Tensor  # [B H N, C, C]
    attend: Tensor  # [B H N, C, C]
    spans: Tensor  # [spans, B, H, K, V + K]: b and A, models/kernels/spans.py says of what
    errors: Tensor  # [B H N, V, C]
    states: Tensor  # [B H N, V, K]


class Faded(NamedTuple):
    """What the scans multiply with beside it: worked out again for the gradient. prepare.py's `fade` says what is
    what."""

    reads: Tensor  # [B, T, H, K]
    erases: Tensor  # [B, T, H, K]
    writes: Tensor  # [B, T, H, K]
    scale: Tensor  # [B H N, 2, K]
    sizes: Tensor  # [B H N, FLAGS]
    starts: Tensor | None  # [B N, 1 + C]


def new_kept(q: Tensor, v: Tensor, keep: bool) -> Kept:
    B, T, H, K = q.shape
    chunks = B * H * -(-T // CHUNK)
    gates = q.new_empty(q.shape, dtype=dtype_of_gates(q))
    R, attend = (q.new_empty(chunks, CHUNK, CHUNK) for _ in range(2))
    V = v.shape[-1]
    further = ((chunks, V, CHUNK), (chunks, V, K)) if keep else [(0,)] * 2
    return Kept(gates, R, attend, new_affine(q, V), *(q.new_empty(shape) for shape in further))


def dtype_of_gates(q: Tensor) -> torch.dtype:
    return torch.float32 if q.dtype == torch.float32 else torch.float16


class Launch:
    """One call: its tensors, contiguous, and what its kernels have in common."""

    def __init__(self, q: Tensor, k: Tensor, step_size: Tensor, value_dim: int) -> None:
        self.given = tuple(x.contiguous() for x in (q, k, step_size))
        (self.B, self.T, self.H, self.K), self.V = q.shape, value_dim
        self.N = cdiv(self.T, CHUNK)
        half = q.dtype != torch.float32
        least = 64 if half else 16
        self.BK, self.BV = (max(least, next_power_of_2(width)) for width in (self.K, self.V))
        self.configurations = HALF if half else SINGLE
        self.common = {"C": CHUNK, "PRECISION": "tf32" if half else "tf32x3"}
        self.width = min(self.configurations["fade"].block, self.BK)
        self.flags = cdiv(self.K, self.width)
        self.sizes = (self.T, self.N, self.H, self.K, self.V)
        self.spans = spans_of(q, value_dim)
        ones = (LOG_CHUNK + ORDERS, CHUNK, CHUNK)
        self.ones, self.same = q.new_empty(ones, dtype=dtype_of_gates(q)), q.new_empty(ones)
        write_ones[(len(self.ones),)](self.ones, self.same, CHUNK, LOG_CHUNK)

    def fade(self, gates: Tensor, segments: Tensor | None, *made_of: Tensor | None) -> Faded:
        """made_of: what prepare.py's `fade` makes the gates of, where they are not known."""
        q, chunks = self.given[0], self.B * self.H * self.N
        starts = None if segments is None else q.new_empty(self.B * self.N, 1 + CHUNK, dtype=torch.int32)
        reads, erases, writes = (torch.empty_like(q) for _ in range(3))
        scale = q.new_empty(chunks, 2, self.K, dtype=torch.float32)
        faded = Faded(reads, erases, writes, scale, q.new_empty(chunks, self.flags, dtype=torch.int32), starts)
        self.launch("fade", fade, *self.given, *(made_of or (None,) * 3), segments, self.ones, gates, *faded)
        return faded

    def launch(self, name: str, kernel, *tensors: Tensor | None, programs: int | None = None, **sizes: int) -> None:
        """A kernel of all chunks at once. programs: of a chunk, None for one for each block of channels."""
        configuration = self.configurations[name]
        BK = min(configuration.block, self.BK)
        further = {"FLAGS": self.flags, "WIDTH": self.width, "LOG_C": LOG_CHUNK, "BK": BK}
        sizes |= {name: size for name, size in further.items() if name in kernel.arg_names}
        kernel[self.B * self.H * self.N * (programs or cdiv(self.K, BK)),](
            *tensors, *self.sizes[:4], **self.common, **sizes, **configuration.options
        )

    def scan(self, name: str, kernel, *tensors: Tensor | None, columns: int | None = None) -> None:
        """columns: of the memories, None for those of the values."""
        configuration = self.configurations[name]
        if self.BV > configuration.block >= 64 and many(self.given[0], WHOLE_SHARED):
            configuration = WHOLE
        BV = min(configuration.block, self.BV)
        kernel[cdiv(columns or self.V, BV), self.spans * self.B * self.H](
            *tensors, None if self.spans == 1 else self.spans, *self.sizes, **self.common, BK=self.BK, BV=BV,
            **configuration.options,
        )  # fmt: skip

    def forward(
        self, v: Tensor, gates: tuple[Tensor | None, ...], first: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Kept]:
        """The outputs, the last memory, and what is kept. gates: what prepare.py's `fade` makes them of."""
        v, first = v.contiguous(), first.contiguous()
        kept, o = new_kept(self.given[0], v, keep), torch.empty_like(v)
        *made_of, segments = (None if x is None else x.contiguous() for x in gates)
        faded = self.fade(kept.gates, segments, *made_of)
        found = faded.sizes, faded.starts, kept.R, kept.attend
        self.launch("scores", scores, *faded[:3], *found, programs=1)
        self.launch("far_scores", far_scores, *self.given, kept.gates, self.ones, *found, programs=1)
        further = (kept.errors, kept.states) if keep else (None, None)
        scanned = *faded[:4], faded.starts, v, kept.R, kept.attend
        if self.spans > 1:
            self.scan("scan", scan, *scanned, None, None, kept.spans, None, None, columns=self.V + self.K)
            first = joined(first, kept.spans)
        last = torch.empty_like(first)
        self.scan("scan", scan, *scanned, first, o, last, *further)
        return o, last if self.spans == 1 else last[-1], kept

    def backward(
        self, kept: Kept, log_rate: Tensor | None, segments: Tensor | None, do: Tensor, dlast: Tensor | None
    ) -> list[Tensor]:
        """The gradients by q, k, v, the step sizes, the log decays or what they are made of, with rates by the bias and
        by the rates, and by the first memory."""
        do, dlast = do.contiguous(), None if dlast is None else dlast.contiguous()
        segments = None if segments is None else segments.contiguous()
        (q, k, step_size), (gates, R, attend, affine, errors, states) = self.given, kept
        faded = self.fade(gates, segments)
        scale, sizes, starts = faded[3:]
        dv, dstates = torch.empty_like(do), torch.empty_like(states)
        dfirst = scale.new_empty(self.spans, self.B, self.H, self.K, self.V)
        scanned = *faded[:4], starts, R, attend, do
        if self.spans > 1:
            self.scan("scan_gradient", scan_gradient, *scanned, None, None, None, dfirst)
            dlast = joined(dlast, affine, dfirst)
        self.scan("scan_gradient", scan_gradient, *scanned, dlast, dv, dstates, dfirst)

        num_blocks = cdiv(self.K, min(self.configurations["gradient"].block, self.BK))
        dq, dk, dsteps = torch.empty_like(q), torch.empty_like(k), step_size.new_empty(num_blocks, *step_size.shape)
        dlog_decay = torch.empty_like(q, dtype=torch.float32 if log_rate is None else q.dtype)
        sums: tuple[Tensor | None, Tensor | None] = None, None  # by the bias and by the rates, of each program
        if log_rate is not None:
            rows = self.B * self.N
            sums = step_size.new_empty(rows, self.H * self.K), step_size.new_empty(rows * num_blocks, self.H)
        found = dq, dk, dsteps, dlog_decay, *sums
        of_values = {"V": self.V, "BV": self.BV}
        self.launch(
            "gradient", gradient, *faded[:3], step_size, gates, self.ones, self.same, scale, sizes, starts, do, dv,
            errors, states, dstates, log_rate, *found, **of_values,
        )  # fmt: skip
        del faded
        dscores, down = R.new_empty(2, *R.shape), torch.empty_like(step_size)
        far_scores_gradient[2 * len(R),](
            step_size, do, errors, dv, sizes, starts, dscores, down, self.T, self.N, self.H, self.V, **self.common,
            LOG_C=LOG_CHUNK, FLAGS=self.flags, BV=self.BV, **self.configurations["far_scores_gradient"].options,
        )  # fmt: skip
        self.launch(
            "far_gradient", far_gradient, *self.given, gates, self.ones, self.same, scale, sizes, starts, dscores, down,
            do, dv, errors, states, dstates, log_rate, *found, **of_values,
        )  # fmt: skip
        shared = [summed(x, x[0]) for x in sums if x is not None]
        return [dq, dk, dv, dsteps.sum(0), dlog_decay, *shared, dfirst[0]]
