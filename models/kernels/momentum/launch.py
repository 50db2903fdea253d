"""Buffers, grids and launch configurations of the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from models.kernels.momentum.coefficients import coefficients, coefficients_gradient
from models.kernels.momentum.products import keys_gradient, outputs, queries_gradient
from models.kernels.momentum.rule import CHUNK, Call, Rule
from models.kernels.momentum.scans import scan, scan_gradient
from models.kernels.momentum.tiles import ROWS

KERNELS = (
    "coefficients",
    "scan",
    "outputs",
    "queries_gradient",
    "scan_gradient",
    "keys_gradient",
    "coefficients_gradient",
)


class Configuration(NamedTuple):
    """BV: columns of the values that a program has, 0 for a kernel without values; warps and stages as Triton's."""

    BV: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def configurations(width: int, half: bool, own_writes: bool) -> dict[str, Configuration]:
    """By kernel, for keys up to 64, 128 or 256 wide. own_writes: for two tiles of keys, beside which fewer columns let
    the gradients stay in registers. (In one stage the scan's gradient of these was wrong by a tenth.)"""
    if not half:  # three products for one, of operands twice as large. With 8 warps: an illegal memory access
        few = Configuration(32 if width <= 64 else 16, 4, 1)
        return dict.fromkeys(KERNELS, few)
    wide, narrow = width > 128, width <= 64
    columns = 32 if own_writes and narrow else 64
    return {
        "coefficients": Configuration(0, 4, 1),
        "scan": Configuration(32, 8, 1) if wide else Configuration(32, 4, 3),
        "outputs": Configuration(64 if wide else 128, 4, 1),
        "queries_gradient": Configuration(32, 8, 1) if wide else Configuration(64, 4 if narrow else 8, 2),
        "scan_gradient": Configuration(32, 8, 1) if wide else Configuration(32, 4, 2),
        "keys_gradient": Configuration(32, 8, 1) if wide else Configuration(columns, 4 if narrow else 8, 1),
        "coefficients_gradient": Configuration(0, 4, 1),
    }


