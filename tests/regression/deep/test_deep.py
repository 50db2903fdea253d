"""Laws of deep memories: the gradients written out are autograd's, the dual form is the loop over tokens with every
weight held, and nothing diverges.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from models.parts.sizes import Sizes
from models.regression.deep import DeepMemory, forms
from models.regression.deep.forms import Call, deep_memory
from models.regression.deep.network import SMOOTH, Network
from models.regression.deep.retention import Entropic, Normed
from models.regression.deep.rules import Gates, Online, Start
from models.regression.linear.momentum import State as MatrixState
from models.regression.linear.momentum import recurrent_momentum
from models.regression.regressor import Tokens
from models.training.run import Run
from tests.test_config import composed

B, H, K, INNER = 2, 2, 6, 9
DOCUMENTS = torch.stack([torch.arange(75) // 9, (torch.arange(75) > 20).long() + (torch.arange(75) > 60)])
LOSSES = {
    "l2": lambda e, y, v: 0.5 * e.square(),
    "huber": lambda e, y, v: F.huber_loss(y, v, reduction="none", delta=0.7),
    "switch": lambda e, y, v: torch.where(
        e.square().mean(-1, keepdim=True) <= 0.49, 0.5 * e.square(), 0.7 * (e.square() + SMOOTH).sqrt()
    ),
    "lp": lambda e, y, v: (e.square() + SMOOTH).pow(0.75) / 1.5,
    "dot": lambda e, y, v: -y * v,
}


def recurrent_deep(
    network: Network, start: Start, *inputs: Tensor, state=None, grad_batch=64, segments=None, **settings
):
    """Titans' rule by the definition, for q, k, v and the three gates of draw."""
    q, k, v, *gates = inputs
    rule = Online(network, momentum=gates[1] is not None)
    return deep_memory(rule, Call(start, q, k, v, Gates(*gates), state, grad_batch, segments), **settings)


chunked_deep = partial(recurrent_deep, chunk=64)


def draw(tokens: int, depth: int = 2, V: int = 5, norm: bool = False) -> tuple[Start, list[Tensor]]:
    """The start, and q, k, v, step_size, log_momentum, log_decay, float64. Keys are shorter than 1: at a length of 1
    a matrix stands on the kink of the limit on steps.
    """
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    widths = [K, *[INNER] * (depth - 1), V]
    weights = tuple(normal(H, n, m) / n**0.5 for n, m in pairwise(widths))
    start = Start(weights, norm=(1 + 0.3 * normal(H, 1, V), normal(H, 1, V)) if norm else ())
    q, k, v = normal(B, tokens, H, K), 0.9 * F.normalize(normal(B, tokens, H, K), dim=-1), normal(B, tokens, H, V)
    logit = normal(B, tokens, H)
    theta = (-logit).sigmoid() * normal(B, tokens, H).sigmoid()
    return start, [q, k, v, theta, F.logsigmoid(logit), F.logsigmoid(normal(B, tokens, H) + 3)]


def f(network: Network, weights: list[Tensor], norm: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """The network by torch's own parts. weights [in, out], x [*, in]."""
    activations = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
    y = x
    for i, W in enumerate(weights):
        y = activations[network.activation](y) if i else y
        y = y @ W[:-1] + W[-1] if network.bias else y @ W
    if norm:
        y = F.layer_norm(y, y.shape[-1:], eps=1e-6) * norm[0] + norm[1]
    return x + y if network.residual else y


def leaves(start: Start, inputs: list[Tensor]) -> tuple[Start, list[Tensor], list[Tensor]]:
    """Copies that take gradients, and all of them in a row."""
    start = start._replace(
        **{x: tuple(w.detach().requires_grad_() for w in getattr(start, x)) for x in ("weights", "norm")}
    )
    inputs = [x if x is None else x.detach().requires_grad_() for x in inputs]
    return start, inputs, [x for x in (*start.weights, *start.norm, *inputs) if x is not None]


def outcome(form: Any, network: Network, start: Start, inputs: list[Tensor], splits=(), segments=None, **settings: Any):
    """The output, the last state, and the gradients of a fixed function of both to everything."""
    start, given, wanted = leaves(start, inputs)
    state, outputs = None, []
    for a, b in pairwise([0, *splits, given[0].shape[1]]):
        documents = None if segments is None else segments[:, a:b]
        cut = (x if x is None else x[:, a:b] for x in given)
        o, state = form(network, start, *cut, state=state, segments=documents, **settings)
        outputs.append(o)
    held = [torch.cat(outputs, dim=1), *state.fitted.weights, *state.fitted.sums, *state.fitted.references]
    g = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=torch.float64)).sum() for x in held)
    return [*held, *torch.autograd.grad(loss, wanted)]


