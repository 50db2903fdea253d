"""The Triton kernels of SwiGLU: one program for BLOCK columns of a token. ab and dab [N, 2 F], h and dh [N, F]."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(F, BLOCK: tl.constexpr):
    """Where the token's row begins, in numbers of F; the columns; which of them there are."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return tl.program_id(0).to(tl.int64) * F, column, column < F


@triton.jit
def gate(ab, h, F, BLOCK: tl.constexpr):
    row, column, mask = _place(F, BLOCK)
    a = tl.load(ab + 2 * row + column, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(ab + 2 * row + F + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(h + row + column, (a * tl.sigmoid(a) * b).to(h.dtype.element_ty), mask=mask)


@triton.jit
def gate_gradient(ab, dh, dab, F, BLOCK: tl.constexpr):
    """dh becomes h."""
    row, column, mask = _place(F, BLOCK)
    a = tl.load(ab + 2 * row + column, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(ab + 2 * row + F + column, mask=mask, other=0.0).to(tl.float32)
    upstream = tl.load(dh + row + column, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    silu = a * s
    dtype: tl.constexpr = dh.dtype.element_ty
    tl.store(dab + 2 * row + column, (upstream * b * s * (1.0 + a * (1.0 - s))).to(dtype), mask=mask)
    tl.store(dab + 2 * row + F + column, (upstream * silu).to(dtype), mask=mask)
    tl.debug_barrier()  # all threads have read dh
    tl.store(dh + row + column, (silu * b).to(dtype), mask=mask)
