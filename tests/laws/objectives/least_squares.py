"""Ridge regression on all pairs so far, by torch.linalg.lstsq on the augmented system."""

import torch

from tests.laws.objectives import Call, states


def fit(call: Call, t: int, h: int, weights: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """argmin_S sum_i w_i ||v_i - k_i S||^2 + sum_j ridge_j ||S_j||^2, [K, V]."""
    root = weights.sqrt().unsqueeze(1)
    k, v = root * call.k[0, : t + 1, h], root * call.v[0, : t + 1, h]
    rows = torch.cat([k, torch.diag(ridge.sqrt())])
    return torch.linalg.lstsq(rows, torch.cat([v, v.new_zeros(k.shape[1], v.shape[1])])).solution


def weights_of(call: Call, t: int, h: int) -> torch.Tensor:
    """b_i times the decays of the tokens after i, if it has any, capped where the preset caps them."""
    b = call.regressor.write_weight(call.x).sigmoid()[0, : t + 1, h]
    if call.log_decay is None:
        return b
    decay = call.log_decay[0, : t + 1, h].exp()
    if (cap := call.regressor.decay_cap) is not None:
        decay = decay * (1 - (1 - cap) * b**2)
    return b * torch.stack([decay[i + 1 :].prod() for i in range(t + 1)])


@states("mesa", "nystrom")
def static_ridge(call: Call) -> None:
    ridge = 0.25 + torch.nn.functional.softplus(call.regressor.ridge)
    assert torch.allclose(ridge, torch.ones_like(ridge))
    for t in range(call.q.shape[1]):
        for h in range(call.q.shape[2]):
            S = fit(call, t, h, weights_of(call, t, h), ridge[h])
            assert torch.allclose(call.o[0, t, h], call.q[0, t, h] @ S, atol=1e-10)


@states("gated_kalman")
def ridge_in_proportion(call: Call) -> None:
    """The ridge is 0.02 of the Frobenius norm of all that is fitted; the read lies between it and linear attention."""
    alpha = call.regressor.query_mix(call.x).sigmoid()
    for t in range(call.q.shape[1]):
        for h in range(call.q.shape[2]):
            k, v, weights = call.k[0, : t + 1, h], call.v[0, : t + 1, h], weights_of(call, t, h)
            norm = torch.linalg.matrix_norm(k.T @ torch.diag(weights) @ k)
            S = fit(call, t, h, weights, (0.02 * norm).expand(k.shape[1]))
            linear = k.T @ torch.diag(weights) @ v
            expected = call.q[0, t, h] @ torch.lerp(linear, S, alpha[0, t, h])
            assert torch.allclose(call.o[0, t, h], expected, atol=1e-10)
