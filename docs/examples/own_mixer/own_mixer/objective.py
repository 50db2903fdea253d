"""What the recipe `kaczmarz` claims, by autograd: pytest tests/laws --recipe ... --objective own_mixer.objective."""

import torch

from tests.laws.objectives import Call, states


@states("kaczmarz")
def normalised_gradient_steps(call: Call) -> None:
    """S = S' - b grad 1/2 ||v - k S'||^2 / (|k|^2 + eps), from an empty memory."""
    b = call.regressor.step_size(call.x).sigmoid()[0]
    S = torch.zeros(*call.k.shape[2:], call.v.shape[-1], dtype=call.k.dtype)
    for t in range(call.q.shape[1]):
        q, k, v = (y[0, t].unsqueeze(1) for y in (call.q, call.k, call.v))  # [H, 1, *]
        with torch.enable_grad():
            S.requires_grad_()
            loss = 0.5 * (v - k @ S).square().sum(-1) / (k.square().sum(-1) + 1e-6)
            (gradient,) = torch.autograd.grad(loss.sum(), S)
        S = S.detach() - b[t].view(-1, 1, 1) * gradient
        assert torch.allclose(call.o[0, t], (q @ S).squeeze(1), atol=1e-10)
