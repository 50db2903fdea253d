"""Least squares: its solvers and gradients equal torch's direct ones, its special cases are what they are called, and
its extremes are accurate."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.parts.precision import doubled_dtype
from models.parts.sizes import Sizes
from models.regression.least_squares.least_squares import (
    LeastSquares,
    Ridge,
    chunked_least_squares,
    recurrent_least_squares,
)
from models.regression.least_squares.moments import Moments
from models.regression.least_squares.recursive import recurrent_fading_ridge, recursive_least_squares
from models.regression.least_squares.solvers import (
    chebyshev,
    chebyshev_steps,
    cholesky,
    conjugate_gradients,
    default_tolerance,
)
from models.regression.regressor import Tokens
from tests.laws.presets import inputs, largest_difference, mixer, outcome

B, T, H, K, V = 2, 75, 3, 8, 6
NAMES = ("q", "k", "v", "write_weight", "ridge", "log_decay", "H", "G", "mix")
SCALE = 0.02


def draw(tokens: int = T, dtype: torch.dtype = torch.float64, width: int = K, seed: int = 0) -> list[Tensor]:
    """q, k, v, write_weight, ridge, log_decay, the first moments, mix."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k = (F.normalize(normal(B, tokens, H, width), dim=-1) for _ in range(2))
    v, b, log_decay = normal(B, tokens, H, V), normal(B, tokens, H).sigmoid(), F.logsigmoid(normal(B, tokens, H) + 3)
    ridge, past, mix = 0.25 + F.softplus(normal(H, width)), normal(B, H, 3, width), normal(B, tokens, H).sigmoid()
    moments = past.mT @ past, past.mT @ normal(B, H, 3, V)
    return [x.to(dtype) for x in (q, k, v, b, ridge, log_decay, *moments, mix)]


def run(form, arguments: list[Tensor], scaled: bool = False, **options) -> dict[str, Tensor]:
    """o, both moments, and the gradients of a fixed function of all three."""
    leaves = [x.detach().clone().requires_grad_() for x in arguments]
    q, k, v, b, ridge, log_decay, H0, G0, mix = leaves
    o, moments, *_ = form(q, k, v, b, Ridge(ridge, scaled), log_decay, Moments(H0, G0), mix, **options)
    g = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=torch.float64)).sum() for x in (o, *moments[:2]))
    gradients = dict(zip(NAMES, torch.autograd.grad(loss, leaves), strict=True))
    gradients["H"] = gradients["H"] + gradients["H"].mT  # of a symmetric H, its two triangles are one
    return {"o": o, "keys": moments.keys, "pairs": moments.pairs, **gradients}


def assert_same(truth: dict[str, Tensor], found: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name, value in truth.items():
        error = (found[name] - value).abs().max() / value.abs().max().clamp(min=1)
        assert error < tolerance, f"{name}: {error:.1e}"


# Every solver, every form


@pytest.mark.parametrize("solver", [conjugate_gradients, cholesky])
@pytest.mark.parametrize("tokens, chunk", [(75, 32), (75, 7), (64, 64), (5, 32), (1, 32)])
def test_outputs_and_gradients_are_those_of_linalg_solve(solver, tokens, chunk):
    arguments = draw(tokens)
    truth = run(recurrent_least_squares, arguments)
    assert_same(truth, run(chunked_least_squares, arguments, solver=solver, chunk=chunk))


@pytest.mark.parametrize("solver", [conjugate_gradients, cholesky, partial(chebyshev, scale=SCALE)])
def test_a_ridge_that_is_scaled_has_its_own_gradient(solver):
    arguments = draw()
    arguments[4] = torch.tensor(SCALE, dtype=torch.float64)
    truth = run(recurrent_least_squares, arguments, scaled=True)
    found = run(chunked_least_squares, arguments, scaled=True, solver=solver)
    if isinstance(solver, partial):  # it is told the scale as a number
        truth.pop("ridge")
    assert_same(truth, found)


def test_an_early_stop_has_another_gradient():
    """What max_steps costs: the implicit gradient is that of the solution, which has not been reached."""
    arguments = draw()
    truth = run(recurrent_least_squares, arguments)
    errors = []
    for steps in (2, 4, 8):
        found = run(chunked_least_squares, arguments, solver=partial(conjugate_gradients, max_steps=steps))
        errors.append(((found["k"] - truth["k"]).norm() / truth["k"].norm()).item())
    assert errors[0] > 1e-2 > errors[1] > 1e-8 > errors[2]


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "cholesky", "decay_cap": None},
        {"solver": "cholesky", "ridge": 0.1, "scaled_ridge": True},
        {"ridge": 0.02, "scaled_ridge": True, "query_mix": True},
        {"solver": "rls"},
        {"ridge": 2},
    ],
    ids=str,
)
def test_every_setting_is_one_map_in_every_form(settings):
    """Law 3 and law 4 for what no preset sets."""
    settings = {f"regressor__{name}": value for name, value in settings.items()}
    x, segments = inputs(1, 30), torch.bucketize(torch.arange(30), torch.tensor([1, 17, 20]), right=True).unsqueeze(0)
    definition, m = mixer("mesa", "recurrent", **settings), mixer("mesa", **settings)
    for documents in (None, segments):
        truth = outcome(definition, x, segments=documents)
        for splits in ((), (1, 18)):
            assert largest_difference(outcome(m, x, splits, documents), truth) < 1e-10
    pieces = torch.cat([m(piece)[0] for piece in x.split((1, 16, 3, 10), dim=1)], dim=1)
    assert largest_difference([m(x, None, segments)[0]], [pieces]) < 1e-10


