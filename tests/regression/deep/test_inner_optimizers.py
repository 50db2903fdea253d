"""Laws of the optimisers inside: each is its textbook loop, every form is the same, and the inner loss falls."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.parts.orthogonal import orthogonal
from models.parts.sizes import Sizes
from models.regression.deep import DeepMemory
from models.regression.deep.optimizers import INNER_OPTIMIZERS, Shampoo
from models.regression.regressor import Tokens
from tests.regression.deep.test_deep import DOCUMENTS

B, T, H, K, V, b = 2, 37, 2, 6, 5, 8
OPTIMIZERS = sorted(INNER_OPTIMIZERS)


def drawn(optimizer: str, tokens: int = T, **settings: Any) -> tuple[DeepMemory, list[Tensor]]:
    torch.manual_seed(0)
    memory = DeepMemory(
        Sizes(4, H, H, K, V), inner_optimizer=optimizer, grad_batch=b, expansion=1.5, **settings
    ).double()
    q, k, v = (
        torch.randn(B, tokens, H, K),
        F.normalize(torch.randn(B, tokens, H, K), dim=-1),
        torch.randn(B, tokens, H, V),
    )
    x, log_decay = torch.randn(B, tokens, 4), F.logsigmoid(torch.randn(B, tokens, H) + 3)
    return memory, [y.double() for y in (x, q, k, v, log_decay)]


def power(A: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(A)
    return vectors @ values.pow(exponent).diag() @ vectors.mT


def direction(optimizer: str, gradients: list[Tensor], etas: list[Tensor]) -> Tensor:
    """U from the gradients of all mini-batches so far, by the textbook."""
    D, (n, m) = gradients[-1], gradients[-1].shape
    if optimizer == "sign":
        return D.sign() / (n * m) ** 0.5
    if optimizer == "adam":
        p = torch.zeros(n, m, dtype=D.dtype, requires_grad=True)
        adam = torch.optim.Adam([p], lr=1.0, betas=(0.9, 0.95), eps=1e-6)
        for D in gradients:
            before, p.grad = p.detach().clone(), -D
            adam.step()
        return (p.detach() - before) / (n * m) ** 0.5
    if optimizer == "shampoo":
        left, right = sum(D @ D.mT for D in gradients), sum(D.mT @ D for D in gradients)
        damped = (A + Shampoo.damping * A.trace() / len(A) * torch.eye(len(A)) for A in (left, right))
        left, right = (power(A, -0.25) for A in damped)
        return left @ D @ right
    momentum = torch.zeros_like(D)
    for D, eta in zip(gradients, etas, strict=True):
        momentum = eta * momentum + D
    X = momentum / (momentum.norm() + 1e-7)
    for _ in range(5):
        X = 3.4445 * X - 4.7750 * X @ X.mT @ X + 2.0315 * X @ X.mT @ X @ X.mT @ X
    return X


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["torch", "recurrent"])
def test_it_is_its_loop(optimizer, backend):
    """Gradients by autograd, weights held; what is read within a mini-batch are the weights of its beginning."""
    memory, (x, q, k, v, log_decay) = drawn(optimizer, depth=3, backend=backend)
    o, _ = memory(Tokens(x, q, k, v, log_decay))
    rates = memory.step_size(x).sigmoid()
    etas = torch.zeros_like(rates) if memory.momentum is None else memory.momentum(x).sigmoid()
    for row, h in ((0, 0), (1, 1)):
        start = [w[h].detach() for w in memory.start]
        M, seen, averages = start, [[] for _ in start], []
        for batch in torch.arange(T).split(b):
            R = [w.clone().requires_grad_() for w in M]
            y = F.silu(F.silu(k[row, batch, h] @ R[0]) @ R[1]) @ R[2]
            read = F.silu(F.silu(q[row, batch, h] @ R[0]) @ R[1]) @ R[2]
            assert torch.allclose(o[row, batch, h], read, atol=1e-10)
            gradients = token_gradients(y, v[row, batch, h], R, rates[row, batch, h] / b)
            rate, a = rates[row, batch, h].mean(), log_decay[row, batch, h].sum().exp()
            averages.append(etas[row, batch, h].mean())
            for history, D in zip(seen, gradients, strict=True):
                history.append(D)
            steps = [direction(optimizer, history, averages) for history in seen]
            M = [(w + a * (m - w) + rate * U).detach() for w, m, U in zip(start, M, steps, strict=True)]


def token_gradients(y: Tensor, v: Tensor, R: list[Tensor], theta: Tensor) -> list[Tensor]:
    """-sum theta dl/dM, each token's step limited as network.py says."""
    total = [torch.zeros_like(r) for r in R]
    for i in range(len(y)):
        error = v[i] - y[i]
        gradients = torch.autograd.grad(0.5 * error.square().sum(), R, retain_graph=True)
        # how far y moves along the error is the squared length of the gradient of y . error
        moved = sum(g.square().sum() for g in gradients)
        share = (error.square().sum() / moved).clamp(max=1.0)
        total = [D - theta[i] * share * g for D, g in zip(total, gradients, strict=True)]
    return [D.detach() for D in total]


