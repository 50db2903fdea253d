"""Buffers, grids and launch configurations of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels.deep.gradient import scan_gradient
from models.kernels.deep.outputs import outputs, outputs_gradient
from models.kernels.deep.scans import scan
from models.regression.deep.network import NOTHING

HALF = {  # BF, warps and stages, in 16 bits. Tiles of 32 beside mini-batches of 64 were wrong or met an illegal address
    "scan": (128, 8, 1),
    "outputs": (64, 4, 1),
    "outputs_gradient": (64, 4, 1),
    "scan_gradient": (64, 8, 1),
}
WHOLE = (16, 4, 1)  # in float32, of operands twice as large


class Launch:
    """One call: its inputs, made contiguous, and what its kernels have in common."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        read: Tensor,
        read_writes: Tensor,
        carry: Tensor,
        carry_writes: Tensor,
        begin: Tensor,
        base: Tensor | None,
        reference: Tensor | None,
        runs: Tensor,
        heads: int,
        rows: int,
    ) -> None:
        given = (q, k, v, read, read_writes, carry, carry_writes, begin, base, reference, runs)
        self.q, self.k, self.v, self.read, self.read_writes, *rest = (x if x is None else x.contiguous() for x in given)
        self.carry, self.carry_writes, self.begin, self.base, self.reference, self.runs = rest
        self.fades = base is None
        # where there is none kernels get an address that they do not read
        self.rounded = self.q if self.fades else self.base.to(q.dtype)
        self.base = self.carry if self.fades else self.base
        self.heads, self.rows, (self.M, C, K), V = heads, rows, q.shape, v.shape[-1]
        n = read.shape[-1]
        self.pair = begin.shape[-1] // n
        self.shared = {"C": C, "K": K, "F": self.pair // (K + V), "V": V, "MOMENTUM": n == 2, "BASE": base is not None}
        self.shared |= {"PRECISION": "tf32" if q.dtype != torch.float32 else "tf32x3"}
        self.scans = {"REFERENCE": reference is not None, "NOTHING": NOTHING}

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """o, N and S after every document, and N at its last mini-batch."""
        last, held, states, _, *errors = self._scan()
        o = torch.empty_like(self.v)
        outputs[(self.M,)](
            self.q, self.k, self.read, self.read_writes, self.rounded, states, *errors, o, self.heads,
            **self._options("outputs"),
        )  # fmt: skip
        return o, last, held

    def backward(self, do: Tensor, dlast: Tensor, dheld: Tensor) -> list[Tensor]:
        """The gradients by all inputs but runs."""
        _, _, states, references, *errors = self._scan()
        do, dheld, dfirst = do.contiguous(), dheld.contiguous(), dlast.clone(memory_format=torch.contiguous_format)
        dq, dkeys, dk, dv, dread, dread_writes, dcarry, dcarry_writes = (
            torch.empty_like(x)
            for x in (self.q, *[self.k] * 2, self.v, self.read, self.read_writes, self.carry, self.carry_writes)
        )
        inner, dinner, dhidden, derrors1 = (torch.empty_like(errors[0]) for _ in range(4))
        derrors2 = torch.empty_like(self.v)
        outputs_gradient[(self.M,)](
            self.q, self.k, self.read, self.read_writes, self.rounded, states, *errors, do,
            inner, dinner, dq, dkeys, dhidden, derrors1, derrors2, dread, dread_writes, self.heads,
            **self._options("outputs_gradient"),
        )  # fmt: skip
        dbase = dheld if self.fades else torch.zeros_like(dheld)
        dreference = None if self.reference is None else torch.empty_like(self.reference)
        scratch = self.q.new_empty(len(dfirst), *inner.shape[1:])
        scan_gradient[(len(dfirst),)](
            self.q, self.k, self.read, self.carry, self.carry_writes, self.runs, states, references, *errors,
            inner, dinner, do, dhidden, derrors1, derrors2, dkeys, dheld, dfirst, dbase, scratch,
            dreference, dk, dv, dcarry, dcarry_writes, self.rows, self.heads,
            **self._options("scan_gradient"), **self.scans,
        )  # fmt: skip
        found = [dq, dk, dv, dread, dread_writes, dcarry, dcarry_writes, dfirst]
        if not self.fades:
            found.append(dbase.unflatten(0, (-1, self.heads)).sum(0))
        return found if dreference is None else [*found, dreference]

    def _scan(self) -> tuple[Tensor, ...]:
        """N and S after every document, N at its last mini-batch; N and S, R, X_2, E_1, E_2 and the limits of all."""
        C, F = self.shared["C"], self.shared["F"]
        last, new = self.begin.clone(), self.q.new_empty
        held = last.new_empty(len(last), self.pair)
        states, references = new(self.M, self.begin.shape[-1]), new(self.M, self.pair)
        errors = new(self.M, C, F), new(self.M, C, F), torch.empty_like(self.v), last.new_empty(self.M, 3, C)
        scan[(len(last),)](
            self.k, self.v, self.carry, self.carry_writes, self.base, self.reference, self.runs,
            last, held, states, references, *errors, self.rows, self.heads,
            **self._options("scan"), **self.scans,
        )  # fmt: skip
        return last, held, states, references, *errors

    def _options(self, kernel: str) -> dict[str, object]:
        tile, warps, stages = HALF[kernel] if self.q.dtype != torch.float32 else WHOLE
        return {**self.shared, "BF": min(tile, self.shared["F"]), "num_warps": warps, "num_stages": stages}
