"""Least squares in chunks: (H_t + Lambda) x_t = b_t of all tokens of a chunk, by conjugate gradients in one kernel.

The problem is in models/regression/least_squares/solvers.py, `conjugate_gradients` the same solver in PyTorch, which
makes three products of all chunks a step, and reads and writes eight tensors of their size.
Products.   Of float16, which keeps as many bits as TF32 and needs half the shared memory. Operands are over a power of
            two, or over their length, so that none is too large or too small for it. A descent has the 11 first bits
            of each operand, and makes a residual 64 times smaller. Then it is measured with 22 bits, by products of
            both halves of an operand, and put in the place of the one that was updated. Directions go on with it (van
            der Vorst and Ye 2000) where the two are alike, and else begin anew. It works while condition number times
            rounding is small: with 11 bits a matrix of condition 600 need not be positive definite, and then steps
            lead anywhere. A descent that has not made a token's residual ten times smaller in truth is as if it had
            not been. What such tokens have left is measured in float64, and their further descents take 22 bits: at a
            condition of 1e3 the product of a solution rounds by more than the tolerance, and no x that float32 can hold
            would be known to meet it.
Start, end. From zero, and until |b - x A| <= tolerance |b| or max_steps, or a descent with 22 bits has not halved the
            residual. A token that is there stays as it is, whatever others do.
Cost.       A step is K^2 + 2 C K multiply-adds a token and head. H and the keys are in shared memory, W comes from the
            cache. A measurement costs as much as two or three, and a solve to 1e-5 has three. One in float64 has as
            many multiply-adds, on tensor cores that make a fourteenth of float16's; it is made in chunks alone where a
            descent with 11 bits was in vain, by a second launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels import backend

WIDEST = 128
LONGEST = 64  # tokens of a chunk
SHARED = 144 << 10  # bytes of shared memory that a program has for keys of WIDEST; half of that for keys half as wide
GAIN = 2.0**-6  # what a descent makes of a residual
CHANNELS = 16  # of a product in float64 at a time
PATIENCE = 24  # steps of a descent with 11 bits: where it needs more, rounding has stopped it


def refusal(device: torch.device, dtype: torch.dtype, key_dim: int) -> str | None:
    """Why the kernel can't run here, or None if it can. dtype is that of q, k and v."""
    if (reason := backend.refusal(device, dtype)) is not None:
        return reason
    if dtype == torch.float32:
        return "the kernel solves in float32, and pairs in float32 have moments in float64"
    if key_dim > WIDEST:
        return f"the kernel holds whole keys, up to {WIDEST} wide, not {key_dim}"
    if device.type == "cuda" and torch.cuda.is_available():
        return backend.refusal_of_gpu(device, SHARED if 2 * key_dim > WIDEST else SHARED // 2)
    return None


@torch.library.custom_op("test_time_regression::least_squares", mutates_args=())
def conjugate_gradients(
    b: Tensor,
    keys: Tensor,
    weights: Tensor,
    start: Tensor,
    first: Tensor,
    ridge: Tensor,
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, C, K], the steps that each token took [M, C, 1] and the residual |b - x A| / |b| that is left [M, C, 1].

    b [M, C, K]; keys, weights, start, first and ridge as solvers.Normal has them, all in float32, and keys with no more
    digits than 16 bits hold. ridge is of tokens [M, C, 1] or of channels [M, 1, K]. Not differentiable by itself.
    """
    from models.kernels.least_squares.kernels import solve_kernel

    M, C, K = b.shape
    results = _results(b)
    b, keys, weights = b.contiguous(), keys.contiguous(), weights.contiguous()
    start, per_token = start.expand(M, C, 1).contiguous(), ridge.shape[-1] == 1
    ridge = ridge.expand(M, C, 1).contiguous() if per_token else ridge.expand(M, 1, K)
    first = first if first.stride(-1) == 1 else first.contiguous()
    BC, BK = (max(16, 1 << (n - 1).bit_length()) for n in (C, K))
    with torch.cuda.device_of(b):
        for careful in (False, True):
            solve_kernel[(M,)](
                b, keys, weights, start, first, ridge, *results, tolerance, max_steps,
                first.stride(0), first.stride(1), ridge.stride(0),
                C=C, K=K, BC=BC, BK=BK, BJ=CHANNELS, GAIN=GAIN, PATIENCE=PATIENCE, PER_TOKEN=per_token,
                CAREFUL=careful, num_warps=8 if BK > 64 else 4,
            )  # fmt: skip
    return results


@conjugate_gradients.register_fake
def _(b, *_):
    return _results(b)


def _results(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    M, C, K = b.shape
    return b.new_empty(M, C, K), b.new_empty(M, C, 1), b.new_empty(M, C, 1)


@torch.library.custom_op("test_time_regression::scan", mutates_args=())
def scan(writes: Tensor, whole: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """S_{n+1} = whole_n S_n + writes_n: all S_n that chunks begin with, and the last. Shapes as in layout.scan."""
    from models.kernels.least_squares.kernels import scan_kernel

    before, last = _states(writes, whole, memory)
    writes, memory, rows = writes.contiguous(), memory.contiguous(), len(memory)
    size, block = memory[0].numel(), 1024
    with torch.cuda.device_of(writes):
        scan_kernel[rows, -(-size // block)](
            writes, whole, memory, before, last, len(writes) // rows, rows, size, whole.stride(0), BLOCK=block
        )
    return before, last


@scan.register_fake
def _states(writes, whole, memory):
    return writes.new_empty(writes.shape), memory.new_empty(memory.shape)


@torch.library.custom_op("test_time_regression::scan_backward", mutates_args=())
def scan_backward(dbefore: Tensor, dlast: Tensor, before: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by writes, whole and memory."""
    from models.kernels.least_squares.kernels import scan_backward_kernel

    dbefore, dlast, before, rows = dbefore.contiguous(), dlast.contiguous(), before.contiguous(), len(dlast)
    dwrites, dmemory, size, block = torch.empty_like(before), torch.empty_like(dlast), dlast[0].numel(), 1024
    blocks = -(-size // block)
    parts = before.new_empty(len(before), blocks)
    with torch.cuda.device_of(before):
        scan_backward_kernel[rows, blocks](
            dbefore, dlast, before, whole, dwrites, dmemory, parts,
            len(before) // rows, rows, size, whole.stride(0), BLOCK=block,
        )  # fmt: skip
    return dwrites, parts.sum(1).view_as(whole), dmemory


@scan_backward.register_fake
def _(dbefore, dlast, before, whole):
    return torch.empty_like(before), whole.new_empty(whole.shape), torch.empty_like(dlast)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[0], inputs[1])


scan.register_autograd(lambda ctx, *gradients: scan_backward(*gradients, *ctx.saved_tensors), setup_context=_keep)
