"""Weighted means."""

import torch

from tests.laws.objectives import Call, states


@states("softmax")
def weighted_mean(call: Call) -> None:
    """argmin_m sum_i exp(beta q.k_i) ||v_i - m||^2, by least squares."""
    beta = call.regressor.log_beta.exp()
    for t in range(call.q.shape[1]):
        for h in range(call.q.shape[2]):
            root = (beta[h] * call.k[0, : t + 1, h] @ call.q[0, t, h] / 2).exp().unsqueeze(1)
            m = torch.linalg.lstsq(root, root * call.v[0, : t + 1, h]).solution[0]
            assert torch.allclose(call.o[0, t, h], m, atol=1e-10)