def largest_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """In the Euclidean norm, relative to each one's own length."""
    return max(((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True))


# What it is


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "activation, residual, norm, bias",
    [("silu", False, False, False), ("gelu", True, True, False), ("gelu_tanh", False, True, True)],
)
def test_errors_are_autograds(depth, loss, activation, residual, norm, bias):
    """X^T E of every layer, and their own gradients, which an outer model needs."""
    start, (_, k, v, *_) = draw(4, depth, K, norm)
    network = Network(activation, residual, loss, {"lp": 1.5, "huber": 0.7, "switch": 0.7}.get(loss, 0.0), False, bias)
    if bias:  # some number for each output, below the weights
        start = start._replace(weights=tuple(torch.cat([w, w[:, :1].sin()], dim=1) for w in start.weights))
    weights, norms = ([w[0].clone().requires_grad_() for w in part] for part in (start.weights, start.norm))
    k, v = k[0, :, 0].requires_grad_(), v[0, :, 0].requires_grad_()
    y = f(network, weights, norms, k)
    expected = torch.autograd.grad(LOSSES[loss](v - y, y, v).sum(), weights, create_graph=True)
    inputs, errors = network.errors(weights, k, v, norms)
    found = [-x.mT @ e for x, e in zip(inputs, errors, strict=True)]
    wanted = [*weights, k, v, *norms]
    pairs = [(found, expected)]
    pairs.append(
        tuple(
            torch.autograd.grad(sum((g * (g + 1)).sum() for g in x), wanted, retain_graph=True, allow_unused=True)
            for x in pairs[0]
        )
    )
    for a, b in pairs:
        for x, y in zip(a, b, strict=True):
            assert (x is None) == (y is None) or y is None
            if y is not None:
                torch.testing.assert_close(x, y, rtol=0, atol=1e-10 * max(1, y.abs().max().item()))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_a_step_of_one_moves_a_prediction_at_most_to_its_value(depth, scale):
    """Its first order, along the error: all the way where the limit holds it, and otherwise as far as it would go."""
    start, (_, k, v, *_) = draw(1, depth)
    k, v, weights = k[0, 0, :1], v[0, 0, :1], tuple(scale * w[0] for w in start.weights)
    moved = []
    for limit in (False, True):
        inputs, errors = Network(limit_steps=limit).errors(weights, k, v)
        write = tuple(x.mT @ e for x, e in zip(inputs, errors, strict=True))
        y, change = torch.autograd.functional.jvp(lambda *w: f(Network(), list(w), (), k), weights, write)
        moved.append((change * (v - y)).sum() / (v - y).square().sum())
    torch.testing.assert_close(moved[1], moved[0].clamp(max=1.0))
    assert moved[0] > 1 or scale < 10 or depth == 1


