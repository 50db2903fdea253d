"""The Triton kernels of the pairs: from a stretch of the projected row to its heads, and back.

Forward: a program has BT tokens of one head; what the convolution wants of tokens before comes from the caches. Its
gradient: a program goes through R spans of S tokens of one head at once, token by token, with the last inputs and the
next gradients in registers. So what a token's gradient needs of the tokens after it is worked out once, and never
stored. A span is read W - 1 tokens beyond its end.

A head is held in two halves, those that a rotation takes together: tiles are [tokens, BH] twice. Arithmetic is float32.
Memory holds x, its gradient and the tail in rows with strides, heads [B, T, H, WIDTH] with strides, and parameters.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def columns(WIDTH: tl.constexpr, TURN: tl.constexpr, ALIGNED: tl.constexpr, BH: tl.constexpr):
    """Which columns of a head are in the first half and in the second, each [BH], and whether they are there: j and
    j + TURN / 2 of those that turn, and of the others too, two that are equally far from each other."""
    j = tl.arange(0, BH)
    HALF: tl.constexpr = (WIDTH + 1) // 2
    first, second = j, j + HALF
    if TURN > 0 and TURN < WIDTH:
        turns = j < TURN // 2
        first, second = tl.where(turns, j, j + TURN // 2), tl.where(turns, j + TURN // 2, j + HALF)
        first = tl.max_contiguous(tl.multiple_of(first, ALIGNED), ALIGNED)
        second = tl.max_contiguous(tl.multiple_of(second, ALIGNED), ALIGNED)
    return first, second, j < HALF, (j < HALF) & (second < WIDTH)


@triton.jit
def load(base, rows, stride, cols, inside, there):
    """[tokens, BH] in float32, zero where `there` [tokens] says no."""
    mask = there[:, None] & inside[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(base, rows, stride, cols, inside, there, value):
    mask = there[:, None] & inside[None, :]
    tl.store(base + rows.to(tl.int64)[:, None] * stride + cols[None, :], value, mask=mask)


@triton.jit
def inputs(x, tail, t, T, x_t, tail_t, cols, inside, there, REACH: tl.constexpr):
    """x at tokens t, those before the call from its tail."""
    y = load(x, t, x_t, cols, inside, there & (t >= 0) & (t < T))
    if tail is not None:
        y += load(tail, t + REACH, tail_t, cols, inside, there & (t < 0) & (t >= -REACH))
    return y


@triton.jit
def tap(weight, cols, inside, BACK: tl.constexpr, W: tl.constexpr):
    """w_BACK of every column, as [1, BH]; zero where the convolution does not reach."""
    there = inside & (BACK < W)
    return tl.load(weight + cols * W + (W - 1 - BACK), mask=there, other=0.0).to(tl.float32)[None, :]


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    elif ACTIVATION == "sigmoid":
        z = tl.sigmoid(z)
    return z


@triton.jit
def activated_gradient(z, dy, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        s = tl.sigmoid(z)
        dy = dy * s * (1 + z * (1 - s))
    elif ACTIVATION == "sigmoid":
        s = tl.sigmoid(z)
        dy = dy * s * (1 - s)
    return dy


@triton.jit
def inverse_length(a, b, eps, WIDTH: tl.constexpr, NORM: tl.constexpr):
    """1 / sqrt(|y|^2 + eps), of the mean square for rms; [tokens, 1]."""
    squares = tl.sum(a * a + b * b, 1)
    if NORM == "rms":
        squares = squares / WIDTH
    return tl.rsqrt(squares + eps)[:, None]


@triton.jit
def turned(a, b, position, frequency):
    """Both halves turned by position * frequency."""
    angle = position.to(tl.float32)[:, None] * frequency
    cos, sin = tl.cos(angle), tl.sin(angle)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def convolved(x, tail, weight, t, T, position, x_t, tail_t, cols, inside, W: tl.constexpr):
    """sum_j w_j x_{t-j} over the tokens of the document, of which `position` come before t."""
    z = inputs(x, tail, t, T, x_t, tail_t, cols, inside, t < T, W - 1)
    if W > 1:
        z *= tap(weight, cols, inside, 0, W)
        for back in tl.static_range(1, W):
            y = inputs(x, tail, t - back, T, x_t, tail_t, cols, inside, (t < T) & (position >= back), W - 1)
            z += y * tap(weight, cols, inside, back, W)
    return z


@triton.jit
def pairs_forward(
    x, tail, weight, scale, frequency, positions, out, T, x_b, x_t, tail_b, tail_t, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr, ALIGNED: tl.constexpr, W: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """out [B, T, HEADS, WIDTH]."""
    head, block, b = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS, tl.program_id(1).to(tl.int64)
    t = block * BT + tl.arange(0, BT)
    first, second, in_first, in_second = columns(WIDTH, TURN, ALIGNED, BH)
    x += b * x_b + head * WIDTH
    out += (b * T * HEADS + head) * WIDTH
    position = t
    if W > 1 or TURN > 0:
        position = tl.load(positions + b * T + t, mask=t < T, other=0)
    if W > 1:
        weight += head * WIDTH * W
        if tail is not None:
            tail += b * tail_b + head * WIDTH
    z = convolved(x, tail, weight, t, T, position, x_t, tail_t, first, in_first, W)
    y = activated(z, ACTIVATION)
    z2 = convolved(x, tail, weight, t, T, position, x_t, tail_t, second, in_second, W)
    y2 = activated(z2, ACTIVATION)
    if NORM != "none":
        inverse = inverse_length(y, y2, eps, WIDTH, NORM)
        y, y2 = y * inverse, y2 * inverse
    if NORM == "rms":
        y *= tl.load(scale + first, mask=in_first, other=0.0).to(tl.float32)[None, :]
        y2 *= tl.load(scale + second, mask=in_second, other=0.0).to(tl.float32)[None, :]
    if TURN > 0:
        j = tl.arange(0, BH)
        y, y2 = turned(y, y2, position, tl.load(frequency + j, mask=j < TURN // 2, other=0.0)[None, :])
    store(out, t, HEADS * WIDTH, first, in_first, t < T, y)
    store(out, t, HEADS * WIDTH, second, in_second, t < T, y2)


@triton.jit
def seen(x, position, BACK: tl.constexpr):
    """x of BACK tokens before, zero where that is another document."""
    return tl.where((position >= BACK)[:, None], x, 0.0)


@triton.jit
def summed(x, window, taps, position, W: tl.constexpr):
    """The convolution of the present x and the three before it, newest first."""
    z = x
    if W > 1:
        z = x * taps[0] + seen(window[0], position, 1) * taps[1]
    if W > 2:
        z += seen(window[1], position, 2) * taps[2]
    if W > 3:
        z += seen(window[2], position, 3) * taps[3]
    return z


@triton.jit
def spread(dz, waiting, taps, position, W: tl.constexpr):
    """The gradient by x of W - 1 tokens ago, to which dz is the last to add; and those of the three tokens before the
    next that have something to wait for."""
    done, w1, w2, w3 = dz, waiting[0], waiting[1], waiting[2]
    if W > 1:
        done = waiting[0] + seen(dz, position, 1) * taps[1]
        w1, w2 = dz * taps[0], done
    if W > 2:
        done = waiting[1] + seen(dz, position, 2) * taps[2]
        w3 = done
    if W > 3:
        done = waiting[2] + seen(dz, position, 3) * taps[3]
    return done, (w1, w2, w3)


@triton.jit
def added(sums, dz, x, window, position, W: tl.constexpr):
    """The sums over tokens of dz_t x_{t-j}, [tokens, BH] for every j."""
    s0, s1, s2, s3 = sums
    if W > 1:
        s0 += dz * x
        s1 += dz * seen(window[0], position, 1)
    if W > 2:
        s2 += dz * seen(window[1], position, 2)
    if W > 3:
        s3 += dz * seen(window[2], position, 3)
    return s0, s1, s2, s3


@triton.jit
def before(x, tail, t, T, x_t, tail_t, cols, inside, BACK: tl.constexpr, W: tl.constexpr):
    """x BACK tokens before t, zero where the convolution does not reach."""
    if BACK < W:
        y = inputs(x, tail, t - BACK, T, x_t, tail_t, cols, inside, t - BACK < T, W - 1)
    else:
        y = tl.zeros([t.shape[0], cols.shape[0]], tl.float32)
    return y


@triton.jit
def window_before(x, tail, t, T, x_t, tail_t, cols, inside, W: tl.constexpr):
    return (
        before(x, tail, t, T, x_t, tail_t, cols, inside, 1, W),
        before(x, tail, t, T, x_t, tail_t, cols, inside, 2, W),
        before(x, tail, t, T, x_t, tail_t, cols, inside, 3, W),
    )


@triton.jit
def all_taps(weight, cols, inside, W: tl.constexpr):
    return (
        tap(weight, cols, inside, 0, W),
        tap(weight, cols, inside, 1, W),
        tap(weight, cols, inside, 2, W),
        tap(weight, cols, inside, 3, W),
    )


@triton.jit
def store_sums(base, sums, cols, inside, W: tl.constexpr):
    """Sums over the program's tokens, in the layout of the weight."""
    tl.store(base + cols * W + W - 1, tl.sum(sums[0], 0), mask=inside)
    tl.store(base + cols * W + W - 2, tl.sum(sums[1], 0), mask=inside)
    if W > 2:
        tl.store(base + cols * W + W - 3, tl.sum(sums[2], 0), mask=inside)
    if W > 3:
        tl.store(base + cols * W + W - 4, tl.sum(sums[3], 0), mask=inside)


