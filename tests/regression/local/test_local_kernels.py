"""Other kernels than the Gaussian, weights that fade, retrieval in steps: what they are special cases of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.regression.local.constant import KERNELS, POWERS, kernel_weights, parallel_softmax, recurrent_local_constant
from models.regression.local.pairs import Pairs, View
from tests.laws.presets import inputs, largest_difference, mixer, outcome


def unit(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def entmax(z: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """((alpha - 1) z - tau)_+^(1 / (alpha - 1)) [T, S] and the tau [T, 1] that makes it add up to one, by bisection."""
    z, power = (alpha - 1) * z, 1 / (alpha - 1)
    low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(80):
        tau = (low + high) / 2
        small = (z - tau).clamp(min=0).pow(power).sum(-1, keepdim=True) < 1
        low, high = torch.where(small, low, tau), torch.where(small, tau, high)
    return (z - tau).clamp(min=0).pow(power), tau


@pytest.mark.parametrize("kernel, n", POWERS.items())
def test_compact_kernels_are_entmax_with_an_adaptive_bandwidth(kernel, n):
    """On the sphere: entmax with alpha = 1 + 1/n of theta q.k is the kernel with 1 / beta = 1 / n - tau / theta, that
    is, for sparsemax, a squared bandwidth of 2 (1 - tau / theta)."""
    torch.manual_seed(0)
    q, k, theta = unit(7, 5), unit(20, 5), 6.0
    p, tau = entmax(theta * q @ k.T, 1 + 1 / n)
    beta = 1 / (1 / n - tau / theta)
    everything = torch.ones(7, 20, dtype=torch.bool)
    assert torch.allclose(kernel_weights(kernel, everything, q, k, beta, empty=0.0), p, atol=1e-12)


def test_large_powers_tend_to_the_gaussian():
    """(1 - x / n)_+^n -> exp(-x)."""
    torch.manual_seed(0)
    x = torch.rand(100, dtype=torch.float64) * 3
    distances = [((1 - x / n).clamp(min=0).pow(n) - (-x).exp()).abs().max() for n in (1, 2, 3, 1000)]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-3


@pytest.mark.parametrize(
    "preset, kernel, window",
    [*(("softmax", kernel, None) for kernel in KERNELS), ("forgetting", "biweight", 5), ("hopfield", "laplace", 5)],
)
def test_blocks_are_the_definition(preset, kernel, window):
    """Whatever the block, with documents, windows, grouped heads and any split into calls; gradients included."""
    x, settings = inputs(2, 21), {"regressor__kernel": kernel, "regressor__window": window, "num_kv_heads": 1}
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor([6, 1, 10, 4])).expand(2, -1)
    m = mixer(preset, regressor__block=4, **settings)
    for documents in (None, segments):
        truth = outcome(mixer(preset, "recurrent", **settings), x, segments=documents, memory=False)
        for splits in ((), (1, 9, 10)):
            assert largest_difference(outcome(m, x, splits, documents, memory=False), truth) < 1e-10, splits


def test_where_no_key_is_near_a_compact_kernel_gives_nothing():
    x = inputs(1, 20, torch.float32)
    y, _ = mixer("epanechnikov", dtype=torch.float32, regressor__inverse_temperature=1e4)(x)
    assert torch.equal(y, torch.zeros_like(y))


def test_no_gradient_hangs_on_a_key_at_the_edge_of_the_support():
    """The gradient in bf16 points where float32's does. It is divided by the weights' sum: with 1e-3 in the place of
    EMPTY a query whose nearest key is at the edge outweighs all others, and the rounding of its distance decides (a
    cosine of 0.13 for the last of these)."""
    for seed in (0, 3, 4):
        m, g = mixer("epanechnikov", dtype=torch.float32), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in m.parameters():
                if p.ndim > 1:
                    p.normal_(std=p.shape[-1] ** -0.5, generator=g)
        x, probe = torch.randn(2, 8, 64, p.shape[-1], generator=g)
        found = []
        for half in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                y, _ = m(x)
            gradients = torch.autograd.grad((y.float() * probe).sum(), list(m.parameters()))
            found.append(torch.cat([gradient.flatten() for gradient in gradients]))
        assert torch.cosine_similarity(*found, dim=0) > 0.95, seed


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_that_do_not_fade_are_softmax(kernel):
    torch.manual_seed(0)
    q, k, v = unit(2, 9, 4, 3), unit(2, 9, 2, 3), torch.randn(2, 9, 2, 5, dtype=torch.float64)
    beta = torch.rand(4, dtype=torch.float64) + 1
    ages = torch.zeros(2, 9, 4, dtype=torch.float64)
    faded, plain = (
        recurrent_local_constant(q, pairs, beta, kernel=kernel) for pairs in (Pairs(k, v, age=ages), Pairs(k, v))
    )
    assert torch.allclose(faded, plain, atol=1e-14)


def test_ages_survive_half_precision():
    """A decay of 1 % a token over 2,000 tokens, in bf16: as exact as softmax without it. One bf16 channel would be
    wrong by 8 % in the weights of neighbours."""
    torch.manual_seed(0)
    T = 2000
    q, k, v = (unit(1, T, 2, 16, dtype=torch.float32) for _ in range(3))
    age = (0.01 * torch.arange(T)).view(1, T, 1).expand(1, T, 2)
    beta = torch.full((2,), 4.0)
    last = slice(T - 50, T)
    exact = recurrent_local_constant(q[:, last], Pairs(k, v, age=age), beta, View(past=T - 50))
    half = [x.bfloat16() for x in (q, k, v)]
    found = parallel_softmax(half[0], Pairs(half[1], half[2], age=age), beta)[:, last].float()
    assert (found - exact).abs().max() < 0.02 * exact.abs().max()


def test_one_step_of_retrieval_is_softmax():
    x = inputs(2, 30)
    assert largest_difference(outcome(mixer("hopfield", regressor__steps=1), x), outcome(mixer("softmax"), x)) < 1e-12


def test_every_step_of_retrieval_lowers_the_energy():
    """-log sum_i exp(beta xi.k_i) / beta + |xi|^2 / 2 (Ramsauer et al. 2021, theorem 1)."""
    torch.manual_seed(0)
    k, xi = unit(1, 50, 1, 8), torch.randn(1, 1, 1, 8, dtype=torch.float64)
    beta, energies = torch.full((1,), 8.0, dtype=torch.float64), []
    for _ in range(6):
        energies.append((xi.square().sum() / 2 - (beta * (k * xi).sum(-1)).logsumexp(1) / beta).item())
        xi = recurrent_local_constant(xi, Pairs(k, k), beta, View(past=49))
    assert energies == sorted(energies, reverse=True) and energies[0] - energies[-1] > 0.5, energies


@pytest.mark.filterwarnings("ignore:softmax without")
def test_without_the_denominator_it_overflows():
    """The same keys, ever larger, at inverse temperature 1: softmax stays within its values, the sum does not stay
    within float32."""
    largest = {"softmax": [], "unnormalized_softmax": []}
    for preset, found in largest.items():
        settings = {"qk_norm": "none", "output_norm": False, "regressor__inverse_temperature": 1.0}
        m = mixer(preset, dtype=torch.float32, **settings)
        values = []
        m.regressor.register_forward_hook(lambda module, args, result, values=values: values.append(result[0]))
        for scale in (1, 4, 16):
            m(inputs(1, 50, torch.float32) * scale)
            found.append((values[-1].abs().max() / scale).item())
    assert max(largest["softmax"]) < 10
    assert largest["unnormalized_softmax"][1] > 1e3 and not largest["unnormalized_softmax"][2] < 1e30


@pytest.mark.parametrize(
    "preset, setting, value", [("softmax", "kernel", "round"), ("softmax", "block", 0), ("hopfield", "steps", 0)]
)
def test_bad_settings(preset, setting, value):
    with pytest.raises(ValueError, match=f"regressor.{setting}={value!r}"):
        mixer(preset, **{f"regressor__{setting}": value})
