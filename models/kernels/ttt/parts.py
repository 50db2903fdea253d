"""What the kernels of test-time training share: products, the layer norm and its gradients, tokens. Rows are of K."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(x, y, TYPE: tl.constexpr):
    """x y of numbers rounded to TYPE, that of q, k and v, summed in float32. (float32 is rounded to TF32 on a GPU.)"""
    return tl.dot(x.to(TYPE), y.to(TYPE))


@triton.jit
def mean(x, K: tl.constexpr):
    return (tl.sum(x, 1) / K)[:, None]


@triton.jit
def standardise(z, K: tl.constexpr, EPS: tl.constexpr):
    z = z - mean(z, K)
    scale = 1 / tl.sqrt(mean(z * z, K) + EPS)
    return z * scale, scale


@triton.jit
def project(x, y, scale, K: tl.constexpr):
    """The gradient by z of y = standardise(z), from the one by y."""
    return scale * (x - mean(x, K) - y * mean(x * y, K))


@triton.jit
def gradient_backward(p, y, scale, gradient, target, gamma, beta, K: tl.constexpr):
    """From the gradient p by d/dz 1/2 ||target - LN(z)||^2: those by z and target, and, not summed yet, by gamma and
    beta. y, scale = standardise(z); gradient is what p is the gradient by.
    """
    error = gamma * y + beta - target
    g = gamma * error
    dg = project(p, y, scale, K)
    dy = gamma * gamma * dg - scale * (mean(g * y, K) * p + mean(p * y, K) * g)
    dz = project(dy, y, scale, K) - scale * y * mean(p * gradient, K)
    return dz, -gamma * dg, dg * (error + gamma * y), gamma * dg


@triton.jit
def tokens(x, batch, head, token, L, H, K: tl.constexpr):
    """Pointers to rows of x [B, L, H, K]."""
    return x + ((batch * L + token) * H + head)[:, None] * K + tl.arange(0, K)[None, :]


@triton.jit
def load(x, batch, head, token, real, L, H, K: tl.constexpr):
    return tl.load(tokens(x, batch, head, token, L, H, K), mask=real[:, None], other=0.0).to(tl.float32)
