"""Sums that programs have left row by row, added up: the last step of a weight's gradient, in one short launch and in
the same order every time. PyTorch's own has few programs for few columns, and waits for memory most of its time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.backend import cdiv

ROWS, COLUMNS = 512, 8  # of a tile: short rows make many programs, and 32 bytes are what memory gives at least


@triton.jit
def column_sums(x, out, N, M, W, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [M / W, W] of x [N, M], whose columns are W rows of M / W."""
    row, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, N, ROWS):
        real = (start + row < N)[:, None] & (column < M)[None, :]
        total += tl.load(x + (start + row).to(tl.int64)[:, None] * M + column[None, :], mask=real, other=0.0)
    C = M // W
    place = column % C * W + column // C
    tl.store(out + place, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < M)


def summed(x: Tensor, like: Tensor) -> Tensor:
    """The sums over rows of x [N, *], float32, in the shape and dtype of `like`: a vector [M] of x [N, M], or [C, W] of
    x [N, W, C]."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    N, M = len(x), like.numel()
    if M:
        width = 1 if like.ndim < 2 else like.shape[1]
        with torch.cuda.device_of(x):
            column_sums[(cdiv(M, COLUMNS),)](
                x, out, N, M, width, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8
            )  # fmt: skip
    return out
