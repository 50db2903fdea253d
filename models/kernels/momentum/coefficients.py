"""The coefficients of every chunk, all at once: of gates and keys alone, and their gradient by the gates."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.momentum import tiles
from models.kernels.momentum.tiles import dot, fades, log_gate_gradient, of_gates, of_square, of_tokens, unit_inverse


@triton.jit
def places(source, bh, n, T, H, C: tl.constexpr, SOURCES: tl.constexpr):
    """[C]: where a token's gradient is taken. 0, 1, ..: after this token of the chunk; -1: at the chunk's first memory;
    less: at the reference carried along; C and more: at zero. What fills the last chunk repeats the last token's."""
    t = n * C + tl.arange(0, C)
    if SOURCES:
        at = source + (bh // H).to(tl.int64) * T + tl.minimum(t, T - 1)
        return tl.load(at) - n * C
    return tl.arange(0, C) - 1


@triton.jit
def tokens_of(step_size, filled, bh, n, T, H, C: tl.constexpr):
    """Addresses [C] of a chunk's step sizes, and where it has tokens: `filled` [B, T] says so where any may be none."""
    at, real = of_gates(step_size, bh, n, T, H, C)
    if filled is not None:
        t = n * C + tl.arange(0, C)
        real = real & (tl.load(filled + (bh // H).to(tl.int64) * T + t, mask=real, other=0) != 0)
    return at, real


@triton.jit
def joining(real, n, C: tl.constexpr, WRITES: tl.constexpr):
    """[C]: after which tokens S is added to M. What fills the last chunk fades nothing, and must not add it again."""
    t = n * C + tl.arange(0, C)
    return real & (t % WRITES == WRITES - 1) if WRITES > 1 else real


@triton.jit
def coefficients(
    k,  # [B, T, H, K]
    write_key,  # [B, T, H, K]
    step_size,  # [B, T, H]
    log_momentum,  # [B, T, H]
    log_decay,  # [B, T, H]
    source,  # [B, T]
    filled,  # [B, T], or None for all
    G,  # out, [B H N, C, C]: how much of the write of token i is in the memory after token t
    R,  # out, [B H N, C, C]: the inverse of the system of the errors, without its diagonal of ones
    vectors,  # out, [B H N, ROWS, C]
    T, N, H, K, C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr, MOMENTUM: tl.constexpr, DECAY: tl.constexpr,
    SOURCES: tl.constexpr, DECAYED: tl.constexpr, SOLVE: tl.constexpr, WRITES: tl.constexpr,
    OWN_WRITES: tl.constexpr,  # keys of their own, not k
    PRECISION: tl.constexpr,
):  # fmt: skip
    n, bh = tl.program_id(0), tl.program_id(1)
    chunk = bh * N + n
    t = tl.arange(0, C)
    at, real = tokens_of(step_size, filled, bh, n, T, H, C)
    theta = tl.load(at, mask=real, other=0.0)
    log_a = tl.zeros([C], tl.float32)
    if DECAY:
        at, _ = of_gates(log_decay, bh, n, T, H, C)
        log_a = tl.load(at, mask=real, other=0.0)
    La, a = fades(log_a, C)
    out = vectors + chunk.to(tl.int64) * tiles.ROWS * C + t
    P = La
    if MOMENTUM:
        at, _ = of_gates(log_momentum, bh, n, T, H, C)
        log_eta = tl.load(at, mask=real, other=0.0)
        Le, m = fades(log_eta, C)
        joins = joining(real, n, C, WRITES)
        P = dot(La, tl.where(joins[:, None], Le, 0.0), PRECISION)
        f = tl.sum(La * tl.where(joins, m, 0.0)[None, :], 1)
        tl.store(out + tiles.F * C, f)
        tl.store(out + tiles.M * C, m)
        tl.store(out + tiles.WRITE_S * C, tl.sum(tl.where((t == C - 1)[:, None], Le, 0.0), 0) * theta)
    combined = P * theta[None, :]
    tl.store(of_square(G, chunk, C), combined)
    tl.store(out + tiles.A * C, a)
    tl.store(out + tiles.WRITE_M * C, tl.sum(tl.where((t == C - 1)[:, None], combined, 0.0), 0))
    if SOLVE:
        if DECAYED:
            refer = tl.where(t[:, None] > t[None, :], combined, 0.0)
            tl.store(out + tiles.REFER_A * C, a)
        else:
            place = places(source, bh, n, T, H, C, SOURCES)
            chosen = tl.where(place[:, None] == t[None, :], 1.0, 0.0)
            refer = dot(chosen, combined, PRECISION)
            tl.store(out + tiles.REFER_A * C, tl.sum(chosen * a[None, :], 1) + tl.where(place == -1, 1.0, 0.0))
            tl.store(out + tiles.REFER_R * C, tl.where(place < -1, 1.0, 0.0))
            tl.store(out + tiles.WRITE_R * C, tl.sum(tl.where((t == C - 1)[:, None], refer, 0.0), 0))
            if MOMENTUM:
                tl.store(out + tiles.REFER_F * C, tl.sum(chosen * f[None, :], 1))
        at, mask = of_tokens(k, bh, n, 0, T, H, K, C, BK)
        keys = tl.load(at, mask=mask, other=0.0)
        written = keys
        if OWN_WRITES:
            at, mask = of_tokens(write_key, bh, n, 0, T, H, K, C, BK)
            written = tl.load(at, mask=mask, other=0.0)
        inverse = unit_inverse(dot(keys, tl.trans(written), PRECISION) * refer, C, LOG_C, PRECISION)
        tl.store(of_square(R, chunk, C), tl.where(t[:, None] > t[None, :], inverse, 0.0))


@triton.jit
def coefficients_gradient(
    step_size, log_momentum, log_decay, source, filled,
    dG,  # [B H N, C, C]
    dvectors,  # [B H N, ROWS, C]: A, F, M and WRITE_*; the others are in dG
    dstep_size,  # out, [B, T, H]
    dlog_momentum,  # out
    dlog_decay,  # out
    T,
    N,
    H,
    C: tl.constexpr,
    MOMENTUM: tl.constexpr,
    CARRIED: tl.constexpr,
    DECAY: tl.constexpr,
    SOURCES: tl.constexpr,
    WRITES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """G = La Le diag(theta), f = La m, of the rows of Le and m that join: products, and so is their gradient."""
    n, bh = tl.program_id(0), tl.program_id(1)
    chunk = bh * N + n
    t = tl.arange(0, C)
    at, real = tokens_of(step_size, filled, bh, n, T, H, C)
    theta = tl.load(at, mask=real, other=0.0)
    log_a = tl.zeros([C], tl.float32)
    if DECAY:
        at, _ = of_gates(log_decay, bh, n, T, H, C)
        log_a = tl.load(at, mask=real, other=0.0)
    La, a = fades(log_a, C)
    rows = dvectors + chunk.to(tl.int64) * tiles.ROWS * C + t
    last = (t == C - 1)[:, None]
    dcombined = tl.load(of_square(dG, chunk, C))
    dcombined += tl.where(last, tl.load(rows + tiles.WRITE_M * C)[None, :], 0.0)
    if CARRIED:  # its last row is G's at the place of the last token
        place = tl.sum(tl.where(t == C - 1, places(source, bh, n, T, H, C, SOURCES), 0), 0)
        dcombined += tl.where((t == place)[:, None], tl.load(rows + tiles.WRITE_R * C)[None, :], 0.0)
    da = tl.load(rows + tiles.A * C)
    P = La
    dLa = dcombined * theta[None, :]
    dtheta = tl.zeros([C], tl.float32)
    if MOMENTUM:
        at, _ = of_gates(log_momentum, bh, n, T, H, C)
        log_eta = tl.load(at, mask=real, other=0.0)
        Le, m = fades(log_eta, C)
        joins = joining(real, n, C, WRITES)
        masked = tl.where(joins[:, None], Le, 0.0)
        df = tl.load(rows + tiles.F * C)
        dwrite = tl.load(rows + tiles.WRITE_S * C)
        dtheta = tl.sum(tl.where(last, Le, 0.0), 0) * dwrite
        P = dot(La, masked, PRECISION)
        dLe = tl.where(joins[:, None], dot(tl.trans(La), dLa, PRECISION), 0.0)
        dLe += tl.where(last, (dwrite * theta)[None, :], 0.0)
        dLa = dot(dLa, tl.trans(masked), PRECISION) + df[:, None] * tl.where(joins, m, 0.0)[None, :]
        dm = tl.where(joins, tl.sum(La * df[:, None], 0), 0.0) + tl.load(rows + tiles.M * C)
        at, _ = of_gates(dlog_momentum, bh, n, T, H, C)
        tl.store(at, log_gate_gradient(dLe, Le, dm, m, C), mask=real)
    dtheta += tl.sum(dcombined * P, 0)
    at, _ = of_gates(dstep_size, bh, n, T, H, C)
    tl.store(at, dtheta, mask=real)
    if DECAY:
        at, _ = of_gates(dlog_decay, bh, n, T, H, C)
        tl.store(at, log_gate_gradient(dLa, La, da, a, C), mask=real)
