"""Weighted means."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.laws.objectives import Call, states


def by_least_squares(call: Call, q: Tensor, weights: Callable[[Tensor, Tensor, Tensor], Tensor], empty: float = 0.0):
    """Asserts o = argmin_m sum_i w_i ||v_i - m||^2 + empty ||m||^2. weights(beta, q [K], k [t, K]): w [t]."""
    beta = call.regressor.log_beta.exp()
    for t in range(q.shape[1]):
        for h in range(q.shape[2]):
            w = weights(beta[h], q[0, t, h], call.k[0, : t + 1, h])
            if call.log_decay is not None:
                gates = call.log_decay[0, : t + 1, h].exp()
                w = w * torch.stack([gates[i + 1 :].prod() for i in range(t + 1)])
            root = torch.cat([w, w.new_full((1,), empty)]).sqrt().unsqueeze(1)
            v = torch.cat([call.v[0, : t + 1, h], call.v.new_zeros(1, call.v.shape[-1])])
            m = torch.linalg.lstsq(root, root * v).solution[0]
            assert torch.allclose(call.o[0, t, h], m, atol=1e-10)


@states("softmax", "gated_softmax", "forgetting")
def softmax(call: Call) -> None:
    by_least_squares(call, call.q, lambda beta, q, k: (beta * k @ q).exp())


@states("wall")
def wall(call: Call) -> None:
    """Means by weights in which every channel of a key has faded since."""
    beta = call.regressor.log_beta.exp()
    for t in range(call.q.shape[1]):
        gates = call.log_decay[0, : t + 1].exp()
        faded = torch.stack([gates[i + 1 :].prod(0) for i in range(t + 1)]) * call.k[0, : t + 1]  # [t, H, K]
        for h in range(call.q.shape[2]):
            root = (beta[h] * faded[:, h] @ call.q[0, t, h]).exp().sqrt().unsqueeze(1)
            m = torch.linalg.lstsq(root, root * call.v[0, : t + 1, h]).solution[0]
            assert torch.allclose(call.o[0, t, h], m, atol=1e-10)


@states("deltaformer")
def deltaformer(call: Call) -> None:
    """Means of values from which the part b of the mean at their own key, of those before, was taken."""
    beta, b, u = call.regressor.log_beta.exp(), call.regressor.steps(call.x)[0], call.v[0].clone()
    for t in range(1, len(u)):
        for h in range(u.shape[1]):
            root = (beta[h] * call.k[0, :t, h] @ call.k[0, t, h]).exp().sqrt().unsqueeze(1)
            u[t, h] -= b[t, h] * torch.linalg.lstsq(root, root * u[:t, h]).solution[0]
    by_least_squares(call._replace(v=u.unsqueeze(0)), call.q, lambda beta, q, k: (beta * k @ q).exp())


@states("sliding_window")
def sliding_window(call: Call) -> None:
    """Softmax on the learned pairs and then the tokens', of which none is out of the window's reach here."""
    r = call.regressor
    for t in range(call.q.shape[1]):
        k, v = torch.cat([r.persistent_keys, call.k[0, : t + 1]]), torch.cat([r.persistent_values, call.v[0, : t + 1]])
        weights = (r.log_beta.exp() * torch.einsum("hk,ihk->ih", call.q[0, t], k)).exp()
        for h in range(k.shape[1]):
            root = weights[:, h].sqrt().unsqueeze(1)
            m = torch.linalg.lstsq(root, root * v[:, h]).solution[0]
            assert torch.allclose(call.o[0, t, h], m, atol=1e-10)


@states("memory_mosaic")
def memory_mosaic(call: Call) -> None:
    """Softmax on all pairs but the first, whose key was before the document; nothing where that is all there is."""
    assert not call.k[:, 0].any() and not call.o[:, 0].any()
    later = call._replace(**{name: getattr(call, name)[:, 1:] for name in ("q", "k", "v", "o")})
    by_least_squares(later, later.q, lambda beta, q, k: (beta * k @ q).exp())


@states("epanechnikov")
def epanechnikov(call: Call) -> None:
    by_least_squares(call, call.q, lambda b, q, k: (1 - b * (q - k).square().sum(-1) / 2).clamp(min=0), empty=0.1)


@states("laplace")
def laplace(call: Call) -> None:
    by_least_squares(call, call.q, lambda beta, q, k: (-(beta * ((q - k).square().sum(-1) + 1e-6)).sqrt()).exp())


@states("hopfield")
def hopfield(call: Call) -> None:
    """The first step is one of gradient descent on the energy -log sum_i exp(beta xi.k_i) / beta + |xi|^2 / 2
    (Ramsauer et al. 2021, section 2), of size one; then softmax."""
    beta, xi = call.regressor.log_beta.exp(), call.q.clone()
    for t in range(xi.shape[1]):
        at = call.q[0, t].clone().requires_grad_()  # [H, K]
        logits = beta.unsqueeze(1) * torch.einsum("hk,ihk->hi", at, call.k[0, : t + 1])
        energy = (at.square().sum(-1) / 2 - logits.logsumexp(-1) / beta).sum()
        xi[0, t] = at.detach() - torch.autograd.grad(energy, at)[0]
    by_least_squares(call, xi.detach(), lambda b, q, k: (b * k @ q).exp())


@states("unnormalized_softmax")
def unnormalized(call: Call) -> None:
    """Kernel regression whose kernel matrix is taken for the identity: m = sum_i v_i kappa(k_i, .), at q."""
    beta = call.regressor.log_beta.exp()
    for t in range(call.q.shape[1]):
        kappa = (beta * torch.einsum("hk,ihk->ih", call.q[0, t], call.k[0, : t + 1])).exp()
        assert torch.allclose(call.o[0, t], torch.einsum("ih,ihv->hv", kappa, call.v[0, : t + 1]), atol=1e-10)