@pytest.mark.parametrize("preset", ["mesa", "gated_kalman", "nystrom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoding_is_prefill_to_rounding(dtype, preset):
    m = mixer(preset, dtype=dtype)
    x = inputs(2, 40, dtype)
    with torch.no_grad():
        whole, after = m(x)
        y, state = m(x[:, :20])
        steps = [y]
        for t in range(20, 40):
            y, state = m(x[:, t : t + 1], state)
            steps.append(y)
    assert {x.dtype for x in (*state.memory[:2], *after.memory[:2])} == {torch.float64}
    tolerance = 10 * torch.finfo(dtype).eps if dtype is torch.float32 else 10 * default_tolerance(dtype, dtype)
    assert largest_difference([torch.cat(steps, dim=1)], [whole]) < tolerance
    assert largest_difference(list(state.memory[:2]), list(after.memory[:2])) < tolerance


# What it is a case of


def test_recursive_least_squares_is_the_solve_with_a_ridge_that_fades():
    q, k, v, b, ridge, log_decay, *_ = draw()
    o, _ = recursive_least_squares(q, k, v, b, ridge, log_decay)
    truth, _ = recurrent_fading_ridge(q, k, v, b, ridge, log_decay)
    torch.testing.assert_close(o, truth, rtol=0, atol=1e-10)
    last = torch.linalg.lstsq(*_augmented(k, v, b, ridge, log_decay)).solution  # [B, H, K, V]
    torch.testing.assert_close(o[:, -1], (q[:, -1].unsqueeze(-2) @ last).squeeze(-2), rtol=0, atol=1e-9)
    assert (o - recurrent_least_squares(q, k, v, b, Ridge(ridge), log_decay)[0]).abs().max() > 0.1


def _augmented(k, v, b, ridge, log_decay):
    """Rows whose squared errors are the objective at the last token, the ridge faded by all decays."""
    left = log_decay.flip(1).cumsum(1).flip(1)
    weights = (b * (left - log_decay).exp()).sqrt().transpose(1, 2).unsqueeze(-1)
    ridge = torch.diag_embed((left[:, 0].exp().unsqueeze(-1) * ridge).sqrt())
    k, v = (weights * x.transpose(1, 2) for x in (k, v))
    return torch.cat((k, ridge), -2), torch.cat((v, v.new_zeros(*ridge.shape[:-1], V)), -2)


def test_without_a_decay_recursion_and_static_ridge_are_one():
    q, k, v, b, ridge, *_ = draw()
    truth, _ = recurrent_least_squares(q, k, v, b, Ridge(ridge))
    torch.testing.assert_close(recursive_least_squares(q, k, v, b, ridge)[0], truth, rtol=0, atol=1e-11)


def test_no_ridge_is_the_fit_of_least_norm():
    """Fewer pairs than channels at first, then more: torch.linalg.pinv of the pairs themselves, and its gradient. (Of H
    it is that of a squared condition number, so where there are about as many pairs as channels nothing is compared.)
    """
    tokens = [*range(K - 3), *range(2 * K, 3 * K)]
    q, k, v, b, *_ = (x.requires_grad_() for x in draw(3 * K))
    truth = []
    for t in tokens:
        root = b[:, : t + 1].sqrt().unsqueeze(-1)
        S = torch.linalg.pinv((root * k[:, : t + 1]).transpose(1, 2)) @ (root * v[:, : t + 1]).transpose(1, 2)
        truth.append((q[:, t].unsqueeze(-2) @ S).squeeze(-2))
    truth = torch.stack(truth, dim=1)
    expected = torch.autograd.grad(truth.square().sum(), (q, k, v, b))
    for form in (recurrent_least_squares, chunked_least_squares):
        o = form(q, k, v, b, Ridge(None))[0][:, tokens]
        torch.testing.assert_close(o, truth, rtol=1e-9, atol=1e-9)
        gradients = torch.autograd.grad(o.square().sum(), (q, k, v, b))
        torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-8)
    small = Ridge(torch.full((H, K), 1e-7, dtype=q.dtype))
    o = chunked_least_squares(q, k, v, b, small, solver=cholesky)[0][:, tokens]
    torch.testing.assert_close(o, truth, rtol=0, atol=1e-3)


def test_a_large_ridge_is_linear_attention():
    q, k, v, b, *_ = draw()
    large = 1e8
    o = chunked_least_squares(q, k, v, b, Ridge(torch.full((H, K), large, dtype=q.dtype)))[0]
    attend = torch.einsum("bthk,bshk->bhts", q, k).tril() * b.transpose(1, 2).unsqueeze(-2)
    torch.testing.assert_close(large * o, torch.einsum("bhts,bshv->bthv", attend, v), rtol=0, atol=1e-5)


def test_polynomial_features_fit_a_parabola_and_a_line_does_not():
    k = torch.linspace(-1, 1, 40, dtype=torch.float64)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    v = 3 * k**2 - 2 * k + 1
    phi, ones = torch.stack((torch.ones_like(k), k, k**2), dim=-1), torch.ones(1, 40, 1, dtype=k.dtype)
    shape = (1, 40, 1, -1)
    errors = []
    for features, ridge in ((phi, None), (phi, 1e-12), (phi[:, 1:2], None)):
        size = None if ridge is None else torch.full((1, features.shape[1]), ridge, dtype=k.dtype)
        pairs = features.view(shape), features.view(shape), v.view(shape)
        o = chunked_least_squares(*pairs, ones, Ridge(size), solver=cholesky)[0].flatten()
        errors.append((o - v)[3:].abs().max().item())
    assert errors[0] < 1e-9 and errors[1] < 1e-6 and errors[2] > 1


# Numerics


@pytest.mark.parametrize("scale", [0.02, 0.1])
def test_a_scaled_ridge_bounds_the_condition_number_and_with_it_the_steps(scale):
    """Keys that repeat with a little noise, the worst: kappa <= (1 + a) / a at every token, and the residual is at most
    the tolerance that the number of steps was computed from."""
    q, k, v, b, *_ = draw(200)
    k = F.normalize(k[:, :1] + 0.01 * k, dim=-1)
    A = torch.einsum("bthk,bthl,bth->bthkl", k, k, b).cumsum(1)
    norms = torch.linalg.matrix_norm(A)[..., None, None]
    eigenvalues = torch.linalg.eigvalsh(A + scale * norms * torch.eye(K))
    assert (eigenvalues[..., -1] / eigenvalues[..., 0]).max() <= (1 + scale) / scale + 1e-9
    ridge = Ridge(torch.tensor(scale, dtype=q.dtype), scaled=True)
    for tolerance in (1e-3, 1e-6, 1e-12):
        solver = partial(chebyshev, scale=scale, tolerance=tolerance)
        found = chunked_least_squares(q, k, v, b, ridge, solver=solver)[2]
        assert found.residual.max() <= tolerance and (found.steps == chebyshev_steps(scale, tolerance)).all()


def test_the_steps_of_the_docstring():
    for dtype, pairs, steps in (
        (torch.float32, torch.bfloat16, 43),
        (torch.float64, torch.float32, 57),
        (torch.float64, torch.float64, 114),
    ):
        assert chebyshev_steps(0.02, default_tolerance(dtype, pairs, 51)) == steps
    assert default_tolerance(torch.float64, torch.float64) == pytest.approx(2.2e-14, rel=0.01)
    assert default_tolerance(torch.float64, torch.float32) == pytest.approx(1.2e-9, rel=0.01)
    for pairs in (torch.bfloat16, torch.float32):  # autocast's, MPS's
        assert default_tolerance(torch.float32, pairs) == pytest.approx(1.2e-5, rel=0.01)


def test_steps_are_reported_and_few_where_the_problem_is_easy():
    torch.manual_seed(0)
    module = LeastSquares(Sizes(12, H, H, 32, V), decay_cap=0.9975)
    q, k, v, _, _, log_decay, *_ = draw(256, torch.float32, width=32)
    assert module.diagnostics() == {}
    module(Tokens(torch.randn(B, 256, 12), q, k, v, log_decay))
    found = module.diagnostics()
    assert module.steps_taken.shape == (B, 256, H, 1)
    assert 1 <= found["solver_steps"] <= 12 and found["solver_steps_max"] <= 15
    assert found["solver_residual"] <= default_tolerance(torch.float64, torch.float32)
    with torch.no_grad():
        module.write_weight.bias.fill_(-20.0)  # H is nearly nothing: the start is the solution
    module(Tokens(torch.randn(B, 256, 12), q, k, v, log_decay))
    assert module.diagnostics()["solver_steps_max"] <= 1


def test_a_token_that_has_converged_waits_unchanged():
    """An easy problem beside a hard one is solved in as many steps, to the same bits, as beside an easy one."""
    q, k, v, b, ridge, *_ = draw(64)
    easy, hard = 0.01 * b[:1], 100 * b[1:]
    beside_hard = chunked_least_squares(q, k, v, torch.cat((easy, hard)), Ridge(ridge))
    beside_easy = chunked_least_squares(q, k, v, torch.cat((easy, easy)), Ridge(ridge))
    assert torch.equal(beside_hard[0][0], beside_easy[0][0])
    assert torch.equal(beside_hard[2].steps[0], beside_easy[2].steps[0])
    assert beside_hard[2].steps[1].max() > beside_easy[2].steps[1].max()


# One key 2048 times over, b = 1: rows of the batch are (noise on the key, whether the value repeats too), heads (ridge,
# decay). The condition number is 2048 / ridge without a decay, 400 / ridge with the cap's 0.9975.
PAIRS = ((0.0, True), (0.0, False), (0.01, True), (0.01, False))
HEADS = ((1.0, 1.0), (1.0, 0.9975), (0.25, 1.0), (0.25, 0.9975))
WIDTH = 16


def repeat(
    dtype: torch.dtype, form, size: Tensor, decays: bool = True, autocast: bool = False, **options
) -> dict[str, Tensor]:
    """o, and the gradients of a fixed function of it to q, k, v, b and the ridge, of pairs that float32 holds."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(len(PAIRS), 2048, len(HEADS), width, generator=g) for width in (WIDTH, WIDTH, V))
    noise, same = (torch.tensor(x).view(-1, 1, 1, 1) for x in zip(*PAIRS, strict=True))
    q, k, v = F.normalize(q, dim=-1), F.normalize(k[:, :1] + noise * k, dim=-1), torch.where(same, v[:, :1], v)
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, torch.ones(v.shape[:3]), size)]
    log_decay = torch.tensor([decay for _, decay in HEADS]).log().expand(v.shape[:3]).to(dtype)
    *pairs, size = leaves
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        o = form(*pairs, size, log_decay if decays else None, **options)[0]
    gradients = torch.autograd.grad((o * torch.randn(o.shape, generator=g).to(o)).sum(), leaves)
    return {"o": o.detach(), **dict(zip(("q", "k", "v", "write_weight", "ridge"), gradients, strict=True))}


def static(*arguments, form=chunked_least_squares, scaled=False, **options):
    *pairs, size, log_decay = arguments
    return form(*pairs, Ridge(size, scaled), log_decay, **options)


truth_of = cache(partial(repeat, torch.float64))
RIDGES = torch.tensor([ridge for ridge, _ in HEADS]).unsqueeze(1).expand(-1, WIDTH)
IN_PROPORTION = torch.tensor(SCALE)
BY_SOLVE, BY_SOLVE_SCALED = (partial(static, form=recurrent_least_squares, scaled=scaled) for scaled in (False, True))


def errors(truth: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each, relative to the largest entry of the same row and head."""
    apart = {name: x.transpose(1, 2).flatten(2) for name, x in truth.items() if x.ndim > 2}
    largest = {name: x.abs().amax(-1) for name, x in apart.items()}
    # with the key and the value the ridge's share of H repeats as well, and b cancels: b writes v, as large as that is
    largest["write_weight"] = torch.maximum(largest["write_weight"], largest["v"])
    differences = {name: (found[name].transpose(1, 2).flatten(2) - x).abs().amax(-1) for name, x in apart.items()}
    ridge = (found["ridge"] - truth["ridge"]).abs() / truth["ridge"].abs().amax(-1, keepdim=True)
    return {name: (x / largest[name]).max().item() for name, x in differences.items()} | {"ridge": ridge.max().item()}


FORMS = {
    "solved": {
        "conjugate gradients": partial(static, solver=conjugate_gradients),
        "Cholesky": partial(static, solver=cholesky),
        "recurrence": BY_SOLVE,
    },
    "recursive": {"rls": recursive_least_squares, "rls recurrence": recurrent_fading_ridge},
}


@pytest.mark.slow
@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize("forms", FORMS)
def test_float32_is_accurate_where_a_key_repeats_2048_times(forms, decays):
    """In one test what has one truth, which takes longer than all that is held to it."""
    truth = truth_of(BY_SOLVE if forms == "solved" else recurrent_fading_ridge, RIDGES, decays)
    for name, form in FORMS[forms].items():
        found = errors(truth, repeat(torch.float32, form, RIDGES, decays))
        assert found["o"] < 1e-6 and max(found.values()) < 1e-5, (name, found)


@pytest.mark.slow
@pytest.mark.parametrize("decays", [True, False])
def test_a_scaled_ridge_is_as_accurate(decays):
    truth = truth_of(BY_SOLVE_SCALED, IN_PROPORTION, decays)
    for solver in (partial(chebyshev, scale=SCALE), conjugate_gradients, cholesky):
        found = errors(truth, repeat(torch.float32, static, IN_PROPORTION, decays, scaled=True, solver=solver))
        assert found["o"] < 1e-6 and max(found.values()) < 2e-5, (solver, found)


@pytest.mark.slow
def test_what_twice_the_digits_are_for():
    """Moments in float32 know that fit to the condition number's rounding, whatever the solver. They are what bf16 has,
    and cost it no more than rounding its outputs does."""
    truth = truth_of(BY_SOLVE, RIDGES, False)
    found = errors(truth, repeat(torch.float32, static, RIDGES, False, autocast=True, solver=cholesky))
    assert 1e-3 < found["o"] < 1e-2
    q, k, v, b, *_ = draw(2048, torch.bfloat16, width=64)
    k, v, b, ridge = k[:, :1].expand_as(k), v[:, :1].expand_as(v), torch.ones_like(b), torch.full((H, 64), 0.25)
    o = chunked_least_squares(q, k, v, b, Ridge(ridge))[0]
    exact = chunked_least_squares(q.double(), k.double(), v.double(), b, Ridge(ridge), solver=cholesky)[0]
    assert ((o - exact).abs().max() / exact.abs().max()) < torch.finfo(torch.bfloat16).eps


def test_decoding_goes_on_to_rounding_where_a_key_has_repeated():
    """From the moments that prefill hands over: the last 24 of 2048 tokens, one by one."""
    q, k, v, b, *_ = draw(2048, torch.float32, width=WIDTH)
    k, b = F.normalize(k[:, :1] + 0.01 * k, dim=-1), torch.ones_like(b)
    for ridge, solver in (
        (Ridge(torch.full((H, WIDTH), 0.25)), conjugate_gradients),
        (Ridge(torch.full((H, WIDTH), 0.25)), cholesky),
        (Ridge(torch.tensor(SCALE), True), partial(chebyshev, scale=SCALE)),
    ):
        whole, after, _ = chunked_least_squares(q, k, v, b, ridge, solver=solver)
        _, moments, _ = chunked_least_squares(*(x[:, :2024] for x in (q, k, v, b)), ridge, solver=solver)
        for t in range(2024, 2048):
            now = (x[:, t : t + 1] for x in (q, k, v, b))
            o, moments, _ = chunked_least_squares(*now, ridge, moments=moments, solver=solver)
            assert (o - whole[:, t : t + 1]).abs().max() <= 4 * torch.finfo(torch.float32).eps * whole.abs().max()
        assert_same(dict(enumerate(after[:2])), dict(enumerate(moments[:2])), 1e-13)


class Dtypes(TorchDispatchMode):
    """Of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {x.dtype for x in tree_leaves(out) if isinstance(x, Tensor)}
        return out


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize(
    "preset, settings",
    [
        ("mesa", {}),
        ("mesa", {"regressor__solver": "cholesky"}),
        ("mesa", {"regressor__solver": "rls"}),
        ("gated_kalman", {}),
        ("nystrom", {}),
    ],
    ids=str,
)
def test_autocast_keeps_float32(preset, settings, backend):
    """Forward, a step of decoding, recall and backward: no float64 anywhere."""
    m, x = mixer(preset, backend, torch.float32, **settings), inputs(1, 20, torch.float32)
    with Dtypes() as dtypes:
        with torch.autocast("cpu", torch.bfloat16):
            y, state = m(x)
            z, state = m(x[:, :1], state)
            if settings.get("regressor__solver") != "rls":
                q = torch.randn(1, 3, m.num_heads * m.key_dim)
                z = z + m.recall(q, x[:, :3], torch.arange(3).view(1, 3), state).sum()
        torch.autograd.grad(y.sum() + z.sum(), list(m.parameters()), allow_unused=True)
    assert {x.dtype for x in state.memory[:2]} == {torch.float32}
    assert torch.bfloat16 in dtypes.seen and torch.float64 not in dtypes.seen


def test_the_digits_of_moments():
    cpu, mps = torch.device("cpu"), torch.device("mps")
    assert doubled_dtype(cpu, torch.float32) == doubled_dtype(cpu, torch.bfloat16, torch.float64) == torch.float64
    assert doubled_dtype(cpu, torch.float32, torch.float16) == doubled_dtype(mps, torch.float32) == torch.float32
    module = LeastSquares(Sizes(12, H, H, K, V))
    assert module.choose(cpu, torch.float32).reason.endswith("conjugate_gradients, moments in float64")
    assert module.choose(cpu, torch.bfloat16).reason.endswith("moments in float32")
    assert module.choose(mps, torch.float32).reason.endswith("moments in float32: MPS has no float64")


@pytest.mark.parametrize("dtype, ridge", [(torch.bfloat16, 1e-9), (torch.float32, 1e-18), (torch.float64, 1e-18)])
def test_a_matrix_that_rounding_made_indefinite_is_solved_with_a_warning(dtype, ridge):
    q, k, v, b, *_ = draw(64, dtype, width=32)
    k, moments = k[:, :1].expand_as(k), None
    with pytest.warns(UserWarning, match=r"not positive definite.*regressor\.ridge"):
        o, _, _ = chunked_least_squares(q, k, v, b, Ridge(torch.full((H, 32), ridge)), None, moments, solver=cholesky)
    assert o.isfinite().all()


def test_impossible_settings_are_refused():
    for settings, sentence in (
        ({"solver": "lu"}, r"regressor\.solver='lu' is not one of"),
        ({"ridge": -1}, r"regressor\.ridge=-1 must be"),
        ({"ridge": "large"}, r"regressor\.ridge='large' must be"),
        ({"ridge": 0}, r"regressor\.ridge=0 leaves H singular, and regressor\.solver=conjugate_gradients"),
        ({"ridge": 0, "solver": "rls"}, r"regressor\.ridge=0 leaves H singular"),
        ({"scaled_ridge": True}, r"regressor\.scaled_ridge=true needs a positive number"),
        ({"solver": "chebyshev", "ridge": 0.02}, r"regressor\.solver=chebyshev needs .*scaled_ridge=true"),
        ({"solver": "rls", "query_mix": True}, r"regressor\.query_mix=true is not possible"),
        ({"tolerance": 2.0}, r"regressor\.tolerance=2\.0 must lie between 0 and 1"),
        ({"decay_cap": 1.5}, r"regressor\.decay_cap=1\.5 must lie between 0 and 1"),
        ({"max_steps": 0}, r"regressor\.max_steps=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            LeastSquares(Sizes(12, H, H, K, V), **settings)
