"""Inner networks: memories that are no matrix, and the gradients of their losses, written out.

        f(x) = s(... s(x W_1 [+ b_1]) ...) W_L [+ b_L]  [layer norm]  [+ x] ,    l(f(k), v) ,    s an activation

A gradient by a weight is a product of two vectors, -dl/dW_l = X_l^T E_l, of what the layer takes in and of the error at
what it gives out,
        X_1 = k ,  X_l = s(X_{l-1} W_{l-1}) ,    E_L = -dl/df (through the norm) ,  E_{l-1} = (E_l W_l^T) * s' .
So what a token writes is known by L pairs of vectors, and no gradient is ever formed. Autograd does the same at twice
the price; it differentiates all this once more for the outer model, which needs the activations' second derivatives.
A bias is one more input of value one: its weights are the last row of W_l, and no formula knows of it.

Losses.     with e = v - y at the prediction y (Behrouz et al. 2025, Miras, section 5, has all but the first and last):
                l2      1/2 |e|^2                                     -dl/dy = e
                huber   sum_j e_j^2 / 2 below delta, linear above     clip(e, -delta, delta)
                switch  |e|^2 / 2 while |e|^2 <= delta^2 V, else      e, or delta e / (e^2 + c)^(1/2)
                        delta sum_j (e_j^2 + c)^(1/2)
                lp      1/p sum_j (e_j^2 + c)^(p/2), c = 1e-6         e (e^2 + c)^(p/2 - 1)
                dot     -y . v                                        v
            c keeps the second derivative of |e|^p finite at 0, where p < 2. Where p > 2 a step along e |e|^(p - 2) goes
            past the value from |e_j| = 1 on; there the loss goes on as e_j^2 / 2 does.
Limit.      One step moves the token's own prediction by J e, and along e by sum_l |X_l|^2 |E_l|^2 / |e|^2 of it: for a
            matrix and keys of length one, by 1; for a wide layer by its width. `limit_steps` divides a token's errors
            by that number where it is above 1, so that step sizes mean for any network what they mean for a matrix, and
            none of at most 1 overshoots (normalised least mean squares does this to |k|^2).
SwiGLU.     f(x) = (silu(x W_0) * x W_2) W_1 with the loss dot, of three matrices, as LaCT has it.

Shapes: * any leading axes, C tokens, K and V widths of keys and values, X_l [*, C, in], E_l [*, C, out], W_l [*, in,
out].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from models.parts.precision import NORM_EPS, NOTHING, wide
from models.regression.linear.mixtures import product

SMOOTH = 1e-6  # c of the loss lp


def _silu_backward(g: Tensor, z: Tensor) -> Tensor:
    gate = z.sigmoid()
    return g * (gate * (1 + z * (1 - gate)))


gelu_backward = torch.ops.aten.gelu_backward  # silu's has no derivative in torch
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    # z -> s(z);  g, z -> g s'(z)
    "silu": (F.silu, _silu_backward),
    "gelu": (F.gelu, gelu_backward),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), partial(gelu_backward, approximate="tanh")),
}


def _steepness(square: Tensor, p: float) -> Tensor:
    found = square.pow(p / 2 - 1)
    return found.clamp(max=1.0) if p > 2 else found


def _switched(e: Tensor, delta: float) -> Tensor:
    long = _square(e) > delta**2 * e.shape[-1]
    return torch.where(long, delta * e * (e.square() + SMOOTH).rsqrt(), e)


# (y, v, the setting that some have) -> -dl/dy
LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "l2": lambda y, v, _: v - y,
    "huber": lambda y, v, delta: (v - y).clamp(-delta, delta),
    "switch": lambda y, v, delta: _switched(v - y, delta),
    "lp": lambda y, v, p: (v - y) * _steepness((v - y).square() + SMOOTH, p),
    "dot": lambda y, v, _: v.expand_as(y),
}


@dataclass(frozen=True)
class Network:
    """The network above. power: p of the loss lp, delta of huber and switch. bias: whether layers have one. Weights
    come with every call, as does `norm`: scale and shift [*, 1, V] of the layer norm, or nothing. Products are in the
    dtype of what comes in, all else in float32 at least.
    """

    activation: str = "silu"
    residual: bool = False
    loss: str = "l2"
    power: float = 1.0
    limit_steps: bool = True
    bias: bool = False

    def read(self, products: Sequence[Callable[[Tensor], Tensor]], q: Tensor, norm: Sequence[Tensor] = ()) -> Tensor:
        """f(q) [*, C, V], each layer's product with its weights given as a function."""
        x = q
        for layer in products[:-1]:
            x = self._activate(layer(self._taken(x)))
        return self._output(products[-1](self._taken(x)), q, norm)[0].to(q.dtype)

    def errors(
        self, weights: Sequence[Tensor], k: Tensor, v: Tensor, norm: Sequence[Tensor] = ()
    ) -> tuple[list[Tensor], list[Tensor]]:
        """X_l and E_l of every layer, for pairs k [*, C, K], v [*, C, V]."""
        inputs, sums, backward = [self._taken(k)], [], ACTIVATIONS[self.activation][1]
        for W in weights[:-1]:
            sums.append(product(inputs[-1], W))
            inputs.append(self._taken(self._activate(sums[-1])))
        y, normed = self._output(product(inputs[-1], weights[-1]), k, norm)
        error = LOSSES[self.loss](y, wide(v), self.power)
        errors = [(error if normed is None else _through_norm(error * norm[0], *normed)).to(k.dtype)]
        for W, z in zip(reversed(weights[1:]), reversed(sums), strict=True):
            back = product(errors[-1], W[..., : z.shape[-1], :].mT)  # but to the input of a bias
            errors.append(backward(wide(back), wide(z)).to(k.dtype))
        errors.reverse()
        return inputs, self._limited(inputs, errors, error) if self.limit_steps else errors

    def _taken(self, x: Tensor) -> Tensor:
        """What a layer takes in: x, and the input of its bias."""
        return F.pad(x, (0, 1), value=1.0) if self.bias else x

    def _activate(self, z: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation][0](wide(z)).to(z.dtype)

    def _output(self, z: Tensor, x: Tensor, norm: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """f where the last layer makes z of the input x, in float32; and of its norm the normed z, 1 / deviation."""
        z, normed = wide(z), None
        if norm:
            z = z - z.mean(-1, keepdim=True)
            rate = (z.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
            normed = (z * rate, rate)
            z = normed[0] * norm[0] + norm[1]
        return (z + x if self.residual else z), normed

    @staticmethod
    def _limited(inputs: list[Tensor], errors: list[Tensor], error: Tensor) -> list[Tensor]:
        size = _square(error)
        moved = sum((_square(x) * _square(e) for x, e in zip(inputs, errors, strict=True)), torch.zeros_like(size))
        share = (size + NOTHING) / (torch.maximum(size, moved) + NOTHING)
        return [(e * share).to(e.dtype) for e in errors]


@dataclass(frozen=True)
class SwiGLU:
    """f above and the errors of its loss, as Network has them; weights in the order W_0, W_2, W_1."""

    bias: ClassVar[bool] = False
    loss: ClassVar[str] = "dot"

    def read(self, products: Sequence[Callable[[Tensor], Tensor]], q: Tensor, norm: Sequence[Tensor] = ()) -> Tensor:
        gate, up, down = products
        return down((F.silu(wide(gate(q))) * up(q)).to(q.dtype))

    def errors(
        self, weights: Sequence[Tensor], k: Tensor, v: Tensor, norm: Sequence[Tensor] = ()
    ) -> tuple[list[Tensor], list[Tensor]]:
        gate, up, down = weights
        z, through, error = (wide(product(x, w)) for x, w in ((k, gate), (k, up), (v, down.mT)))
        opened = F.silu(z)
        errors = [_silu_backward(error * through, z), error * opened, v]
        return [k, k, (opened * through).to(k.dtype)], [e.to(k.dtype) for e in errors]


def _square(x: Tensor) -> Tensor:
    return wide(x).square().sum(-1, keepdim=True)


def _through_norm(g: Tensor, normed: Tensor, rate: Tensor) -> Tensor:
    """The gradient by z from the one by the normed z."""
    return rate * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