@pytest.mark.parametrize("form", [recurrent_deep, chunked_deep], ids=["recurrent", "chunked"])
@pytest.mark.parametrize(
    "depth, fades, momentum", [(1, False, True), (2, False, True), (2, True, True), (4, True, False)]
)
def test_it_is_gradient_descent_with_every_weight_held(form, depth, fades, momentum):
    """A loop over tokens, one head at a time, its gradients by autograd; with documents."""
    start, inputs = draw(40, depth)
    start = start._replace(fades=fades)
    network = Network("gelu", limit_steps=False)
    b, segments = 16, DOCUMENTS[:, :40]
    q, k, v, theta, log_momentum, log_decay = inputs
    if not momentum:
        inputs[4] = None
        log_momentum = torch.full_like(theta, -torch.inf)
    o, _ = form(network, start, *inputs, grad_batch=b, segments=segments)
    for row, h in ((0, 0), (1, 1)):
        first = [w[h] for w in start.weights]
        for t in range(40):
            if t == 0 or segments[row, t] != segments[row, t - 1]:
                M, S, begin = first, [torch.zeros_like(w) for w in first], t
            if (t - begin) % b == 0:
                R = [m.detach().requires_grad_() for m in M]
            at = (row, t, h)
            loss = 0.5 * (f(network, R, (), k[at]) - v[at]).square().sum()
            gradients = torch.autograd.grad(loss, R)
            S = [log_momentum[at].exp() * s - theta[at] * g for s, g in zip(S, gradients, strict=True)]
            base = [torch.zeros_like(w) if fades else w for w in first]
            M = [w + log_decay[at].exp() * (m - w) + s for w, m, s in zip(base, M, S, strict=True)]
            torch.testing.assert_close(o[at], f(network, M, (), q[at]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", [recurrent_deep, chunked_deep], ids=["recurrent", "chunked"])
def test_one_layer_from_zero_is_a_matrix(form):
    start, inputs = draw(50, 1)
    start = start._replace(weights=(torch.zeros_like(start.weights[0]),))
    for b in (1, 7, 16):
        o, state = form(Network(), start, *inputs, grad_batch=b)
        expected, last = recurrent_momentum(*inputs, grad_batch=b)
        found = [state.fitted.weights[0], state.fitted.sums[0]]
        assert largest_error([o, *found], [expected, *MatrixState(*last[:2]).matrices]) < 1e-10


# Every form is the same


@pytest.mark.parametrize(
    "depth, norm", [(2, True), *(pytest.param(depth, False, marks=pytest.mark.slow) for depth in (1, 3, 4))]
)
@pytest.mark.parametrize("documents", [False, True])
def test_chunked_is_recurrent(depth, norm, documents):
    """Every output, weight and gradient, whatever mini-batch, chunk, split and group; float32 to its rounding."""
    start, drawn = draw(75, depth, K, norm)
    network, segments = Network(residual=norm), DOCUMENTS if documents else None
    for b, chunk in ((16, 16), (32, 8), (7, 4), (128, 32)):
        inputs = [x / b if i == 3 else x for i, x in enumerate(drawn)]
        exact = outcome(recurrent_deep, network, start, inputs, (), segments, grad_batch=b)
        for splits, remat in (((), 2), ((1, 30, 31, 67), 0)):
            settings = {"grad_batch": b, "chunk": chunk, "remat": remat}
            found = outcome(chunked_deep, network, start, inputs, splits, segments, **settings)
            assert largest_error(found, exact) < 1e-10, (b, chunk, splits)
        single = [x.float() for x in inputs]
        narrow = start._replace(
            weights=tuple(w.float() for w in start.weights), norm=tuple(w.float() for w in start.norm)
        )
        found = outcome(chunked_deep, network, narrow, single, (), segments, grad_batch=b, chunk=chunk)
        assert largest_error(found, exact) < 2e-6
    assert (
        largest_error(outcome(recurrent_deep, network, start, inputs, (3, 50), segments, grad_batch=128), exact) < 1e-10
    )


@pytest.mark.parametrize("fades", [False, True])
def test_plain_gradient_descent_and_other_losses_in_chunks(fades):
    start, inputs = draw(40)
    start = start._replace(fades=fades)
    inputs[4] = None
    for loss, power in (("huber", 0.7), ("switch", 0.7), ("lp", 1.5), ("lp", 3.0), ("dot", 0.0)):
        network = Network(loss=loss, power=power)

        forms = (recurrent_deep, {}), (chunked_deep, {"chunk": 8, "remat": 3})
        found = [outcome(form, network, start, inputs, grad_batch=8, **more) for form, more in forms]
        assert largest_error(found[1], found[0]) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("remat", [0, 2])
def test_compiled_steps_are_the_steps(remat):
    """Five slots, four in one call; with documents there are more."""
    start, inputs = draw(40)
    settings = {"grad_batch": 8, "chunk": 8, "remat": remat, "segments": DOCUMENTS[:, :40] if remat else None}
    exact, found = (outcome(chunked_deep, Network(), start, inputs, compiled=x, **settings) for x in (False, True))
    assert largest_error(found, exact) < 1e-10


def test_chunks_are_compiled_in_few_forms(monkeypatch):
    """Four in one call, and one by one those that are left: of ten slots the first have no form of their own. Where
    documents are told none are left, however many slots a batch needs."""
    graphs, compile_ = [], torch.compile

    def compiler(graph, _):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda steps, **options: compile_(steps, backend=compiler, **options))
    start, inputs = draw(80)
    ends = torch.arange(80) > torch.tensor([[43], [60]])
    for calls, num_forms in (([None], 2), ([ends.long(), ends.cumsum(1) // 11], 1)):
        graphs.clear()
        torch._dynamo.reset()
        forms.compiled_steps.cache_clear()
        for segments in calls:
            settings = {"grad_batch": 8, "chunk": 8, "segments": segments}
            exact, found = (
                outcome(chunked_deep, Network(), start, inputs, compiled=x, **settings) for x in (False, True)
            )
            assert largest_error(found, exact) < 1e-10
        assert len(graphs) == num_forms
    forms.compiled_steps.cache_clear()


def test_autocast_changes_nothing():
    """In the backward pass too."""
    start, inputs = draw(40, 2, K, True)
    start = Start(*(x if isinstance(x, bool) else tuple(w.float() for w in x) for x in start))
    inputs = [x.float() for x in inputs]
    expected = outcome(chunked_deep, Network(), start, inputs, grad_batch=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert largest_error(outcome(chunked_deep, Network(), start, inputs, grad_batch=16), expected) == 0


# It learns within the sequence, and nothing diverges


def module(**settings: Any) -> DeepMemory:
    torch.manual_seed(0)
    return DeepMemory(Sizes(4, H, H, 32, 32), **settings)


def test_gradients_cross_mini_batches():
    """Of what the third mini-batch reads, to what the first wrote, through the gradients taken in the second: by x, all
    else held."""
    start, inputs = draw(24)
    inputs[2].requires_grad_()
    o, _ = chunked_deep(Network(), start, *inputs, grad_batch=8, chunk=8)
    (gradient,) = torch.autograd.grad(o[:, 16:].square().sum(), inputs[2])
    assert (gradient[:, :8].norm(dim=-1) > 0).all()
    one, _ = chunked_deep(Network(), start, *inputs, grad_batch=24, chunk=8)
    assert not torch.allclose(o[:, 8:], one[:, 8:]), "the second mini-batch's gradients know of the first"


def test_yaad_with_no_threshold_is_gradient_descent_and_retention_of_two_divides_by_nothing():
    start, inputs = draw(20)
    inputs[4] = None
    plain = outcome(chunked_deep, Network(), start, inputs, grad_batch=8)
    network = Network(loss="switch", power=1e9)
    assert largest_error(outcome(chunked_deep, network, start, inputs, grad_batch=8), plain) < 1e-12
    rule, call = Normed(Network(), False, 2.0), Call(start, *inputs[:3], Gates(*inputs[3:]), None, 8)
    assert (deep_memory(rule, call, 8)[0] - plain[0]).abs().max() < 1e-12


def test_a_large_mass_is_gradient_descent():
    """Memora's limit: what the second mini-batch reads at its start is what Online has left."""
    start, (q, k, v, theta, _, log_decay) = draw(9)
    first = Call(start, q[:, :8], k[:, :8], v[:, :8], Gates(theta[:, :8], None, log_decay[:, :8]), None, 8)
    _, left = deep_memory(Online(Network(), False), first, 8)
    after = Call(start, q[:, 8:], k[:, 8:], v[:, 8:], Gates(0 * theta[:, 8:]), left, 8)
    expected, _ = deep_memory(Online(Network(), False), after)
    whole = Call(start, q, k, v, Gates(theta, None, log_decay), None, 8)
    found, _ = deep_memory(Entropic(Network(), False, (1e4, 1e4)), whole, 8)
    assert (found[:, 8:] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("inner_loss", ["l2", "huber", "switch", "lp", "dot"])
@pytest.mark.parametrize("inner_optimizer", ["momentum", "sgd"])
def test_the_inner_loss_falls(inner_loss, inner_optimizer):
    """The same 16 pairs again and again: the reads come ever closer to the values, or for `dot` grow along them."""
    memory = module(grad_batch=16, inner_loss=inner_loss, inner_optimizer=inner_optimizer)
    g = torch.Generator().manual_seed(0)
    k = F.normalize(torch.randn(1, 16, H, 32, generator=g), dim=-1)
    v = F.normalize(torch.randn(1, 16, H, 32, generator=g), dim=-1)
    k, v = k.repeat(1, 64, 1, 1), v.repeat(1, 64, 1, 1)
    with torch.no_grad():
        memory.step_size.bias.fill_(4.0)
        o, _ = memory(Tokens(torch.zeros(1, 1024, 4), k, k, v))
    e, y = v - o, o
    loss = LOSSES[inner_loss](e, y, v).sum((-1, -2)).view(64, 16).mean(1)
    assert (loss[[8, 20, 40, 63]] < loss[[0, 8, 20, 40]]).all(), loss
    if inner_loss == "l2":
        assert loss[-1] < 0.1 * loss[0]


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("grad_batch", [1, 16, 64])
@pytest.mark.parametrize("momentum", [0.0, 3.0, 7.0, 20.0])
def test_no_gates_let_it_diverge(depth, grad_batch, momentum):
    """2048 tokens (256 where each is a mini-batch), keys of mean cosine 1/2, no decay, the largest steps, values up to
    4. A matrix and two layers keep within their values; deeper ones with steps of size 1 overshoot now and then.
    """
    memory, T = module(grad_batch=grad_batch, depth=depth), 256 if grad_batch == 1 else 2048
    with torch.no_grad():
        for p in (*memory.step_size.parameters(), *memory.momentum.parameters()):
            p.zero_()
        memory.step_size.bias.fill_(20.0)
        memory.momentum.bias.fill_(momentum)
        shared = F.normalize(torch.randn(32), dim=0)
        k = F.normalize(shared + F.normalize(torch.randn(1, T, H, 32), dim=-1), dim=-1)
        o, state = memory(Tokens(torch.zeros(1, T, 4), k, k, torch.randn(1, T, H, 32)))
    assert all(x.isfinite().all() for x in (o, *state.fitted.weights, *state.fitted.sums))
    assert o.abs().max() < (100 if depth > 2 and grad_batch == 1 else 10), o.abs().max()


# Mistakes


@pytest.mark.parametrize(
    "setting, says",
    [
        ({"depth": 5}, "regressor.depth=5 must be 1, 2, 3 or 4"),
        ({"expansion": 0}, "regressor.expansion=0 must be at least 1 / 32"),
        ({"grad_batch": 0}, "regressor.grad_batch=0"),
        ({"activation": "relu"}, "regressor.activation=relu is not one of silu, gelu, gelu_tanh"),
        ({"mass": 0.0}, "regressor.mass=0.0 must be positive, or null"),
        ({"mass": 1.0}, "regressor.mass=1.0 goes with inner_optimizer=sgd, forget_to=start and retention=2"),
        ({"retention": 1.5}, "regressor.retention=1.5 must be at least 2"),
        ({"retention": 4.0, "inner_optimizer": "muon"}, "regressor.retention=4.0 goes with inner_optimizer=momentum"),
        ({"inner_loss": "l1"}, "regressor.inner_loss=l1 is not one of l2, huber, switch, lp, dot"),
        ({"inner_optimizer": "lion"}, "regressor.inner_optimizer=lion is not one of momentum, sgd"),
        ({"forget_to": "mean"}, "regressor.forget_to=mean is not one of start, zero"),
        ({"p": 0.5}, "regressor.p=0.5 must be at least 1"),
        ({"remat": -1}, "regressor.remat=-1"),
    ],
    ids=str,
)
def test_refusals_name_the_setting(setting, says):
    with pytest.raises(ValueError, match=says):
        module(**setting)
    with pytest.raises(ValueError, match=r"regressor\.residual=true adds keys of width 6 to values of width 5"):
        DeepMemory(Sizes(4, H, H, 6, 5), residual=True)


def test_a_run_does_not_go_on_with_other_mini_batches(tmp_path):
    """They are a part of the model: the difference is named, and nothing trained."""
    for grad_batch in (64, 32):
        cfg = composed("model=titans_mlp", f"model.mixers.main.regressor.grad_batch={grad_batch}")
        run = Run(tmp_path / "run", OmegaConf.to_container(cfg, resolve=True))
        if grad_batch == 64:
            run.enter()
            run._held.release()
            continue
        with pytest.raises(ValueError, match=r"regressor\.grad_batch: 64 before, 32 now"):
            run.enter()
