"""The coefficients of every chunk and their gradient by the gates: recurrences of rows, which need no product.

With S_t the row of what the momentum has of every write after token t, and G_t the memory's, both rows of [C, C],
    S_t = eta_t S_{t-1} + theta_t e_t ,    G_t = a_t G_{t-1} + S_t ,
and backward, with g and s the gradients by them,
    g_t = dG_t + a_{t+1} g_{t+1} ,    s_t = g_t + eta_{t+1} s_{t+1} ,
    dtheta_t = s_tt ,    dlog a_t = a_t g_t . G_{t-1} ,    dlog eta_t = eta_t s_t . S_{t-1} .
No term is negative and nothing is divided, so that float32 keeps its digits whatever the gates. A chunk is one warp and
C steps of two numbers a thread. G = L_a L_eta diag(theta) and its gradients as products of [C, C] tiles are three
times as many instructions in each of four warps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.momentum import tiles

UNROLL = tl.constexpr(8)  # steps whose loads are asked for together


@triton.jit
def begin_of(chunk, T, N, H, C: tl.constexpr):
    """Where rows of [B, T, H] and of [B, T] begin, and how many tokens are left from there."""
    b, h, n = (chunk // (N * H)).to(tl.int64), chunk // N % H, chunk % N
    first = b * T + n * C
    return first * H + h, first, T - n * C


@triton.jit
def gates_at(
    step_size, log_momentum, log_decay, filled, at, first, s, left, T, H, MOMENTUM: tl.constexpr, DECAY: tl.constexpr,
    WRITES: tl.constexpr,
):  # fmt: skip
    """theta, eta and a of token s of the chunks, 0, 1 and 1 where there is none; and whether S is added to M there, 1
    or 0: what fills the last chunk must not add it again. `filled` [B, T] says where there are tokens, if any may be
    none."""
    real = s < left
    if filled is not None:
        real = real & (tl.load(filled + first + s, mask=real, other=0) != 0)
    theta = tl.load(step_size + at + s * H, mask=real, other=0.0)
    eta, a = theta * 0.0 + 1.0, theta * 0.0 + 1.0
    if MOMENTUM:
        eta = tl.exp(tl.load(log_momentum + at + s * H, mask=real, other=0.0))
    if DECAY:
        a = tl.exp(tl.load(log_decay + at + s * H, mask=real, other=0.0))
    joins = real & ((T - left + s) % WRITES == WRITES - 1) if WRITES > 1 else real
    return theta, eta, a, tl.where(joins, 1.0, 0.0)


@triton.jit
def coefficients(
    step_size,  # [B, T, H]
    log_momentum,  # [B, T, H]
    log_decay,  # [B, T, H]
    source,  # [B, T]
    filled,  # [B, T], or None for all
    G,  # out, [B H N, C, C]: how much of the write of token i is in the memory after token t
    vectors,  # out, [B H N, ROWS, C]
    T, N, H, M,  # M = B H N
    C: tl.constexpr, CHUNKS: tl.constexpr, MOMENTUM: tl.constexpr, DECAY: tl.constexpr, SOURCES: tl.constexpr,
    DECAYED: tl.constexpr, SOLVE: tl.constexpr, CARRIED: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """Of CHUNKS chunks side by side."""
    chunk = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    known = chunk < M
    at, first, left = begin_of(chunk, T, N, H, C)
    left = tl.where(known, left, 0)
    t = tl.arange(0, C)[None, :]
    row = vectors + (chunk.to(tl.int64) * (tiles.ROWS * C))[:, None] + t
    if MOMENTUM:  # sums of logs for the gradient: in float64, and kept as two float32 numbers
        real = t < left[:, None]
        log_eta = tl.load(log_momentum + at[:, None] + t * H, mask=real, other=0.0)
        if filled is not None:
            log_eta = tl.where(tl.load(filled + first[:, None] + t, mask=real, other=0) != 0, log_eta, 0.0)
        summed = tl.cumsum(tl.maximum(log_eta, -1000.0).to(tl.float64), 1)  # a gate of 0 has an infinite log
        high = summed.to(tl.float32)
        tl.store(row + tiles.HIGH * C, high, mask=known[:, None])
        tl.store(row + tiles.LOW * C, (summed - high.to(tl.float64)).to(tl.float32), mask=known[:, None])
    zeros = tl.zeros([CHUNKS, C], tl.float32)
    A, F, S = zeros, zeros, zeros
    of_memory, of_momentum, of_reference = zeros, zeros, zeros  # the rows of G and S, and of G where M_ref is carried
    kept = tl.zeros([CHUNKS], tl.float32) + 1.0
    kept_s, kept_f = kept, kept - 1.0
    place = places(source, first, left, T, C, SOURCES)
    place_of_last = tl.sum(tl.where(t == C - 1, place, 0), 1)
    to = G + chunk.to(tl.int64) * (C * C)
    for s in tl.range(0, C, loop_unroll_factor=UNROLL):
        theta, eta, a, joins = gates_at(
            step_size, log_momentum, log_decay, filled, at, first, s, left, T, H, MOMENTUM, DECAY, WRITES
        )
        now = t == s
        write = tl.where(now, theta[:, None], 0.0)
        of_memory *= a[:, None]
        kept *= a
        A = tl.where(now, kept[:, None], A)
        if MOMENTUM:
            of_momentum = of_momentum * eta[:, None] + write
            of_memory += joins[:, None] * of_momentum
            kept_s *= eta
            kept_f = a * kept_f + joins * kept_s
            F = tl.where(now, kept_f[:, None], F)
            S = tl.where(now, kept_s[:, None], S)
        else:
            of_memory += write
        if CARRIED:
            of_reference = tl.where((place_of_last == s)[:, None], of_memory, of_reference)
        tl.store(to[:, None] + s * C + t, of_memory, mask=known[:, None])
    tl.store(row + tiles.A * C, A, mask=known[:, None])
    tl.store(row + tiles.WRITE_M * C, of_memory, mask=known[:, None])
    if MOMENTUM:
        tl.store(row + tiles.F * C, F, mask=known[:, None])
        tl.store(row + tiles.M * C, S, mask=known[:, None])
        tl.store(row + tiles.WRITE_S * C, of_momentum, mask=known[:, None])
    if SOLVE:
        refer_a, refer_f = A, F
        if not DECAYED:
            inside, at_place = (place >= 0) & (place < C), tl.minimum(tl.maximum(place, 0), C - 1)
            refer_a = tl.where(inside, tl.gather(A, at_place, 1), tl.where(place == -1, 1.0, 0.0))
            if MOMENTUM:
                refer_f = tl.where(inside, tl.gather(F, at_place, 1), 0.0)
        tl.store(row + tiles.REFER_A * C, refer_a, mask=known[:, None])
        if MOMENTUM:
            tl.store(row + tiles.REFER_F * C, refer_f, mask=known[:, None])
        if CARRIED:
            tl.store(row + tiles.REFER_R * C, tl.where(place < -1, 1.0, 0.0), mask=known[:, None])
            tl.store(row + tiles.WRITE_R * C, of_reference, mask=known[:, None])


@triton.jit
def places(source, first, left, T, C: tl.constexpr, SOURCES: tl.constexpr):
    """[CHUNKS, C]: where a token's gradient is taken. 0, 1, ..: after this token of the chunk; -1: at the chunk's first
    memory; less: at the reference carried along; C and more: at zero. What fills the last chunk repeats the last
    token's. first, left: as begin_of gives them."""
    t = tl.arange(0, C)[None, :]
    if SOURCES:
        at = source + first[:, None] + tl.minimum(t, left[:, None] - 1)
        return tl.load(at, mask=(t >= 0) & (left > 0)[:, None], other=0) - (T - left)[:, None]
    return tl.zeros_like(first)[:, None].to(tl.int32) + t - 1


