"""The Triton kernel of a least-squares solve; what it computes is in __init__.py.

One program per chunk: it holds x, the residual and the direction of all tokens of the chunk, and reads keys, weights
and the chunk's first matrix anew for every product, from the cache that all programs share.

b, x [M, C, K], keys [M, C, K], weights [M, C, C], start, steps and residual [M, C], float32 and contiguous; first
[M, K, K] and ridge [M, C, K] by their strides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.intervals import load


@triton.jit
def times(
    p, keys, weights, first, first_row, start, ridge,
    C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p_t A_t of every token."""
    rows, channels = tl.arange(0, BC), tl.arange(0, BK)
    matrix = load(first, channels, K, first_row, K, BK)
    y = tl.dot(p, matrix, input_precision=PRECISION) * start[:, None]
    k = load(keys, rows, C, K, K, BK)
    attend = tl.dot(p, tl.trans(k), input_precision=PRECISION) * load(weights, rows, C, C, C, BC)
    return tl.dot(attend, k, y, input_precision=PRECISION) + p * ridge


@triton.jit
def descend(
    r, p, squares, goal, steps, most, keys, weights, first, first_row, start, ridge,
    C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Conjugate gradients from the residual r and along p until |r|^2 <= goal, of the tokens that have not taken the
    most steps. By how much x has moved, the residual that this leaves by its own account, the next direction, and the
    steps that each token has taken."""
    d, active = tl.zeros_like(r), (squares > goal) & (steps < most)
    while tl.max(active.to(tl.int32), 0) > 0:
        moved = times(p, keys, weights, first, first_row, start, ridge, C, K, BC, BK, PRECISION)
        along = tl.sum(p * moved, 1)
        alpha = tl.where(active, squares / tl.where(active, along, 1.0), 0.0)
        d += alpha[:, None] * p
        r -= alpha[:, None] * moved
        before, squares = squares, tl.sum(r * r, 1)
        p = tl.where(active[:, None], r + (squares / tl.where(active, before, 1.0))[:, None] * p, p)
        steps += active.to(tl.int32)
        active &= (squares > goal) & (steps < most)
    return d, r, p, steps


@triton.jit(do_not_specialize=["max_steps"])
def solve_kernel(
    b, keys, weights, start, first, ridge, x_out, steps_out, residual_out, tolerance, max_steps,
    first_matrix, first_row, ridge_matrix, ridge_row, ridge_channel,
    C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, FAST: tl.constexpr, EXACT: tl.constexpr,
    GAIN: tl.constexpr, PATIENCE: tl.constexpr,
):  # fmt: skip
    """x, with the steps and the residual of each token."""
    m = tl.program_id(0).to(tl.int64)
    rows, channels = tl.arange(0, BC), tl.arange(0, BK)
    inside = (rows < C)[:, None] & (channels < K)[None, :]
    keys += m * C * K
    weights += m * C * C
    first += m * first_matrix
    s = tl.load(start + m * C + rows, mask=rows < C, other=0.0)
    places = ridge + m * ridge_matrix + rows[:, None] * ridge_row + channels[None, :] * ridge_channel
    penalty = tl.load(places, mask=inside, other=1.0)

    right = load(b + m * C * K, rows, C, K, K, BK)
    size = tl.max(tl.abs(right), 1)
    right = right / tl.where(size > 0, size, 1.0)[:, None]  # squares of it neither overflow nor underflow
    length = tl.sum(right * right, 1)
    goal = tolerance * tolerance * length

    k = load(keys, rows, C, K, K, BK)
    diagonal = tl.load(first + channels * (first_row + 1), mask=channels < K, other=0.0)
    diagonal = s[:, None] * diagonal[None, :] + penalty
    diagonal = tl.dot(load(weights, rows, C, C, C, BC), k * k, diagonal, input_precision=FAST)
    x = right / diagonal
    r = right - times(x, keys, weights, first, first_row, s, penalty, C, K, BC, BK, EXACT)
    squares, p = tl.sum(r * r, 1), r
    steps = tl.zeros_like(s).to(tl.int32)
    careful, stuck = 0, tl.zeros_like(s) > 0
    busy = tl.max(((squares > goal) & (max_steps > 0)).to(tl.int32), 0)
    while busy > 0:
        nearer = tl.maximum(GAIN * GAIN * squares, 0.25 * goal)
        nearer = tl.where((squares > goal) & ~stuck, nearer, squares)  # who is done stays as it is
        if careful > 0:
            d, said, p, taken = descend(
                r, p, squares, nearer, steps, tl.zeros_like(steps) + max_steps,
                keys, weights, first, first_row, s, penalty, C, K, BC, BK, EXACT,
            )  # fmt: skip
        else:
            d, said, p, taken = descend(
                r, p, squares, nearer, steps, tl.minimum(steps + PATIENCE, max_steps),
                keys, weights, first, first_row, s, penalty, C, K, BC, BK, FAST,
            )  # fmt: skip
        r = right - times(x + d, keys, weights, first, first_row, s, penalty, C, K, BC, BK, EXACT)
        before, squares = squares, tl.sum(r * r, 1)
        slow = (before > goal) & ~stuck & ~(squares <= tl.maximum(before * 0.01, goal))  # or not a number
        # a residual may grow by the root of the condition, for a while: beyond 1e4 it is rounding that made it so
        vain = slow & ((careful == 0) | ~(squares <= before * 1e4))
        x += tl.where(vain[:, None], 0.0, d)
        steps = tl.where(vain, steps, taken)
        if tl.max(vain.to(tl.int32), 0) > 0:  # as if their descent had not been
            r = right - times(x, keys, weights, first, first_row, s, penalty, C, K, BC, BK, EXACT)
            squares = tl.sum(r * r, 1)
        stuck |= slow & (careful > 0)  # as far as float32 goes
        anew = tl.max(slow.to(tl.int32), 0) > careful
        careful = tl.maximum(careful, tl.max(slow.to(tl.int32), 0))
        p = tl.where((slow | anew)[:, None], r, p + r - said)  # else directions go on, so that no step is lost
        busy = tl.max(((squares > goal) & (steps < max_steps) & ~stuck).to(tl.int32), 0)
    places = m * C + rows
    tl.store(x_out + places[:, None] * K + channels[None, :], x * size[:, None], mask=inside)
    tl.store(steps_out + places, steps.to(tl.float32), mask=rows < C)
    left = tl.sqrt(squares / tl.where(length > 0, length, 1.0))
    tl.store(residual_out + places, left, mask=rows < C)


@triton.jit(do_not_specialize=["N", "rows"])
def scan_kernel(writes, whole, memory, before, last, N, rows, size, whole_row, BLOCK: tl.constexpr):
    """The states of one sequence, a block of their entries: chunk n of sequence m is matrix n rows + m."""
    m, place = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    state = tl.load(memory + m.to(tl.int64) * size + place, mask=inside, other=0.0)
    for n in range(N):
        at = (n * rows + m).to(tl.int64)
        tl.store(before + at * size + place, state, mask=inside)
        state = tl.load(whole + at * whole_row) * state + tl.load(writes + at * size + place, mask=inside, other=0.0)
    tl.store(last + m.to(tl.int64) * size + place, state, mask=inside)


@triton.jit(do_not_specialize=["N", "rows"])
def scan_backward_kernel(
    dbefore, dlast, before, whole, dwrites, dmemory, parts, N, rows, size, whole_row, BLOCK: tl.constexpr
):
    """From the last chunk to the first. parts: each block's share of the gradient by whole."""
    m, place = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    gradient = tl.load(dlast + m.to(tl.int64) * size + place, mask=inside, other=0.0)
    for i in range(N):
        at = ((N - 1 - i) * rows + m).to(tl.int64)
        tl.store(dwrites + at * size + place, gradient, mask=inside)
        state = tl.load(before + at * size + place, mask=inside, other=0.0)
        tl.store(parts + at * tl.num_programs(1) + tl.program_id(1), tl.sum(gradient * state, 0))
        gradient = tl.load(whole + at * whole_row) * gradient
        gradient += tl.load(dbefore + at * size + place, mask=inside, other=0.0)
    tl.store(dmemory + m.to(tl.int64) * size + place, gradient, mask=inside)
