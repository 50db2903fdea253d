"""The Triton kernels of the read-out: a program has a few heads of a token beside each other, [BG, BV]; backward of
several tokens in turn, so that their part of the weight's gradient is summed in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.pairs.tiles import activated, activated_gradient


@triton.jit
def _tile(H: tl.constexpr, V: tl.constexpr, BG: tl.constexpr, BV: tl.constexpr):
    """Columns of a head; places behind a token's first number, and which of them there are."""
    head, column = tl.program_id(1) * BG + tl.arange(0, BG), tl.arange(0, BV)
    return column, head[:, None] * V + column[None, :], (head < H)[:, None] & (column < V)[None, :]


@triton.jit
def read_out(
    o, row, weight, out, FIRST, N, eps,
    H: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, BG: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """out [tokens, H V]; the gate begins at column FIRST of row [tokens, N]."""
    token = tl.program_id(0).to(tl.int64)
    column, at, real = _tile(H, V, BG, BV)
    y = tl.load(o + token * (H * V) + at, mask=real, other=0.0).to(tl.float32)
    gate = tl.load(row + token * N + FIRST + at, mask=real, other=0.0).to(tl.float32)
    if weight is not None:
        w = tl.load(weight + column, mask=column < V, other=0.0).to(tl.float32)[None, :]
        y *= tl.rsqrt(tl.sum(y * y, 1) / V + eps)[:, None] * w
    a, _ = activated(gate, GATE)
    tl.store(out + token * (H * V) + at, (y * a).to(out.dtype.element_ty), mask=real)


@triton.jit
def read_out_gradient(
    o, row, weight, dout, do, drow, dweight, FIRST, N, tokens, eps,
    H: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, BG: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """do [tokens, H, V], the gate's columns of drow [tokens, N], and of the program's numbers dweight [programs, V]."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    column, at, real = _tile(H, V, BG, BV)
    dw = tl.zeros([BG, BV], tl.float32)
    if weight is not None:
        w = tl.load(weight + column, mask=column < V, other=0.0).to(tl.float32)[None, :]
    for i in range(0, ROWS):
        token = first + i
        inside = (real.to(tl.int32) & (token < tokens).to(tl.int32)) != 0
        y = tl.load(o + token * (H * V) + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dout + token * (H * V) + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(row + token * N + FIRST + at, mask=inside, other=0.0).to(tl.float32)
        a, s = activated(gate, GATE)
        if weight is not None:
            inverse = tl.rsqrt(tl.sum(y * y, 1) / V + eps)[:, None]
            n = y * inverse
            dgate = activated_gradient(d * n * w, a, s, GATE)
            d *= a
            dw += d * n
            d *= w
            d = (d - n * (tl.sum(d * n, 1) / V)[:, None]) * inverse
        else:
            dgate = activated_gradient(d * y, a, s, GATE)
            d *= a
        tl.store(drow + token * N + FIRST + at, dgate.to(drow.dtype.element_ty), mask=inside)
        tl.store(do + token * (H * V) + at, d.to(do.dtype.element_ty), mask=inside)
    if weight is not None:
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(dweight + program * V + column, tl.sum(dw, 0), mask=column < V)
