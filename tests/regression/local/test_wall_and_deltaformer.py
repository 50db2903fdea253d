"""Where their extra parts say nothing, both are softmax."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.mixers.mixer import Mixer
from models.parts.sizes import Sizes
from models.regression.local import Forgetting, Wall, deltaformer
from models.regression.local.deltaformer import parallel_corrected, recurrent_corrected
from models.regression.local.pairs import Pairs, View
from models.regression.local.wall import faded_products, through_the_first
from models.regression.regressor import Tokens
from tests.laws.presets import inputs, largest_difference, mixer


def same_as_softmax(m: Mixer, **settings) -> float:
    known = mixer("softmax", **settings)
    known.load_state_dict(m.state_dict(), strict=False)
    x = inputs(2, 21)
    return largest_difference([m(x)[0]], [known(x)[0]])


def test_deltaformer_that_corrects_nothing_is_softmax():
    m = mixer("deltaformer")
    with torch.no_grad():
        m.regressor.step_size.bias.fill_(-1e4)
    assert same_as_softmax(m) < 1e-12


def test_wall_that_fades_nothing_is_softmax_and_equal_channels_are_a_temperature():
    m = mixer("wall")
    with torch.no_grad():
        m.decay.expansion.bias.fill_(1e4)
    assert same_as_softmax(m, rotary=None) < 1e-12
    q, k, age = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    age = age[..., :1].abs().cumsum(2).expand(-1, -1, -1, 4)
    found = faded_products(q, age, k, age).tril()
    assert torch.allclose(found, ((q @ k.mT) * (age[..., :1].mT - age[..., :1]).exp()).tril(), atol=1e-12)


def test_a_channel_of_its_own_makes_wall_forget():
    """In the limit of a long query, the keys of that channel alike: exp(-s / L) L is L - s."""
    g = torch.Generator().manual_seed(0)
    H = 3
    q, k, v = (torch.randn(2, 9, H, 4, dtype=torch.float64, generator=g) for _ in range(3))
    fade = torch.rand(2, 9, H, dtype=torch.float64, generator=g).log()
    settings = {"inverse_temperature": 0.7}
    forgetting = Forgetting(Sizes(8, H, H, 4, 4), **settings)(Tokens(q, q, k, v, fade))[0]
    for L, error in ((1e3, 1e-1), (1e6, 1e-4)):
        age = torch.cat([torch.zeros_like(q), fade.unsqueeze(-1) / (0.7 * L)], dim=-1)
        queries, keys = F.pad(q, (0, 1), value=L), F.pad(k, (0, 1), value=1.0)
        found = Wall(Sizes(8, H, H, 5, 4), **settings)(Tokens(q, queries, keys, v, age))[0]
        assert (found - forgetting).abs().max() < error


@pytest.mark.parametrize("past", [0, 7])
def test_products_through_the_first_query_are_their_definition(past):
    """However far channels have faded: where float64 has nothing left too."""
    g = torch.Generator().manual_seed(0)
    q, k, step = (torch.randn(2, 2, n, 4, dtype=torch.float64, generator=g) for n in (5, past + 5, past + 5))
    age = (10 * step - 5).exp().cumsum(2)
    visible = torch.ones(5, past + 5, dtype=torch.bool).tril(past)
    forms = (form(q, age[:, :, past:], k, age)[..., visible] for form in (through_the_first, faded_products))
    assert largest_difference([next(forms)], [next(forms)]) < 1e-12


def test_corrected_values_solve_their_system():
    """(I + diag(b) P) U = V, P softmax of keys with the keys before: as fla's reference has it at q = k."""
    k, v = (torch.randn(1, 2, 12, 4, dtype=torch.float64) for _ in range(2))
    b, beta = torch.rand(1, 2, 12, 1, dtype=torch.float64), torch.full((2, 1, 1), 0.7, dtype=torch.float64)
    nothing = Pairs(k[:, :, :0], v[:, :, :0])
    U = parallel_corrected(k, v, b, beta, View(), nothing, 5)
    P = (0.7 * k @ k.mT).masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(-1), -torch.inf).softmax(-1)
    P[..., 0, :] = 0.0
    assert torch.allclose(U + b * (P @ U), v, atol=1e-12)
    assert torch.allclose(recurrent_corrected(k, v, b, beta, View(), nothing), U, atol=1e-12)


@pytest.mark.parametrize("past, documents", [(0, False), (3, False), (3, True)])
def test_corrected_values_and_their_gradients_block_by_block(past, documents):
    """With pairs of an earlier call, and documents; blocks that do not divide the tokens."""
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 2, n, 4, dtype=torch.float64, generator=g) for n in (11, 11))
    b = torch.rand(2, 2, 11, 1, dtype=torch.float64, generator=g)
    beta = torch.tensor([0.7, 2.0], dtype=torch.float64).view(2, 1, 1)
    old = [torch.randn(2, 2, past, 4, dtype=torch.float64, generator=g) for _ in range(2)]
    start = torch.tensor([[0] * 4 + [past + 4] * 7, [past] * 11]) if documents else None
    leaves, found = [x.requires_grad_() for x in (k, v, b, beta, *old)], []
    for form, settings in ((recurrent_corrected, {}), (parallel_corrected, {"block": 4})):
        u = form(k, v, b, beta, View(past, start), Pairs(*old), **settings)
        wanted = leaves if past else leaves[:4]
        found.append([u, *torch.autograd.grad(u.square().sum(), wanted, allow_unused=True)])
    pairs = [(x, y) for x, y in zip(*found, strict=True) if x is not None]
    assert largest_difference([x for x, _ in pairs], [y for _, y in pairs]) < 1e-12


def test_blocks_are_compiled_in_one_form(monkeypatch):
    """However many pairs they see, forward and backward; the last one, which is shorter, is not compiled."""
    graphs, compile_ = [], torch.compile

    def compiler(graph, _):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda form: compile_(form, backend=compiler))
    deltaformer._compiled.cache_clear()
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 2, 19, 4, dtype=torch.float64, generator=g) for _ in range(2))
    b = torch.rand(2, 2, 19, 1, dtype=torch.float64, generator=g)
    beta = torch.tensor([0.7, 2.0], dtype=torch.float64).view(2, 1, 1)
    start = torch.tensor([[0] * 4 + [4] * 15, [0] * 19])
    leaves, found = [x.requires_grad_() for x in (k, v, b, beta)], []
    for compiled in (False, True):
        u = parallel_corrected(k, v, b, beta, View(0, start), Pairs(k[:, :, :0], v[:, :, :0]), 4, compiled)
        found.append([u, *torch.autograd.grad(u.square().sum(), leaves)])
    deltaformer._compiled.cache_clear()
    assert len(graphs) == 2 and largest_difference(*found) < 1e-12
