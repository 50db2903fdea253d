"""The Triton kernel of cross-entropy: one program a token, BLOCK logits of its row at a time."""

from __future__ import annotations

import triton
import triton.language as tl

IGNORED = tl.constexpr(-100)
LOWEST = tl.constexpr(-3e38)  # below all logits, and finite: the difference of two is a number
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def cross_entropy(logits, targets, nats, likeliest, stride, V, BLOCK: tl.constexpr):
    """likeliest is None where the gradient is wanted, which replaces the logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    # before any thread writes a gradient: the sums below are a barrier
    picked = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    column = tl.arange(0, BLOCK)
    most, total = tl.full([BLOCK], LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)  # of every BLOCK-th logit
    first = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        mask = start + column < V
        x = tl.load(logits + start + column, mask=mask, other=-float("inf")).to(tl.float32)
        # one exponential for both cases: of two terms of a sum the larger is scaled to one
        smaller = tl.exp2(-tl.abs(x - most) * LOG2_E)
        total = tl.where(x > most, total * smaller + 1.0, total + smaller)
        if likeliest is not None:
            first = tl.where(x > most, start + column, first)
        most = tl.maximum(most, x)
    largest = tl.max(most, 0)
    whole = tl.sum(total * tl.exp2((most - largest) * LOG2_E), 0)
    kept = target != IGNORED
    tl.store(nats + row, tl.where(kept, largest - picked + tl.log(whole), 0.0))
    if likeliest is not None:
        tl.store(likeliest + row, tl.min(tl.where(most == largest, first, V), 0))
    else:
        log_whole = tl.log2(whole)
        for start in range(0, V, BLOCK):
            mask = start + column < V
            x = tl.load(logits + start + column, mask=mask, other=0.0).to(tl.float32)
            gradient = tl.exp2((x - largest) * LOG2_E - log_whole) - tl.where(start + column == target, 1.0, 0.0)
            gradient = tl.where(kept, gradient, 0.0)
            tl.store(logits + start + column, gradient.to(logits.dtype.element_ty), mask=mask)
