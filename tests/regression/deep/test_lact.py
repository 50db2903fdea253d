"""Laws of LaCT: its gradients are autograd's, every form is the same, and what the published layer is known to do."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.parts.sizes import Sizes
from models.regression.deep import LaCT
from models.regression.deep.network import SwiGLU
from models.regression.regressor import Tokens
from scripts.recipes import composed
from tests.regression.deep.test_deep import DOCUMENTS

B, T, H, K, V = 2, 40, 2, 6, 5


def layer(**settings: Any) -> tuple[LaCT, list[Tensor]]:
    torch.manual_seed(0)
    memory = LaCT(Sizes(4, H, H, K, V), **{"grad_batch": 8, "window": 11, "expansion": 1.5, **settings}).double()
    q, k = (F.normalize(torch.randn(B, T, H, K), dim=-1) for _ in range(2))
    return memory, [y.double() for y in (torch.randn(B, T, 4), q, k, torch.randn(B, T, H, V))]


def outcome(memory: LaCT, inputs: list[Tensor], splits=(), segments=None) -> list[Tensor]:
    """The output, the weights at last, and the gradients of a fixed function of both to all inputs and parameters."""
    inputs, state, outputs = [x.detach().requires_grad_() for x in inputs], None, []
    for i, j in pairwise([0, *splits, T]):
        documents = None if segments is None else segments[:, i:j]
        o, state = memory(Tokens(*(x[:, i:j] for x in inputs), segments=documents), state)
        outputs.append(o)
    held = [torch.cat(outputs, dim=1), *state.memory.fitted.weights, state.pairs.k]
    g = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in held)
    return [*held, *torch.autograd.grad(loss, [*inputs, *memory.parameters()])]


def test_errors_are_autograds():
    """Of every matrix, and their own gradients."""
    torch.manual_seed(0)
    W = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((K, 7), (K, 7), (7, V))]
    k, v = (torch.randn(3, width, dtype=torch.float64, requires_grad=True) for width in (K, V))
    y = (F.silu(k @ W[0]) * (k @ W[1])) @ W[2]
    torch.testing.assert_close(SwiGLU().read([lambda x, w=w: x @ w for w in W], k), y)
    expected = torch.autograd.grad((y * v).sum(), W, create_graph=True)
    found = [x.mT @ e for x, e in zip(*SwiGLU().errors(W, k, v), strict=True)]
    for pairs in (
        (found, expected),
        [torch.autograd.grad(sum((g * (g + 1)).sum() for g in x), [*W, k, v]) for x in (found, expected)],
    ):
        for x, y in zip(*pairs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("documents", [False, True])
def test_every_form_is_the_same(documents):
    segments = DOCUMENTS[:, :T] if documents else None
    memory, inputs = layer(backend="recurrent")
    exact = outcome(memory, inputs, (), segments)
    for chunk, remat, splits in ((None, 1, ()), (4, 0, ()), (3, 2, (1, 17, 30))):
        found = outcome(layer(backend="torch", chunk=chunk, remat=remat)[0], inputs, splits, segments)
        for x, y in zip(found, exact, strict=True):
            assert (x - y).norm() <= 1e-10 * y.norm(), (chunk, splits)


def test_columns_keep_their_lengths_and_rates_only_weigh():
    """Ten times all rates: the same layer, since Muon undoes the scale."""
    memory, inputs = layer()
    _, state = memory(Tokens(*inputs))
    for w, start in zip(state.memory.fitted.weights, memory.start, strict=True):
        torch.testing.assert_close(w.norm(dim=-2), start.norm(dim=-2).expand(B, -1, -1), rtol=1e-4, atol=0)
        assert (w - start).norm() > 0.1 * start.norm()
    rates = F.softplus(memory.rates(inputs[0]))
    with torch.no_grad():
        memory.rates.weight.zero_()
        memory.rates.bias.fill_(-3.0)
        once = memory(Tokens(*inputs))[0]
        memory.rates.bias.copy_((10 * F.softplus(memory.rates.bias)).expm1().log())
        torch.testing.assert_close(memory(Tokens(*inputs))[0], once, rtol=0, atol=1e-4)
    assert 5e-4 < rates.median() < 2e-3


def test_a_short_sequence_is_attention_beside_the_start():
    memory, inputs = layer(grad_batch=T + 1)
    with pytest.warns(UserWarning, match=f"grad_batch={T + 1}: .* learns nothing from a sequence of {T} tokens"):
        _, state = memory(Tokens(*inputs))
    for w, start in zip(state.memory.fitted.weights, memory.start, strict=True):
        assert torch.equal(w, start.expand(B, -1, -1, -1))


def test_the_preset_learns_within_a_sequence_of_any_size():
    """At least four chunks, and the published proportion of chunk and window."""
    for size, seq_len, chunk in (("tiny", 128, 32), ("340m", 2048, 512)):
        cfg = composed("lact", f"size={size}")
        regressor = cfg.model.mixers.main.regressor
        assert (cfg.seq_len, regressor.grad_batch, regressor.window) == (seq_len, chunk, chunk)


@pytest.mark.parametrize(
    "setting", [{"grad_batch": 0}, {"window": 0}, {"expansion": 0}, {"remat": -1}, {"chunk": 0}], ids=str
)
def test_refusals_name_the_setting(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"regressor\.{name}={value}"):
        layer(**setting)