class Launch:
    """One call: its inputs, made contiguous, and what its kernels have in common."""

    def __init__(self, call: Call, rule: Rule) -> None:
        inputs: list[Tensor | Any] = [x if x is None else x.contiguous() for x in call]
        self.q, self.k, self.v, self.step_size, *rest = inputs
        self.log_momentum, self.log_decay, self.matrices, write_key, self.source = rest
        self.own_writes, self.write_key = write_key is not None, self.k if write_key is None else write_key
        self.rule, (self.B, self.T, self.H, self.K), self.V = rule, call.q.shape, call.v.shape[-1]
        self.N, self.BH = triton.cdiv(self.T, CHUNK), self.B * self.H
        self.width = max(16, triton.next_power_of_2(self.K))
        half = call.v.dtype != torch.float32
        self.configurations = configurations(self.width, half, self.own_writes)
        self.precision = {"PRECISION": "tf32" if half else "tf32x3"}
        self.sizes = (self.T, self.N, self.H, self.K, self.V)
        self.chunk = {"C": CHUNK, "BK": self.width}
        self.matrices_of = {"MOMENTUM": rule.momentum, "CARRIED": rule.carried and rule.solve}
        self.solved = {"SOLVE": rule.solve, "OWN_WRITES": self.own_writes}
        self.scanned = {**self.matrices_of, "OUTSIDE": rule.num_matrices, **self.solved}
        self.gates = {"DECAY": call.log_decay is not None, "WRITES": rule.writes}
        self.system = {"SOURCES": call.source is not None, "DECAYED": rule.decayed, **self.solved}

    def columns(self, kernel: str) -> tuple[dict[str, int], int]:
        """A kernel's options, and how many programs share the values."""
        found = self.configurations[kernel]
        BV = min(found.BV, max(16, triton.next_power_of_2(self.V)))
        return {"BV": BV, **found.options}, triton.cdiv(self.V, BV)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.v.new_empty(shape, dtype=dtype)

    def run_scan(self) -> tuple[Tensor, ...]:
        """G, R, vectors, U, states and the last matrices."""
        G = self.new(self.BH * self.N, CHUNK, CHUNK)
        R = self.new(self.BH * self.N, CHUNK, CHUNK) if self.rule.solve else G
        vectors = self.new(self.BH * self.N, ROWS, CHUNK)
        coefficients[self.N, self.BH](
            self.k, self.write_key, self.step_size, self.log_momentum, self.log_decay, self.source, None, G, R,
            vectors, *self.sizes[:4], **self.chunk, LOG_C=CHUNK.bit_length() - 1, MOMENTUM=self.rule.momentum,
            **self.gates, **self.system, **self.precision, **self.configurations["coefficients"].options,
        )  # fmt: skip
        U = torch.empty_like(self.v)
        states = self.new(self.BH * self.N, sum((1, *self.matrices_of.values())), self.K, self.V, dtype=self.v.dtype)
        last = torch.empty_like(self.matrices)
        options, programs = self.columns("scan")
        scan[programs, self.BH](
            self.k, self.write_key, self.v, R, vectors, self.matrices, U, states, last, *self.sizes, **self.chunk,
            **self.scanned, **self.precision, **options,
        )  # fmt: skip
        return G, R, vectors, U, states, last

    def forward(self) -> tuple[Tensor, Tensor]:
        G, _, vectors, U, states, last = self.run_scan()
        o = torch.empty_like(self.v)
        options, programs = self.columns("outputs")
        outputs[self.N, self.BH, programs](
            self.q, self.write_key, U, G, vectors, states, o, *self.sizes, **self.chunk, **self.matrices_of,
            **self.precision, **options,
        )  # fmt: skip
        return o, last

    def backward(self, do: Tensor, dlast: Tensor) -> list[Tensor]:
        G, R, vectors, U, states, _ = self.run_scan()
        do, dlast = do.contiguous(), dlast.contiguous()
        dq, dk, dU, dv = (torch.empty_like(x) for x in (self.q, self.k, self.v, self.v))
        dwrite_key = torch.empty_like(self.write_key) if self.own_writes else None
        dsimilar, dG, dvectors = self.new(*G.shape, dtype=self.v.dtype), torch.empty_like(G), torch.empty_like(vectors)
        options, _ = self.columns("queries_gradient")
        queries_gradient[self.N, self.BH](
            self.q, self.write_key, U, do, G, vectors, states, dq, dU, dsimilar, dG, dvectors, *self.sizes,
            **self.chunk, **self.matrices_of, **self.precision, **options,
        )  # fmt: skip
        dstates, dfirst = torch.empty_like(states), torch.empty_like(self.matrices)
        options, programs = self.columns("scan_gradient")
        scan_gradient[programs, self.BH](
            self.q, self.k, self.write_key, R, vectors, do, dU, dlast, dv, dstates, dfirst, *self.sizes, **self.chunk,
            **self.scanned, **self.precision, **options,
        )  # fmt: skip
        options, _ = self.columns("keys_gradient")
        keys_gradient[self.N, self.BH](
            self.q, self.k, self.write_key, self.source, U, dv, G, dsimilar, vectors, states, dstates, dk, dwrite_key,
            dG, dvectors, *self.sizes, **self.chunk, **self.matrices_of, **self.system, **self.precision, **options,
        )  # fmt: skip
        gates = self.step_size, self.log_momentum, self.log_decay
        dgates = [None if x is None else torch.empty_like(x) for x in gates]
        coefficients_gradient[self.N, self.BH](
            self.step_size, self.log_momentum, self.log_decay, self.source, None, dG, dvectors, *dgates,
            *self.sizes[:3], C=CHUNK, **self.matrices_of, **self.gates, SOURCES=self.source is not None,
            **self.precision, **self.configurations["coefficients_gradient"].options,
        )  # fmt: skip
        return [x for x in (dq, dk, dv, *dgates, dfirst, dwrite_key) if x is not None]
