"""What the kernels of test-time training share: products, the layer norm and its gradients, tokens.

Tokens are rows [C, K] with AXIS 1, the one that the norm goes along, and columns [K, C] with AXIS 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.parts.precision import NORM_EPS

EPS = tl.constexpr(NORM_EPS)


@triton.jit
def dot(x, y, TYPE: tl.constexpr):
    """x y of numbers rounded to TYPE, that of q, k and v, summed in float32. (float32 is rounded to TF32 on a GPU.)"""
    return tl.dot(x.to(TYPE), y.to(TYPE))


@triton.jit
def add_dot(x, y, total, TYPE: tl.constexpr):
    return tl.dot(x.to(TYPE), y.to(TYPE), total)


@triton.jit
def mean(x, K: tl.constexpr, AXIS: tl.constexpr = 1):
    return tl.sum(x, AXIS, keep_dims=True) / K


@triton.jit
def standardise(z, K: tl.constexpr, AXIS: tl.constexpr = 1):
    z = z - mean(z, K, AXIS)
    scale = 1 / tl.sqrt(mean(z * z, K, AXIS) + EPS)
    return z * scale, scale


@triton.jit
def project(x, y, scale, K: tl.constexpr, AXIS: tl.constexpr = 1):
    """The gradient by z of y = standardise(z), from the one by y."""
    return scale * (x - mean(x, K, AXIS) - y * mean(x * y, K, AXIS))


@triton.jit
def gradient_backward(p, y, scale, gradient, target, gamma, beta, K: tl.constexpr, AXIS: tl.constexpr = 1):
    """From the gradient p by d/dz 1/2 ||target - LN(z)||^2: those by z and target, and, not summed yet, by gamma and
    beta. y, scale = standardise(z); gradient is what p is the gradient by.
    """
    error = gamma * y + beta - target
    g = gamma * error
    dg = project(p, y, scale, K, AXIS)
    dy = gamma * gamma * dg - scale * (mean(g * y, K, AXIS) * p + mean(p * y, K, AXIS) * g)
    dz = project(dy, y, scale, K, AXIS) - scale * y * mean(p * gradient, K, AXIS)
    return dz, -gamma * dg, dg * (error + gamma * y), gamma * dg


@triton.jit
def mini_batch(first, fresh, batch, n, N, C: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Of mini-batch n its first token and its length, its tokens and which of them it has, and whether it begins a
    document.
    """
    begin, end = tl.load(first + batch * (N + 1) + n), tl.load(first + batch * (N + 1) + n + 1)
    token = begin + tl.arange(0, C)
    new = begin < 0  # false, and of the type that it has with documents
    if DOCUMENTS:
        new = tl.load(fresh + batch * N + n) != 0
    return begin, end - begin, token, token < end, new


@triton.jit
def tokens(x, batch, head, token, L, H, K: tl.constexpr):
    """Pointers to rows of x [B, L, H, K]."""
    return x + ((batch * L + token) * H + head)[:, None] * K + tl.arange(0, K)[None, :]


@triton.jit
def load(x, batch, head, token, real, L, H, K: tl.constexpr):
    return tl.load(tokens(x, batch, head, token, L, H, K), mask=real[:, None], other=0.0).to(tl.float32)


@triton.jit
def columns(x, batch, head, token, L, H, K: tl.constexpr):
    """Pointers to rows of x [B, L, H, K], as columns."""
    return x + ((batch * L + token) * H + head)[None, :] * K + tl.arange(0, K)[:, None]
