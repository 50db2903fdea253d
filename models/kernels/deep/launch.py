"""Buffers, grids and launch configurations of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels import backend
from models.kernels.deep.gradient import scan_gradient
from models.kernels.deep.outputs import outputs, outputs_gradient
from models.kernels.deep.scans import scan
from models.kernels.deep.writes import base_gradient, writes_gradient
from models.kernels.momentum.coefficients import coefficients, coefficients_gradient
from models.kernels.momentum.tiles import ROWS
from models.parts.precision import NOTHING

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

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        step_size: Tensor,
        log_momentum: Tensor | None,
        log_decay: Tensor | None,
        filled: Tensor | None,
        begin: Tensor,
        base: Tensor | None,
        reference: Tensor | None,
        runs: Tensor,
        grad_batch: int,
    ) -> None:
        given = (q, k, v, step_size, log_momentum, log_decay, filled, begin, base, reference, runs)
        self.q, self.k, self.v, *rest = (x if x is None else x.contiguous() for x in given)
        *self.gates, self.filled, self.begin, self.base, self.reference, self.runs = rest
        self.fades = base is None
        # where there is none kernels get an address that they do not read
        self.rounded = self.q if self.fades else self.base.to(q.dtype)
        (self.B, T, self.H, K), V, C, n = q.shape, v.shape[-1], grad_batch, 1 if log_momentum is None else 2
        self.N, self.BH, self.pair = T // C, self.B * self.H, begin.shape[-1] // n
        self.M, self.hidden = self.BH * self.N, self.pair // (K + V)
        self.precision = {"PRECISION": "tf32" if q.dtype != torch.float32 else "tf32x3"}
        self.shared = {"C": C, "K": K, "F": self.hidden, "V": V, "MOMENTUM": n == 2, "BASE": base is not None}
        self.shared |= self.precision

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """o, N and S after every document, and N at its last mini-batch."""
        G, vectors = self._coefficients()
        last, held, states, _, *errors, _, _ = self._scan(vectors)
        o = torch.empty_like(self.v)
        outputs[self.N, self.BH](
            self.q, self.k, G, vectors, self.rounded, states, *errors, o, self.N, self.H, **self._options("outputs")
        )
        return o, last, held

    def backward(self, do: Tensor, dlast: Tensor, dheld: Tensor) -> list[Tensor]:
        """The gradients by all inputs but filled and runs."""
        G, vectors = self._coefficients()
        _, _, states, references, *errors, slopes, curves = self._scan(vectors, gradient=True)
        hidden, _, errors2, _ = errors
        do, dheld, dfirst = do.contiguous(), dheld.contiguous(), dlast.clone(memory_format=torch.contiguous_format)
        dq, dkeys, dk, dv, dG, dvectors = (torch.empty_like(x) for x in (self.q, self.k, self.k, self.v, G, vectors))
        inner, dinner, dhidden, derrors1, dback, dz = (torch.empty_like(hidden) for _ in range(6))
        derrors2, dstates, dlength = torch.empty_like(errors2), torch.empty_like(states), self._new(*hidden.shape[:2])
        dreference = None if self.reference is None else torch.empty_like(self.reference)
        outputs_gradient[self.N, self.BH](
            self.q, self.k, G, vectors, self.rounded, states, *errors, do,
            inner, dinner, dq, dkeys, dhidden, derrors1, derrors2, dG, dvectors, self.N, self.H,
            **self._options("outputs_gradient"),
        )  # fmt: skip
        options, split = self._shared_out("scan_gradient")
        scan_gradient[(len(dfirst) * split,)](
            self.q, self.k, vectors, self.runs, references, *errors, slopes, curves,
            inner, dinner, do, dhidden, derrors1, derrors2, dheld, dfirst, dstates, dback, dz, dv, dlength,
            dreference, *self._meeting(split, 2 * self.v.shape[-1] + 1), self.N, self.H, **options,
        )  # fmt: skip
        writes_gradient[self.N, self.BH](
            self.k, vectors, states, references, *errors, dkeys, dstates, dz, dlength,
            dk, dvectors, self.N, self.H, **self._options("writes_gradient"),
        )  # fmt: skip
        dgates = [x if x is None else torch.empty_like(x) for x in self.gates]
        coefficients_gradient[self.N, self.BH](
            *self.gates, None, self.filled, dG, dvectors, *dgates, self.N * self.shared["C"], self.N, self.H,
            C=self.shared["C"], MOMENTUM=self.shared["MOMENTUM"], DECAY=self.gates[2] is not None, CARRIED=False,
            SOURCES=False, WRITES=1, **self.precision, num_warps=4,
        )  # fmt: skip
        found = [dq, dk, dv, *(x for x in dgates if x is not None), dfirst]
        if not self.fades:
            options = {**self._options("base_gradient"), "REFERENCE": dreference is not None}
            dbase = self._new(GROUPS, *self.base.shape)
            base_gradient[(self.hidden // options["BF"], self.H, GROUPS)](
                self.q, self.k, hidden, errors2, inner, dinner, do, dback, dz, dv, dbase, self.B, self.N, self.H,
                **options,
            )  # fmt: skip
            found.append(dbase.sum(0))
        return found if dreference is None else [*found, dreference]

    def _coefficients(self) -> tuple[Tensor, Tensor]:
        """Those of models/kernels/momentum, whose errors refer to the chunk's first memory here: G, and vectors."""
        C, K = self.shared["C"], self.shared["K"]
        G, vectors = self._new(self.M, C, C), self._new(self.M, ROWS, C)
        coefficients[self.N, self.BH](
            self.k, self.k, *self.gates, None, self.filled, G, G, vectors, self.N * C, self.N, self.H, K,
            C=C, LOG_C=C.bit_length() - 1, BK=K, MOMENTUM=self.shared["MOMENTUM"], DECAY=self.gates[2] is not None,
            SOURCES=False, DECAYED=False, SOLVE=False, WRITES=1, OWN_WRITES=False, **self.precision, num_warps=4,
        )  # fmt: skip
        return G, vectors

    def _scan(self, vectors: Tensor, gradient: bool = False) -> tuple[Tensor, ...]:
        """N and S after every document, N at its last mini-batch; N and S, R, X_2, E_1, E_2 and the limits of all, and
        what the backward pass wants to know of the activation."""
        C, F, V = (self.shared[name] for name in "CFV")
        last, new = self.begin.clone(), self.q.new_empty
        held = self._new(len(last), self.pair)
        states, references = new(self.M, self.begin.shape[-1]), new(self.M, self.pair)
        errors = new(self.M, C, F), new(self.M, C, F), new(self.M, C, V), self._new(self.M, 3, C)
        slopes, curves = (new(self.M, C, F) if gradient else errors[0] for _ in range(2))
        options, split = self._shared_out("scan")
        scan[(len(last) * split,)](
            self.k, self.v, vectors, self.rounded, self.reference, self.runs,
            last, held, states, references, *errors, slopes, curves, *self._meeting(split, V + 2),
            self.N, self.H, GRADIENT=gradient, **options,
        )  # fmt: skip
        return last, held, states, references, *errors, slopes, curves

    def _new(self, *shape: int) -> Tensor:
        return self.begin.new_empty(shape)

    def _meeting(self, split: int, width: int) -> tuple[Tensor, Tensor]:
        """Where the programs of a document exchange `width` numbers a token, and count who has come."""
        sums = self._new(len(self.begin), split, self.shared["C"] * width)
        return sums, torch.zeros(len(self.begin), dtype=torch.int32, device=sums.device)

    def _shared_out(self, kernel: str) -> tuple[dict[str, object], int]:
        """The options of a scan, and how many programs a document of a head has; one in the interpreter, where programs
        run one after another."""
        options = {**self._options(kernel), "REFERENCE": self.reference is not None, "NOTHING": NOTHING}
        if backend.interpreting():
            options["BF"] = self.hidden
        return options, self.hidden // options["BF"]

    def _options(self, kernel: str) -> dict[str, object]:
        tile, warps, stages = HALF[kernel] if self.q.dtype != torch.float32 else WHOLE
        return {**self.shared, "BF": min(tile, self.hidden), "num_warps": warps, "num_stages": stages}
