"""The delta rule's relatives: what turns one into another, and what each is when it is written down by other means.
(Law 6 has the objectives: proximal steps, the matrix exponential, weight decay.)"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.parts.sizes import Sizes
from models.regression.linear.delta import Delta, _decayed_share, chunked_delta, recurrent_delta
from models.regression.linear.delta_product import DeltaProduct, recurrent_delta_product
from models.regression.linear.preconditioned import (
    PreconditionedDelta,
    SquashedDelta,
    chunked_curvature,
    recurrent_curvature,
)
from models.regression.regressor import FORGET, Tokens
from tests.laws.presets import CHUNK, inputs, largest_difference, mixer, outcome, part
from tests.laws.test_objectives import call_of
from tests.regression.linear.test_delta import B, H, K, T, V, draw


def results(form, leaves: list[Tensor], **options) -> list[Tensor]:
    """o, memory and the gradients of a fixed function of both; of the gates that forget, none."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    o, memory = form(*leaves[:6], write_key=leaves[6] if len(leaves) > 6 else None, **options)
    g = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in (o, memory))
    gradients = list(torch.autograd.grad(loss, leaves))
    gradients[4] = gradients[4].masked_fill(leaves[4] <= FORGET, 0.0)
    return [o, memory, *gradients]


@pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])
@pytest.mark.parametrize("early", [False, True], ids=["decay first", "gradient first"])
@pytest.mark.parametrize("own", [False, True], ids=["one key", "two keys"])
@pytest.mark.parametrize("chunk", [7, 16, 64])
def test_chunked_is_recurrent_for_every_relative(channels, early, own, chunk):
    """All gradients too; with gates of one, closed gates, and documents."""
    leaves, g = draw(), torch.Generator().manual_seed(5)
    leaves[3] = leaves[3] / 2
    shape = (B, T, H, K) if channels else (B, T, H)
    leaves[4] = F.logsigmoid(3 * torch.randn(shape, generator=g, dtype=torch.float64) + 2)
    leaves[4][:, 10:13], leaves[4][:, 20], leaves[4][:, [3, 4, 40]] = 0.0, -30.0, FORGET
    if own:
        leaves.append(0.5 * F.normalize(torch.randn(B, T, H, K, generator=g, dtype=torch.float64), dim=-1))
    truth = results(recurrent_delta, leaves, gradient_before_decay=early)
    form = results(chunked_delta, leaves, gradient_before_decay=early, chunk=chunk)
    assert largest_difference(form, truth) < 1e-10


def test_leaky_lms_is_the_gated_rule_with_other_steps_and_values_and_not_the_gated_rule():
    """b/a for b, a v for v; with the gate shut those overflow, and it does not."""
    q, k, v, b, log_decay, memory = draw()
    a, b = log_decay.exp(), b / 2
    leaky = chunked_delta(q, k, v, b, log_decay, memory, gradient_before_decay=True)
    mapped = chunked_delta(q, k, a.unsqueeze(-1) * v, b / a, log_decay, memory)
    assert largest_difference(list(leaky), list(mapped)) < 1e-10
    assert (leaky[0] - chunked_delta(q, k, v, b, log_decay, memory)[0]).abs().max() > 0.01
    shut = [x.float() for x in (q, k, v, b, torch.full_like(log_decay, -63.9), memory)]
    assert all(x.isfinite().all() for x in results(chunked_delta, shut, gradient_before_decay=True))


def test_equal_channels_are_the_gated_rule():
    q, k, v, b, log_decay, memory = draw()
    channels = log_decay.unsqueeze(-1).expand(-1, -1, -1, K)
    head, channel = (chunked_delta(q, k, v, b, decay, memory) for decay in (log_decay, channels))
    assert largest_difference(list(channel), list(head)) < 1e-12


def test_a_signed_decay_is_the_recurrence_with_negative_gamma():
    """The shell turns keys and queries; here is the rule itself, with gamma < 0."""
    m = mixer("gated_delta", decay=part("decay", "signed"), conv_size=0)
    m.decay.projection.weight.data.mul_(50)  # gates of both signs
    calls, x = [], inputs(1, 20)
    m.regressor.register_forward_hook(lambda module, args, result: calls.append((*args[0][1:5], result[0])))
    m(x)
    q, k, v, _, o = (y[0] for y in calls[0])
    log_decay, signs = (y[0] for y in m.decay(x))
    gamma, turns = signs * log_decay.exp(), signs.cumprod(0).unsqueeze(-1)
    q, k = q * turns, k * turns  # as they were before the shell turned them
    b, S = m.regressor.step_size(x)[0].sigmoid(), torch.zeros(*k.shape[1:], v.shape[-1], dtype=v.dtype)
    for t in range(20):
        S = gamma[t].view(-1, 1, 1) * S
        S = S + b[t].view(-1, 1, 1) * k[t].unsqueeze(2) * (v[t].unsqueeze(1) - k[t].unsqueeze(1) @ S)
        assert torch.allclose(o[t], (q[t].unsqueeze(1) @ S).squeeze(1), atol=1e-10)
    assert (gamma < 0).any() and (gamma > 0).any()


