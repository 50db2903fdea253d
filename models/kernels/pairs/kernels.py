"""The Triton kernels of the pairs: from a stretch of the projected row to its heads, and back.

A program goes through S tokens of a few heads, token by token. Forward it has the last inputs of the convolution in
registers, so that each passes once; backward also the gradients that still wait for tokens to come, so that what a
token's gradient needs of the tokens after it is worked out once, and never stored. Backward a span is read W - 1 tokens
beyond its end. AHEAD tokens are on their way from memory while one is worked out.

A token is one for a whole program, so that all that is said of tokens alone (is it there, how far goes its document) is
said once, not for every number. Arithmetic is float32. Memory holds x, its gradient and the tail in rows with strides,
heads [B, T, H, WIDTH] with strides, and parameters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.pairs.tiles import (
    activated,
    activated_gradient,
    all_taps,
    columns,
    cos_sin,
    inverse_length,
    load,
    of_document,
    places,
    queue_of,
    queued,
    store,
    summed,
    window_before,
)


@triton.jit
def position_of(positions, t, T, COUNTS: tl.constexpr):
    position = t
    if COUNTS:
        position = tl.load(positions + t, mask=t < T, other=0).to(tl.int32)
    return position


@triton.jit
def goes_on(positions, start, T, S: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr):
    """Whether the convolution's inputs are all of the token's own document, for S tokens from start: so it is of most
    spans, where then no token asks."""
    i = tl.arange(0, BLOCK)
    inside = ((i < S).to(tl.int32) & (start + i < T).to(tl.int32)) != 0
    return tl.min(tl.load(positions + start + i, mask=inside, other=W).to(tl.int32), 0) >= W - 1


@triton.jit
def forth(
    x, tail, weight, scale, frequency, positions, out, start, T, x_t: tl.constexpr, tail_t: tl.constexpr, eps, heads,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr, ALIGNED: tl.constexpr, W: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, BG: tl.constexpr, BH: tl.constexpr, S: tl.constexpr,
    AHEAD: tl.constexpr, UNROLL: tl.constexpr, GOES_ON: tl.constexpr,
):  # fmt: skip
    """A program of pairs_forward. GOES_ON: as above, known."""
    COUNTS: tl.constexpr = (W > 1 and not GOES_ON) or TURN > 0
    first, second, in_first, in_second = columns(WIDTH, TURN, ALIGNED, BH)
    at, inside = places(heads, first, in_first, WIDTH, HEADS, BG)
    at2, inside2 = places(heads, second, in_second, WIDTH, HEADS, BG)
    zero = tl.zeros([BG, BH], tl.float32)
    three, four = (zero, zero, zero), (zero, zero, zero, zero)
    window, window2, taps, taps2 = three, three, four, four
    xs, xs2 = queue_of(x, start, T, x_t, at, inside, AHEAD), queue_of(x, start, T, x_t, at2, inside2, AHEAD)
    position = position_of(positions, start, T, COUNTS)
    if W > 1:
        before = tl.load(positions + start, mask=start < T, other=0).to(tl.int32)
        taps, taps2 = all_taps(weight, at, inside, W), all_taps(weight, at2, inside2, W)
        window = window_before(x, tail, start, T, before, x_t, tail_t, at, inside, W)
        window2 = window_before(x, tail, start, T, before, x_t, tail_t, at2, inside2, W)
    if NORM == "rms":
        scales = tl.load(scale + first, mask=in_first, other=0.0).to(tl.float32)[None, :]
        scales2 = tl.load(scale + second, mask=in_second, other=0.0).to(tl.float32)[None, :]
    if TURN > 0:
        j = tl.arange(0, BH)
        frequencies = tl.load(frequency + j, mask=j < TURN // 2, other=0.0)[None, :]
    for i in tl.range(0, S, loop_unroll_factor=UNROLL):
        t = start + i
        now, now2, counted = xs[0].to(tl.float32), xs2[0].to(tl.float32), position
        u = t + AHEAD
        xs = queued(xs, load(x, u, x_t, at, inside, u < T), AHEAD)
        xs2 = queued(xs2, load(x, u, x_t, at2, inside2, u < T), AHEAD)
        position = position_of(positions, t + 1, T, COUNTS)
        window, window2 = of_document(window, counted, GOES_ON), of_document(window2, counted, GOES_ON)
        y, _ = activated(summed(now, window, taps, W), ACTIVATION)
        y2, _ = activated(summed(now2, window2, taps2, W), ACTIVATION)
        if W > 1:
            window, window2 = (now, window[0], window[1]), (now2, window2[0], window2[1])
        if NORM != "none":
            inverse = inverse_length(y, y2, eps, WIDTH, NORM)
            y, y2 = y * inverse, y2 * inverse
        if NORM == "rms":
            y, y2 = y * scales, y2 * scales2
        if TURN > 0:
            cos, sin = cos_sin(counted.to(tl.float32) * frequencies)
            y, y2 = y * cos - y2 * sin, y2 * cos + y * sin
        store(out, t, HEADS * WIDTH, at, inside, t < T, y)
        store(out, t, HEADS * WIDTH, at2, inside2, t < T, y2)


@triton.jit
def pairs_forward(
    x, tail, weight, scale, frequency, positions, out, T, x_b, x_t: tl.constexpr, tail_b, tail_t: tl.constexpr, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr, ALIGNED: tl.constexpr, W: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, BG: tl.constexpr, BH: tl.constexpr, S: tl.constexpr,
    AHEAD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """out [B, T, HEADS, WIDTH]."""
    GROUPS: tl.constexpr = (HEADS + BG - 1) // BG
    group, span, b = tl.program_id(0) % GROUPS, tl.program_id(0) // GROUPS, tl.program_id(1).to(tl.int64)
    heads, start = group * BG + tl.arange(0, BG), span * S
    x += b * x_b
    out += b * T * HEADS * WIDTH
    positions += b * T
    if tail is not None:
        tail += b * tail_b
    inner = True
    if W > 1:
        inner = goes_on(positions, start, T, S, S, W)
    if inner:
        forth(
            x, tail, weight, scale, frequency, positions, out, start, T, x_t, tail_t, eps, heads,
            HEADS, WIDTH, TURN, ALIGNED, W, ACTIVATION, NORM, BG, BH, S, AHEAD, UNROLL, True,
        )  # fmt: skip
    else:
        forth(
            x, tail, weight, scale, frequency, positions, out, start, T, x_t, tail_t, eps, heads,
            HEADS, WIDTH, TURN, ALIGNED, W, ACTIVATION, NORM, BG, BH, S, AHEAD, 1, False,
        )  # fmt: skip


@triton.jit
def reaching(dz, position, BACK: tl.constexpr, GOES_ON: tl.constexpr):
    """What goes back so many tokens: nothing, where the document does not."""
    if not GOES_ON:
        dz = tl.where(position >= BACK, dz, 0.0)
    return dz


@triton.jit
def spread(dz, waiting, taps, position, W: tl.constexpr, GOES_ON: tl.constexpr):
    """The gradient by x of W - 1 tokens ago, to which dz is the last to add; and those of the three tokens before the
    next that have something to wait for. position: how far back dz reaches."""
    done, w1, w2, w3 = dz, waiting[0], waiting[1], waiting[2]
    if W > 1:
        done = waiting[0] + reaching(dz, position, 1, GOES_ON) * taps[1]
        w1, w2 = dz * taps[0], done
    if W > 2:
        done = waiting[1] + reaching(dz, position, 2, GOES_ON) * taps[2]
        w3 = done
    if W > 3:
        done = waiting[2] + reaching(dz, position, 3, GOES_ON) * taps[3]
    return done, (w1, w2, w3)


@triton.jit
def added(sums, dz, x, window, W: tl.constexpr):
    """The sums over tokens of dz_t x_{t-j}, a tile for every j."""
    s0, s1, s2, s3 = sums
    if W > 1:
        s0 += dz * x
        s1 += dz * window[0]
    if W > 2:
        s2 += dz * window[1]
    if W > 3:
        s3 += dz * window[2]
    return s0, s1, s2, s3


@triton.jit
def store_sums(base, sums, channels, at, inside, W: tl.constexpr):
    """Sums over the program's tokens, [W, channels]."""
    tl.store(base + (W - 1) * channels + at, sums[0], mask=inside)
    tl.store(base + (W - 2) * channels + at, sums[1], mask=inside)
    if W > 2:
        tl.store(base + (W - 3) * channels + at, sums[2], mask=inside)
    if W > 3:
        tl.store(base + (W - 4) * channels + at, sums[3], mask=inside)


