"""Buffers, grids and launch configurations of the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels import backend
from models.kernels.deep.arguments import Call, Found, Left, Scan, Sizes
from models.kernels.deep.gradient import scan_gradient
from models.kernels.deep.outputs import outputs, outputs_gradient
from models.kernels.deep.scans import scan
from models.kernels.deep.writes import base_gradient, writes_gradient
from models.kernels.momentum.coefficients import coefficients, coefficients_gradient
from models.kernels.momentum.launch import by_gates
from models.kernels.momentum.tiles import ROWS

HALF = {  # BF, warps and stages, in 16 bits. Tiles of 32 beside mini-batches of 64 were wrong or met an illegal address
    "scan": (128, 8, 1),
    "outputs": (64, 4, 1),
    "outputs_gradient": (64, 4, 1),
    "scan_gradient": (128, 8, 1),
    "writes_gradient": (64, 4, 1),
    "base_gradient": (64, 4, 1),
}
WHOLE = (16, 4, 1)  # in float32, of operands twice as large
GROUPS = 16  # of mini-batches, whose gradients by W are summed apart


class Launch:
    """One call: its inputs, made contiguous, and what its kernels have in common."""

    def __init__(self, scan: Scan, grad_batch: int) -> None:
        self.scan = scan = Scan._make(x if x is None else x.contiguous() for x in scan)
        self.gates, self.momentum = scan[3:6], scan.log_momentum is not None
        (self.B, T, self.H, self.K), self.C, self.V = scan.q.shape, grad_batch, scan.v.shape[-1]
        self.N, self.BH, self.pair = T // self.C, self.B * self.H, scan.begin.shape[-1] // (1 + self.momentum)
        self.M, self.F = self.BH * self.N, self.pair // (self.K + self.V)
        self.half = scan.q.dtype != torch.float32
        self.precision = "tf32" if self.half else "tf32x3"
        # errors refer to the chunk's first memory
        self.referring: dict[str, Any] = dict.fromkeys(("SOURCES", "DECAYED", "SOLVE", "CARRIED"), False)
        self.referring |= {"MOMENTUM": self.momentum, "DECAY": self.gates[2] is not None, "WRITES": 1}

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """o, N and S after every document, and N at its last mini-batch."""
        call = self._coefficients()
        left, last, held = self._scan(call)
        o = torch.empty_like(call.v)
        outputs[self.N, self.BH](call, left, o, **self._options("outputs"))
        return o, last, held

    def backward(self, do: Tensor, dlast: Tensor, dheld: Tensor) -> list[Tensor]:
        """The gradients by all of the Scan but filled and runs."""
        call = self._coefficients()
        left, *_ = self._scan(call, gradient=True)
        like = dict.fromkeys(("inner", "dinner", "dhidden", "derrors1", "dback", "dz"), left.hidden)
        like |= {"dq": call.q, "dk": call.k, "dkeys": call.k, "dv": call.v, "derrors2": left.errors2}
        like |= {"dcoefficients": call.G, "dvectors": call.vectors, "dlength": call.vectors[:, 0]}
        like["dstates"] = left.states
        found = Found(
            do=do.contiguous(),
            dheld=dheld.contiguous(),
            dfirst=dlast.clone(memory_format=torch.contiguous_format),
            dreference=None if call.reference is None else torch.empty_like(call.reference),
            **{name: torch.empty_like(x, memory_format=torch.contiguous_format) for name, x in like.items()},
        )
        outputs_gradient[self.N, self.BH](call, left, found, **self._options("outputs_gradient"))
        grid, meeting, options = self._documents("scan_gradient", 2 * self.V + 1)
        scan_gradient[grid](call, left, found, *meeting, **options)
        writes_gradient[self.N, self.BH](call, left, found, **self._options("writes_gradient"))
        dgates = [x if x is None else torch.empty_like(x) for x in self.gates]
        grid, options = by_gates(self.M)
        coefficients_gradient[grid](
            *self.gates, None, self.scan.filled, call.G, call.vectors, found.dcoefficients, found.dvectors, *dgates,
            self.N * self.C, self.N, self.H, self.M, C=self.C, **self.referring, **options,
        )  # fmt: skip
        dbase = None
        if call.base is not None:
            options, parts = self._options("base_gradient"), self._new(GROUPS, self.H, self.pair)
            base_gradient[options["S"].split, self.H, GROUPS](call, left, found, parts, **options)
            dbase = parts.sum(0)
        gradients = (found.dq, found.dk, found.dv, *dgates, found.dfirst, dbase, found.dreference)
        return [x for x in gradients if x is not None]

    def _coefficients(self) -> Call:
        """With those of models/kernels/momentum, whose errors refer to the chunk's first memory here."""
        (q, k, v), base, C = self.scan[:3], self.scan.base, self.C
        G, vectors = self._new(self.M, C, C), self._new(self.M, ROWS, C)
        grid, options = by_gates(self.M)
        coefficients[grid](
            *self.gates, None, self.scan.filled, G, vectors, self.N * C, self.N, self.H, self.M, C=C,
            **self.referring, **options,
        )  # fmt: skip
        base = base if base is None else base.to(q.dtype)
        return Call(q, k, v, base, self.scan.reference, self.scan.runs, G, vectors, self.B, self.N, self.H)

    def _scan(self, call: Call, gradient: bool = False) -> tuple[Left, Tensor, Tensor]:
        """What it leaves behind, N and S after every document, and N at its last mini-batch."""
        M, C, new, last = self.M, self.C, call.q.new_empty, self.scan.begin.clone()
        left = Left(
            states=new(M, last.shape[-1]),
            references=new(M, self.pair),
            hidden=new(M, C, self.F),
            errors1=new(M, C, self.F),
            errors2=new(M, C, self.V),
            limits=self._new(M, 3, C),
            slopes=new(M, C, self.F) if gradient else None,
            curves=new(M, C, self.F) if gradient else None,
        )
        held = self._new(len(last), self.pair)
        grid, meeting, options = self._documents("scan", self.V + 2)
        scan[grid](call, left, last, held, *meeting, **options)
        return left, last, held

    def _new(self, *shape: int) -> Tensor:
        return self.scan.begin.new_empty(shape)

    def _documents(self, kernel: str, width: int) -> tuple[tuple[int], tuple[Tensor, Tensor], dict[str, Any]]:
        """A scan's grid; where the programs of a document of a head exchange `width` numbers a token, and count who has
        come; and its options. One program for each in the interpreter, where they run one after another."""
        options, documents = self._options(kernel, self.F if backend.interpreting() else None), len(self.scan.begin)
        split = options["S"].split
        sums = self._new(documents, split, self.C * width)
        return (documents * split,), (sums, torch.zeros_like(sums[:, 0, 0], dtype=torch.int32)), options

    def _options(self, kernel: str, tile: int | None = None) -> dict[str, Any]:
        width, warps, stages = HALF[kernel] if self.half else WHOLE
        sizes = Sizes(self.C, self.K, self.F, self.V, self.momentum, self.precision, tile or min(width, self.F))
        return {"S": sizes, "num_warps": warps, "num_stages": stages}
