"""The feature maps: the kernel that each claims, what is positive, and that every linear memory takes every map."""

from __future__ import annotations

import math
from functools import cache, partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from conf import schema
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.features import (
    DPFP,
    ELU,
    MLP,
    CosFormer,
    Cosine,
    Hedgehog,
    Performer,
    Polynomial,
    Rebased,
    ReLU,
    Taylor,
)
from models.parts.features.monomials import symmetric_powers
from models.parts.sizes import Sizes
from models.training.summary import summary
from tests.laws import test_laws as laws
from tests.laws.presets import CONF, HEADS, PRESETS, mixer, recipe

FEATURES = sorted(path.stem for path in (CONF / "features").glob("*.yaml"))
LINEAR = [preset for preset in ("gated_delta", "linear") if preset in PRESETS]
B, T, H, G, K = 2, 5, 4, 2, 6
SIZES = Sizes(12, H, G, K, 5)
LENGTH = 64  # of CosFormer, and of the sequences


def draw(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, T, H, K], k [B, T, G, K], and their positions."""
    g = torch.Generator().manual_seed(0)
    q, k = (scale * torch.randn(B, T, heads, K, generator=g, dtype=torch.float64).to(dtype) for heads in (H, G))
    return q, k, torch.arange(T).expand(B, T)


def dots(q: Tensor, k: Tensor) -> Tensor:
    """q . k of every query and key head of its group, at the same token."""
    return (q * k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)).sum(-1)


def kernel(features: torch.nn.Module, q: Tensor, k: Tensor, positions: Tensor | None = None) -> Tensor:
    phi_q, phi_k = features(q, positions), features(k, positions)
    assert phi_q.shape[-1] == features.width and phi_q.dtype == q.dtype
    return dots(phi_q, phi_k)


@cache
def node(name: str) -> dict[str, Any]:
    """The map as the command line composes it, with few random features."""
    schema.register()
    overrides = [f"features@model.mixers.main.features={name}", "name=law", "run_dir=none", f"seq_len={LENGTH}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = OmegaConf.to_container(compose("train", overrides).model.mixers.main.features, resolve=True)
    return found | ({"num_features": 24} if "num_features" in found else {})


def built(name: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    return mixer("gated_delta", features=node(name), key_dim=K, num_heads=H, dtype=dtype).features


# Exact kernels


@pytest.mark.parametrize("beta", [1.0, 2.5, "learned"])
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_monomials_are_exactly_their_kernel(p, beta):
    q, k, _ = draw()
    taylor = Taylor(SIZES, p, beta).double()
    polynomials = {c: Polynomial(SIZES, p, c, beta).double() for c in (0.0, 0.5, 1.0)}
    dot = dots(q, k) * (1.0 if beta == "learned" else beta)
    if beta == "learned":
        for features in (taylor, *polynomials.values()):
            features.sharpen.log_beta.data = torch.tensor([0.3, -0.7], dtype=torch.float64)
        dot = dot * torch.tensor([0.3, 0.3, -0.7, -0.7], dtype=torch.float64).exp()

    def exact(found, expected):
        assert (found - expected).abs().max() < 1e-12 * expected.abs().max()

    exact(kernel(taylor, q, k), sum(dot**j / math.factorial(j) for j in range(p + 1)))
    assert taylor.width == sum(math.comb(K + j - 1, j) for j in range(p + 1))
    for c, features in polynomials.items():
        exact(kernel(features, q, k), (c + dot) ** p)
        assert features.width == (math.comb(K + p, p) if c else math.comb(K + p - 1, p))


@pytest.mark.parametrize("degree", [2, 3])
def test_compiled_monomials_are_the_monomials(degree):
    """Gathered, with a gradient that gathers: in the same order, and each once."""
    x = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def outcome(form: Any) -> list[Tensor]:
        y = torch.cat(form(x, degree), dim=-1)
        return [y, *torch.autograd.grad((y * torch.arange(y.shape[-1])).sum(), x)]

    compiled = torch.compile(symmetric_powers, backend="aot_eager", dynamic=False)
    for found, exact in zip(outcome(compiled), outcome(symmetric_powers), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-14, atol=1e-14)


def test_rebased_is_a_learned_parabola():
    q, k, _ = draw()
    features = Rebased(SIZES).double()
    for parameter in features.parameters():
        torch.nn.init.normal_(parameter)

    def affine(x):
        scale, shift = (y.repeat_interleave(x.shape[2] // G, 0) for y in (features.scale, features.shift))
        return F.layer_norm(x, (K,)) * scale + shift

    torch.testing.assert_close(kernel(features, q, k), dots(affine(q), affine(k)) ** 2 / K, rtol=1e-12, atol=1e-12)
    assert features.width == K * (K + 1) // 2


def test_cosformer_fades_to_zero_at_its_length():
    q, k, _ = draw()
    features, t = CosFormer(SIZES, LENGTH).double(), torch.tensor([0, 1, 20, LENGTH - 1, LENGTH]).expand(B, T)
    found = dots(features(q, t), features(k, torch.zeros_like(t)))
    fading = (math.pi / 2 * t.double() / LENGTH).cos().unsqueeze(-1)
    torch.testing.assert_close(found, dots(q.relu(), k.relu()) * fading, rtol=0, atol=1e-12)
    assert (found[:, :-1] >= 0).all() and found[:, -1].abs().max() < 1e-12


@pytest.mark.slow
def test_dpfp_and_rebased_are_flas():
    theirs = pytest.importorskip("fla.modules.feature_map")
    q, k, positions = draw()
    torch.testing.assert_close(DPFP(SIZES, 3)(q, positions), theirs.DPFPFeatureMap(K, 3)(q), rtol=0, atol=0)
    peer = theirs.RebasedFeatureMap(K, use_gamma=False, use_beta=False)
    torch.testing.assert_close(kernel(Rebased(SIZES).double(), q, k), dots(peer(q), peer(k)))


# Kernels in expectation


def error(make, num_features: int, orthogonal: bool, width: int = 32, seeds: int = 16) -> float:
    """Root mean square over seeds and pairs of independent unit vectors, relative to the kernel."""
    g = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(1, 200, 1, width, generator=g, dtype=torch.float64), dim=-1) for _ in range(2))
    exact = dots(q, k).exp() if make is Performer else (-(q - k).square().sum(-1) / 2).exp()
    sizes = Sizes(12, 1, 1, width, 5)
    found = [kernel(make(sizes, num_features, orthogonal, seed).double(), q, k) for seed in range(seeds)]
    return (torch.stack(found) / exact - 1).square().mean().sqrt().item()


@pytest.mark.parametrize("make", [Performer, Cosine])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_random_features_err_like_one_over_the_root_of_their_number(make, orthogonal):
    """64 times the features, an eighth of the error, within a quarter: a bias would stay."""
    few, many = error(make, 32, orthogonal), error(make, 2048, orthogonal)
    assert 6 < few / many < 10, (few, many)


@pytest.mark.parametrize("make", [Performer, Cosine])
@pytest.mark.parametrize("num_features", [32, 128])
def test_orthogonal_directions_err_less(make, num_features):
    assert error(make, num_features, True) < 0.95 * error(make, num_features, False)


def test_orthogonal_directions_are_orthogonal_and_as_long_as_independent_ones():
    W, independent = (Performer(SIZES, 9, orthogonal).directions.double() for orthogonal in (True, False))
    torch.testing.assert_close(W.norm(dim=-1), independent.norm(dim=-1), rtol=1e-6, atol=0)
    for block in (W[:, :K], W[:, K:]):
        gram = block @ block.mT
        assert (gram - gram.diagonal(dim1=-2, dim2=-1).diag_embed()).abs().max() < 1e-5


# Positive, finite, the same again


def test_positive_where_claimed():
    q, k, positions = draw(torch.float32, scale=3.0)
    for features in (ReLU(SIZES), ReLU(SIZES, 2), DPFP(SIZES), CosFormer(SIZES, LENGTH)):
        assert (features(q, positions) >= 0).all()
    assert (Performer(SIZES)(q / 3, positions) > 0).all()  # longer ones end below the smallest number
    for features in (ELU(SIZES), Hedgehog(SIZES)):
        assert (features(q, positions) > 0).all()
    assert (ELU(SIZES)(torch.full_like(q, -80), positions) > 0).all()
    torch.testing.assert_close(Hedgehog(SIZES)(q, positions).sum(-1), torch.ones(B, T, H))
    q, k, positions = draw(scale=3.0)
    for even in (2, 4):
        assert (kernel(Taylor(SIZES, even).double(), q, k) > 0).all()
        assert (kernel(Polynomial(SIZES, even).double(), q, k) >= 0).all()
    assert (kernel(Taylor(SIZES, 3).double(), q, k) < 0).any() and (kernel(Cosine(SIZES).double(), q, k) < 0).any()


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_with_finite_gradients(name, scale, dtype):
    q, _, positions = draw(dtype, scale)
    features, q = built(name, torch.float32), q.requires_grad_()
    phi = features(q, positions)
    gradients = torch.autograd.grad(phi.float().sum(), [q, *features.parameters()])
    assert all(x.isfinite().all() for x in (phi, *gradients))


@pytest.mark.parametrize("name", FEATURES)
def test_autocast_and_the_other_tokens_change_nothing(name):
    q, _, positions = draw(torch.float32)
    features = built(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = features(q, positions)
    assert torch.equal(found, features(q, positions))
    torch.testing.assert_close(found[:, 2:3], features(q[:, 2:3], positions[:, 2:3]))


def test_a_seed_is_a_draw_for_every_head():
    a, again, other = (Cosine(SIZES, 8, seed=seed) for seed in (3, 3, 4))
    for name, x in a.named_buffers():
        assert torch.equal(x, again.get_buffer(name)) and not torch.equal(x, other.get_buffer(name))
        assert not torch.equal(x[0], x[1])


@pytest.mark.parametrize("name", ["performer", "cosine", "taylor", "hedgehog"])
def test_a_saved_model_has_its_own_features(name, tmp_path):
    """Not those that its seed draws again: other numbers are put in their place."""
    main = recipe("gated_delta") | {"features": node(name)}
    model = LanguageModel(LanguageModelConfig(hidden_size=32, num_layers=1, mixers={"main": main}, pattern=["main"]))
    features = model.blocks[0].mixer.features
    for x in features.state_dict().values():
        x.copy_(torch.arange(x.numel()).view_as(x) % 7)
    model.save_pretrained(tmp_path)
    tokens = torch.arange(12).view(1, -1)
    loaded = LanguageModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    half = LanguageModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for x, y in zip(features.buffers(), half.blocks[0].mixer.features.buffers(), strict=True):
        assert torch.equal(x, y.to(x.dtype)) and half(tokens).logits.isfinite().all()
    said = summary(loaded, LENGTH, torch.device("cpu"), torch.float32)
    assert f"main: {type(features).__name__}, {features.width} of {32 // HEADS}" in said


# With every linear memory


every_pair = pytest.mark.parametrize("preset, name", list(product(LINEAR, FEATURES)))


@pytest.fixture
def with_map(name, monkeypatch):
    """The laws' mixers have this map."""
    monkeypatch.setattr(laws, "mixer", partial(mixer, features=node(name), key_dim=K))


