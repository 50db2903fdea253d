"""Buffers, grids and launch configurations of the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.kernels import backend
from models.kernels.backend import cdiv, next_power_of_2
from models.kernels.delta.launch import many
from models.kernels.momentum.coefficients import coefficients, coefficients_gradient
from models.kernels.momentum.products import outputs, systems, tokens_gradient
from models.kernels.momentum.rule import CHUNK, PART, PRECISE, ROWS, Call, Kept, Rule
from models.kernels.momentum.scans import scan, scan_gradient
from models.kernels.spans import joined, num_spans

KERNELS = ("coefficients", "systems", "scan", "outputs", "scan_gradient", "tokens_gradient", "coefficients_gradient")


class Configuration(NamedTuple):
    """BV: columns of the values that a program has at a time, 0 for a kernel without values; warps and stages as
    Triton's; BK: columns of the keys, of a kernel that has them in parts; the most registers of a thread, or None."""

    BV: int
    num_warps: int
    num_stages: int
    BK: int = 128
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        found = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return found if self.maxnreg is None else found | {"maxnreg": self.maxnreg}


# Scans of 16 bits and more than 64 columns where programs of 64 would not all run at once, and what they want.
WHOLE = Configuration(128, 8, 2)
WHOLE_SHARED = 220 << 10


def configurations(width: int, half: bool, carried: bool) -> dict[str, Configuration]:
    """By kernel, for keys up to 64, 128 or 256 wide.

    No loop with products has one stage: on an H200 (Triton 3.7.1) some of those are wrong by a fifth or read where they
    must not, while others are right. Kernels without such loops have nothing to stage. tokens_gradient with 32 channels
    of the keys in two stages, or in none, reads shared memory where there is none; with 32 or 16 in three it is right,
    but with 32, and 64 of the values at a time, the gradient by keys was other numbers in every call.
    """
    if not half:  # three products for one, of operands twice as large. With 8 warps: an illegal memory access. Without
        # a number of registers, which is the most there is, the compiler gives wide scans 32 and spills all else
        few = Configuration(32 if width <= 64 else 16, 4, 2, 32, 255)
        return dict.fromkeys(KERNELS, few)
    wide = width > 128
    scans = Configuration(32 if wide or carried else 64, 4, 2)
    return {
        "systems": Configuration(0, 4, 1, maxnreg=168),  # of which a multiprocessor has room for three programs
        "scan": scans,
        "outputs": Configuration(64 if wide else 128, 4, 1),
        "scan_gradient": scans,
        "tokens_gradient": Configuration(64, 4, 2, 64) if wide else Configuration(128, 4, 3, 16),
    }


def configurations_of(call: Call, rule: Rule) -> dict[str, Configuration]:
    half = call.v.dtype != torch.float32
    return configurations(width_of(call), half, rule.carried and rule.solve)


def width_of(call: Call) -> int:
    """Of tiles of keys: products of 16 bits with fewer than 64 columns may be wrong (docs/kernels.md)."""
    return max(16 if call.v.dtype == torch.float32 else 64, next_power_of_2(call.k.shape[-1]))


def spans_of(call: Call, rule: Rule) -> int:
    """How many spans each row is cut into: 1 where a reference is carried along, which the last chunk leaves as no
    other does, and for keys of which a multiprocessor has room for one program alone."""
    (B, T, H, _), V = call.q.shape, call.v.shape[-1]
    if rule.carried or width_of(call) > 128:
        return 1
    programs = cdiv(V, configurations_of(call, rule)["scan"].BV) * B * H
    return num_spans(call.q, cdiv(programs, 2), cdiv(T, CHUNK))  # a multiprocessor has room for two programs of a scan


