"""Buffers, grids and launch configurations of the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from models.kernels.momentum.coefficients import coefficients
from models.kernels.momentum.products import gates_gradient, outputs, tokens_gradient
from models.kernels.momentum.rule import CHUNK, Call, Kept, Rule, new_kept
from models.kernels.momentum.scans import scan, scan_gradient

KERNELS = ("coefficients", "scan", "outputs", "scan_gradient", "tokens_gradient", "gates_gradient")


class Configuration(NamedTuple):
    """BV: columns of the values that a program has at a time, 0 for a kernel without values; warps and stages as
    Triton's; BK: columns of the keys, of a kernel that has them in parts."""

    BV: int
    num_warps: int
    num_stages: int
    BK: int = 128

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def configurations(width: int, half: bool) -> dict[str, Configuration]:
    """By kernel, for keys up to 64, 128 or 256 wide.

    No loop with products has one stage: on an H200 (Triton 3.7.1) some of those are wrong by a fifth or read where they
    must not, while others are right. Kernels without such loops have nothing to stage. gates_gradient with 128 columns
    and keys at a time gave other numbers in every call, wrong by a sixth (tests/kernels/test_momentum_exact.py).
    """
    if not half:  # three products for one, of operands twice as large. With 8 warps: an illegal memory access
        few = Configuration(32 if width <= 64 else 16, 4, 2, 32)
        return dict.fromkeys(KERNELS, few)
    wide = width > 128
    return {
        "coefficients": Configuration(0, 4, 1),
        "scan": Configuration(32, 8, 2) if wide else Configuration(32, 4, 3),
        "outputs": Configuration(64 if wide else 128, 4, 1),
        "scan_gradient": Configuration(32, 8, 2) if wide else Configuration(32, 4, 2),
        "tokens_gradient": Configuration(64 if wide else 128, 4, 2, 32),
        "gates_gradient": Configuration(64, 4, 2, 64) if wide else Configuration(64, 4, 3, 64),
    }


class Launch:
    """One call: its inputs, made contiguous, and what its kernels have in common."""

    def __init__(self, call: Call, rule: Rule) -> None:
        self.call = call
        inputs: list[Tensor | Any] = [x if x is None else x.contiguous() for x in call]
        self.q, self.k, self.v, self.step_size, *rest = inputs
        self.log_momentum, self.log_decay, self.matrices, write_key, self.source = rest
        self.own_writes, self.write_key = write_key is not None, self.k if write_key is None else write_key
        self.rule, (self.B, self.T, self.H, self.K), self.V = rule, call.q.shape, call.v.shape[-1]
        self.N, self.BH = triton.cdiv(self.T, CHUNK), self.B * self.H
        self.width = max(16, triton.next_power_of_2(self.K))
        half = call.v.dtype != torch.float32
        self.configurations = configurations(self.width, half)
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

    def forward(self) -> tuple[Tensor, Tensor, Kept]:
        """The outputs, the last matrices and what the backward pass wants again."""
        kept = new_kept(self.call, self.rule)
        G, R, vectors, U, states, attend = kept
        coefficients[self.N, self.BH](
            self.k, self.write_key, self.step_size, self.log_momentum, self.log_decay, self.source, None, G, R,
            vectors, *self.sizes[:4], **self.chunk, LOG_C=CHUNK.bit_length() - 1, MOMENTUM=self.rule.momentum,
            **self.gates, **self.system, **self.precision, **self.configurations["coefficients"].options,
        )  # fmt: skip
        last = torch.empty_like(self.matrices)
        options, programs = self.columns("scan")
        scan[programs, self.BH](
            self.k, self.write_key, self.v, R, vectors, self.matrices, U, states, last, *self.sizes, **self.chunk,
            **self.scanned, **self.precision, **options,
        )  # fmt: skip
        o = torch.empty_like(self.v)
        options, programs = self.columns("outputs")
        outputs[self.N, self.BH, programs](
            self.q, self.write_key, U, G, vectors, states, o, attend, *self.sizes, **self.chunk, **self.matrices_of,
            **self.precision, **options,
        )  # fmt: skip
        return o, last, kept

    def backward(self, do: Tensor, dlast: Tensor, kept: Kept) -> list[Tensor]:
        do, dlast = do.contiguous(), dlast.contiguous()
        dq, dk, dv = (torch.empty_like(x) for x in (self.q, self.k, self.v))
        dwrite_key = torch.empty_like(self.write_key) if self.own_writes else None
        dstates, dfirst = torch.empty_like(kept.states), torch.empty_like(self.matrices)
        options, programs = self.columns("scan_gradient")
        scan_gradient[programs, self.BH](
            self.q, self.k, self.write_key, kept.R, kept.vectors, do, kept.attend, dlast, dv, dstates, dfirst,
            *self.sizes, **self.chunk, **self.scanned, **self.precision, **options,
        )  # fmt: skip
        gates = self.step_size, self.log_momentum, self.log_decay
        dgates = [None if x is None else torch.empty_like(x) for x in gates]
        options, tiles = self.columns("tokens_gradient")
        BK = min(self.width, self.configurations["tokens_gradient"].BK)
        parts = self.width // BK
        dvectors = kept.vectors.new_empty(self.BH * self.N, parts, *kept.vectors.shape[1:])
        tokens_gradient[parts, self.N, self.BH](
            self.q, self.k, self.write_key, self.source, kept.U, dv, do, kept.G, kept.vectors, kept.states, dstates,
            dq, dk, dwrite_key, dvectors, *self.sizes, C=CHUNK, BK=BK, PARTS=parts, TILES=tiles,
            **self.matrices_of, **self.system, **self.precision, **options,
        )  # fmt: skip
        options, tiles = self.columns("gates_gradient")
        BK = min(self.width, self.configurations["gates_gradient"].BK)
        system = {name: self.system[name] for name in ("SOURCES", "DECAYED", "SOLVE")}
        gates_gradient[self.N, self.BH](
            self.q, self.k, self.write_key, *gates, self.source, kept.U, dv, do, dvectors, *dgates, *self.sizes,
            C=CHUNK, BK=BK, PARTS=parts, KEY_TILES=self.width // BK, TILES=tiles, **self.matrices_of,
            **self.gates, **system, **self.precision, **options,
        )  # fmt: skip
        return [x for x in (dq, dk, dv, *dgates, dfirst, dwrite_key) if x is not None]
