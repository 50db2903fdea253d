"""The Hebbian memory."""

import torch

from tests.laws.objectives import Call, states


@states("linear", "retnet", "gla", "mamba2")
def one_step_from_zero(call: Call) -> None:
    """M = -grad of sum_i gamma_i w_i 1/2 ||v_i - k_i M||^2 at M = 0, all pairs at once; gamma per channel scales the
    gradient's rows."""
    T, gates = call.q.shape[1], call.log_decay
    weight = torch.ones(1) if call.regressor.writes == "all" else 1 - gates[0].exp()
    if gates is None:
        gates = torch.zeros(1, T, call.q.shape[2], dtype=call.q.dtype)
    gates = gates[0].reshape(T, call.q.shape[2], -1)
    for t in range(T):
        M = torch.zeros(*call.k.shape[2:], call.v.shape[-1], dtype=call.k.dtype, requires_grad=True)
        gradients = []
        for i in range(t + 1):
            gamma = gates[i + 1 : t + 1].sum(0).exp()  # [H, 1 or K]
            w = weight[i] if len(weight) > 1 else weight.expand(call.q.shape[2])
            error = call.v[0, i] - (call.k[0, i].unsqueeze(1) @ M).squeeze(1)
            loss = 0.5 * (w.unsqueeze(-1) * error.square()).sum()
            gradients.append(gamma.unsqueeze(-1) * torch.autograd.grad(loss, M)[0])
        read = (call.q[0, t].unsqueeze(1) @ -sum(gradients)).squeeze(1)
        assert torch.allclose(call.o[0, t], read, atol=1e-10)
