"""Buffers, grids and launch configurations of the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels import backend
from models.kernels.deep.arguments import Call, Found, Last, Left, Scan, Sizes
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
        (self.B, _, self.H, self.K), self.C, self.V = scan.q.shape, grad_batch, scan.v.shape[-1]
        self.L, self.P, self.pair = len(scan.slots), len(scan.runs), weights_of(scan).shape[-1]
        self.M, self.F = self.H * self.L, self.pair // (self.K + self.V)
        self.size = (1 + self.momentum) * self.pair
        self.half = scan.q.dtype != torch.float32
        self.precision = "tf32" if self.half else "tf32x3"
        # errors refer to the chunk's first memory
        self.referring: dict[str, Any] = dict.fromkeys(("SOURCES", "DECAYED", "SOLVE", "CARRIED"), False)
        self.referring |= {"MOMENTUM": self.momentum, "DECAY": self.gates[2] is not None, "WRITES": 1}

    def forward(self, keep: bool) -> tuple[Tensor, Last, Left]:
        """o, what comes after every row, and what the backward pass wants, if `keep`."""
        call, (last, left) = self._coefficients(), empty(self.scan, self.C, keep)
        grid, meeting, options = self._documents("scan", self.V + 2)
        scan[grid](call, left, last, *meeting, **options)
        o = torch.empty_like(call.v)
        outputs[(self.M,)](call, left, o, **self._options("outputs"))
        return o, last, left

    def backward(self, left: Left, do: Tensor | None, dlast: Tensor | None, dheld: Tensor | None) -> list[Tensor]:
        """The gradients by all of the Scan but filled, slots and runs."""
        call = self._coefficients()
        like = dict.fromkeys(("inner", "dinner", "dhidden", "derrors1", "dback", "dz"), left.hidden)
        like |= {"dq": call.q, "dk": call.k, "dkeys": call.k, "dv": call.v, "derrors2": left.errors2}
        like |= {"dcoefficients": call.G, "dvectors": call.vectors, "dlength": call.vectors[:, 0]}
        like["dstates"] = left.states
        begins = call.first is not None or call.carried is not None
        found = Found(
            do=torch.zeros_like(call.v) if do is None else do.contiguous(),
            dlast=dlast if dlast is None else dlast.contiguous(),
            dheld=dheld if dheld is None else dheld.contiguous(),
            dfirst=self._new(self.P * self.H, self.size) if begins else None,
            dreference=None if call.reference is None else torch.empty_like(call.reference),
            **{name: torch.empty_like(x, memory_format=torch.contiguous_format) for name, x in like.items()},
        )
        outputs_gradient[(self.M,)](call, left, found, **self._options("outputs_gradient"))
        grid, meeting, options = self._documents("scan_gradient", 2 * (3 * self.V + 1))
        scan_gradient[grid](call, left, found, *meeting, **options)
        writes_gradient[(self.M,)](call, left, found, **self._options("writes_gradient"))
        dgates = [x if x is None else torch.empty_like(x) for x in self.gates]
        grid, options = by_gates(self.M)
        coefficients_gradient[grid](
            *self.gates, None, self.scan.filled, call.G, call.vectors, found.dcoefficients, found.dvectors, *dgates,
            self.C, 1, self.H, self.M, C=self.C, **self.referring, **options,
        )  # fmt: skip
        dbase = None
        if call.base is not None:
            options, parts = self._options("base_gradient"), self._new(GROUPS, self.H, self.pair)
            base_gradient[options["S"].split, self.H, GROUPS](call, left, found, parts, self.L, **options)
            dbase = parts.sum(0)
        gradients = (found.dq, found.dk, found.dv, *dgates, *self._begins(found.dfirst), dbase, found.dreference)
        return [x for x in gradients if x is not None]

    def _begins(self, dfirst: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The gradients by `first` and by `carried`, of those by what every document begins with."""
        first, carried = self.scan.first, self.scan.carried
        if dfirst is None:
            return None, None
        found = dfirst.unflatten(0, (self.P, self.H))
        if carried is None:
            return found[..., : self.pair].sum(0), None
        row, begin = self.scan.runs[:, 0].long(), self.scan.runs[:, 1].long()
        carries = self.scan.slots[begin, 2] >= 0
        place = torch.where(carries, row, self.B)  # the last place for documents that carry nothing on
        dcarried = self._new(self.B + 1, self.H, self.size).index_copy_(0, place, found)[: self.B].flatten(0, 1)
        fresh = torch.where(carries.view(-1, 1, 1), 0.0, found[..., : self.pair])
        return None if first is None else fresh.sum(0), dcarried

    def _coefficients(self) -> Call:
        """With those of models/kernels/momentum, whose errors refer to the chunk's first memory here."""
        given, C = self.scan, self.C
        G, vectors = self._new(self.M, C, C), self._new(self.M, ROWS, C)
        grid, options = by_gates(self.M)
        coefficients[grid](
            *self.gates, None, given.filled, G, vectors, C, 1, self.H, self.M, C=C,
            **self.referring, **options,
        )  # fmt: skip
        base = given.base if given.base is None else given.base.to(given.q.dtype)
        begins = given.first, given.carried, base, given.reference
        return Call(given.q, given.k, given.v, *begins, given.slots, given.runs, G, vectors, self.H)

    def _new(self, *shape: int) -> Tensor:
        return self.scan.step_size.new_empty(shape)

    def _documents(self, kernel: str, width: int) -> tuple[tuple[int], tuple[Tensor, ...], dict[str, Any]]:
        """A scan's grid; for every document of a head S or E, where its programs exchange `width` numbers a token, and
        count who has come; and its options. One program for each in the interpreter, where they run one after another.
        """
        options, documents = self._options(kernel, self.F if backend.interpreting() else None), self.P * self.H
        split = options["S"].split
        sums = self._new(documents, split, self.C * width)
        momenta = self._new(documents, self.size - self.pair)
        arrived = torch.zeros_like(sums[:, 0, 0], dtype=torch.int32)
        return (documents * split,), (momenta, sums, arrived), options

    def _options(self, kernel: str, tile: int | None = None) -> dict[str, Any]:
        width, warps, stages = HALF[kernel] if self.half else WHOLE
        sizes = Sizes(self.C, self.K, self.F, self.V, self.momentum, self.precision, tile or min(width, self.F))
        return {"S": sizes, "num_warps": warps, "num_stages": stages}


def weights_of(scan: Scan) -> Tensor:
    """[H, PAIR]: what documents begin with, as N or as W."""
    found = scan.base if scan.first is None else scan.first
    assert found is not None
    return found


def empty(scan: Scan, C: int, keep: bool) -> tuple[Last, Left]:
    """Room for what the scan leaves behind. keep: for the backward pass too."""
    (B, _, H, K), V, pair = scan.q.shape, scan.v.shape[-1], weights_of(scan).shape[-1]
    M, F, size = H * len(scan.slots), pair // (K + V), pair * (1 if scan.log_momentum is None else 2)
    new, number = scan.q.new_empty, scan.step_size.new_empty
    left = Left(
        states=new(M, size),
        hidden=new(M, F, C),
        errors1=new(M, F, C),
        errors2=new(M, C, V),
        limits=number(M, 3, C),
        z=new(M, F, C),
        back=new(M, F, C) if keep else None,
    )
    return Last(number(B * H, size), number(B * H, pair)), left
