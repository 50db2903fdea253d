"""The Triton kernel of a least-squares solve; what it computes is in __init__.py.

One program per chunk: it holds the residual and the direction of all tokens of the chunk, and by how much x has moved,
in registers, and the keys and both halves of the chunk's first matrix in shared memory. x, b and the weights come from
memory when they are wanted. It is launched twice: the second time for what rounding has stopped, and where that is
nothing a program ends at once. So the first is compiled without what float64 wants of registers.

b, x [M, C, K], keys [M, C, K], weights [M, C, C], start, steps and residual [M, C], float32 and contiguous; first
[M, K, K] by its strides; ridge [M, C, 1] or [M, 1, K], by one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.intervals import load


@triton.jit
def power(x):
    """The power of two that is as large as x or next below it; one for zero."""
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.where(exponent > 0, exponent, 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def halves(x):
    """The 22 first bits of x, none of which is beyond 2^15: its 11 first as a number of 16 bits, and 2^11 times the
    others."""
    high = x.to(tl.float16)
    return high, ((x - high.to(tl.float32)) * 2048.0).to(tl.float16)


@triton.jit
def system(
    keys, weights, first, first_row, start, penalty,
    C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A of all tokens as products with it take it: both halves of H and the keys, which have no more digits than one
    half, each over a power of two; W for keys of that size over its largest in each row; what products with H and with
    keys are then times; and Lambda."""
    matrix = load(first, tl.arange(0, BK), K, first_row, K, BK)
    size = power(tl.max(tl.abs(matrix)))
    matrix, rest = halves(matrix * (1 / size))
    k = load(keys, tl.arange(0, BC), C, K, K, BK)
    length = power(tl.max(tl.abs(k), 1, keep_dims=True))
    squares = tl.trans(length * length)
    most = tl.max(load(weights, tl.arange(0, BC), C, C, C, BC) * squares, 1, keep_dims=True)
    most = tl.where(most > 0, most, 1.0)
    return matrix, rest, (k * (1 / length)).to(tl.float16), weights, squares, start * size, most, penalty


@triton.jit
def attention(scores, A, C: tl.constexpr, BC: tl.constexpr):
    """What products of p and keys are times, over the largest of each row."""
    _, _, _, weights, squares, _, most, _ = A
    return scores * (load(weights, tl.arange(0, BC), C, C, C, BC) * squares * (1 / most))


@triton.jit
def times(p, length, A, C: tl.constexpr, BC: tl.constexpr):
    """p_t A_t of every token, with 11 bits of an operand. length: about that of p. A: as `system` gives it. Sums are
    fma: a product and a term that are added would become a product that goes on with another, and such a one is made
    twice, by both halves of a program's warps."""
    matrix, _, k, _, _, start, most, penalty = A
    p_short = (p * (1 / length)).to(tl.float16)
    y = tl.dot(p_short, matrix)
    attend = attention(tl.dot(p_short, tl.trans(k)), A, C, BC)
    z = tl.dot(attend.to(tl.float16), k)
    y = tl.fma(y, length * start + tl.zeros_like(p), p * penalty)
    return tl.fma(z, length * most + tl.zeros_like(p), y)


@triton.jit
def all_times(p, A, C: tl.constexpr, BC: tl.constexpr):
    """The same with 22 bits: products of halves, but for that of both second ones."""
    matrix, rest, k, _, _, start, most, penalty = A
    small = tl.full(p.shape, 1 / 2048, tl.float32)
    length = power(tl.max(tl.abs(p), 1, keep_dims=True))
    high, low = halves(p * (1 / length))
    y = tl.fma(tl.dot(low, matrix), small, tl.dot(high, matrix))
    y = tl.fma(tl.dot(high, rest), small, y)
    scores = tl.dot(high, tl.trans(k))
    scores = tl.fma(tl.dot(low, tl.trans(k)), tl.full(scores.shape, 1 / 2048, tl.float32), scores)
    high, low = halves(attention(scores, A, C, BC))
    z = tl.fma(tl.dot(low, k), small, tl.dot(high, k))
    return y * (length * start) + z * (length * most) + p * penalty


