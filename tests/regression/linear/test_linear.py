"""The Hebbian memory's own laws: its limits, its weights, its normaliser. What all memories share is in tests/laws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.parts.decay import ScalarDecay
from models.regression.chunks import fades
from models.regression.linear.linear import chunked_linear, recurrent_linear
from models.regression.regressor import FORGET, Tokens
from tests.laws.presets import inputs, largest_difference, mixer, outcome, part

B, T, H, K, V = 2, 75, 3, 8, 6


def draw(dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(B, T, H, n, generator=g, dtype=dtype) for n in (K, K, V))


def results(form, *leaves, **options) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    o, memory = form(*leaves, **options)
    loss = (o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)).sum() + memory.square().sum()
    return [o, memory, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("shape", [(), (K,)], ids=["head", "channel"])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 128])
def test_one_map_in_every_form(shape, chunk):
    """With gates at 0 and 1, documents and a first memory; all gradients."""
    g = torch.Generator().manual_seed(1)
    gates = F.logsigmoid(4 * torch.randn(B, T, H, *shape, generator=g, dtype=torch.float64))
    gates[:, 5:9], gates[:, 20:23], gates[0, 40] = 0.0, -1e3, FORGET
    memory = torch.randn(B, H, K, V, generator=g, dtype=torch.float64)
    truth = results(recurrent_linear, *draw(), gates, memory)
    assert largest_difference(results(chunked_linear, *draw(), gates, memory, chunk=chunk), truth) < 1e-10


def test_a_decay_of_one_is_no_decay_and_equal_channels_are_a_head():
    q, k, v = draw()
    zeros = torch.zeros(B, T, H, dtype=q.dtype)
    plain, one = chunked_linear(q, k, v), chunked_linear(q, k, v, zeros)
    assert largest_difference([*plain], [*one]) < 1e-12
    gates = F.logsigmoid(torch.randn(B, T, H, dtype=q.dtype))
    head = chunked_linear(q, k, v, gates)
    channels = chunked_linear(q, k, v, gates.unsqueeze(-1).expand(-1, -1, -1, K))
    assert largest_difference([*head], [*channels]) < 1e-12


def test_many_documents_in_a_chunk_leave_the_others_their_digits():
    """float32 resolves a sum of 32 boundaries to 2e-4; in sums of their own they cost nothing."""
    gates = torch.full((1, 64, 1), -0.01)
    gates[:, 1::2] = FORGET
    within, start, end = fades(torch.zeros(1, 64, 1), gates)
    assert within[0, 62, 62] == 1 and within[0, 62, 61] == pytest.approx(0.99005, abs=1e-6)
    assert max(start[0, 1:].max(), end[0, :-1].max()) < 1e-27


def test_with_its_normaliser_it_is_a_weighted_mean():
    settings = {"features": part("features", "elu"), "regressor__normalizer": True}
    m, calls = mixer("mamba2", **settings), []
    m.regressor.register_forward_hook(lambda module, args, result: calls.append((*args[0][1:5], result[0])))
    m(inputs(1, 20))
    q, k, v, gates, o = calls[0]
    for t in range(20):
        weights = (
            torch.einsum("hk,ihk->ih", q[0, t], k[0, : t + 1])
            * gates[0, : t + 1].sum(0).sub(gates[0, : t + 1].cumsum(0)).exp()
        )
        assert (weights >= 0).all()
        mean = torch.einsum("ih,ihv->hv", weights / weights.sum(0), v[0, : t + 1])
        torch.testing.assert_close(o[0, t], mean, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="normalizer"):
        mixer("linear", regressor__normalizer=True)


def test_a_write_and_its_negative_leave_nothing():
    """Signed writes can remove a pair."""
    m = mixer("linear", regressor__writes="signed").regressor
    x = torch.randn(1, 1, 32, dtype=torch.float64)
    q, k, v = (torch.randn(1, 1, 2, 16, dtype=torch.float64) for _ in range(3))
    bias = m.write_weight.bias.data
    m.write_weight.weight.data.zero_()
    bias.fill_(1.3)
    _, memory = m(Tokens(x, q, k, v))
    bias.fill_(-1.3)  # 2 sigmoid - 1 is odd
    _, memory = m(Tokens(x, q, k, v), memory)
    assert memory.abs().max() < 1e-15


def test_held_writes_are_what_a_state_space_model_holds():
    """dM/dt = -r M + r k^T v, with the pair constant during the step."""
    m = mixer("mamba2", regressor__writes="held")
    x = inputs(1, 1)
    q, k, v = (torch.randn(1, 1, 2, 16, dtype=torch.float64) for _ in range(3))
    log_decay, _ = m.decay(x)
    before = torch.randn(1, 2, 16, 16, dtype=torch.float64)
    _, memory = m.regressor(Tokens(x, q, k, v, log_decay), before)
    step = 0.01  # any; the rate is -log_decay / step
    for h in range(2):
        rate = -log_decay[0, 0, h].item() / step
        write = rate * k[0, 0, h, :, None] * v[0, 0, h]
        system = torch.zeros(2, 2, dtype=torch.float64)
        system[0, 0], system[0, 1] = -rate, 1.0  # d(M, u) = (-r M + u, 0), for each entry's own u
        solution = torch.matrix_exp(system * step)
        torch.testing.assert_close(memory[0, h], solution[0, 0] * before[0, h] + solution[0, 1] * write)
    with pytest.raises(ValueError, match="possible choices of decay"):
        mixer("linear", regressor__writes="held")


def test_signed_decays_are_the_recurrence_with_negative_gamma():
    m, seen = mixer("mamba2", decay=part("decay", "signed"), qk_norm="none"), []
    m.decay.projection.weight.data.mul_(50)  # gates of both signs
    m.regressor.register_forward_hook(lambda module, args, result: seen.append((*args[0][1:4], result[0])))
    x = inputs(1, 30)
    m(x)
    q, k, v, o = seen[0]
    gamma = 2 * ScalarDecay.forward(m.decay, x)[0].exp() - 1
    assert (gamma < 0).any() and (gamma > 0).any()
    turns = gamma.sign().cumprod(1).unsqueeze(-1)
    q, k, M = q * turns, k * turns, torch.zeros(1, 2, 16, 16, dtype=torch.float64)  # as they were before they turned
    for t in range(30):
        M = gamma[:, t, :, None, None] * M + k[:, t, :, :, None] * v[:, t, :, None]
        torch.testing.assert_close((q[:, t, :, None] @ M).squeeze(-2), o[:, t], rtol=0, atol=1e-9)


@pytest.mark.parametrize("preset", ["linear", "gla"])
def test_split_calls_and_documents_with_a_signed_or_channel_decay(preset):
    decay = part("decay", {"linear": "signed", "gla": "channel"}[preset])
    x = inputs(2, 50)
    segments = (torch.arange(50) // 13).expand(2, -1)
    m = mixer(preset, decay=decay)
    truth = outcome(mixer(preset, "recurrent", decay=decay), x, segments=segments)
    for splits in ((), (13,), (7, 30)):
        assert largest_difference(outcome(m, x, splits, segments), truth) < 1e-10