def outcome(memory: DeepMemory, inputs: list[Tensor], splits=(), segments=None) -> list[Tensor]:
    """The output, the weights at last, and the gradients of a fixed function of both to all inputs and parameters."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    state, outputs = None, []
    for i, j in pairwise([0, *splits, T]):
        o, state = memory(Tokens(*(x[:, i:j] for x in inputs), None if segments is None else segments[:, i:j]), state)
        outputs.append(o)
    held = [torch.cat(outputs, dim=1), *state.fitted.weights, *state.fitted.sums, *state.fitted.gates]
    g = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in held)
    return [*held, *torch.autograd.grad(loss, [*inputs, *memory.parameters()])]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("documents", [False, True])
def test_every_form_is_the_same(optimizer, documents):
    """Token by token, in chunks of less than a mini-batch, in calls, and in groups computed twice."""
    memory, inputs = drawn(optimizer, backend="recurrent", layer_norm=True)
    segments = DOCUMENTS[:, :T] if documents else None
    exact = outcome(memory, inputs, (), segments)
    for chunk, remat, splits in ((8, 0, ()), (4, 3, ()), (3, 0, (1, 17, 30))):
        other, _ = drawn(optimizer, backend="torch", layer_norm=True, chunk=chunk, remat=remat)
        for x, y in zip(outcome(other, inputs, splits, segments), exact, strict=True):
            assert (x - y).norm() <= 1e-10 * y.norm(), (chunk, splits)


@pytest.mark.slow
def test_a_compiled_step_is_the_step(monkeypatch):
    memory, inputs = drawn("muon")
    exact = outcome(memory, inputs)
    monkeypatch.setattr("models.regression.deep.memory.compiles", lambda device: True)
    for x, y in zip(outcome(memory, inputs), exact, strict=True):
        assert (x - y).norm() <= 1e-10 * y.norm()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("inner_loss", ["l2", "huber"])
def test_the_inner_loss_falls(optimizer, inner_loss):
    """The same 8 pairs again and again, steps as long as a tenth."""
    memory, (x, _, k, v, _) = drawn(optimizer, 400, inner_loss=inner_loss)
    k, v, x = k[:, :b].repeat(1, 50, 1, 1), v[:, :b].repeat(1, 50, 1, 1), torch.zeros_like(x)
    with torch.no_grad():
        memory.step_size.bias.fill_(-2.2)
        o, _ = memory(Tokens(x, k, k, v))
    loss = (v - o).square().mean((0, 2, 3)).view(50, b).mean(1)
    assert loss[-1] < 0.5 * loss[0] and (loss[[10, 25, 49]] < loss[[0, 10, 25]] + 0.02 * loss[0]).all(), loss


def test_directions_have_a_spectral_norm_of_about_one():
    torch.manual_seed(0)
    D = torch.randn(3, 20, 9, dtype=torch.float64) * torch.tensor([1e-4, 1.0, 1e3]).view(3, 1, 1)
    for name, optimizer in INNER_OPTIMIZERS.items():
        history = [D.new_zeros(3, *shape) for shape in optimizer.shapes(20, 9)]
        U, _ = optimizer.direction(D, history, D.new_ones(3, 1, 1))
        lengths = torch.linalg.matrix_norm(U, 2)
        assert (lengths < 1.3).all() and (lengths > 0.2).all(), (name, lengths)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_the_inverse_fourth_root(dtype, tolerance):
    """Of matrices of little rank too, and of nothing."""
    torch.manual_seed(0)
    for rank in (1, 4, 40):
        D = torch.randn(20, rank, dtype=dtype)
        A = D @ D.mT
        damped = A + Shampoo.damping * A.trace() / 20 * torch.eye(20, dtype=dtype)
        Y = Shampoo()._root(A)
        torch.testing.assert_close(Y @ Y @ damped @ Y @ Y, torch.eye(20, dtype=dtype), rtol=0, atol=tolerance)
    assert Shampoo()._root(torch.zeros(4, 4, dtype=dtype)).isfinite().all()


def test_orthogonal_of_nothing_has_a_gradient():
    G = torch.zeros(2, 3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(orthogonal(G).sum(), G)
    assert gradient.isfinite().all()
