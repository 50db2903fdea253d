"""Steps of gradient descent, the gradient by autograd."""

import torch

from tests.laws.objectives import Call, states


@states("gated_delta")
def gradient_steps(call: Call) -> None:
    """S = S' - b grad 1/2 ||v - k S'||^2 at S' = a S."""
    steps = call.regressor.step_size(call.x).sigmoid()
    S = torch.zeros(*call.k.shape[2:], call.v.shape[-1], dtype=call.k.dtype)
    for t in range(call.q.shape[1]):
        S = (call.log_decay[0, t].exp().view(-1, 1, 1) * S).requires_grad_()
        error = call.v[0, t] - (call.k[0, t].unsqueeze(1) @ S).squeeze(1)
        (gradient,) = torch.autograd.grad(0.5 * error.square().sum(), S)
        S = (S - steps[0, t].view(-1, 1, 1) * gradient).detach()
        assert torch.allclose(call.o[0, t], (call.q[0, t].unsqueeze(1) @ S).squeeze(1), atol=1e-10)