@every_pair
def test_laws_1_and_9_with_every_map(preset, name, with_map):
    laws.test_1_causal(preset, "torch")
    laws.test_9_counts(preset)


@pytest.mark.slow
@every_pair
def test_laws_3_4_and_7_with_every_map(preset, name, with_map):
    laws.test_3_one_map_in_every_form(preset)
    laws.test_4_packed_documents_are_separate_sequences(preset, "torch")
    for dtype, length in product((torch.float32, torch.bfloat16), (1, 16, 19)):
        laws.test_7_finite_at_the_extremes(preset, "torch", dtype, length)


# Mistakes


def test_too_wide_is_refused_with_what_would_do():
    with pytest.raises(ValueError, match=r"features\.order=3 makes 47,905 features of key_dim=64, more than 16,384; "):
        Taylor(SIZES._replace(key_dim=64), 3)
    with pytest.raises(ValueError, match="order=2 at this key_dim or key_dim=44 at this order would do"):
        Taylor(SIZES._replace(key_dim=64), 3)
    assert Taylor(SIZES._replace(key_dim=64), 2).width == 2145
    assert Taylor(SIZES._replace(key_dim=44), 3).width == 16215


@pytest.mark.parametrize(
    "make, settings",
    [
        (Taylor, {"order": 0}),
        (Polynomial, {"degree": 0}),
        (Polynomial, {"offset": -1.0}),
        (Performer, {"num_features": 0}),
        (Performer, {"inverse_temperature": 0.0}),
        (Cosine, {"inverse_temperature": "hot"}),
        (DPFP, {"order": 2 * K}),
        (ReLU, {"power": 0}),
        (MLP, {"expansion": 0}),
        (CosFormer, {"length": 0}),
    ],
)
def test_refusals_name_the_setting(make, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"features\.{name}={value!r}"):
        make(SIZES, **settings)