def test_rotary_positions_are_a_complex_decay():
    """gamma_j = a exp(i w_j) for the j-th pair of channels: S <- gamma * S, and the rule with complex keys."""
    base, length = 100.0, 12
    plain, turning = (mixer("gated_delta", rotary=rotary) for rotary in (None, base))
    turning.load_state_dict(plain.state_dict())
    found, seen = [], []
    turning.regressor.register_forward_hook(lambda module, args, result: found.append(result[0][0]))
    plain.regressor.register_forward_hook(lambda module, args, result: seen.append(args[0][:5]))
    x = inputs(1, length)
    plain(x), turning(x)
    (x, q, k, v, log_decay), (o,) = seen[0], found
    half = q.shape[-1] // 2
    q, k = (torch.complex(y[0, ..., :half], y[0, ..., half:]) for y in (q, k))
    angle = base ** -(torch.arange(half, dtype=torch.float64) / half)
    b, S = plain.regressor.step_size(x)[0].sigmoid(), torch.zeros(*k.shape[1:], v.shape[-1], dtype=torch.complex128)
    for t in range(length):
        S = log_decay[0, t].exp().view(-1, 1, 1) * torch.polar(torch.ones_like(angle), angle).unsqueeze(1) * S
        error = v[0, t] - torch.einsum("hj,hjv->hv", k[t], S).real
        S = S + torch.einsum("h,hj,hv->hjv", b[t].to(k.dtype), k[t].conj(), error.to(k.dtype))
        assert torch.allclose(o[t], torch.einsum("hj,hjv->hv", q[t], S).real, atol=1e-10)


# Several steps a token


def test_one_step_a_token_is_the_gated_rule():
    inputs = draw()
    assert largest_difference(list(recurrent_delta_product(*inputs)), list(recurrent_delta(*inputs))) < 1e-12


