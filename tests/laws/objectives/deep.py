"""Steps along the gradient of an inner network's loss, by autograd, every weight held for every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.parts.orthogonal import orthogonal
from models.regression.regressor import Tokens
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


@states("atlas")
def windows_and_muon(call: Call) -> None:
    """Of every token the gradients of its last pairs, weighted; a step by the polar factor of their sum, by Newton and
    Schulz, at a mini-batch's end."""
    memory, start = call.regressor, [w.detach() for w in call.regressor.begin().weights]
    c, b = memory.window, memory.grad_batch
    gamma = memory.weights(call.x)[0].sigmoid().unflatten(-1, (-1, c))
    gamma = gamma / gamma.sum(-1, keepdim=True).clamp(min=1)
    rates, etas = memory.step_size(call.x)[0].sigmoid(), memory.momentum(call.x)[0].sigmoid()
    M, B = start, [torch.zeros_like(w) for w in start]
    for batch in torch.arange(call.q.shape[1]).split(b):
        R, D = [w.clone().requires_grad_() for w in M], [torch.zeros_like(w) for w in start]
        for t in batch.tolist():
            assert torch.allclose(call.o[0, t], mlp(M, call.q[0, t]), atol=1e-10)
            for r in range(min(c, t + 1)):
                k, v = call.k[0, t - r], call.v[0, t - r]
                share = step_limits([w.detach() for w in R], k, v) * gamma[t, :, r] * rates[t] / b
                loss = 0.5 * (share * (v - mlp(R, k)).square().sum(-1)).sum()
                D = [d - g for d, g in zip(D, torch.autograd.grad(loss, R), strict=True)]
        eta, rate = (x[batch].mean(0).view(-1, 1, 1) for x in (etas, rates))
        a = call.log_decay[0, batch].sum(0).exp().view(-1, 1, 1)
        B = [eta * x + d for x, d in zip(B, D, strict=True)]
        M = [w + a * (m - w) + rate * orthogonal(x) for w, m, x in zip(start, M, B, strict=True)]


@states("memora")
def masses(call: Call) -> None:
    """Of every output a mass one over inputs of both signs: the least theta <S, G> + a KL(S | before) + (1 - a) KL(S |
    start), G the gradient at the last mini-batch's end, read by the next."""
    memory = call.regressor
    units = memory.rule.units

    def read(S: list[Tensor]) -> list[Tensor]:
        halves = (s.chunk(2, dim=-2) for s in S)
        return [u * plus.shape[-2] * (plus - minus) for u, (plus, minus) in zip(units, halves, strict=True)]

    start = [w.detach() / u for w, u in zip(memory.begin().weights, units, strict=True)]
    roots = [(1 + x.square()).sqrt() for x in start]
    first = [torch.cat([y + x, y - x], dim=-2) for x, y in zip(start, roots, strict=True)]  # exp(asinh(x)), and of -x
    first = [s / s.sum(-2, keepdim=True) for s in first]
    S, theta = first, memory.step_size(call.x).sigmoid()[0] / memory.grad_batch
    for t in range(call.q.shape[1]):
        k, v = call.k[0, t], call.v[0, t]
        if t % memory.grad_batch == 0:
            R = [w.requires_grad_() for w in read(S)]
        assert torch.allclose(call.o[0, t], mlp(R, call.q[0, t]), atol=1e-10)
        share = step_limits([w.detach() for w in R], k, v)
        gradients = torch.autograd.grad(0.5 * (share * (v - mlp(R, k)).square().sum(-1)).sum(), R)
        a, step = (g[t].view(-1, 1, 1) for g in (call.log_decay[0].exp(), theta))
        G = [step * torch.cat([g, -g], dim=-2) / u for g, u in zip(gradients, units, strict=True)]
        S = [s.pow(a) * s0.pow(1 - a) * (-g).exp() for s, s0, g in zip(S, first, G, strict=True)]
        S = [s / s.sum(-2, keepdim=True) for s in S]


@states("tnt")
def shards(call: Call) -> None:
    """Titans' memory for all tokens; and one that begins anew in every shard, asked along its mini-batch's keys."""
    tnt, tokens = call.regressor, Tokens(*call[1:6])
    (local,), whole = tnt.local, tnt.memory(tokens)[0]
    momentum(Call(tnt.memory, *tokens[:5], whole))
    for now in torch.arange(call.q.shape[1]).split(tnt.shard):
        x, q, k, v, log_decay = (y[:, now] for y in tokens[:5])
        q = q.clone()
        for t in range(len(now)):
            keys = k[0, t - t % local.grad_batch : t + 1]
            P = torch.einsum("thk,thl->hkl", keys, keys / keys.square().sum(-1, keepdim=True))
            q[0, t] = torch.einsum("hk,hkl->hl", q[0, t], P)
        momentum(Call(local, x, q, k, v, log_decay, call.o[:, now] - whole[:, now]))
