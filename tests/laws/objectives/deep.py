"""Steps along the gradient of an inner network's loss, by autograd, every weight held for every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.laws.objectives import Call, states


def mlp(weights: list[Tensor], x: Tensor) -> Tensor:
    """x [H, K] to [H, V] through weights [H, in, out]."""
    for W in weights[:-1]:
        x = F.silu(torch.einsum("hk,hkm->hm", x, W))
    return torch.einsum("hk,hkm->hm", x, weights[-1])


def step_limits(weights: list[Tensor], k: Tensor, v: Tensor) -> Tensor:
    return limits(weights, k, v - mlp(weights, k))


def limits(weights: list[Tensor], k: Tensor, error: Tensor) -> Tensor:
    """1 / max(1, how far a step of size 1 moves the prediction along its error), per head, by a directional
    derivative."""
    W = [w.detach().requires_grad_() for w in weights]
    gradients = torch.autograd.grad((mlp(W, k) * error.detach()).sum(), W)  # of f . e: with the sign of a descent
    moved = torch.autograd.functional.jvp(lambda *w: mlp(list(w), k), tuple(weights), gradients)[1]
    return 1 / ((moved * error).sum(-1) / error.square().sum(-1)).clamp(min=1)


@states("titans_mlp")
def momentum(call: Call) -> None:
    """S = eta S - theta grad 1/2 ||v - f(k)||^2 at the last mini-batch's end; M = M_0 + a (M - M_0) + S."""
    start = [w.detach() for w in call.regressor.begin().weights]
    eta = call.regressor.momentum(call.x).sigmoid()[0]
    theta = (1 - eta) * call.regressor.step_size(call.x).sigmoid()[0] / call.regressor.grad_batch
    M, S = start, [torch.zeros_like(w) for w in start]
    for t in range(call.q.shape[1]):
        k, v = call.k[0, t], call.v[0, t]
        if t % call.regressor.grad_batch == 0:
            R = [w.clone().requires_grad_() for w in M]
        share = step_limits([r.detach() for r in R], k, v)
        loss = 0.5 * (share * (v - mlp(R, k)).square().sum(-1)).sum()
        gradients = torch.autograd.grad(loss, R)
        gates = (g[t].view(-1, 1, 1) for g in (eta, theta, call.log_decay[0].exp()))
        e, step, a = gates
        S = [e * s - step * g for s, g in zip(S, gradients, strict=True)]
        M = [w + a * (m - w) + s for w, m, s in zip(start, M, S, strict=True)]
        assert torch.allclose(call.o[0, t], mlp(M, call.q[0, t]), atol=1e-10)


def descent(call: Call, loss, share) -> None:
    """A = M_0 + a (A - M_0) - theta grad loss(v - f(k)) at the last mini-batch's end; read and referred to at share A,
    share of A there."""
    start = [w.detach() for w in call.regressor.begin().weights]
    theta = call.regressor.step_size(call.x).sigmoid()[0] / call.regressor.grad_batch
    A = start
    for t in range(call.q.shape[1]):
        k, v = call.k[0, t], call.v[0, t]
        if t % call.regressor.grad_batch == 0:
            c = share(start, A)
            R = [(c * w).requires_grad_() for w in A]
        error = v - mlp(R, k)
        limit = limits([r.detach() for r in R], k, torch.autograd.grad(loss(error).sum(), error)[0])
        gradients = torch.autograd.grad((limit * loss(v - mlp(R, k)).sum(-1)).sum(), R)
        step, a = (g[t].view(-1, 1, 1) for g in (theta, call.log_decay[0].exp()))
        A = [w + a * (m - w) - step * g for w, m, g in zip(start, A, gradients, strict=True)]
        assert torch.allclose(call.o[0, t], mlp([c * w for w in A], call.q[0, t]), atol=1e-10)


@states("yaad")
def switched(call: Call) -> None:
    """|e|^2 / 2, and beyond a root mean square of 1/2 half the sum of |e_j|."""

    def loss(e: Tensor) -> Tensor:
        short = e.square().mean(-1, keepdim=True) <= 0.25
        return torch.where(short, e.square() / 2, (e.square() + 1e-6).sqrt() / 2)

    descent(call, loss, lambda first, now: torch.ones(len(now[0]), 1, 1, dtype=now[0].dtype))


@states("moneta")
def cubes_and_a_fourth_norm(call: Call) -> None:
    """|e_j|^3 / 3, going on as e_j^2 / 2 beyond 1; weights times (|M_0|_4 / |A|_4)^2."""

    def loss(e: Tensor) -> Tensor:
        inside = e.square() + 1e-6 < 1
        return torch.where(inside, (e.square() + 1e-6).pow(1.5) / 3, e.square() / 2)

    def norm(weights: list[Tensor]) -> Tensor:
        return torch.cat([w.flatten(1) for w in weights], dim=1).norm(4, dim=1).view(-1, 1, 1)

    descent(call, loss, lambda first, now: (norm(first) / norm(now)).square())
