"""Several linear layers of one input as one product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.parts.linear import ROWS, Products, one_product, read


def test_one_product_is_read_as_each_layers_own():
    torch.manual_seed(0)
    layers = tuple(nn.Linear(6, n, bias=n == 3, dtype=torch.float64) for n in (7, 3, 2))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    row = one_product(x, layers)
    assert row.shape == (2, 5, ROWS)
    known = Products(layers[1:], row[..., 7:])
    for layer in layers[1:]:
        assert torch.allclose(read(layer, known), layer(x), rtol=0, atol=1e-14)
        assert torch.equal(read(layer, x), layer(x))


def test_a_layer_that_nobody_named_is_an_error():
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    with pytest.raises(ValueError, match="`reads` must name it"):
        read(second, Products((first,), torch.zeros(1, 1, 2)))