def test_two_reflections_are_a_rotation():
    """With b = 2 a token multiplies the memory by a matrix of determinant 1, its eigenvalues complex; one step, -1."""
    g = torch.Generator().manual_seed(0)
    k = F.normalize(torch.randn(1, 2, 1, K, generator=g, dtype=torch.float64), dim=-1)
    zeros, two = torch.zeros_like(k), torch.full((1, 2, 1), 2.0, dtype=k.dtype)
    start = torch.eye(K, dtype=k.dtype).view(1, 1, K, K)
    _, once = recurrent_delta_product(k[:, :1], k[:, :1], zeros[:, :1], two[:, :1], memory=start)
    _, twice = recurrent_delta_product(k[:, :1], k, zeros, two, memory=start)
    assert torch.linalg.det(once).item() == pytest.approx(-1) and torch.linalg.det(twice).item() == pytest.approx(1)
    assert torch.linalg.eigvals(once).imag.abs().max() < 1e-12 < 0.1 < torch.linalg.eigvals(twice).imag.abs().max()
    assert torch.allclose(twice @ twice.mT, start, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("decay", ["none", "channel"])
def test_products_of_any_number_in_every_form(steps, decay):
    settings = {"regressor__num_steps": steps, "decay": part("decay", decay), "rotary": 100.0}
    x, documents = inputs(2, 2 * CHUNK + 3), (torch.arange(2 * CHUNK + 3) // 9).expand(2, -1)
    truth = outcome(mixer("delta_product", "recurrent", **settings), x, segments=documents)
    for splits in ((), (5, CHUNK)):
        assert largest_difference(outcome(mixer("delta_product", **settings), x, splits, documents), truth) < 1e-10


# A step for every channel


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
def test_with_keys_of_one_channel_each_the_diagonal_is_ridge_regression(backend):
    """Weighted by b, and exactly: the solution of the normal equations after every token."""
    torch.manual_seed(0)
    m = PreconditionedDelta(Sizes(12, H, H, K, V), backend, ridge=0.3).double()
    channel, scale = torch.randint(K, (1, T, H)), 1 + torch.rand(1, T, H, 1, dtype=torch.float64)
    k = scale * F.one_hot(channel, K).double()
    x, q, v = (torch.randn(1, T, *shape, dtype=torch.float64) for shape in ((12,), (H, K), (H, V)))
    o, _ = m(Tokens(x, q, k, v))
    root = m.step_size(x).sigmoid().sqrt().unsqueeze(-1)
    rows, values = ((root * y)[0].transpose(0, 1) for y in (k, v))
    ridge = torch.diag_embed(m.log_ridge.exp())
    for t in range(T):
        past, seen = rows[:, : t + 1], values[:, : t + 1]
        S = torch.linalg.solve(ridge + past.mT @ past, past.mT @ seen)
        assert torch.allclose(o[0, t], (q[0, t].unsqueeze(1) @ S).squeeze(1), atol=1e-10)


@pytest.mark.parametrize("chunk", [7, 16, 64])
def test_the_curvature_is_its_recurrence(chunk):
    _, k, _, b, log_decay, memory = draw()
    log_decay[:, [3, 4, 40]] = FORGET
    for decay in (None, log_decay):
        truth = recurrent_curvature(b.unsqueeze(-1) * k.square(), decay, memory[..., 0].abs())
        form = chunked_curvature(b.unsqueeze(-1) * k.square(), decay, memory[..., 0].abs(), chunk)
        assert largest_difference(list(form), list(truth)) < 1e-12


def test_no_key_is_too_long_for_the_diagonal():
    call = call_of("preconditioned_delta", T=60, qk_norm="none", feature_norm="none", conv_size=0)
    assert call.o.isfinite().all()
    m = PreconditionedDelta(Sizes(12, H, H, K, V))
    x, q, k, v = (torch.randn(1, 200, *shape) for shape in ((12,), (H, K), (H, K), (H, V)))
    o, _ = m(Tokens(x, q, 100 * k, v))
    assert o.abs().max() < 10


def test_a_squash_of_one_is_the_gated_rule():
    found, known = mixer("pgdn", regressor__squash=1.0), mixer("gated_delta")
    found.load_state_dict(known.state_dict(), strict=False)
    x = inputs(2, 21)
    assert largest_difference([found(x)[0]], [known(x)[0]]) < 1e-12


def test_normalized_steps_know_only_the_direction_of_a_key():
    """Keys and queries c times as long: the same reads, but for the 1e-6 beside |k|^2."""
    m = Delta(Sizes(12, H, H, K, V), step="normalized").double()
    q, k, v, _, log_decay, _ = draw()
    x = torch.randn(*q.shape[:2], 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    short, long = (m(Tokens(x, c * q, c * k, v, log_decay))[0] for c in (10.0, 1000.0))
    assert largest_difference([long], [short]) < 1e-6


# The exact step, and refusals


def test_the_exact_step_and_its_gradient_where_the_key_vanishes():
    s = torch.tensor([0.0, 1e-12, 1e-5, 9.99e-4, 1.001e-3, 0.3, 30.0, 1e4], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(_decayed_share(s).sum(), s)
    nodes = torch.linspace(0, 1, 20001, dtype=torch.float64)  # (1 - e^-s) / s is the mean of e^-su over u in (0, 1)
    for i in range(6):
        decay = torch.exp(-s[i].detach() * nodes)
        assert _decayed_share(s)[i].item() == pytest.approx(torch.trapezoid(decay, nodes).item(), abs=1e-9)
        assert gradient[i].item() == pytest.approx(-torch.trapezoid(nodes * decay, nodes).item(), abs=1e-9)
    assert gradient.isfinite().all()


def test_refusals_name_the_setting():
    sizes = Sizes(12, H, H, K, V)
    with pytest.raises(ValueError, match=r"regressor\.step=newton is not one of gradient, implicit, exact"):
        Delta(sizes, step="newton")
    with pytest.raises(ValueError, match=r"negative_eigenvalues=true: regressor\.step=exact"):
        Delta(sizes, step="exact", negative_eigenvalues=True)
    with pytest.raises(ValueError, match=r"negative_eigenvalues=true: regressor\.gradient_before_decay=true"):
        Delta(sizes, gradient_before_decay=True, negative_eigenvalues=True)
    with pytest.raises(ValueError, match=r"regressor\.num_steps=0"):
        DeltaProduct(sizes, num_steps=0)
    with pytest.raises(ValueError, match=r"regressor\.squash=3"):
        SquashedDelta(sizes, squash=3.0)
    with pytest.raises(ValueError, match=r"regressor\.ridge=0"):
        PreconditionedDelta(sizes, ridge=0.0)
