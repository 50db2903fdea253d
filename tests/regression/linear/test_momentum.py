"""Laws of the momentum rule and of its window: what they are, that every form is the same, that float32 keeps its
digits, and that no gates diverge.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.parts.sizes import Sizes
from models.regression.linear.momentum import Momentum, State, chunked_momentum, recurrent_momentum
from models.regression.linear.omega import Omega, chunked_omega, recurrent_omega
from models.regression.regressor import Tokens

B, H, K, V = 2, 2, 8, 6
GRAD_BATCHES = (1, 4, 16, 64, 128)
DOCUMENTS = torch.stack([torch.arange(75) // 9, (torch.arange(75) > 20).long() + (torch.arange(75) > 60)])
Form = Callable[..., tuple[Tensor, State]]


def draw(tokens: int, momentum: float | None = None, window: int | None = None) -> list[Tensor]:
    """q, k, v, [weights,] step_size, log_momentum, log_decay, and the matrices M, S and M_ref, float64."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k, v = normal(B, tokens, H, K), F.normalize(normal(B, tokens, H, K), dim=-1), normal(B, tokens, H, V)
    logit = normal(B, tokens, H)
    if momentum is not None:
        logit = torch.logit(torch.full_like(logit, momentum))
    gates = [(-logit).sigmoid() * normal(B, tokens, H).sigmoid(), F.logsigmoid(logit)]
    gates.append(F.logsigmoid(normal(B, tokens, H) + 4))
    weights = [] if window is None else [normal(B, tokens, H, window).sigmoid() / window]
    return [q, k, v, *weights, *gates, *(0.3 * normal(B, H, K, V) for _ in range(3))]


def in_calls(form: Form, splits: tuple[int, ...], segments: Tensor | None = None) -> Form:
    """The form, the sequence given in calls that end at `splits`."""

    def calls(*args: Tensor, state: State) -> tuple[Tensor, State]:
        outputs = []
        for a, b in pairwise([0, *splits, args[0].shape[1]]):
            documents = None if segments is None else segments[:, a:b]
            o, state = form(*(x[:, a:b] for x in args), state=state, segments=documents)
            outputs.append(o)
        return torch.cat(outputs, dim=1), state

    return calls


