"""Linear layers: which may be passed over for their weights, and several of one input as one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parts.product import product, widens

ROWS = 16  # a product has a multiple of so many outputs: matrix units and wide loads want it


def is_its_weight(layer: nn.Module) -> bool:
    """Whether the layer is its product with a plain weight: no adapter, no hook such as accelerate's that brings the
    weight from elsewhere, no weight that knows products of its own (quantised or distributed).
    """
    changed = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    return type(layer) is nn.Linear and type(layer.weight) in (nn.Parameter, Tensor) and not changed


class Products(NamedTuple):
    """Stands for x [B, T, D] where nothing is wanted of it but its products with these layers (`read`).

    products [B, T, N]: side by side, without the biases.
    """

    layers: tuple[nn.Linear, ...]
    products: Tensor


def read(layer: nn.Linear, x: Any) -> Tensor:
    """layer(x). x: a tensor, or the Products that stand for it."""
    if not isinstance(x, Products):
        plain = layer.bias is None and is_its_weight(layer) and widens(x, [layer.weight])
        return product(x, [layer.weight]) if plain else layer(x)
    start = 0
    for known in x.layers:
        if known is layer:
            found = x.products[..., start : start + layer.out_features]
            return found if layer.bias is None else found + layer.bias.to(found.dtype)
        start += known.out_features
    raise ValueError(f"{layer} is not among the layers whose products are known; its owner's `reads` must name it")


def one_product(x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """[B, T, N]: the products of x with all these layers side by side, without biases; zeros fill N up to ROWS."""
    weights = [layer.weight for layer in layers]
    if widens(x, weights):
        return product(x, weights, rows=-(-sum(map(len, weights)) // ROWS) * ROWS)
    if missing := -sum(map(len, weights)) % ROWS:
        weights.append(weights[0].new_zeros(missing, weights[0].shape[1]))
    return F.linear(x, torch.cat(weights))