@triton.jit
def pairs_backward(
    x, tail, weight, scale, frequency, positions, do, dx, dtail, dweight, dscale,
    T, S, CHANNELS, x_b, x_t, tail_b, tail_t, do_b, do_t, do_h, dx_b, dx_t, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr, ALIGNED: tl.constexpr, W: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, R: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """dx and dtail; of the program's tokens dweight [B, groups, CHANNELS, W] and dscale [B, groups, HEADS, WIDTH]."""
    REACH: tl.constexpr = W - 1
    head, group, b = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS, tl.program_id(1).to(tl.int64)
    start = (group * R + tl.arange(0, R)) * S
    first, second, in_first, in_second = columns(WIDTH, TURN, ALIGNED, BH)
    x += b * x_b + head * WIDTH
    do += b * do_b + head * do_h
    dx += b * dx_b + head * WIDTH
    positions += b * T
    program = b * (tl.num_programs(0) // HEADS) + group
    zero = tl.zeros([R, BH], tl.float32)
    three, four = (zero, zero, zero), (zero, zero, zero, zero)
    taps, taps2, sums, sums2 = four, four, four, four
    window, window2, waiting, waiting2 = three, three, three, three
    dscales, dscales2 = zero, zero
    if W > 1:
        weight += head * WIDTH * W
        if tail is not None:
            tail += b * tail_b + head * WIDTH
            dtail += b * tail_b + head * WIDTH
        taps, taps2 = all_taps(weight, first, in_first, W), all_taps(weight, second, in_second, W)
        window = window_before(x, tail, start, T, x_t, tail_t, first, in_first, W)
        window2 = window_before(x, tail, start, T, x_t, tail_t, second, in_second, W)
    if NORM == "rms":
        scales = tl.load(scale + first, mask=in_first, other=0.0).to(tl.float32)[None, :]
        scales2 = tl.load(scale + second, mask=in_second, other=0.0).to(tl.float32)[None, :]
    if TURN > 0:
        j = tl.arange(0, BH)
        frequencies = tl.load(frequency + j, mask=j < TURN // 2, other=0.0)[None, :]
    position = start
    # what a token needs is loaded while the one before it is worked out
    next_x, next_x2 = load(x, start, x_t, first, in_first, start < T), load(x, start, x_t, second, in_second, start < T)
    next_do = load(do, start, do_t, first, in_first, start < T)
    next_do2 = load(do, start, do_t, second, in_second, start < T)
    if W > 1 or TURN > 0:
        position = tl.load(positions + start, mask=start < T, other=0)
    for i in range(S + REACH):
        u = start + i
        now, now2, dy, dy2, there, at = next_x, next_x2, next_do, next_do2, u < T, position
        u += 1
        next_x, next_x2 = load(x, u, x_t, first, in_first, u < T), load(x, u, x_t, second, in_second, u < T)
        next_do, next_do2 = load(do, u, do_t, first, in_first, u < T), load(do, u, do_t, second, in_second, u < T)
        if W > 1 or TURN > 0:
            position = tl.load(positions + u, mask=u < T, other=0)

        z, z2 = summed(now, window, taps, at, W), summed(now2, window2, taps2, at, W)
        if TURN > 0:
            dy, dy2 = turned(dy, dy2, at, -frequencies)
        if NORM != "none":
            y, y2 = activated(z, ACTIVATION), activated(z2, ACTIVATION)
            inverse = inverse_length(y, y2, eps, WIDTH, NORM)
            y, y2 = y * inverse, y2 * inverse
            if NORM == "rms":
                dscales += tl.where(i < S, dy * y, 0.0)
                dscales2 += tl.where(i < S, dy2 * y2, 0.0)
                dy, dy2 = dy * scales, dy2 * scales2
            along = tl.sum(dy * y + dy2 * y2, 1)[:, None]
            if NORM == "rms":
                along = along / WIDTH
            dy, dy2 = (dy - y * along) * inverse, (dy2 - y2 * along) * inverse
        dz = tl.where(there[:, None], activated_gradient(z, dy, ACTIVATION), 0.0)
        dz2 = tl.where(there[:, None], activated_gradient(z2, dy2, ACTIVATION), 0.0)
        if W > 1:
            own, own2 = tl.where(i < S, dz, 0.0), tl.where(i < S, dz2, 0.0)
            sums = added(sums, own, now, window, at, W)
            sums2 = added(sums2, own2, now2, window2, at, W)
        done, waiting = spread(dz, waiting, taps, at, W)
        done2, waiting2 = spread(dz2, waiting2, taps2, at, W)
        window, window2 = (now, window[0], window[1]), (now2, window2[0], window2[1])

        t = u - W  # = the present token less W - 1
        whole = (t < T) & (i >= REACH)
        store(dx, t, dx_t, first, in_first, whole, done)
        store(dx, t, dx_t, second, in_second, whole, done2)
        if tail is not None:
            store(dtail, t + REACH, tail_t, first, in_first, t < 0, done)
            store(dtail, t + REACH, tail_t, second, in_second, t < 0, done2)
    if W > 1:
        dweight += (program * CHANNELS + head * WIDTH) * W
        store_sums(dweight, sums, first, in_first, W)
        store_sums(dweight, sums2, second, in_second, W)
    if NORM == "rms":
        dscale += (program * HEADS + head) * WIDTH
        tl.store(dscale + first, tl.sum(dscales, 0), mask=in_first)
        tl.store(dscale + second, tl.sum(dscales2, 0), mask=in_second)
