"""Laws of test-time training: that every form is the same, and that nothing diverges. That it is what it says has
tests/laws/objectives/ttt.py, that its gradients are the gradients test_deep.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from models.parts.sizes import Sizes
from models.regression.deep import TTT, DeepMemory
from models.regression.deep.forms import Call, State, deep_memory
from models.regression.deep.network import Network
from models.regression.deep.rules import Averaged, Gates, Start
from models.regression.regressor import Tokens

B, T, H, K = 2, 75, 2, 6
DOCUMENTS = torch.stack([torch.arange(T) // 9, (torch.arange(T) > 20).long() + (torch.arange(T) > 60)])
Form = Callable[..., tuple[Tensor, State]]
RULE = Averaged(Network("gelu_tanh", residual=True, limit_steps=False, bias=True))
recurrent_ttt, dual_ttt = deep_memory, partial(deep_memory, chunk=128)
every_model = pytest.mark.parametrize("inner_model", ["linear", "mlp"])


def draw(inner_model: str, grad_batch: int = 16, width: int = K) -> list[Tensor]:
    """q, k, v, step_size, token_size, gamma, beta, and the weights W_0, b_0, .. of each layer, float64."""
    g, K = torch.Generator().manual_seed(0), width
    widths = {"linear": (K, K), "mlp": (K, 4 * K, K)}[inner_model]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    pairs = [normal(B, T, H, K) for _ in range(3)]
    sizes = [normal(B, T, H).sigmoid() / K, 1 / torch.arange(1, grad_batch + 1).double() + 0.1]
    norm = [1 + 0.3 * normal(H, K), 0.3 * normal(H, K)]
    weights = [w for a, b in pairwise(widths) for w in (0.3 * normal(H, a, b), 0.3 * normal(H, 1, b))]
    return [*pairs, *sizes, *norm, *weights]


def in_calls(form: Form, inputs: list[Tensor], splits: tuple[int, ...] = (), segments: Tensor | None = None):
    """The form, the sequence given in calls that end at `splits`: o and the last state."""
    q, k, v, step_size, token_size, gamma, beta, *weights = inputs
    layers = zip(weights[::2], weights[1::2], strict=True)
    start = Start(tuple(torch.cat(layer, dim=1) for layer in layers), True, (gamma.unsqueeze(1), beta.unsqueeze(1)))
    outputs, state = [], None
    for a, b in pairwise([0, *splits, q.shape[1]]):
        *tokens, steps = (x[:, a:b] for x in (q, k, v, step_size))
        documents = None if segments is None else segments[:, a:b]
        gates = Gates(steps, share=token_size)
        o, state = form(RULE, Call(start, *tokens, gates, state, len(token_size), documents))
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


def outcome(form: Form, inputs: list[Tensor], dtype: torch.dtype = torch.float64, **given) -> list[Tensor]:
    """The output, the last state, and the gradients of a fixed function of both to all inputs."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    o, state = in_calls(form, leaves, **given)
    held = [o, *state.fitted.weights, *state.fitted.sums]
    g = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.device)).sum() for x in held)
    return [*held, *torch.autograd.grad(loss, leaves)]


def largest_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """In the Euclidean norm, relative to each one's own length."""
    pairs = zip(found, exact, strict=True)
    return max(((x.double() - y).norm() / y.norm().clamp(min=1e-30)).item() for x, y in pairs)


# Every form is the same


