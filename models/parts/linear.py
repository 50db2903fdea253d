"""Whether a linear layer may be passed over for its weight."""

from __future__ import annotations

from torch import Tensor, nn


def is_its_weight(layer: nn.Module) -> bool:
    """Whether the layer is its product with a plain weight: no adapter, no hook such as accelerate's that brings the
    weight from elsewhere, no weight that knows products of its own (quantised or distributed).
    """
    changed = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    return type(layer) is nn.Linear and type(layer.weight) in (nn.Parameter, Tensor) and not changed
