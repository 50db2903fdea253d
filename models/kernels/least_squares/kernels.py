"""The Triton kernel of a least-squares solve; what it computes is in __init__.py.

One program per chunk: it holds x, the residual and the direction of all tokens of the chunk, and reads keys, weights
and the chunk's first matrix anew for every product, from the cache that all programs share. It is launched twice: the
second time for what rounding has stopped, and where that is nothing a program ends at once. So the first is compiled
without what float64 wants of registers.

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
def left_over(
    right, x, wanted, place, keys, weights, first, first_row, start, ridge,
    C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """right_t - x_t A_t of the tokens wanted, by products in float64. x goes to `place` [C, K] and comes back by BJ
    channels at a time: a tile of all is not cut in registers, and all of `first` would not fit beside it."""
    rows, channels = tl.arange(0, BC), tl.arange(0, BK)
    inside = wanted[:, None] & (channels < K)[None, :]
    tl.store(place + rows[:, None] * K + channels[None, :], x, mask=inside)
    tl.debug_barrier()
    r = right.to(tl.float64) - x.to(tl.float64) * ridge.to(tl.float64)
    attend, s = tl.zeros([BC, BC], tl.float64), start.to(tl.float64)
    for j in range(0, K, BJ):
        part = j + tl.arange(0, BJ)
        x_j = tl.load(place + rows[:, None] * K + part[None, :], mask=wanted[:, None] & (part < K)[None, :], other=0.0)
        k_j = tl.load(
            keys + rows[:, None] * K + part[None, :], mask=(rows < C)[:, None] & (part < K)[None, :], other=0.0
        )
        first_j = tl.load(
            first + part[:, None] * first_row + channels[None, :],
            mask=(part < K)[:, None] & (channels < K)[None, :], other=0.0,
        )  # fmt: skip
        exact = x_j.to(tl.float64)
        attend = tl.dot(exact, tl.trans(k_j.to(tl.float64)), attend, out_dtype=tl.float64)
        r = tl.dot(exact * -s[:, None], first_j.to(tl.float64), r, out_dtype=tl.float64)
    attend *= load(weights, rows, C, C, C, BC).to(tl.float64)
    r = tl.dot(-attend, load(keys, rows, C, K, K, BK).to(tl.float64), r, out_dtype=tl.float64)
    tl.debug_barrier()  # all have read before the next x is written
    return tl.where(wanted[:, None], r.to(tl.float32), 0.0)


@triton.jit
def descend(
    r, p, squares, goal, steps, most, keys, weights, first, first_row, start, ridge,
    C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Conjugate gradients from the residual r and along p until |r|^2 <= goal, of the tokens that have not taken the
    most steps. By how much x has moved, the square of the residual that this leaves by its own account, what the next
    direction has beside that residual, and the steps that each token has taken."""
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
    return d, squares, p - r, steps


@triton.jit
def approach(
    x, right, going, goal, steps, max_steps, place, keys, weights, first, first_row, start, ridge,
    C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr, GAIN: tl.constexpr, patience,
):  # fmt: skip
    """Descents of the tokens that are `going`, until |right - x A|^2 <= goal, or one has not gained enough. x, the
    squares that are left, and the steps."""
    enough: tl.constexpr = 0.25 if CAREFUL else 0.01
    # within a descent a residual may grow by the root of the condition: beyond 1e4 it is rounding that made it so
    trusted: tl.constexpr = 1e4 if CAREFUL else 0.01
    d, said, rest, taken = tl.zeros_like(x), tl.zeros_like(goal), tl.zeros_like(x), steps
    squares = tl.zeros_like(goal) + float("inf")
    while tl.max(going.to(tl.int32), 0) > 0:
        if CAREFUL:
            r = left_over(right, x + d, going, place, keys, weights, first, first_row, start, ridge, C, K, BC, BK, BJ)
        else:
            r = right - times(x + d, keys, weights, first, first_row, start, ridge, C, K, BC, BK, "tf32x3")
        before, found = squares, tl.sum(r * r, 1)
        slow = ~(found <= tl.maximum(before * enough, goal))  # or not a number
        vain = slow & ~(found <= before * trusted)  # as if this descent had not been
        x += tl.where(vain[:, None], 0.0, d)
        steps = tl.where(going & ~vain, taken, steps)
        squares = tl.where(going & ~vain, found, before)
        going &= ~slow & (squares > goal) & (steps < max_steps)
        known = (found <= 4 * said) & (said <= 4 * found)  # else directions are of other products, and begin anew
        p = tl.where(going[:, None], r + tl.where(known[:, None], rest, 0.0), 0.0)
        found = tl.where(going, found, 0.0)
        nearer = tl.where(going, tl.maximum(GAIN * GAIN * found, 0.25 * goal), 0.0)
        d, said, rest, taken = descend(
            r, p, found, nearer, steps, tl.minimum(steps + patience, max_steps),
            keys, weights, first, first_row, start, ridge, C, K, BC, BK, PRECISION,
        )  # fmt: skip
    return x, squares, steps


