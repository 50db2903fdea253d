"""Steps along the gradient, by autograd, by linear solves and by the matrix exponential."""

import torch
from torch import Tensor

from tests.laws.objectives import Call, states


def walk(call: Call, update) -> None:
    """Asserts that the reads are those of S <- update(t, S), S [H, K, V] the memory before token t."""
    S = torch.zeros(*call.k.shape[2:], call.v.shape[-1], dtype=call.k.dtype)
    for t in range(call.q.shape[1]):
        S = update(t, S)
        assert torch.allclose(call.o[0, t], (call.q[0, t].unsqueeze(1) @ S).squeeze(1), atol=1e-10)


def faded(call: Call, t: int, S: Tensor) -> Tensor:
    if call.log_decay is None:
        return S
    decay = call.log_decay[0, t].exp()
    return decay.view(len(S), -1, 1) * S  # per head, or per head and channel


def steps(call: Call) -> Tensor:
    """The learned b [T, n H]."""
    return call.regressor.largest_step * call.regressor.step_size(call.x).sigmoid()[0]


def gradient(S: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of 1/2 ||v - k S||^2, summed over heads; k [H, K], v [H, V]."""
    S = S.detach().requires_grad_()
    return torch.autograd.grad(0.5 * (v - (k.unsqueeze(1) @ S).squeeze(1)).square().sum(), S)[0]


@states("gated_delta", "deltanet", "kda", "fast_weights")
def gradient_steps(call: Call) -> None:
    """S = S' - b grad 1/2 ||v - k S'||^2 at S' = a S."""

    def update(t: int, S: Tensor) -> Tensor:
        S = faded(call, t, S)
        return S - steps(call)[t].view(-1, 1, 1) * gradient(S, call.k[0, t], call.v[0, t])

    walk(call, update)


@states("leaky_lms")
def gradient_steps_with_weight_decay(call: Call) -> None:
    """S = S - b grad (1/2 ||v - k S||^2 + (1 - a) / (2 b) ||S||^2), the loss and its penalty at once."""

    def update(t: int, S: Tensor) -> Tensor:
        b, a = steps(call)[t].view(-1, 1, 1), call.log_decay[0, t].exp().view(-1, 1, 1)
        S = S.detach().requires_grad_()
        loss = 0.5 * (call.v[0, t] - (call.k[0, t].unsqueeze(1) @ S).squeeze(1)).square().sum()
        (whole,) = torch.autograd.grad(loss + ((1 - a) / (2 * b) * S.square()).sum(), S)
        return S - b * whole

    walk(call, update)


@states("delta_product")
def several_gradient_steps(call: Call) -> None:
    """n of them, each on a pair of its own, after one decay."""
    n, H = call.regressor.pairs_per_token, call.q.shape[2]

    def update(t: int, S: Tensor) -> Tensor:
        S = faded(call, t, S)
        for j, b in enumerate(steps(call)[t].view(n, H, 1, 1)):
            S = S - b * gradient(S, call.k[0, n * t + j], call.v[0, n * t + j])
        return S

    walk(call, update)


@states("longhorn")
def proximal_steps(call: Call) -> None:
    """argmin_S ||S - S'||^2 + b ||v - k S||^2, by least squares on the rows [I; sqrt(b) k]."""

    def update(t: int, S: Tensor) -> Tensor:
        S, root = faded(call, t, S), steps(call)[t].sqrt().view(-1, 1, 1)
        rows = torch.cat([torch.eye(S.shape[1], dtype=S.dtype).expand(len(S), -1, -1), root * call.k[0, t, :, None]], 1)
        return torch.linalg.lstsq(rows, torch.cat([S, root * call.v[0, t, :, None]], 1)).solution

    walk(call, update)


@states("efla")
def continuous_steps(call: Call) -> None:
    """dS/ds = k^T (v - k S) from s = 0 to b, an affine flow, by the matrix exponential."""

    def update(t: int, S: Tensor) -> Tensor:
        S, k, v = faded(call, t, S), call.k[0, t].unsqueeze(2), call.v[0, t].unsqueeze(1)
        (H, K, V), b = S.shape, steps(call)[t].view(-1, 1, 1)
        generator = torch.zeros(H, K + V, K + V, dtype=S.dtype)
        generator[:, :K, :K], generator[:, :K, K:] = -k @ k.mT, k @ v
        flow = torch.linalg.matrix_exp(b * generator)
        return flow[:, :K, :K] @ S + flow[:, :K, K:]

    walk(call, update)


@states("kla")
def shares_of_projections(call: Call) -> None:
    """S' + b D, D the least change with k (S' + D) = v, by least squares; 1e-6 |D|^2 is its price."""

    def update(t: int, S: Tensor) -> Tensor:
        S, k = faded(call, t, S), call.k[0, t].unsqueeze(1)
        rows = torch.cat([k, 1e-3 * torch.eye(S.shape[1], dtype=S.dtype).expand(len(S), -1, -1)], 1)
        error = torch.cat([call.v[0, t].unsqueeze(1) - k @ S, torch.zeros_like(S)], 1)
        return S + steps(call)[t].view(-1, 1, 1) * torch.linalg.lstsq(rows, error).solution

    walk(call, update)


@states("pgdn")
def squashed_steps(call: Call) -> None:
    """S = S' - b P grad 1/2 ||v - k S'||^2, P falling with how much each channel was used."""
    regressor, A = call.regressor, torch.zeros(call.k.shape[2:], dtype=call.k.dtype)
    kept, weight = regressor.curvature_decay(call.x)[0][0].exp(), regressor.curvature_weight(call.x)[0].sigmoid()

    def update(t: int, S: Tensor) -> Tensor:
        nonlocal A
        S, A = faded(call, t, S), kept[t].unsqueeze(1) * A + weight[t].unsqueeze(1) * call.k[0, t].square()
        r = torch.log(A + 1e-6) - regressor.center
        P = 1.5 ** (-r / (1 + r.abs()))
        return S - steps(call)[t].view(-1, 1, 1) * P.unsqueeze(2) * gradient(S, call.k[0, t], call.v[0, t])

    walk(call, update)


@states("preconditioned_delta")
def diagonal_newton_steps(call: Call) -> None:
    """argmin_S of b ||v - k S||^2 + (S - S')^T diag(ridge + A') (S - S'), the past by its Hessian's diagonal."""
    ridge = call.regressor.log_ridge.exp()
    A = torch.zeros_like(ridge)

    def update(t: int, S: Tensor) -> Tensor:
        nonlocal A
        S, A = faded(call, t, S), faded(call, t, A.unsqueeze(2)).squeeze(2)
        b, k = steps(call)[t].view(-1, 1, 1), call.k[0, t].unsqueeze(1)
        past = torch.diag_embed(ridge + A)
        A = A + (b * k.square()).squeeze(1)
        return torch.linalg.solve(past + b * k.mT @ k, past @ S + b * k.mT @ call.v[0, t].unsqueeze(1))

    walk(call, update)
