"""The Triton kernels of one token; what they compute is in step/__init__.py.

A row of `pairs` [B, N] is what one product has made of a token: q, k and v side by side, the gate, the logits. Numbers
are float32 within a kernel, and rounded where the layers of a whole pass round them: after the convolution, and where a
vector has got its length.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.residual.kernels import rounded


@triton.jit
def softplus(x):
    """log(1 + e^x) with the digits of a small e^x, of which 1 + e^x loses most."""
    y = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + y
    small = tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, small)


@triton.jit
def of_length_one(x, eps, dtype: tl.constexpr):
    return rounded(x * tl.rsqrt(tl.sum(x * x, 0) + eps), dtype)


@triton.jit
def product(x, weight, out, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out [B, N] = x [B, D] weight^T: a program reads ROWS rows of the weight for one token."""
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        inside = (row < N)[:, None] & (channel < D)[None, :]
        w = tl.load(weight + row[:, None].to(tl.int64) * D + channel[None, :], mask=inside, other=0.0)
        a = tl.load(x + token * D + channel, mask=channel < D, other=0.0)
        total += w.to(tl.float32) * a.to(tl.float32)[None, :]
    tl.store(out + token * N + row, tl.sum(total, 1).to(out.dtype.element_ty), mask=row < N)


@triton.jit
def convolve(pairs, tail, weight, position, out, N, C, W: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """out [B, C], tail [B, W-1, C] moved on by a token, position [B] by one."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    real = channel < C
    TYPE: tl.constexpr = out.dtype.element_ty
    x = tl.load(pairs + row * N + channel, mask=real, other=0.0)
    y = x.to(tl.float32) * rounded(tl.load(weight + channel * W + W - 1, mask=real, other=0.0), TYPE)
    here = tail + row * (W - 1) * C + channel
    for i in tl.static_range(W - 1):
        earlier = tl.load(here + i * C, mask=real, other=0.0)
        y += earlier.to(tl.float32) * rounded(tl.load(weight + channel * W + i, mask=real, other=0.0), TYPE)
        if i > 0:
            tl.store(here + (i - 1) * C, earlier, mask=real)
    tl.store(here + (W - 2) * C, x.to(tail.dtype.element_ty), mask=real)
    if SILU:
        y = rounded(y, TYPE)
        y = y / (1.0 + tl.exp(-y))
    tl.store(out + row * C + channel, y.to(TYPE), mask=real)
    if block == 0:
        tl.store(position + row, tl.load(position + row) + 1)


@triton.jit
def write_and_read(
    along, pairs, memory, momentum, out, log_rate, decay_bias, step_bias, momentum_bias, eps, largest,
    N, C, LOGITS, H, K, V, R: tl.constexpr, DECAY: tl.constexpr, MOMENTUM: tl.constexpr, TIED: tl.constexpr,
    UNIT: tl.constexpr, STEP_BIAS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """out [B, H, V]; memory and momentum [B, H, K, V] in place. along [B, C]: q and k of H / R heads, v of H."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key, value = tl.arange(0, KEYS), tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    TYPE: tl.constexpr = out.dtype.element_ty
    there, real = key < K, value < V
    vectors = along + row * C + (head // R) * K + key
    q = tl.load(vectors, mask=there, other=0.0).to(tl.float32)
    k = tl.load(vectors + H // R * K, mask=there, other=0.0).to(tl.float32)
    v = tl.load(along + row * C + 2 * (H // R) * K + head * V + value, mask=real, other=0.0).to(tl.float32)
    if UNIT:
        q, k = of_length_one(q, eps, TYPE), of_length_one(k, eps, TYPE)

    logits, log_decay = pairs + row * N + LOGITS + head, 0.0
    if DECAY:
        rate = tl.exp(tl.load(log_rate + head).to(tl.float32))
        log_decay = -rate * softplus(tl.load(logits).to(tl.float32) + tl.load(decay_bias + head).to(tl.float32))
        logits += H
    z = tl.load(logits).to(tl.float32)
    if STEP_BIAS:
        z += tl.load(step_bias + head).to(tl.float32)
    step = largest / (1.0 + tl.exp(-z))

    cell = ((row * H + head) * K + key[:, None]) * V + value[None, :]
    inside = there[:, None] & real[None, :]
    M = tl.load(memory + cell, mask=inside, other=0.0)
    decay = tl.exp(log_decay)
    if MOMENTUM:
        z = tl.load(logits + H).to(tl.float32) + tl.load(momentum_bias + head).to(tl.float32)
        if TIED:
            z = tl.minimum(z, 12.0)
        log_rest = -softplus(z)
        if TIED:  # eta as momentum.py's gates have it for the first token of a call
            eta, step, remaining = log_rest + log_decay, step * tl.exp(2.0 * log_rest + log_decay), tl.exp(z)
        else:
            eta, step, remaining = -softplus(-z), step * tl.exp(log_rest), 1.0
        S = tl.load(momentum + cell, mask=inside, other=0.0)
        error = step * (v - tl.sum(k[:, None] * M, 0))
        S = tl.exp(eta) * S + k[:, None] * error[None, :]
        M = decay * M + S
        tl.store(momentum + cell, remaining * S, mask=inside)
    else:
        M = decay * M
        error = step * (v - tl.sum(k[:, None] * M, 0))
        M += k[:, None] * error[None, :]
    tl.store(memory + cell, M, mask=inside)
    o = tl.sum(q[:, None] * M, 0)
    tl.store(out + (row * H + head) * V + value, o.to(TYPE), mask=real)


@triton.jit
def read_out(
    o, pairs, weight, out, eps, N, GATE, H, V, NORM: tl.constexpr, ACTIVATION: tl.constexpr, VALUES: tl.constexpr
):
    """out [B, H, V]: each head of o at its norm, times the gate."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    value = tl.arange(0, VALUES)
    real = value < V
    TYPE: tl.constexpr = out.dtype.element_ty
    y = tl.load(o + (row * H + head) * V + value, mask=real, other=0.0).to(tl.float32)
    if NORM:
        w = rounded(tl.load(weight + value, mask=real, other=0.0), TYPE)
        y = rounded(y * tl.rsqrt(tl.sum(y * y, 0) / V + eps) * w, TYPE)
    if ACTIVATION:
        gate = tl.load(pairs + row * N + GATE + head * V + value, mask=real, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        if ACTIVATION == 1:
            sigmoid *= gate
        y *= rounded(sigmoid, TYPE)
    tl.store(out + (row * H + head) * V + value, y.to(TYPE), mask=real)


@triton.jit
def swiglu(x, out, F, BLOCK: tl.constexpr):
    """out [B, F] = silu(a) b of x = [a, b] [B, 2 F]."""
    row, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < F
    TYPE: tl.constexpr = out.dtype.element_ty
    a = tl.load(x + row * 2 * F + channel, mask=real, other=0.0).to(tl.float32)
    b = tl.load(x + row * 2 * F + F + channel, mask=real, other=0.0).to(tl.float32)
    y = rounded(a / (1.0 + tl.exp(-a)), TYPE) * b
    tl.store(out + row * F + channel, y.to(TYPE), mask=real)