@every_model
@pytest.mark.parametrize(
    "grad_batch", [1, pytest.param(4, marks=pytest.mark.slow), 16, pytest.param(100, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("documents", [False, True])
def test_the_dual_form_is_the_token_loop(inner_model, grad_batch, documents):
    """Float64 to 1e-10, float32 to 1e-4, of every output, weight and gradient, in one call and in several."""
    inputs, segments = draw(inner_model, grad_batch), DOCUMENTS if documents else None
    exact = outcome(recurrent_ttt, inputs, segments=segments)
    for splits in ((), (1, 30, 31, 67), (16, 64)):
        assert largest_error(outcome(dual_ttt, inputs, splits=splits, segments=segments), exact) < 1e-10, splits
    assert largest_error(outcome(dual_ttt, inputs, torch.float32, segments=segments), exact) < 1e-4
    assert largest_error(outcome(recurrent_ttt, inputs, splits=(3, 50), segments=segments), exact) < 1e-10


@every_model
@pytest.mark.parametrize("remat", [1, 2, 100])
def test_computing_it_again_changes_nothing(inner_model, remat):
    inputs = draw(inner_model, 4)
    for segments in (None, DOCUMENTS):
        exact = outcome(dual_ttt, inputs, segments=segments)
        assert largest_error(outcome(partial(dual_ttt, remat=remat), inputs, segments=segments), exact) < 1e-14


@every_model
def test_autocast_changes_nothing(inner_model):
    """In the backward pass too."""
    inputs = draw(inner_model)
    expected = outcome(dual_ttt, inputs, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert largest_error(outcome(dual_ttt, inputs, torch.float32), expected) == 0


@pytest.mark.parametrize("depth", [1, 3])
def test_other_networks_are_averaged_too(depth):
    """DeepMemory by this rule, in every form; a decay is refused, which it would not apply."""
    found = []
    for backend, chunk, splits in (("recurrent", None, []), ("torch", 4, []), ("torch", 8, [1, 30, 67])):
        torch.manual_seed(0)
        memory = DeepMemory(Sizes(4, H, H, K, K), backend, chunk, 8, depth, bias=True, inner_optimizer="average")
        memory, (q, k, v, *_), state, outputs = memory.double(), draw("linear"), None, []
        for a, b in pairwise([0, *splits, T]):
            part = (
                x[:, a:b] for x in (torch.randn(B, T, 4, generator=torch.Generator().manual_seed(1)).double(), q, k, v)
            )
            o, state = memory(Tokens(*part, segments=DOCUMENTS[:, a:b]), state)
            outputs.append(o)
        o = torch.cat(outputs, dim=1)
        gradients = torch.autograd.grad(o.sin().sum(), list(memory.parameters()))
        found.append([o, *state.fitted.weights, *state.fitted.sums, *gradients])
    assert memory.accepts_decay == ("none",)
    assert all(largest_error(x, found[0]) < 1e-10 for x in found[1:])
    torch.testing.assert_close(memory.recall(torch.zeros(B, 1, 4).double(), q[:, -1:], state), o[:, -1:])


# Nothing diverges


@every_model
@pytest.mark.parametrize("length", [0.1, 1.0, 10.0])
def test_keys_that_agree_do_not_let_it_diverge(inner_model, length):
    """2048 tokens, keys of mean cosine 1/2 and up to ten times sqrt(K) long, every step the largest."""
    torch.manual_seed(0)
    module = TTT(Sizes(4, H, H, 16, 16), inner_model=inner_model)
    with torch.no_grad():
        module.step_size.bias.fill_(20.0)
    k = (length * (torch.randn(16) + torch.randn(1, 2048, H, 16))).requires_grad_()
    x, v = torch.zeros(1, 2048, 4), torch.randn(1, 2048, H, 16)
    o, state = module(Tokens(x, k, k, v))
    gradient = torch.autograd.grad(o.square().mean(), [k, *module.parameters()])
    assert all(t.isfinite().all() for t in (o, *state.fitted.weights, *gradient))
    assert (o - k).abs().max() < 30 and max(w.abs().max() for w in state.fitted.weights) < 100


def test_refusals_name_the_setting():
    sizes = Sizes(12, H, H, K, K)
    for setting, value in (("inner_model", "conv"), ("grad_batch", 0), ("base_lr", 0.0), ("remat", 0)):
        with pytest.raises(ValueError, match=rf"regressor\.{setting}={value}"):
            TTT(sizes, **{setting: value})
    with pytest.raises(ValueError, match=r"value_dim=8.*only value_dim=6"):
        TTT(sizes._replace(value_dim=8))
