"""The Triton kernels of a residual with the norm after it. Forward a program has one row, backward several in turn, so
that their part of the weight's gradient is summed in registers. Rows are contiguous."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def add_and_norm(x, y, weight, total, out, inverse, eps, D, BLOCK: tl.constexpr):
    """total [N, D] = x + y; out [N, D]; inverse [N], 1 / rms, where it is kept."""
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    real = channel < D
    TYPE: tl.constexpr = total.dtype.element_ty
    a = tl.load(x + row * D + channel, mask=real, other=0.0).to(tl.float32)
    b = tl.load(y + row * D + channel, mask=real, other=0.0).to(tl.float32)
    w = rounded(tl.load(weight + channel, mask=real, other=0.0), TYPE)
    a = rounded(a + b, TYPE)
    tl.store(total + row * D + channel, a.to(TYPE), mask=real)
    scale = tl.rsqrt(tl.sum(a * a, 0) / D + eps)
    tl.store(out + row * D + channel, rounded(a * scale * w, TYPE).to(out.dtype.element_ty), mask=real)
    if inverse is not None:
        tl.store(inverse + row, scale)


@triton.jit
def add_and_norm_gradient(
    total, inverse, weight, dtotal, dout, dx, dy, dweight, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """dx [N, D], dy [N, D] where its dtype is another, and of the program's rows dweight [programs, D]."""
    first, channel = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, BLOCK)
    real = channel < D
    w = rounded(tl.load(weight + channel, mask=real, other=0.0), total.dtype.element_ty)
    dw = tl.zeros([BLOCK], tl.float32)
    for i in range(0, ROWS):
        row = first + i
        inside = (real.to(tl.int32) & (row < N).to(tl.int32)) != 0
        at = row * D + channel
        scale = tl.load(inverse + row, mask=row < N, other=0.0)
        n = tl.load(total + at, mask=inside, other=0.0).to(tl.float32) * scale
        d = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        dw += d * n
        d *= w
        # a row's length is not in its norm: what goes along the row is taken off
        d = (d - n * (tl.sum(d * n, 0) / D)) * scale
        if dtotal is not None:
            d += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
        if dy is not None:
            tl.store(dy + at, d.to(dy.dtype.element_ty), mask=inside)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * D + channel, dw, mask=real)