def outcome(form: Form, inputs: list[Tensor], grad_batch: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The output, the matrices of the last state, and the gradients of a fixed function of both to all inputs. The rows
    begin at different places of their mini-batches.
    """
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    phase = torch.tensor([0, grad_batch // 2])
    state = State(*leaves[-3:-1]) if grad_batch == 1 else State(*leaves[-3:], phase)
    o, last = form(*leaves[:-3], state=state)
    held = [o, *last.matrices]
    g = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=torch.float64)).sum() for x in held)
    return [*held, *torch.autograd.grad(loss, leaves, allow_unused=True)[: len(leaves) - (grad_batch == 1)]]


def largest_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """In the Euclidean norm, relative to each one's own length."""
    return max(((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True))


def form(function: Form, grad_batch: int, **settings: int) -> Form:
    return lambda *args, **given: function(*args, grad_batch=grad_batch, **settings, **given)


# What it is


@pytest.mark.parametrize("function", [recurrent_momentum, chunked_momentum])
@pytest.mark.parametrize("nothing", [-64.0, float("-inf")])
def test_without_momentum_it_is_leaky_lms(function, nothing):
    q, k, v, b, log_momentum, log_decay, memory, speed, _ = draw(75)
    o, _ = function(q, k, v, b, torch.full_like(log_momentum, nothing), log_decay, State(memory, speed))
    for t in range(75):
        error = v[:, t, :, None] - k[:, t, :, None] @ memory
        memory = log_decay[:, t, :, None, None].exp() * memory
        memory = memory + b[:, t, :, None, None] * k[:, t, :, :, None] * error
        torch.testing.assert_close(o[:, t], (q[:, t, :, None] @ memory).squeeze(-2), rtol=0, atol=1e-10)


@pytest.mark.parametrize("chunk", [16, 64])
def test_one_mini_batch_is_linear_attention_over_the_errors_of_the_first_memory(chunk):
    """Coefficients by products of gates, from their definition."""
    q, k, v, b, log_momentum, log_decay, memory, speed, _ = draw(40)
    o, _ = chunked_momentum(q, k, v, b, log_momentum, log_decay, State(memory, speed), grad_batch=40, chunk=chunk)
    errors, eta, a = v - torch.einsum("bthk,bhkv->bthv", k, memory), log_momentum.exp(), log_decay.exp()
    for t in (0, 1, 17, 39):
        read, carried, pushed = memory, speed, torch.zeros_like(b[:, 0])
        for i in range(t + 1):
            carried = eta[:, i, :, None, None] * carried
            read = a[:, i, :, None, None] * read + carried
        expected = (q[:, t, :, None] @ read).squeeze(-2)
        for i in range(t + 1):
            speed_of, pushed = b[:, i], b[:, i]
            for j in range(i + 1, t + 1):
                speed_of = eta[:, j] * speed_of
                pushed = a[:, j] * pushed + speed_of
            expected = expected + (pushed * (q[:, t] * k[:, i]).sum(-1)).unsqueeze(-1) * errors[:, i]
        torch.testing.assert_close(o[:, t], expected, rtol=0, atol=1e-10)


# Every form is the same


@pytest.mark.parametrize("grad_batch", GRAD_BATCHES)
@pytest.mark.parametrize("documents", [False, True])
def test_chunked_is_recurrent(grad_batch, documents):
    """Float64 to 1e-10, float32 to 1e-5, of every output, matrix and gradient."""
    inputs, segments = draw(75), DOCUMENTS[:, :75] if documents else None
    exact = outcome(in_calls(form(recurrent_momentum, grad_batch), (), segments), inputs, grad_batch)
    for chunk, splits in ((64, ()), (16, (1, 30, 31, 67))):
        chunked = in_calls(form(chunked_momentum, grad_batch, chunk=chunk), splits, segments)
        assert largest_error(outcome(chunked, inputs, grad_batch), exact) < 1e-10
        if not splits:
            assert largest_error(outcome(chunked, inputs, grad_batch, torch.float32), exact) < 1e-5
    split = in_calls(form(recurrent_momentum, grad_batch), (3, 50), segments)
    assert largest_error(outcome(split, inputs, grad_batch), exact) < 1e-10


@pytest.mark.parametrize("momentum", [0.9999, 0.9, 0.5, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("grad_batch", [1, 16])
def test_float32_keeps_its_digits_at_any_momentum(momentum, grad_batch):
    inputs = draw(75, momentum)
    exact = outcome(form(recurrent_momentum, grad_batch), inputs, grad_batch)
    found = outcome(form(chunked_momentum, grad_batch, chunk=64), inputs, grad_batch, torch.float32)
    assert largest_error(found, exact) < 1e-5


@pytest.mark.parametrize("grad_batch", [1, 4, 64])
@pytest.mark.parametrize("documents", [False, True])
def test_a_window_in_chunks_is_the_window_token_by_token(grad_batch, documents):
    inputs, segments = draw(50, window=4), DOCUMENTS[:, :50] if documents else None

    def alone(function, splits, **settings):
        """The outcome without the window's pairs in the state: the first call gets none."""

        def calls(*args, state):
            outputs, state = [], None
            for a, b in pairwise([0, *splits, 50]):
                given = {"state": state, "segments": None if segments is None else segments[:, a:b]}
                o, state = function(*(x[:, a:b] for x in args), grad_batch=grad_batch, **settings, **given)
                outputs.append(o)
            pairs = torch.cat([state.keys, state.values], dim=-1)
            return torch.cat([*outputs, F.pad(pairs, (0, V - K - V))], dim=1), state.fitted

        return [x for x in outcome(calls, inputs, grad_batch) if x is not None]

    exact = alone(recurrent_omega, ())
    for chunk, splits in ((16, ()), (8, (1, 2, 30)), (64, (47,))):
        assert largest_error(alone(chunked_omega, splits, chunk=chunk), exact) < 1e-10
    assert largest_error(alone(recurrent_omega, (2, 33)), exact) < 1e-10


@pytest.mark.parametrize("grad_batch", [1, 5])
def test_a_window_of_one_pair_is_no_window(grad_batch):
    q, k, v, *gates = draw(75)[:6]
    ones = torch.ones(B, 75, H, 1, dtype=torch.float64)
    expected = recurrent_momentum(q, k, v, *gates, grad_batch=grad_batch)
    for function in (recurrent_omega, chunked_omega):
        o, state = function(q, k, v, ones, *gates, grad_batch=grad_batch)
        found = [o, *state.fitted.matrices]
        assert largest_error(found, [expected[0], *expected[1].matrices]) < 1e-12


def test_autocast_changes_nothing():
    """In the backward pass too."""
    inputs = [x.float() for x in draw(75)]
    expected = outcome(form(chunked_momentum, 4), inputs, 4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert largest_error(outcome(form(chunked_momentum, 4), inputs, 4, torch.float32), expected) == 0


# Nothing diverges


@pytest.mark.slow
@pytest.mark.parametrize("grad_batch", [1, 16, 64])
@pytest.mark.parametrize("regressor", [Momentum, Omega])
@pytest.mark.parametrize("momentum", [0.0, 3.0, 7.0, 20.0])
def test_no_gates_let_it_diverge(grad_batch, regressor, momentum):
    """2048 tokens, keys of mean cosine 1/2, no decay, the largest steps, momenta up to 1 - 2e-9."""
    torch.manual_seed(0)
    module = regressor(Sizes(4, H, H, 32, V), grad_batch=grad_batch)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.step_size.bias.fill_(20.0)
        module.momentum.bias.fill_(momentum)
        if regressor is Omega:
            module.weights.bias.fill_(20.0)
    shared = F.normalize(torch.randn(32), dim=0)
    k = F.normalize(shared + F.normalize(torch.randn(1, 2048, H, 32), dim=-1), dim=-1)
    v = torch.randn(1, 2048, H, V)
    o, state = module(Tokens(torch.zeros(1, 2048, 4), k, k, v))
    assert o.isfinite().all() and all(x.isfinite().all() for x in state[:2] if isinstance(x, Tensor))
    assert o.abs().max() < 30, o.abs().max()


@pytest.mark.parametrize("fades", [False, True])
def test_no_gates_that_vary_let_it_diverge(fades):
    """A key over and over, or another for each token, and gates drawn at random, many at their ends: |M + D|^2 + |D|^2
    never grows without values."""
    torch.manual_seed(0)
    T, module = 400, Momentum(Sizes(2, 1, 1, 4, 4)).double()
    for name, column in (("momentum", 0), ("step_size", 1)):
        with torch.no_grad():
            getattr(module, name).weight.copy_(torch.eye(2)[column : column + 1])
            getattr(module, name).bias.zero_()
    ends = torch.tensor([-30.0, 0.0, 12.0], dtype=torch.float64)
    for keys in (torch.randn(1, 1, 1, 4).expand(1, T, 1, 4), torch.randn(1, T, 1, 4)):
        k, x = F.normalize(keys.double(), dim=-1), ends[torch.randint(3, (1, T, 2))]
        log_decay = -torch.rand(1, T, 1, dtype=torch.float64) if fades else None
        state, before = State(*torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)), float("inf")
        for t in range(T):
            now = slice(t, t + 1)
            decay = None if log_decay is None else log_decay[:, now]
            _, state = module(Tokens(x[:, now], k[:, now], k[:, now], torch.zeros_like(k[:, now]), decay), state)
            energy = ((state.memory + state.momentum).square().sum() + state.momentum.square().sum()).item()
            assert energy <= before * (1 + 1e-12)
            before = energy


@pytest.mark.parametrize("regressor", [Momentum, Omega])
def test_free_gates_do_and_tied_ones_do_not(regressor):
    """One token writes, with no momentum, and four keep it moving, with all of it: past the target by four times the
    error, twelve times over. One key, one value."""
    found = {}
    for gates in ("free", "tied"):
        module = regressor(Sizes(1, 1, 1, 4, 4), gates=gates)
        with torch.no_grad():
            for p in module.parameters():
                p.zero_()
            module.momentum.weight.fill_(1.0)
            module.step_size.bias.fill_(20.0)
            if regressor is Omega:
                module.weights.bias.copy_(torch.tensor([20.0, -20.0, -20.0, -20.0]))
        x = torch.tensor([-30.0, 12.0, 12.0, 12.0, 12.0]).repeat(12).view(1, -1, 1)
        key = F.normalize(torch.ones(1, 60, 1, 4), dim=-1)
        o, _ = module(Tokens(x, key, key, torch.ones(1, 60, 1, 4)))
        found[gates] = o.abs().max().item()
    assert found["free"] > 1e5 and found["tied"] < 2, found


def test_refusals_name_the_setting():
    sizes = Sizes(12, H, H, K, V)
    with pytest.raises(ValueError, match=r"regressor\.gates=tide is not one of tied, free"):
        Momentum(sizes, gates="tide")
    with pytest.raises(ValueError, match=r"regressor\.grad_batch=0"):
        Momentum(sizes, grad_batch=0)
    with pytest.raises(ValueError, match=r"regressor\.window=0"):
        Omega(sizes, window=0)
    with pytest.raises(ValueError, match=r"regressor\.backend=fla can't run Momentum here"):
        Momentum(sizes, backend="fla").choose(torch.device("cpu"), torch.float32)
