"""What a program of the pairs' kernels holds: of one token, the numbers of a few heads beside each other, in two tiles
[heads, BH]. Each head is in two halves, those that a rotation takes together."""

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
def places(heads, cols, inside, stride, HEADS: tl.constexpr, BG: tl.constexpr):
    """Where a tile's numbers lie behind the first of a token, and whether they are there. heads: [BG]."""
    there = inside[None, :]
    if HEADS % BG != 0:
        there = there & (heads < HEADS)[:, None]
    return heads[:, None] * stride + cols[None, :], there


@triton.jit
def both(inside, there):
    """A tile's mask and a token's. As integers, since Triton's interpreter makes no mask of a scalar comparison."""
    return (inside.to(tl.int32) & there.to(tl.int32)) != 0


@triton.jit
def load(base, t, stride, at, inside, there):
    """The tile of token t as it is in memory, zero where `there`, of the token, says no."""
    return tl.load(base + t.to(tl.int64) * stride + at, mask=both(inside, there), other=0.0)


@triton.jit
def store(base, t, stride, at, inside, there, value):
    tl.store(base + t.to(tl.int64) * stride + at, value, mask=both(inside, there))


@triton.jit
def before(x, tail, t, T, position, x_t, tail_t, at, inside, BACK: tl.constexpr, W: tl.constexpr):
    """x of BACK tokens before t, which may be in the call before; zero if that is another document, or if the
    convolution does not reach so far."""
    y = tl.zeros(at.shape, tl.float32)
    if BACK < W:
        u = t - BACK
        y += load(x, u, x_t, at, inside, (u >= 0) & (u < T) & (position >= BACK)).to(tl.float32)
        if tail is not None:
            there = (u < 0) & (u > -W) & (position >= BACK)
            y += load(tail, u + W - 1, tail_t, at, inside, there).to(tl.float32)
    return y


@triton.jit
def window_before(x, tail, t, T, position, x_t, tail_t, at, inside, W: tl.constexpr):
    """The three inputs before token t, newest first."""
    return (
        before(x, tail, t, T, position, x_t, tail_t, at, inside, 1, W),
        before(x, tail, t, T, position, x_t, tail_t, at, inside, 2, W),
        before(x, tail, t, T, position, x_t, tail_t, at, inside, 3, W),
    )


@triton.jit
def of_document(window, position, GOES_ON: tl.constexpr):
    """The window of a token: nothing, if the token is the first of its document."""
    if GOES_ON:
        return window
    return (
        tl.where(position > 0, window[0], 0.0),
        tl.where(position > 0, window[1], 0.0),
        tl.where(position > 0, window[2], 0.0),
    )


@triton.jit
def tap(weight, at, inside, BACK: tl.constexpr, W: tl.constexpr):
    """w_BACK of every column; zero where the convolution does not reach."""
    return tl.load(weight + at * W + (W - 1 - BACK), mask=inside & (BACK < W), other=0.0).to(tl.float32)


@triton.jit
def all_taps(weight, at, inside, W: tl.constexpr):
    return (
        tap(weight, at, inside, 0, W),
        tap(weight, at, inside, 1, W),
        tap(weight, at, inside, 2, W),
        tap(weight, at, inside, 3, W),
    )


@triton.jit
def summed(x, window, taps, W: tl.constexpr):
    """The convolution: of x and the inputs before it, newest first."""
    z = x
    if W > 1:
        z = x * taps[0] + window[0] * taps[1]
    if W > 2:
        z += window[1] * taps[2]
    if W > 3:
        z += window[2] * taps[3]
    return z


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)), by the root, since a GPU has an operation for 1 / sqrt, and five for a quotient."""
    root = tl.rsqrt(1 + tl.exp2(z * -1.4426950408889634))
    return root * root


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """The activation, and the sigmoid in it."""
    y, s = z, z
    if ACTIVATION != "none":
        s = sigmoid(z)
        y = s
    if ACTIVATION == "silu":
        y = z * s
    return y, s


@triton.jit
def activated_gradient(dy, y, s, ACTIVATION: tl.constexpr):
    """By z, of the outcomes of `activated`."""
    if ACTIVATION == "silu":
        dy = dy * (y + s * (1 - y))
    elif ACTIVATION == "sigmoid":
        dy = dy * (s - s * s)
    return dy


@triton.jit
def inverse_length(a, b, eps, WIDTH: tl.constexpr, NORM: tl.constexpr):
    """1 / sqrt(|y|^2 + eps), of the mean square for rms; [heads, 1]."""
    squares = tl.sum(a * a + b * b, 1)
    if NORM == "rms":
        squares = squares / WIDTH
    return tl.rsqrt(squares + eps)[:, None]


@triton.jit
def cos_sin(angle):
    """Of 0 <= angle < 1e6, to 1e-7 (to 5e6, to 1e-5): less the nearest multiple of pi / 2, which is taken off in three
    parts so that none rounds, then polynomials (S. Moshier, Cephes, sinf.c). A GPU's own take a slow way for far
    angles, and some three times the operations for all."""
    # behind 1.5 * 2^23 a float32 has no fractions
    shifted = angle * 0.6366197723675814 + 12582912.0
    quarter = shifted.to(tl.int32, bitcast=True)
    n = shifted - 12582912.0
    r = tl.fma(n, -1.5703125, angle)
    r = tl.fma(n, -7.549789948768648e-8, tl.fma(n, -4.837512969970703125e-4, r))
    s = r * r
    sin = r + r * s * (-1.6666654611e-1 + s * (8.3321608736e-3 - s * 1.9515295891e-4))
    cos = 1 - s * 0.5 + s * s * (4.166664568298827e-2 + s * (-1.388731625493765e-3 + s * 2.443315711809948e-5))
    odd = (quarter & 1) != 0
    a, b = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(((quarter + 1) & 2) != 0, -a, a), tl.where((quarter & 2) != 0, -b, b)


@triton.jit
def queued(queue, new, AHEAD: tl.constexpr):
    """The queue of AHEAD tokens that are on their way from memory, one on."""
    if AHEAD == 1:
        return (new,)
    elif AHEAD == 2:
        return queue[1], new
    else:
        return queue[1], queue[2], queue[3], new


@triton.jit
def queue_of(base, t, T, stride, at, inside, AHEAD: tl.constexpr):
    """The first AHEAD tiles."""
    if AHEAD == 1:
        return (load(base, t, stride, at, inside, t < T),)
    elif AHEAD == 2:
        return (load(base, t, stride, at, inside, t < T), load(base, t + 1, stride, at, inside, t + 1 < T))
    else:
        return (
            load(base, t, stride, at, inside, t < T),
            load(base, t + 1, stride, at, inside, t + 1 < T),
            load(base, t + 2, stride, at, inside, t + 2 < T),
            load(base, t + 3, stride, at, inside, t + 3 < T),
        )
