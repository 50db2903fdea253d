"""Products with float32 weights in 16 bits: what they compute, and that the weights' gradients are rounded to float32
alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parts.linear import one_product, read
from models.parts.product import product, widens


def made(device: str) -> tuple[Tensor, list[Tensor], Tensor]:
    torch.manual_seed(0)
    x, weights = torch.randn(3, 50, 24), [torch.randn(rows, 24) for rows in (7, 5)]
    upstream = torch.randn(3, 50, 16, dtype=torch.bfloat16)
    return x.to(device).requires_grad_(), [w.to(device).requires_grad_() for w in weights], upstream.to(device)


def errors(device: str) -> list[float]:
    """Of the product, and the gradients by x and both weights, to those of the rounded numbers in float64."""
    x, weights, upstream = made(device)
    with torch.autocast(device, torch.bfloat16):
        y = product(x, weights, rows=16)
    assert y.shape == (3, 50, 16) and y.dtype == torch.bfloat16 and not y[..., 12:].any()
    found = [y[..., :12], *torch.autograd.grad(y, [x, *weights], upstream)]
    assert [z.dtype for z in found[1:]] == [torch.float32] * 3
    rounded = [z.detach().bfloat16().double().requires_grad_() for z in (x, *weights)]
    exact = F.linear(rounded[0], torch.cat(rounded[1:]))
    all_exact = [exact, *torch.autograd.grad(exact, rounded, upstream[..., :12].double())]
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, all_exact, strict=True)]


def test_a_product_and_its_gradients():
    assert max(errors("cpu")) < 1e-2  # on a CPU all are rounded to 16 bits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gradients_of_weights_keep_their_digits():
    product_, by_x, *by_weights = errors("cuda")
    assert max(product_, by_x) < 1e-2 and max(by_weights) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_layers_are_read_so():
    x, weights, _ = made("cuda")
    layers = [nn.Linear(24, len(w), bias=False, device="cuda") for w in weights]
    with torch.autocast("cuda", torch.bfloat16):
        for y in (read(layers[0], x), one_product(x, layers)):
            assert "product" in type(y.grad_fn).__name__


def test_what_it_is_for():
    """Not for a CPU, on which a layer stays as it is bit by bit."""
    x, weights, _ = made("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert not widens(x, weights)
    meta = torch.empty(2, 24, device="meta")
    assert not widens(meta, [w.to("meta") for w in weights])
