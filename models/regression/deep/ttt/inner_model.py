"""Inner models with a layer norm and a residual, and their gradients written out.

f(x) = x + LN(z(x)) ,    z(x) = x W + b    or    z(x) = gelu(x W_1 + b_1) W_2 + b_2 ,    and so on,

with the loss 1/2 ||v - f(k)||^2. What is written out here is the gradient that the memory descends along (layer.py);
all of it can be differentiated once more, as training the layers around the memory asks for.

Shapes: M rows of a batch, each with models of its own; b tokens, K key width, which is V, F hidden width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.parts.precision import NORM_EPS
from models.regression.linear.mixtures import product

Weights = tuple[Tensor, ...]  # W and b of each layer: [M, K, V] and [M, 1, V], or K, F and F, V


class Norm(NamedTuple):
    """LN: gamma and beta of the layer norm, [M, 1, V]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        return self.weight * standardise(z)[0] + self.bias


def standardise(z: Tensor) -> tuple[Tensor, Tensor]:
    """(z - mean) / sqrt(var + NORM_EPS) along the last axis, and what it was divided by, inverted."""
    z = z - z.mean(-1, keepdim=True)
    scale = (z.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    return z * scale, scale


def project(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The gradient by z of y, scale = standardise(z), from the one by y: less what moving mean and variance undo."""
    return scale * (x - x.mean(-1, keepdim=True) - y * (x * y).mean(-1, keepdim=True))


def norm_gradient(z: Tensor, target: Tensor, norm: Norm) -> Tensor:
    """d/dz 1/2 ||target - LN(z)||^2."""
    return _NormGradient.apply(z, target, *norm)


class _NormGradient(torch.autograd.Function):
    """Its own gradient is written out as well: a mini-batch is small, and every operation that it takes counts."""

    @staticmethod
    def forward(ctx, z, target, weight, bias):
        y, scale = standardise(z)
        error = weight * y + bias - target
        gradient = project(weight * error, y, scale)
        ctx.save_for_backward(y, scale, error, gradient, weight)
        return gradient

    @staticmethod
    @once_differentiable
    def backward(ctx, p):
        y, scale, error, gradient, weight = ctx.saved_tensors
        g, dg = weight * error, project(p, y, scale)
        derror = weight * dg
        dy = weight * derror - scale * (p * (g * y).mean(-1, keepdim=True) + g * (p * y).mean(-1, keepdim=True))
        dz = project(dy, y, scale) - scale * y * (p * gradient).mean(-1, keepdim=True)
        dweight = dg * (error + weight * y)
        return dz, -derror, dweight.sum_to_size(weight.shape), derror.sum_to_size(weight.shape)


def gelu(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def gelu_slope(z: Tensor) -> Tensor:
    """d/dz gelu(z)."""
    return _Slope.apply(z)


class _Slope(torch.autograd.Function):
    """gelu(z) = z S, S = sigmoid(2 c (z + d z^3)), has the slope S + z S' and the curvature 2 S' + z S''."""

    C, D = math.sqrt(2 / math.pi), 0.044715

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        S, dS, _ = _Slope.sigmoid(z)
        return S + z * dS

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (z,) = ctx.saved_tensors
        S, dS, speed = _Slope.sigmoid(z)
        ddS = dS * (1 - 2 * S) * speed + S * (1 - S) * (12 * _Slope.C * _Slope.D) * z
        return gradient * (2 * dS + z * ddS)

    @staticmethod
    def sigmoid(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S, S', and the derivative of what S is the sigmoid of."""
        square = z.square()
        S = torch.sigmoid(2 * _Slope.C * z * (1 + _Slope.D * square))
        speed = 2 * _Slope.C * (1 + 3 * _Slope.D * square)
        return S, S * (1 - S) * speed, speed


def layers(weights: Weights) -> list[tuple[Tensor, Tensor]]:
    return list(zip(weights[::2], weights[1::2], strict=True))


def apply(x: Tensor, weights: Weights) -> Tensor:
    """z(x)."""
    for i, (W, b) in enumerate(layers(weights)):
        x = product(gelu(x) if i else x, W) + b
    return x


def gradients(k: Tensor, v: Tensor, weights: Weights, norm: Norm) -> list[tuple[Tensor, Tensor]]:
    """Of every layer its inputs X and E = dl/dz, at the pairs [M, *, K]: the gradient by W is X^T E, by b the sum of E.
    Written out, and all of it differentiable.
    """
    (W, b), *others = layers(weights)
    inputs, sums = [k], [product(k, W) + b]
    for W, b in others:
        inputs.append(gelu(sums[-1]))
        sums.append(product(inputs[-1], W) + b)
    errors = [norm_gradient(sums.pop(), v - k, norm)]
    for W, _ in reversed(others):
        errors.append(product(errors[-1], W.mT) * gelu_slope(sums.pop()))
    return list(zip(inputs, reversed(errors), strict=True))
