"""Rows that are cut into spans, which are scanned side by side: for few rows of many chunks, whose scan has fewer
programs than the GPU has multiprocessors, and goes through all chunks of a row one after the other.

The memory that a span ends with is affine in the one it begins with, S' = A S + b: A [K, K] is the product of what its
chunks do to a memory, b [K, V] what it writes to an empty one. So

    a scan of every span by itself, which leaves nothing behind but b and A: further columns of values are all zeros,
    and their first memory is the identity, so that their last one is A,
    `join`, which goes from span to span, and finds the memory that each of them begins with,
    and the scan as it is without spans, of all spans at once, each from its own first memory.

Backward likewise, by dS = A^T dS' + c, with A kept from the forward pass: a scan that leaves c, `join`, and the scan as
it is. A document's end in a span closes a gate, or masks a memory, and A is 0 after it as the memory is.

Spans differ by a chunk at most. Of what has one matrix per span, span s of a sequence's head bh is number s B H + bh.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.backend import cdiv, next_power_of_2
from models.kernels.momentum.tiles import dot

# Two passes go through each span, and the first of them has twice the columns. With every multiprocessor at work a
# chunk takes longer too, since all wait for the same memory: with three spans nothing was won.
LEAST_SPANS = 4
# Of a span: with fewer chunks `join`, and the launches of two more kernels, take as long as what is saved.
LEAST_CHUNKS = 32
COLUMNS = 16  # of the values, of a program of `join`


def num_spans(x: Tensor, num_programs: int, num_chunks: int) -> int:
    """How many spans rows of so many chunks are cut into, where their scan has so many programs on the GPU of x: as
    many as have a multiprocessor each, or 1 if that is too few to pay. By sizes and the GPU alone, so that all runs of
    a model have the same."""
    if not x.is_cuda:
        return 1
    gpu: Any = torch.cuda.get_device_properties(x.device)
    found = min(gpu.multi_processor_count // num_programs, num_chunks // LEAST_CHUNKS)
    return found if found >= LEAST_SPANS else 1


@triton.jit
def span_of(program, N, SPANS: tl.constexpr):
    """The sequence's head of a program of the grid's second axis, and the chunks of its span: the first, and the one
    after its last."""
    if SPANS == 1:
        return program, 0, N
    else:
        rows = tl.num_programs(1) // SPANS
        s = program // rows
        return program % rows, s * N // SPANS, (s + 1) * N // SPANS


@triton.jit
def join(
    first,  # [B H, K, V]: of the first span; backward the gradient by the last memory, or None
    affine,  # [SPANS B H, K, V + K]: b and A
    added,  # [SPANS B H, K, V] with rows of WIDTH: b; backward c
    memories,  # out, [SPANS B H, K, V]: what every span begins with; backward the gradient by what it ends with
    K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, SPANS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """S' = A S + b from span to span, or dS = A^T dS' + c from the last one to the first, of some columns of the
    values. Memories are turned around, as in the scans, and products are of float32."""
    bh, rows = tl.program_id(1), tl.num_programs(1)
    v, k = tl.program_id(0) * BV + tl.arange(0, BV), tl.arange(0, BK)
    inside = (v < V)[:, None] & (k < K)[None, :]
    memory = tl.zeros([BV, BK], tl.float32)
    if first is not None:
        memory = tl.load(first + bh.to(tl.int64) * (K * V) + (k[None, :] * V + v[:, None]), mask=inside, other=0.0)
    square = (k < K)[:, None] & (k < K)[None, :]
    turned = k[:, None] * (V + K) + V + k[None, :] if BACKWARD else k[None, :] * (V + K) + V + k[:, None]
    for i in tl.range(SPANS):
        number = (rows * (SPANS - 1 - i if BACKWARD else i) + bh).to(tl.int64)
        tl.store(memories + number * (K * V) + (k[None, :] * V + v[:, None]), memory, mask=inside)
        A = tl.load(affine + number * (K * (V + K)) + turned, mask=square, other=0.0)
        b = tl.load(added + number * (K * WIDTH) + (k[None, :] * WIDTH + v[:, None]), mask=inside, other=0.0)
        memory = dot(memory, A, "tf32x3", b)


def joined(first: Tensor | None, affine: Tensor, backward: Tensor | None = None) -> Tensor:
    """The memories [SPANS, B, H, K, V] that spans begin with, from the first of them, [B, H, K, V], and affine
    [SPANS, B, H, K, V + K], b and A. Or the gradients by those they end with, from `backward`, c [SPANS, B, H, K, V],
    and the gradient by the last one, None for zeros."""
    spans, B, H, K, width = affine.shape
    V, added = width - K, affine if backward is None else backward
    memories = affine.new_empty(spans, B, H, K, V)
    join[cdiv(V, COLUMNS), B * H](
        first, affine, added, memories, K=K, V=V, WIDTH=added.shape[-1], SPANS=spans, BK=max(16, next_power_of_2(K)),
        BV=COLUMNS, BACKWARD=backward is not None, num_warps=4, num_stages=2,
    )  # fmt: skip
    return memories
