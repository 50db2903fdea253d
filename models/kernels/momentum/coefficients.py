"""The coefficients of every chunk, all at once: of gates and keys alone, and their gradient by the gates."""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.momentum import tiles
from models.kernels.momentum.tiles import (
    dot,
    fades,
    halves,
    log_gate_gradient,
    of_gates,
    of_square,
    of_tokens,
    select_dot,
    split,
    split_dot,
    store_row,
    unit_inverse,
)


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
def gates_of(
    step_size, log_momentum, log_decay, filled, bh, n, T, H, C: tl.constexpr, MOMENTUM: tl.constexpr,
    DECAY: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """[C] each of a chunk: theta, log eta and log a, zeros where there are no tokens or gates; and after which tokens S
    is added to M. What fills the last chunk fades nothing, and must not add it again. `filled` [B, T] says where there
    are tokens, if any may be none."""
    t = n * C + tl.arange(0, C)
    at, real = of_gates(step_size, bh, n, T, H, C)
    if filled is not None:
        real = real & (tl.load(filled + (bh // H).to(tl.int64) * T + t, mask=real, other=0) != 0)
    theta = tl.load(at, mask=real, other=0.0)
    log_eta = tl.zeros([C], tl.float32)
    if MOMENTUM:
        at, _ = of_gates(log_momentum, bh, n, T, H, C)
        log_eta = tl.load(at, mask=real, other=0.0)
    log_a = tl.zeros([C], tl.float32)
    if DECAY:
        at, _ = of_gates(log_decay, bh, n, T, H, C)
        log_a = tl.load(at, mask=real, other=0.0)
    joins = real & (t % WRITES == WRITES - 1) if WRITES > 1 else real
    return theta, log_eta, log_a, joins


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
    R,  # out, [B H N, HALVES, C, C]: the inverse of the system of the errors, without its diagonal of ones
    vectors,  # out, [B H N, ROWS, C]
    q,  # [B, T, H, K], or None where nothing reads; then the three below are None too
    similar,  # out, [B H N, C, C]: Q W^T
    attend,  # out, [B H N, C, C]: Q W^T * G, what the outputs have of the errors
    system,  # out, [B H N, C, C]: K W^T, or None without SOLVE
    T, N, H, K: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr, MOMENTUM: tl.constexpr,
    DECAY: tl.constexpr, SOURCES: tl.constexpr, DECAYED: tl.constexpr, SOLVE: tl.constexpr, WRITES: tl.constexpr,
    OWN_WRITES: tl.constexpr,  # keys of their own, not k
    PRECISION: tl.constexpr,
):  # fmt: skip
    n, bh = tl.program_id(0), tl.program_id(1)
    chunk = bh * N + n
    TYPE: tl.constexpr = k.dtype.element_ty
    t = tl.arange(0, C)
    theta, log_eta, log_a, joins = gates_of(
        step_size, log_momentum, log_decay, filled, bh, n, T, H, C, MOMENTUM, DECAY, WRITES
    )
    La, a, _ = fades(log_a, C)
    out = vectors + chunk.to(tl.int64) * tiles.ROWS * C + t
    P = La
    if MOMENTUM:
        Le, m, rest = fades(log_eta, C)
        high, low = split(La, TYPE)
        joined, joined_low = split(tl.where(joins[:, None], Le, 0.0), TYPE)
        P = split_dot(high, low, joined, joined_low, PRECISION)
        # f = La m, and m_s is Le's first column times the first momentum
        f = tl.sum(tl.where(t[None, :] == 0, P, 0.0), 1) * tl.sum(tl.where(t == 0, m, 0.0), 0)
        tl.store(out + tiles.F * C, f)
        tl.store(out + tiles.M * C, m)
        tl.store(out + tiles.WRITE_S * C, rest * theta)
    combined = P * theta[None, :]
    tl.store(of_square(G, chunk, C), combined)
    tl.store(out + tiles.A * C, a)
    rows = vectors + chunk.to(tl.int64) * tiles.ROWS * C
    store_row(rows + tiles.WRITE_M * C, combined, C - 1, C)
    if SOLVE:
        if DECAYED:
            refer = tl.where(t[:, None] > t[None, :], combined, 0.0)
            tl.store(out + tiles.REFER_A * C, a)
        else:
            place = places(source, bh, n, T, H, C, SOURCES)
            chosen = place[:, None] == t[None, :]
            refer = select_dot(chosen, combined, TYPE, PRECISION)
            inside, at_place = (place >= 0) & (place < C), tl.minimum(tl.maximum(place, 0), C - 1)
            refer_a = tl.where(inside, tl.gather(a, at_place, 0), tl.where(place == -1, 1.0, 0.0))
            tl.store(out + tiles.REFER_A * C, refer_a)
            tl.store(out + tiles.REFER_R * C, tl.where(place < -1, 1.0, 0.0))
            store_row(rows + tiles.WRITE_R * C, refer, C - 1, C)
            if MOMENTUM:
                tl.store(out + tiles.REFER_F * C, tl.where(inside, tl.gather(f, at_place, 0), 0.0))
    if q is not None:
        at, mask = of_tokens(k, bh, n, 0, T, H, K, C, BK)
        keys = tl.load(at, mask=mask, other=0.0)
        written = keys
        if OWN_WRITES:
            at, mask = of_tokens(write_key, bh, n, 0, T, H, K, C, BK)
            written = tl.load(at, mask=mask, other=0.0)
        at, mask = of_tokens(q, bh, n, 0, T, H, K, C, BK)
        product = dot(tl.load(at, mask=mask, other=0.0), tl.trans(written), PRECISION)
        tl.store(of_square(similar, chunk, C), product.to(TYPE))
        tl.store(of_square(attend, chunk, C), (product * combined).to(TYPE))
        if SOLVE:
            product = dot(keys, tl.trans(written), PRECISION)
            tl.store(of_square(system, chunk, C), product.to(TYPE))
            inverse = unit_inverse(product * refer, C, LOG_C, TYPE, PRECISION)
            high, low = halves(tl.where(t[:, None] > t[None, :], inverse, 0.0), TYPE)
            HALVES: tl.constexpr = 1 if TYPE.is_fp32() else 2
            tl.store(of_square(R, chunk * HALVES, C), high)
            if HALVES == 2:
                tl.store(of_square(R, chunk * HALVES + 1, C), low)


@triton.jit
def coefficients_gradient(
    k,  # of the call, for its dtype
    step_size, log_momentum, log_decay, filled,
    dG,  # [B H N, C, C]
    dvectors,  # [B H N, ROWS, C]: A, F, M and WRITE_*; the others are in dG
    dstep_size,  # out, [B, T, H]
    dlog_momentum,  # out
    dlog_decay,  # out
    T, N, H, C: tl.constexpr, MOMENTUM: tl.constexpr, DECAY: tl.constexpr, WRITES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n, bh = tl.program_id(0), tl.program_id(1)
    chunk = bh * N + n
    t = tl.arange(0, C)
    rows = dvectors + chunk.to(tl.int64) * tiles.ROWS * C + t
    dcombined = tl.load(of_square(dG, chunk, C))
    dcombined += tl.where((t == C - 1)[:, None], tl.load(rows + tiles.WRITE_M * C)[None, :], 0.0)
    da = tl.load(rows + tiles.A * C)
    df, dm, dwrite = da, da, da
    if MOMENTUM:
        df = tl.load(rows + tiles.F * C)
        dm = tl.load(rows + tiles.M * C)
        dwrite = tl.load(rows + tiles.WRITE_S * C)
    store_gates_gradient(
        step_size, log_momentum, log_decay, filled, dcombined, da, df, dm, dwrite, dstep_size, dlog_momentum,
        dlog_decay, bh, n, T, H, C, MOMENTUM, DECAY, WRITES, k.dtype.element_ty, PRECISION,
    )  # fmt: skip


@triton.jit
def store_gates_gradient(
    step_size, log_momentum, log_decay, filled,
    dcombined,  # [C, C]: by G
    da, df, dm,  # [C]: by what is left of the chunk's first matrices
    dwrite,  # [C]: by what the last momentum has of the writes
    dstep_size, dlog_momentum, dlog_decay, bh, n, T, H, C: tl.constexpr, MOMENTUM: tl.constexpr, DECAY: tl.constexpr,
    WRITES: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G = La Le diag(theta), f = La m, of the rows of Le and m that join: products, and so is their gradient."""
    t = tl.arange(0, C)
    theta, log_eta, log_a, joins = gates_of(
        step_size, log_momentum, log_decay, filled, bh, n, T, H, C, MOMENTUM, DECAY, WRITES
    )
    La, a, _ = fades(log_a, C)
    if MOMENTUM:
        Le, m, rest = fades(log_eta, C)
        high, low = split(La, TYPE)
        joined, joined_low = split(tl.where(joins[:, None], Le, 0.0), TYPE)
        P = split_dot(high, low, joined, joined_low, PRECISION)
        dtheta = rest * dwrite + tl.sum(dcombined * P, 0)
        dm += tl.where(joins, tl.sum(La * df[:, None], 0), 0.0)
        dhigh, dlow = split(dcombined * theta[None, :], TYPE)
        dLe = tl.where(joins[:, None], split_dot(tl.trans(high), tl.trans(low), dhigh, dlow, PRECISION), 0.0)
        dLe += tl.where((t == C - 1)[:, None], (dwrite * theta)[None, :], 0.0)
        at, mask = of_gates(dlog_momentum, bh, n, T, H, C)
        tl.store(at, log_gate_gradient(dLe, Le, dm, m, C, TYPE, PRECISION), mask=mask)
        dLa = df[:, None] * tl.where(joins, m, 0.0)[None, :]
        dLa = split_dot(dhigh, dlow, tl.trans(joined), tl.trans(joined_low), PRECISION, dLa)
    else:
        dtheta = tl.sum(dcombined * La, 0)
        dLa = dcombined * theta[None, :]
    at, mask = of_gates(dstep_size, bh, n, T, H, C)
    tl.store(at, dtheta, mask=mask)
    if DECAY:
        at, mask = of_gates(dlog_decay, bh, n, T, H, C)
        tl.store(at, log_gate_gradient(dLa, La, da, a, C, TYPE, PRECISION), mask=mask)


@triton.jit
def gates_gradient(
    k,  # of the call, for its dtype
    step_size, log_momentum, log_decay, source,
    dG,  # [B H N, C, C]: by the coefficients of outputs, and by all where DECAYED
    drefer,  # [B H N, C, C]: by those of the system, or None
    dvectors,  # [B H N, ROWS, C]
    dstep_size, dlog_momentum, dlog_decay,  # out, [B, T, H]
    T, N, H: tl.constexpr, C: tl.constexpr, MOMENTUM: tl.constexpr, CARRIED: tl.constexpr, DECAY: tl.constexpr,
    SOURCES: tl.constexpr, DECAYED: tl.constexpr, SOLVE: tl.constexpr, WRITES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """By the gates. What is by M_ref goes where it was taken from."""
    bh, n = tl.program_id(2) * H + tl.program_id(0), tl.program_id(1)
    chunk = bh * N + n
    TYPE: tl.constexpr = k.dtype.element_ty
    t = tl.arange(0, C)
    row = dvectors + chunk.to(tl.int64) * tiles.ROWS * C + t
    dcombined = tl.load(of_square(dG, chunk, C))
    dcombined += tl.where((t == C - 1)[:, None], tl.load(row + tiles.WRITE_M * C)[None, :], 0.0)
    da = tl.load(row + tiles.A * C)
    df, dm, dwrite_s = da, da, da
    if MOMENTUM:
        df = tl.load(row + tiles.F * C)
        dm = tl.load(row + tiles.M * C)
        dwrite_s = tl.load(row + tiles.WRITE_S * C)
    if SOLVE:
        drefer_a = tl.load(row + tiles.REFER_A * C)
        if DECAYED:
            da += drefer_a
        else:
            place = places(source, bh, n, T, H, C, SOURCES)
            if CARRIED:  # its last row is G's at the place of the last token
                place_of_last = tl.sum(tl.where(t == C - 1, place, 0), 0)
                dwrite_r = tl.load(row + tiles.WRITE_R * C)
                dcombined += tl.where((t == place_of_last)[:, None], dwrite_r[None, :], 0.0)
            taken = t[:, None] == place[None, :]
            by_system = tl.load(of_square(drefer, chunk, C))
            dcombined = dot(tl.where(taken, 1.0, 0.0).to(by_system.dtype), by_system, PRECISION, dcombined)
            drefer_f = drefer_a
            if MOMENTUM:
                drefer_f = tl.load(row + tiles.REFER_F * C)
            dtaken_a, dtaken_f = select_two(taken, drefer_a, drefer_f, C, TYPE, PRECISION)
            da += dtaken_a
            df += dtaken_f
    store_gates_gradient(
        step_size, log_momentum, log_decay, None, dcombined, da, df, dm, dwrite_s, dstep_size, dlog_momentum,
        dlog_decay, bh, n, T, H, C, MOMENTUM, DECAY, WRITES, TYPE, PRECISION,
    )  # fmt: skip


@triton.jit
def select_two(chosen, x, y, C: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """chosen x and chosen y, of a tile of zeros and ones and two vectors [C]: a product of a narrow tile. (Sums along
    the rows of [C, C] would be 160 shuffles each.)"""
    column = tl.arange(0, 16)[None, :]
    both = tl.where(column == 0, x[:, None], tl.where(column == 1, y[:, None], 0.0))
    found = select_dot(chosen, both, TYPE, PRECISION)
    return tl.sum(tl.where(column == 0, found, 0.0), 1), tl.sum(tl.where(column == 1, found, 0.0), 1)
