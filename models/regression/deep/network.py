"""Inner networks: memories that are no matrix, and the gradients of their losses, written out.

        f(x) = W_L s(... s(x W_1) ...)  [layer norm]  [+ x] ,    l(f(k), v) ,    s an activation

A gradient by a weight is a product of two vectors, -dl/dW_l = X_l^T E_l, of what the layer takes in and of the error at
what it gives out,
        X_1 = k ,  X_l = s(X_{l-1} W_{l-1}) ,    E_L = -dl/df (through the norm) ,  E_{l-1} = (E_l W_l^T) * s' .
So what a token writes is known by L pairs of vectors, and no gradient is ever formed. Autograd does the same at twice
the price; it differentiates all this once more for the outer model, which needs the activations' second derivatives.

Losses.     with e = v - y at the prediction y (Behrouz et al. 2025, Miras, section 5, has the second and third):
                l2      1/2 |e|^2                                     -dl/dy = e
                huber   sum_j e_j^2 / 2 below delta, linear above     clip(e, -delta, delta)
                lp      1/p sum_j (e_j^2 + c)^(p/2), c = 1e-6         e (e^2 + c)^(p/2 - 1)
                dot     -y . v                                        v
            (c keeps the second derivative of |e|^p finite at 0, where p < 2.)
Limit.      One step moves the token's own prediction by J e, and along e by sum_l |X_l|^2 |E_l|^2 / |e|^2 of it: for a
            matrix and keys of length one, by 1; for a wide layer by its width. `limit_steps` divides a token's errors
            by that number where it is above 1, so that step sizes mean for any network what they mean for a matrix, and
            none of at most 1 overshoots (normalised least mean squares does this to |k|^2).

Shapes: * any leading axes, C tokens, K and V widths of keys and values, X_l [*, C, in], E_l [*, C, out], W_l [*, in,
out].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.parts.precision import NORM_EPS, NOTHING, wide

SMOOTH = 1e-6  # c of the loss lp


def _silu(z: Tensor) -> tuple[Tensor, Tensor]:
    gate = z.sigmoid()
    return z * gate, gate * (1 + z * (1 - gate))


def _gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    share = (1 + torch.erf(z / math.sqrt(2))) / 2
    return z * share, share + z * (-z.square() / 2).exp() / math.sqrt(2 * math.pi)


ACTIVATIONS = {"silu": _silu, "gelu": _gelu}  # z -> s(z), s'(z)

# (y, v, the setting that some have) -> -dl/dy
LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "l2": lambda y, v, _: v - y,
    "huber": lambda y, v, delta: (v - y).clamp(-delta, delta),
    "lp": lambda y, v, p: (v - y) * ((v - y).square() + SMOOTH).pow(p / 2 - 1),
    "dot": lambda y, v, _: v.expand_as(y),
}


@dataclass(frozen=True)
class Network:
    """The network above. power: p of the loss lp, delta of huber. Weights come with every call, as does `norm`: scale
    and shift [*, 1, V] of the layer norm, or nothing. Products are in the dtype of what comes in, all else in float32
    at least.
    """

    activation: str = "silu"
    residual: bool = False
    loss: str = "l2"
    power: float = 1.0
    limit_steps: bool = True

    def read(self, products: Sequence[Callable[[Tensor], Tensor]], q: Tensor, norm: Sequence[Tensor] = ()) -> Tensor:
        """f(q) [*, C, V], each layer's product with its weights given as a function."""
        x = q
        for product in products[:-1]:
            x = self._activate(product(x))[0]
        return self._output(products[-1](x), q, norm)[0].to(q.dtype)

    def errors(
        self, weights: Sequence[Tensor], k: Tensor, v: Tensor, norm: Sequence[Tensor] = ()
    ) -> tuple[list[Tensor], list[Tensor]]:
        """X_l and E_l of every layer, for pairs k [*, C, K], v [*, C, V]."""
        inputs, slopes = [k], []
        for W in weights[:-1]:
            x, slope = self._activate(inputs[-1] @ W)
            inputs.append(x)
            slopes.append(slope)
        y, normed = self._output(inputs[-1] @ weights[-1], k, norm)
        error = LOSSES[self.loss](y, wide(v), self.power)
        errors = [(error if normed is None else _through_norm(error * norm[0], *normed)).to(k.dtype)]
        for W, slope in zip(reversed(weights[1:]), reversed(slopes), strict=True):
            errors.append((wide(errors[-1] @ W.mT) * slope).to(k.dtype))
        errors.reverse()
        return inputs, self._limited(inputs, errors, error) if self.limit_steps else errors

    def _activate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ACTIVATIONS[self.activation](wide(z))
        return x.to(z.dtype), slope

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
        moved = sum(_square(x) * _square(e) for x, e in zip(inputs, errors, strict=True))
        size = _square(error)
        share = (size + NOTHING) / (torch.maximum(size, moved) + NOTHING)
        return [(e * share).to(e.dtype) for e in errors]


def _square(x: Tensor) -> Tensor:
    return wide(x).square().sum(-1, keepdim=True)


def _through_norm(g: Tensor, normed: Tensor, rate: Tensor) -> Tensor:
    """The gradient by z from the one by the normed z."""
    return rate * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
