"""Kernel ridge regression: one factor for all queries, forgetting, landmarks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.parts.features import Nystrom
from models.parts.sizes import Sizes
from models.regression.local.kernel import Factor, parallel_intention
from models.regression.local.pairs import View
from tests.laws.presets import inputs, largest_difference, mixer, outcome, part


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def intention(q: Tensor, k: Tensor, v: Tensor, beta: float, ridge: Tensor) -> Tensor:
    """[T, K] and [T, V] to [T, V]; ridge [T]."""
    K, V = k.shape[-1], v.shape[-1]
    nothing = Factor(k.new_empty(1, 0, 1, K), k.new_empty(1, 1, 0, 0), k.new_empty(1, 1, 0, V), k.new_zeros(1, 1))
    q, k, v = (x.unsqueeze(0).unsqueeze(2) for x in (q, k, v))
    return parallel_intention(q, k, v, k.new_full((1,), beta), ridge.view(1, -1, 1), View(), nothing)[0][0, :, 0]


def kernel(a: Tensor, b: Tensor, beta: float) -> Tensor:
    return (-beta * torch.cdist(a, b).square() / 2).exp()


def test_a_ridge_that_fades_weighs_the_pairs():
    """With ridges lambda c_i the gradient of sum_i (c_t / c_i) |v_i - m(k_i)|^2 + lambda c_t |m|^2 is zero."""
    torch.manual_seed(0)
    q, k, v = unit(12, 4), unit(12, 4), torch.randn(12, 3, dtype=torch.float64)
    c = (0.9 * torch.ones(12, dtype=torch.float64)).cumprod(0)
    o = intention(q, k, v, 2.0, 0.3 * c)
    t = 11
    gram = kernel(k, k, 2.0)
    alpha = torch.linalg.solve(gram + 0.3 * c.diag(), v).requires_grad_()
    weights = (c[t] / c).unsqueeze(1)
    loss = (weights * (v - gram @ alpha).square()).sum() + 0.3 * c[t] * (alpha * (gram @ alpha)).sum()
    (gradient,) = torch.autograd.grad(loss, alpha)
    assert gradient.abs().max() < 1e-12
    assert torch.allclose(o[t], (kernel(q[t:], k, 2.0) @ alpha)[0], atol=1e-12)


@pytest.mark.parametrize("decay", ["none", "scalar"])
def test_documents_calls_and_decays(decay):
    """A factor that is extended call by call, in packed documents, is that of separate sequences."""
    x, lengths = inputs(2, 21), (6, 1, 10, 4)
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
    m = mixer("intention", decay=part("decay", decay))
    separate = torch.cat([m(piece)[0] for piece in x.split(lengths, dim=1)], dim=1)
    truth = outcome(m, x, segments=segments, memory=False)
    assert largest_difference([separate], truth[:1]) < 1e-12
    assert largest_difference(outcome(m, x, (3, 7, 8), segments, memory=False), truth) < 1e-10


@pytest.mark.parametrize("documents", [False, True])
def test_a_backward_of_its_own_is_autograds(documents):
    """One call, by the inverse of the factor, and a call after another, where autograd differentiates the solves;
    through the outputs and the factor, over several blocks of the inverse."""
    x, m = inputs(1, 150), mixer("intention")
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor([70, 1, 79])).expand(1, -1) if documents else None
    assert largest_difference(outcome(m, x, (), segments), outcome(m, x, (1,), segments)) < 1e-10


def test_forgetting_stops_where_systems_would_be_singular():
    """float32, a decay that forgets everything within a few tokens, and keys that repeat: finite."""
    x = inputs(1, 8, torch.float32).repeat(1, 40, 1)
    fast = {**part("decay", "fixed"), "shortest": 0.5, "longest": 0.5}
    m = mixer("intention", dtype=torch.float32, decay=fast)
    assert m(x)[0].isfinite().all()


def test_bad_ridge():
    with pytest.raises(ValueError, match="of at least"):
        mixer("intention", regressor__ridge=0.001)


def nystrom(landmarks: Tensor, beta: float, jitter: float) -> Nystrom:
    features = Nystrom(Sizes(0, 1, 1, landmarks.shape[1], 0), len(landmarks), beta, jitter).double()
    features.landmarks.data.copy_(landmarks)
    return features


def test_landmarks_at_the_keys_give_the_kernel():
    """phi(q) . phi(k) = kappa(q, k) for every q and for k a landmark."""
    torch.manual_seed(0)
    q, k = unit(9, 5), unit(20, 5)
    features = nystrom(k, 3.0, 1e-13)
    phi_q, phi_k = (features(x.view(1, -1, 1, 5), None)[0, :, 0] for x in (q, k))
    assert torch.allclose(phi_q @ phi_k.T, kernel(q, k, 3.0), atol=1e-9)


def test_landmarks_converge_to_intention():
    """Least squares in phi, solved at every token, on a smooth target: nearer to Intention the more landmarks."""
    torch.manual_seed(0)
    T, K, beta, ridge = 96, 4, 1.0, 0.1
    q, k, Z = unit(T, K), unit(T, K), unit(128, K)
    v = torch.sin(2 * k @ torch.randn(K, 3, dtype=torch.float64))
    exact = intention(q, k, v, beta, torch.full((T,), ridge, dtype=torch.float64))
    distances = []
    for m in (4, 16, 64, 128):
        features = nystrom(Z[:m], beta, 1e-10)
        phi_q, phi_k = (features(x.view(1, -1, 1, K), None)[0, :, 0] for x in (q, k))
        H = (phi_k.unsqueeze(2) * phi_k.unsqueeze(1)).cumsum(0) + ridge * torch.eye(m).to(k)
        G = (phi_k.unsqueeze(2) * v.unsqueeze(1)).cumsum(0)
        o = (phi_q.unsqueeze(1) @ torch.linalg.solve(H, G)).squeeze(1)
        distances.append(((o - exact).norm() / exact.norm()).item())
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-3 < 0.1 < distances[0], distances