@triton.jit
def back(
    x, tail, weight, scale, frequency, positions, do, dx, dtail, dweight, dscale, program, start,
    T, CHANNELS, x_t: tl.constexpr, tail_t: tl.constexpr, do_t: tl.constexpr, do_h, dx_t: tl.constexpr, eps, heads,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr, ALIGNED: tl.constexpr, W: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, BG: tl.constexpr, BH: tl.constexpr, S: tl.constexpr,
    AHEAD: tl.constexpr, UNROLL: tl.constexpr, GOES_ON: tl.constexpr,
):  # fmt: skip
    """A program of pairs_backward. GOES_ON: as above, known."""
    REACH: tl.constexpr = W - 1
    COUNTS: tl.constexpr = (W > 1 and not GOES_ON) or TURN > 0
    first, second, in_first, in_second = columns(WIDTH, TURN, ALIGNED, BH)
    at, inside = places(heads, first, in_first, WIDTH, HEADS, BG)
    at2, inside2 = places(heads, second, in_second, WIDTH, HEADS, BG)
    from_at, _ = places(heads, first, in_first, do_h, HEADS, BG)
    from_at2, _ = places(heads, second, in_second, do_h, HEADS, BG)
    zero = tl.zeros([BG, BH], tl.float32)
    three, four = (zero, zero, zero), (zero, zero, zero, zero)
    taps, taps2, sums, sums2 = four, four, four, four
    window, window2, waiting, waiting2 = three, three, three, three
    dscales, dscales2 = zero, zero
    xs, xs2 = queue_of(x, start, T, x_t, at, inside, AHEAD), queue_of(x, start, T, x_t, at2, inside2, AHEAD)
    dos = queue_of(do, start, T, do_t, from_at, inside, AHEAD)
    dos2 = queue_of(do, start, T, do_t, from_at2, inside2, AHEAD)
    position = position_of(positions, start, T, COUNTS)
    if W > 1:
        before = tl.load(positions + start, mask=start < T, other=0).to(tl.int32)
        taps, taps2 = all_taps(weight, at, inside, W), all_taps(weight, at2, inside2, W)
        window = window_before(x, tail, start, T, before, x_t, tail_t, at, inside, W)
        window2 = window_before(x, tail, start, T, before, x_t, tail_t, at2, inside2, W)
    if NORM == "rms":
        scales = tl.load(scale + first, mask=in_first, other=0.0).to(tl.float32)[None, :]
        scales2 = tl.load(scale + second, mask=in_second, other=0.0).to(tl.float32)[None, :]
    if TURN > 0:
        j = tl.arange(0, BH)
        frequencies = tl.load(frequency + j, mask=j < TURN // 2, other=0.0)[None, :]
    for i in tl.range(0, S + REACH, loop_unroll_factor=UNROLL):
        t = start + i
        now, now2, counted = xs[0].to(tl.float32), xs2[0].to(tl.float32), position
        dy, dy2 = dos[0].to(tl.float32), dos2[0].to(tl.float32)
        u = t + AHEAD
        xs = queued(xs, load(x, u, x_t, at, inside, u < T), AHEAD)
        xs2 = queued(xs2, load(x, u, x_t, at2, inside2, u < T), AHEAD)
        dos = queued(dos, load(do, u, do_t, from_at, inside, u < T), AHEAD)
        dos2 = queued(dos2, load(do, u, do_t, from_at2, inside2, u < T), AHEAD)
        position = position_of(positions, t + 1, T, COUNTS)

        window, window2 = of_document(window, counted, GOES_ON), of_document(window2, counted, GOES_ON)
        y, s = activated(summed(now, window, taps, W), ACTIVATION)
        y2, s2 = activated(summed(now2, window2, taps2, W), ACTIVATION)
        if TURN > 0:
            cos, sin = cos_sin(counted.to(tl.float32) * frequencies)
            dy, dy2 = dy * cos + dy2 * sin, dy2 * cos - dy * sin
        if NORM != "none":
            inverse = inverse_length(y, y2, eps, WIDTH, NORM)
            if NORM == "rms":
                counts = tl.where(i < S, inverse, 0.0)
                dscales += dy * y * counts
                dscales2 += dy2 * y2 * counts
                dy, dy2 = dy * scales, dy2 * scales2
            # y / |y| goes along with |y|, which is not in the outcome
            along = tl.sum(dy * y + dy2 * y2, 1)[:, None] * inverse * inverse * inverse
            if NORM == "rms":
                along = along / WIDTH
            dy, dy2 = dy * inverse - y * along, dy2 * inverse - y2 * along
        dz, dz2 = activated_gradient(dy, y, s, ACTIVATION), activated_gradient(dy2, y2, s2, ACTIVATION)
        if W > 1:
            own, own2 = tl.where(i < S, dz, 0.0), tl.where(i < S, dz2, 0.0)
            sums, sums2 = added(sums, own, now, window, W), added(sums2, own2, now2, window2, W)
            window, window2 = (now, window[0], window[1]), (now2, window2[0], window2[1])
        done, waiting = spread(dz, waiting, taps, counted, W, GOES_ON)
        done2, waiting2 = spread(dz2, waiting2, taps2, counted, W, GOES_ON)

        t -= REACH
        whole = (t < T) & (i >= REACH)
        store(dx, t, dx_t, at, inside, whole, done)
        store(dx, t, dx_t, at2, inside2, whole, done2)
        if tail is not None:
            store(dtail, t + REACH, tail_t, at, inside, t < 0, done)
            store(dtail, t + REACH, tail_t, at2, inside2, t < 0, done2)
    if W > 1:
        dweight += program * W * CHANNELS
        store_sums(dweight, sums, CHANNELS, at, inside, W)
        store_sums(dweight, sums2, CHANNELS, at2, inside2, W)
    if NORM == "rms":
        dscale += program * HEADS * WIDTH
        tl.store(dscale + at, dscales, mask=inside)
        tl.store(dscale + at2, dscales2, mask=inside2)


@triton.jit
def pairs_backward(
    x, tail, weight, scale, frequency, positions, do, dx, dtail, dweight, dscale,
    T, CHANNELS, x_b, x_t: tl.constexpr, tail_b, tail_t: tl.constexpr, do_b, do_t: tl.constexpr, do_h, dx_b,
    dx_t: tl.constexpr, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr, ALIGNED: tl.constexpr, W: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, BG: tl.constexpr, BH: tl.constexpr, S: tl.constexpr,
    AHEAD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dx and dtail; of the program's tokens dweight [B, spans, W, CHANNELS] and dscale [B, spans, HEADS, WIDTH]."""
    GROUPS: tl.constexpr = (HEADS + BG - 1) // BG
    group, span, b = tl.program_id(0) % GROUPS, tl.program_id(0) // GROUPS, tl.program_id(1).to(tl.int64)
    heads, start = group * BG + tl.arange(0, BG), span * S
    x += b * x_b
    do += b * do_b
    dx += b * dx_b
    positions += b * T
    program = b * (tl.num_programs(0) // GROUPS) + span
    if tail is not None:
        tail += b * tail_b
        dtail += b * tail_b
    inner = True
    if W > 1:
        inner = goes_on(positions, start, T, S + W - 1, 2 * S, W)
    if inner:
        back(
            x, tail, weight, scale, frequency, positions, do, dx, dtail, dweight, dscale, program, start,
            T, CHANNELS, x_t, tail_t, do_t, do_h, dx_t, eps, heads,
            HEADS, WIDTH, TURN, ALIGNED, W, ACTIVATION, NORM, BG, BH, S, AHEAD, UNROLL, True,
        )  # fmt: skip
    else:
        back(
            x, tail, weight, scale, frequency, positions, do, dx, dtail, dweight, dscale, program, start,
            T, CHANNELS, x_t, tail_t, do_t, do_h, dx_t, eps, heads,
            HEADS, WIDTH, TURN, ALIGNED, W, ACTIVATION, NORM, BG, BH, S, AHEAD, 1, False,
        )  # fmt: skip