@triton.jit
def scaled(b, C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr):
    """b of every token with a largest entry of one, whose squares neither overflow nor underflow; the size that it had,
    and the square of its length."""
    right = load(b, tl.arange(0, BC), C, K, K, BK)
    size = tl.max(tl.abs(right), 1)
    right = right / tl.where(size > 0, size, 1.0)[:, None]
    return right, size, tl.sum(right * right, 1)


@triton.jit(do_not_specialize=["max_steps"])
def solve_kernel(
    b, keys, weights, start, first, ridge, x_out, steps_out, residual_out, tolerance, max_steps,
    first_matrix, first_row, ridge_matrix, ridge_row, ridge_channel,
    C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, GAIN: tl.constexpr,
    PATIENCE: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """x, with the steps and the residual of each token. By descents in TF32: the residual of a token for which one was
    in vain is negative. Then, CAREFUL, those tokens from where they are, with all digits."""
    m = tl.program_id(0).to(tl.int64)
    rows, channels = tl.arange(0, BC), tl.arange(0, BK)
    x_out += m * C * K
    steps_out += m * C
    residual_out += m * C
    going = rows < C
    if CAREFUL:
        going = tl.load(residual_out + rows, mask=rows < C, other=0.0) < 0
    if tl.max(going.to(tl.int32), 0) > 0:
        keys += m * C * K
        weights += m * C * C
        first += m * first_matrix
        s = tl.load(start + m * C + rows, mask=rows < C, other=0.0)
        places = ridge + m * ridge_matrix + rows[:, None] * ridge_row + channels[None, :] * ridge_channel
        penalty = tl.load(places, mask=(rows < C)[:, None] & (channels < K)[None, :], other=1.0)
        right, size, length = scaled(b + m * C * K, C, K, BC, BK)
        goal = tolerance * tolerance * length
        if CAREFUL:
            steps = tl.load(steps_out + rows, mask=going, other=0.0).to(tl.int32)
            x = load(x_out, rows, C, K, K, BK) / tl.where(size > 0, size, 1.0)[:, None]
            x = tl.where(going[:, None], x, 0.0)
            x, squares, steps = approach(
                x, right, going, goal, steps, max_steps, x_out, keys, weights, first, first_row, s, penalty,
                C, K, BC, BK, BJ, "tf32x3", True, GAIN, max_steps,
            )  # fmt: skip
        else:
            k = load(keys, rows, C, K, K, BK)
            diagonal = tl.load(first + channels * (first_row + 1), mask=channels < K, other=0.0)
            diagonal = s[:, None] * diagonal[None, :] + penalty
            diagonal = tl.dot(load(weights, rows, C, C, C, BC), k * k, diagonal, input_precision="tf32")
            x, steps = right / diagonal, tl.zeros_like(s).to(tl.int32)
            x, squares, steps = approach(
                x, right, going, goal, steps, max_steps, x_out, keys, weights, first, first_row, s, penalty,
                C, K, BC, BK, BJ, "tf32", False, GAIN, PATIENCE,
            )  # fmt: skip
        inside = going[:, None] & (channels < K)[None, :]
        tl.store(x_out + rows[:, None] * K + channels[None, :], x * size[:, None], mask=inside)
        tl.store(steps_out + rows, steps.to(tl.float32), mask=going)
        left = tl.sqrt(squares / tl.where(length > 0, length, 1.0))
        if not CAREFUL:
            left = tl.where((squares > goal) & (steps < max_steps), -left, left)
        tl.store(residual_out + rows, left, mask=going)


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