def new_kept(call: Call, rule: Rule) -> Kept:
    """Where it is written, with nothing in it."""
    (B, T, H, K), V = call.q.shape, call.v.shape[-1]
    chunks, matrices = B * H * -(-T // CHUNK), 1 + rule.momentum + (rule.carried and rule.solve)
    halves = 1 if call.v.dtype == torch.float32 else 2
    solved = chunks if rule.solve else 0
    attend = call.v.new_empty(chunks, CHUNK, CHUNK)
    alike = attend.dtype if K > PRECISE else torch.float32
    similar, system = (attend.new_empty(n, CHUNK, CHUNK, dtype=alike) for n in (chunks, solved))
    return Kept(
        call.v.new_empty(chunks, CHUNK, CHUNK, dtype=torch.float32),
        call.v.new_empty(solved, halves, CHUNK, CHUNK),
        call.v.new_empty(chunks, ROWS, CHUNK, dtype=torch.float32),
        call.v.new_empty(chunks, V, CHUNK),
        call.v.new_empty(chunks, -(-K // PART), V, matrices, PART),
        attend,
        similar,
        system,
        new_affine(call, rule),
    )


def new_affine(call: Call, rule: Rule) -> Tensor:
    """Where b and A of all spans are left, with nothing in it; empty where there is but one span."""
    (B, _, H, K), V, number = call.q.shape, call.v.shape[-1], spans_of(call, rule)
    rows = rule.num_matrices * K
    return call.v.new_empty((number, B, H, rows, V + rows) if number > 1 else (0,), dtype=torch.float32)


def by_gates(num_chunks: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and options of the kernels of coefficients: a warp for every chunk, and in the interpreter, whose time goes
    by operations, one program for many."""
    many = 64 if backend.interpreting() else 1
    return (cdiv(num_chunks, many),), {"CHUNKS": many, "num_warps": 1}


class Launch:
    """One call: its inputs, made contiguous, and what its kernels have in common."""

    def __init__(self, call: Call, rule: Rule) -> None:
        self.call = call
        inputs: list[Tensor | Any] = [x if x is None else x.contiguous() for x in call]
        self.q, self.k, self.v, self.step_size, *rest = inputs
        self.log_momentum, self.log_decay, self.matrices, write_key, self.source = rest
        self.own_writes, self.write_key = write_key is not None, self.k if write_key is None else write_key
        self.rule, (self.B, self.T, self.H, self.K), self.V = rule, call.q.shape, call.v.shape[-1]
        self.N, self.BH = cdiv(self.T, CHUNK), self.B * self.H
        half = call.v.dtype != torch.float32
        self.least = 64 if half else 16
        self.width, self.spans = width_of(call), spans_of(call, rule)
        self.configurations = configurations_of(call, rule)
        self.precision = {"PRECISION": "tf32" if half else "tf32x3"}
        self.sizes = (self.T, self.N, self.H, self.K, self.V)
        self.chunk = {"C": CHUNK, "BK": self.width}
        self.matrices_of = {"MOMENTUM": rule.momentum, "CARRIED": rule.carried and rule.solve}
        self.solved = {"SOLVE": rule.solve, "OWN_WRITES": self.own_writes}
        self.scanned = {**self.matrices_of, "OUTSIDE": rule.num_matrices, **self.solved}
        self.gates = {"DECAY": call.log_decay is not None, "WRITES": rule.writes}
        self.referring = {"SOURCES": call.source is not None, "DECAYED": rule.decayed, "SOLVE": rule.solve}
        self.system = {**self.referring, "OWN_WRITES": self.own_writes}

    def columns(self, kernel: str, columns: int | None = None) -> tuple[dict[str, int], int]:
        """A kernel's options, and how many programs share the values, or so many columns."""
        found, width = self.configurations[kernel], max(self.least, next_power_of_2(self.V))
        if kernel.startswith("scan") and width > found.BV >= 64 and many(self.q, WHOLE_SHARED):
            found = WHOLE
        BV = min(found.BV, width)
        return {"BV": BV, **found.options}, cdiv(columns or self.V, BV)

    def scan(self, name: str, kernel, *tensors: Tensor | None, columns: int | None = None) -> None:
        """columns: of the matrices, None for those of the values."""
        options, programs = self.columns(name, columns)
        kernel[programs, self.spans * self.BH](
            *tensors, None if self.spans == 1 else self.spans, *self.sizes, **self.chunk, **self.scanned,
            **self.precision, **options,
        )  # fmt: skip

    def of_spans(self, matrices: Tensor) -> Tensor:
        """[spans, B, H, n, K, V] of matrices one below the other."""
        return matrices.unflatten(3, (-1, self.K))

    def forward(self) -> tuple[Tensor, Tensor, Kept]:
        """The outputs, the last matrices and what the backward pass wants again."""
        kept = new_kept(self.call, self.rule)
        gates = self.step_size, self.log_momentum, self.log_decay
        grid, options = by_gates(self.BH * self.N)
        coefficients[grid](
            *gates, self.source, None, kept.G, kept.vectors, *self.sizes[:3], self.BH * self.N, C=CHUNK,
            **self.matrices_of, **self.gates, **self.referring, **options,
        )  # fmt: skip
        systems[self.H, self.N, self.B](
            self.q, self.k, self.write_key, self.source, kept.G, kept.R, kept.similar, kept.attend, kept.system,
            *self.sizes[:4], **self.chunk, LOG_C=CHUNK.bit_length() - 1, **self.system, **self.precision,
            **self.configurations["systems"].options,
        )  # fmt: skip
        given, first = (self.k, self.write_key, self.v, kept.R, kept.vectors), self.matrices
        if self.spans > 1:
            self.scan("scan", scan, *given, None, None, None, kept.spans, columns=kept.spans.shape[-1])
            first = self.of_spans(joined(first.flatten(2, 3), kept.spans))
        last = torch.empty_like(first)
        self.scan("scan", scan, *given, first, kept.U, kept.states, last)
        o = torch.empty_like(self.v)
        options, programs = self.columns("outputs")
        outputs[programs * self.H, self.N, self.B](
            self.q, kept.U, kept.attend, kept.vectors, kept.states, o, *self.sizes, **self.chunk, **self.matrices_of,
            **self.precision, **options,
        )  # fmt: skip
        return o, last if self.spans == 1 else last[-1], kept

    def backward(self, do: Tensor, dlast: Tensor, kept: Kept) -> list[Tensor]:
        do, dlast = do.contiguous(), dlast.contiguous()
        dq, dk, dv = (torch.empty_like(x) for x in (self.q, self.k, self.v))
        dwrite_key = torch.empty_like(self.write_key) if self.own_writes else None
        dstates, dfirst = torch.empty_like(kept.states), self.matrices.new_empty(self.spans, *self.matrices.shape)
        given = self.q, self.k, self.write_key, kept.R, kept.vectors, do, kept.attend
        if self.spans > 1:
            self.scan("scan_gradient", scan_gradient, *given, None, None, None, dfirst)
            dlast = self.of_spans(joined(dlast.flatten(2, 3), kept.spans, dfirst.flatten(3, 4)))
        self.scan("scan_gradient", scan_gradient, *given, dlast, dv, dstates, dfirst)
        dG, dvectors = torch.empty_like(kept.G), torch.empty_like(kept.vectors)
        options, tiles = self.columns("tokens_gradient")
        # Of keys narrower than `width` the last parts are zeros: one part would be no loop, and its products of few
        # columns, which are then not staged, were wrong
        BK = min(self.width, self.configurations["tokens_gradient"].BK)
        tokens_gradient[self.H, self.N, self.B](
            self.q, self.k, self.write_key, self.source, kept.U, dv, do, kept.G, kept.similar, kept.system,
            kept.vectors, kept.states, dstates, dq, dk, dwrite_key, dG, dvectors, *self.sizes, C=CHUNK, BK=BK,
            PARTS=self.width // BK, TILES=tiles, **self.matrices_of, **self.system, **self.precision, **options,
        )  # fmt: skip
        gates = self.step_size, self.log_momentum, self.log_decay
        dgates = [None if x is None else torch.empty_like(x) for x in gates]
        grid, options = by_gates(self.BH * self.N)
        coefficients_gradient[grid](
            *gates, self.source, None, kept.G, kept.vectors, dG, dvectors, *dgates, *self.sizes[:3],
            self.BH * self.N, C=CHUNK, **self.matrices_of, **self.gates, **self.referring, **options,
        )  # fmt: skip
        return [x for x in (dq, dk, dv, *dgates, dfirst[0], dwrite_key) if x is not None]
