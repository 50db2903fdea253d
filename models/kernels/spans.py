"""Rows that are cut into spans, which are scanned side by side: for few rows of many chunks, whose scan has fewer
programs than the GPU has multiprocessors, and goes through all chunks of a row one after the other.

The memory that a span ends with is affine in the one it begins with, S' = A S + b: A [K, K] is the product of what its
chunks do to a memory, b [K, V] what it writes to an empty one. So

    a scan of every span by itself, which leaves nothing behind but b and A: further columns of values are all zeros,
    and their first memory is the identity, so that their last one is A,
    `join`, which goes from span to span, and finds the memory that each of them begins with,
    and the scan as it is without spans, of all spans at once, each from its own first memory.

Backward likewise, by dS = A^T dS' + c, with A kept from the forward pass: a scan that leaves c, `join`, and the scan as
it is. A document's start in a span closes a gate, or masks a memory: A is then what the memory is, 0 or e^-64 of it.

Spans differ by a chunk at most. Of what has one matrix per span, span s of a sequence's head bh is number s B H + bh.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.backend import cdiv, next_power_of_2
from models.kernels.delta.tiles import of_memory
from models.kernels.momentum.tiles import dot

# Two passes go through each span, and with every multiprocessor at work a chunk takes longer, since all wait for the
# same memory: with three spans nothing would be won (docs/kernels.md).
LEAST_SPANS = 4
# Of a span: with fewer chunks `join`, and the launches of two more kernels, take as long as what is saved.
LEAST_CHUNKS = 32
COLUMNS = 16  # of the values, of a program of `join`


def num_spans(x: Tensor, num_programs: int, num_chunks: int) -> int:
    """How many spans rows of so many chunks are cut into, where their scan has so many programs on the GPU of x: as
    many as have a multiprocessor each, or 1 if those are too few. By sizes and the GPU alone, so that all runs of a
    model have the same."""
    if not x.is_cuda:
        return 1
    gpu: Any = torch.cuda.get_device_properties(x.device)
    found = min(gpu.multi_processor_count // num_programs, num_chunks // LEAST_CHUNKS)
    return found if found >= LEAST_SPANS else 1


@triton.jit
def span_of(program, N, spans):
    """The sequence's head of a program of the grid's second axis, and the chunks of its span: the first, and the one
    after its last. spans: how many a row has, at most as many as chunks; None for 1, so that nothing is left of them in
    what is compiled."""
    if spans is None:
        return program, 0, N
    else:
        rows = tl.num_programs(1) // spans
        s = program // rows
        return program % rows, s * N // spans, (s + 1) * N // spans


@triton.jit(do_not_specialize=["spans"])
def join(
    first,  # [B H, K, V]: of the first span; backward the gradient by the last memory, or None for zeros
    affine,  # [spans B H, K, V + K]: b and A
    added,  # [spans B H, K, WIDTH], of which V columns: b; backward c
    memories,  # out, [spans B H, K, V]: what every span begins with; backward the gradient by what it ends with
    spans, K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """S' = A S + b from span to span, or dS = A^T dS' + c from the last one to the first, of BV columns of the values,
    turned around. A memory is an operand as it was stored: in registers there is no room for it and all of A."""
    bh, rows = tl.program_id(1), tl.num_programs(1)
    v, k = tl.program_id(0) * BV + tl.arange(0, BV), tl.arange(0, BK)
    step = -rows if BACKWARD else rows
    number = bh + (spans - 1) * rows if BACKWARD else bh
    at, inside = of_memory(memories, number, v, k, V, K)
    memory = tl.zeros([BV, BK], tl.float32)
    if first is not None:
        at_first, _ = of_memory(first, bh, v, k, V, K)
        memory = tl.load(at_first, mask=inside, other=0.0)
    tl.store(at, memory, mask=inside)
    for _ in range(spans - 1):
        tl.debug_barrier()
        at, _ = of_memory(added, number, v, k, WIDTH, K)
        memory = tl.load(at, mask=inside, other=0.0)
        A = affine + number.to(tl.int64) * (K * (V + K)) + V
        for start in range(0, K, BLOCK):
            j = start + tl.arange(0, BLOCK)
            at_j, real = of_memory(memories, number, v, j, V, K)
            before = tl.load(at_j, mask=real, other=0.0)
            place = j[:, None] * (V + K) + k[None, :] if BACKWARD else k[None, :] * (V + K) + j[:, None]
            block = tl.load(A + place, mask=(j < K)[:, None] & (k < K)[None, :], other=0.0)
            memory = dot(before, block, "tf32x3", memory)
        number += step
        at, _ = of_memory(memories, number, v, k, V, K)
        tl.store(at, memory, mask=inside)


def joined(first: Tensor | None, affine: Tensor, backward: Tensor | None = None) -> Tensor:
    """The memories [spans, B, H, K, V] that spans begin with, from the first of them, [B, H, K, V], and affine
    [spans, B, H, K, V + K], b and A. Or the gradients by those they end with, from `backward`, c [spans, B, H, K, V],
    and the gradient by the last one, None for zeros."""
    spans, B, H, K, width = affine.shape
    V, added = width - K, affine if backward is None else backward
    memories, BK = affine.new_empty(spans, B, H, K, V), max(16, next_power_of_2(K))
    num_warps, num_stages = (8, 4) if BK > 64 else (4, 2)  # a block of A is on its way while three wait
    join[cdiv(V, COLUMNS), B * H](
        first, affine, added, memories, spans, K=K, V=V, WIDTH=added.shape[-1], BK=BK, BV=COLUMNS,
        BLOCK=min(BK, 8192 // BK), BACKWARD=backward is not None, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return memories