@triton.jit
def coefficients_gradient(
    step_size, log_momentum, log_decay, source, filled, G, vectors,
    dG,  # [B H N, C, C]: what is by M_ref among it, at the places where that was taken
    dvectors,  # [B H N, ROWS, C]
    dstep_size, dlog_momentum, dlog_decay,  # out, [B, T, H]
    T, N, H, M,
    C: tl.constexpr, CHUNKS: tl.constexpr, MOMENTUM: tl.constexpr, DECAY: tl.constexpr, SOURCES: tl.constexpr,
    DECAYED: tl.constexpr, SOLVE: tl.constexpr, CARRIED: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """By the gates, from the last token to the first."""
    chunk = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    known = chunk < M
    at, first, left = begin_of(chunk, T, N, H, C)
    left = tl.where(known, left, 0)
    t = tl.arange(0, C)[None, :]
    real = t < left[:, None]
    begin = chunk.to(tl.int64) * (tiles.ROWS * C)
    row, drow = vectors + begin, dvectors + begin
    square = chunk.to(tl.int64) * (C * C)
    theta = tl.load(step_size + at[:, None] + t * H, mask=real, other=0.0)
    if filled is not None:
        theta = tl.where(tl.load(filled + first[:, None] + t, mask=real, other=0) != 0, theta, 0.0)
    by_memory = tl.load(drow[:, None] + tiles.WRITE_M * C + t, mask=known[:, None], other=0.0)
    zeros = tl.zeros([CHUNKS, C], tl.float32)
    dtheta, deta, da = zeros, zeros, zeros
    by_a = tl.load(drow[:, None] + tiles.A * C + t, mask=known[:, None], other=0.0)
    TAKEN: tl.constexpr = SOLVE and not DECAYED  # M_ref is M of the token before, or of another
    if SOLVE:
        drefer_a = tl.load(drow[:, None] + tiles.REFER_A * C + t, mask=known[:, None], other=0.0)
        if DECAYED:
            by_a += drefer_a
        place = places(source, first, left, T, C, SOURCES)
        if MOMENTUM:
            drefer_f = tl.load(drow[:, None] + tiles.REFER_F * C + t, mask=known[:, None], other=0.0)
        if CARRIED:
            by_reference = tl.load(drow[:, None] + tiles.WRITE_R * C + t, mask=known[:, None], other=0.0)
            place_of_last = tl.sum(tl.where(t == C - 1, place, 0), 1)
    by_f = tl.zeros([CHUNKS], tl.float32)
    if MOMENTUM:
        by_momentum = tl.load(drow[:, None] + tiles.WRITE_S * C + t, mask=known[:, None], other=0.0)
        high = tl.load(row[:, None] + tiles.HIGH * C + t, mask=known[:, None], other=0.0)
        low = tl.load(row[:, None] + tiles.LOW * C + t, mask=known[:, None], other=0.0)
        by_m = by_f
    for i in tl.range(0, C, loop_unroll_factor=UNROLL):
        s = C - 1 - i
        now, later = t == s, tl.where(known, s, 0) > 0
        _, eta, a, joins = gates_at(
            step_size, log_momentum, log_decay, filled, at, first, s, left, T, H, MOMENTUM, DECAY, WRITES
        )
        by_memory += tl.load(dG + square[:, None] + s * C + t, mask=known[:, None], other=0.0)
        if CARRIED:
            by_memory += tl.where((place_of_last == s)[:, None], by_reference, 0.0)
        if TAKEN:
            by_a += tl.where(now, tl.sum(tl.where(place == s, drefer_a, 0.0), 1)[:, None], 0.0)
        if MOMENTUM:
            by_f += tl.load(drow + tiles.F * C + s, mask=known, other=0.0)
            if TAKEN:
                by_f += tl.sum(tl.where(place == s, drefer_f, 0.0), 1)
            by_m += tl.load(drow + tiles.M * C + s, mask=known, other=0.0) + joins * by_f
            by_momentum += joins[:, None] * by_memory
            dtheta = tl.where(now, by_momentum, dtheta)
            high_before = tl.load(row + tiles.HIGH * C + s - 1, mask=later, other=0.0)
            low_before = tl.load(row + tiles.LOW * C + s - 1, mask=later, other=0.0)
            between = (high_before[:, None] - high) + (low_before[:, None] - low)
            before = tl.exp(tl.where(t < s, between, -float("inf"))) * theta
            kept_before = tl.load(row + tiles.M * C + s - 1, mask=later, other=1.0)
            found = eta * (tl.sum(by_momentum * before, 1) + by_m * kept_before)
            deta = tl.where(now, found[:, None], deta)
            by_momentum *= eta[:, None]
            by_m *= eta
        else:
            dtheta = tl.where(now, by_memory, dtheta)
        if DECAY:
            before = tl.load(G + square[:, None] + (s - 1) * C + t, mask=later[:, None], other=0.0)
            found = tl.sum(by_memory * before, 1)
            if MOMENTUM:
                found += by_f * tl.load(row + tiles.F * C + s - 1, mask=later, other=0.0)
            da = tl.where(now, (a * found)[:, None], da)
        by_memory *= a[:, None]
        by_f *= a
    tl.store(dstep_size + at[:, None] + t * H, dtheta, mask=real)
    if MOMENTUM:
        tl.store(dlog_momentum + at[:, None] + t * H, deta, mask=real)
    if DECAY:
        kept = tl.load(row[:, None] + tiles.A * C + t, mask=known[:, None], other=0.0)
        tl.store(dlog_decay + at[:, None] + t * H, da + tl.cumsum(by_a * kept, 1, reverse=True), mask=real)