@triton.jit
def left_over(
    x, right, wanted, place, keys, weights, first, first_row, start, penalty,
    C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """right_t - x_t A_t of the tokens wanted, by products in float64. x goes to `place` [C, K] and comes back by BJ
    channels at a time: a tile of all is not cut in registers, and all of `first` would not fit beside it."""
    rows = tl.arange(0, BC)
    tl.store(place + rows[:, None] * K + tl.arange(0, BK)[None, :], x, mask=wanted & (tl.arange(0, BK) < K)[None, :])
    tl.debug_barrier()
    r = right.to(tl.float64) - x.to(tl.float64) * penalty.to(tl.float64)
    attend, s = tl.zeros([BC, BC], tl.float64), start.to(tl.float64)
    for j in range(0, K, BJ):
        part = j + tl.arange(0, BJ)
        inside = (part < K)[None, :]
        x_j = tl.load(place + rows[:, None] * K + part[None, :], mask=wanted & inside, other=0.0).to(tl.float64)
        k_j = tl.load(keys + rows[:, None] * K + part[None, :], mask=(rows < C)[:, None] & inside, other=0.0)
        attend = tl.dot(x_j, tl.trans(k_j.to(tl.float64)), attend, out_dtype=tl.float64)
        r = tl.dot(x_j * -s, load(first, part, K, first_row, K, BK).to(tl.float64), r, out_dtype=tl.float64)
    attend *= -load(weights, rows, C, C, C, BC).to(tl.float64)
    r = tl.dot(attend, load(keys, rows, C, K, K, BK).to(tl.float64), r, out_dtype=tl.float64)
    tl.debug_barrier()  # all have read before the next x is written
    return tl.where(wanted, r.to(tl.float32), 0.0)


@triton.jit
def descend(r, p, squares, goal, steps, most, A, C: tl.constexpr, BC: tl.constexpr, CAREFUL: tl.constexpr):
    """Conjugate gradients from the residual r and along p until |r|^2 <= goal, of the tokens that have not taken the
    most steps. By how much x has moved, the square of the residual that this leaves by its own account, what the next
    direction has beside that residual, and the steps that each token has taken."""
    d, active = tl.zeros_like(r), (squares > goal) & (steps < most)
    length = tl.sum(p * p, 1, keep_dims=True)  # of p squared; it goes on as if p and the next residual were orthogonal
    while tl.sum(active.to(tl.int32)) > 0:
        about = tl.where(length > 0, tl.sqrt(length), 1.0)
        moved = all_times(p, A, C, BC) if CAREFUL else times(p, about, A, C, BC)
        along = tl.sum(p * moved, 1, keep_dims=True)
        alpha = tl.where(active, squares / tl.where(active, along, 1.0), 0.0)
        d += alpha * p
        r -= alpha * moved
        before, squares = squares, tl.sum(r * r, 1, keep_dims=True)
        beta = squares / tl.where(active, before, 1.0)
        p = tl.where(active, r + beta * p, p)
        length = tl.where(active, squares + beta * beta * length, length)
        steps += active.to(tl.int32)
        active &= (squares > goal) & (steps < most)
    return d, squares, p - r, steps


@triton.jit
def scaled(b, C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr):
    """b of every token with a largest entry of one, whose squares neither overflow nor underflow; the size that it had,
    and the square of its length."""
    right = load(b, tl.arange(0, BC), C, K, K, BK)
    size = tl.max(tl.abs(right), 1, keep_dims=True)
    right *= 1 / tl.where(size > 0, size, 1.0)
    return right, size, tl.sum(right * right, 1, keep_dims=True)


@triton.jit
def approach(
    b, place, going, steps, goal, max_steps, keys, weights, first, first_row, start, penalty,
    C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, CAREFUL: tl.constexpr,
    GAIN: tl.constexpr, patience,
):  # fmt: skip
    """Descents of the tokens that are `going`, from the x that stands at `place`, which is zero unless CAREFUL, until
    |b - x A|^2 <= goal, or one has not gained enough. The squares that are left, and the steps. What a descent does not
    need stays in memory."""
    enough: tl.constexpr = 0.25 if CAREFUL else 0.01
    # within a descent a residual may grow by the root of the condition: beyond 1e4 it is rounding that made it so
    trusted: tl.constexpr = 1e4 if CAREFUL else 0.01
    rows, channels = tl.arange(0, BC)[:, None], tl.arange(0, BK)[None, :]
    r, _, squares = scaled(b, C, K, BC, BK)
    if CAREFUL:
        x = load(place, tl.arange(0, BC), C, K, K, BK)
        r = left_over(x, r, going, place, keys, weights, first, first_row, start, penalty, C, K, BC, BK, BJ)
        squares = tl.sum(r * r, 1, keep_dims=True)
    A = system(keys, weights, first, first_row, start, penalty, C, K, BC, BK)
    going &= (squares > goal) & (steps < max_steps)
    beside = tl.zeros_like(r)
    while tl.sum(going.to(tl.int32)) > 0:
        p = tl.where(going, r + beside, 0.0)
        found = tl.where(going, squares, 0.0)
        nearer = tl.where(going, tl.maximum(GAIN * GAIN * found, 0.25 * goal), 0.0)
        d, said, beside, taken = descend(
            r, p, found, nearer, steps, tl.minimum(steps + patience, max_steps), A, C, BC, CAREFUL
        )
        x = load(place, tl.arange(0, BC), C, K, K, BK)
        right, _, _ = scaled(b, C, K, BC, BK)
        if CAREFUL:
            r = left_over(x + d, right, going, place, keys, weights, first, first_row, start, penalty, C, K, BC, BK, BJ)
        else:
            r = right - all_times(x + d, A, C, BC)
        found = tl.sum(r * r, 1, keep_dims=True)
        slow = ~(found <= tl.maximum(squares * enough, goal))  # or not a number
        vain = slow & ~(found <= squares * trusted)  # as if this descent had not been
        tl.store(place + rows * K + channels, tl.where(vain, x, x + d), mask=going & (channels < K))
        steps = tl.where(going & ~vain, taken, steps)
        squares = tl.where(going & ~vain, found, squares)
        going &= ~slow & (squares > goal) & (steps < max_steps)
        known = (found <= 4 * said) & (said <= 4 * found)  # else directions are of other products, and begin anew
        beside = tl.where(known, beside, 0.0)
        tl.debug_barrier()  # x is written
    return squares, steps


@triton.jit(do_not_specialize=["max_steps"])
def solve_kernel(
    b, keys, weights, start, first, ridge, x_out, steps_out, residual_out, tolerance, max_steps,
    first_matrix, first_row, ridge_matrix,
    C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, GAIN: tl.constexpr,
    PATIENCE: tl.constexpr, PER_TOKEN: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """x, with the steps and the residual of each token. By descents with 11 bits: the residual of a token for which one
    was in vain is negative. Then, CAREFUL, those tokens from where they are, with all digits."""
    m = tl.program_id(0).to(tl.int64)
    rows, channels = tl.arange(0, BC)[:, None], tl.arange(0, BK)[None, :]
    x_out += m * C * K
    steps_out += m * C
    residual_out += m * C
    going = rows < C
    if CAREFUL:
        going = tl.load(residual_out + rows, mask=rows < C, other=0.0) < 0
    if tl.sum(going.to(tl.int32)) > 0:
        b += m * C * K
        ridge += m * ridge_matrix
        s = tl.load(start + m * C + rows, mask=rows < C, other=0.0)
        if PER_TOKEN:
            penalty = tl.load(ridge + rows, mask=rows < C, other=1.0)
        else:
            penalty = tl.load(ridge + channels, mask=channels < K, other=1.0)
        _, size, length = scaled(b, C, K, BC, BK)
        goal = tolerance * tolerance * length
        places, inside = x_out + rows * K + channels, going & (channels < K)
        if CAREFUL:
            steps = tl.load(steps_out + rows, mask=going, other=0.0).to(tl.int32)
            x = tl.load(places, mask=inside, other=0.0) / tl.where(size > 0, size, 1.0)
        else:
            steps, x = tl.zeros([BC, 1], tl.int32), tl.zeros([BC, BK], tl.float32)
        tl.store(places, x, mask=inside)
        tl.debug_barrier()
        squares, steps = approach(
            b, x_out, going, steps, goal, max_steps, keys + m * C * K, weights + m * C * C, first + m * first_matrix,
            first_row, s, penalty, C, K, BC, BK, BJ, CAREFUL, GAIN, max_steps if CAREFUL else PATIENCE,
        )  # fmt: skip
        tl.debug_barrier()
        size = tl.where(squares >= 0, size, float("nan"))  # of what is no number there is no solution, and none is zero
        tl.store(places, tl.load(places, mask=inside) * size, mask=inside)
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
