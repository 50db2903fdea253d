"""What is not finite goes through a mixer as such, never as an exception: the step is left out and counted.

People lose runs to a factor that does not exist: https://github.com/MCZhi/DIPP/issues/6,
https://github.com/yookoon/VLAE/issues/5, https://github.com/facebookresearch/theseus/issues/645.
"""

from __future__ import annotations

import pytest
import torch

from models.parts import solves
from tests.laws.presets import PRESETS, inputs, mixer, part

SOLVERS = {
    "mesa, cholesky": ("mesa", {"regressor__solver": "cholesky"}),
    "mesa, no ridge": ("mesa", {"regressor__solver": "cholesky", "regressor__ridge": 0}),
    "mesa, rls": ("mesa", {"regressor__solver": "rls"}),
    "intention, scalar": ("intention", {"decay": part("decay", "scalar")}),
}
CASES = {preset: (preset, {}) for preset in PRESETS} | {k: v for k, v in SOLVERS.items() if v[0] in PRESETS}
FORMS = ("torch", "recurrent")


@pytest.mark.filterwarnings("ignore:least squares")
@pytest.mark.parametrize("case", CASES)
def test_an_input_that_is_not_finite_makes_outputs_and_gradients_so(case):
    preset, settings = CASES[case]
    for form in FORMS:
        m, x = mixer(preset, form, torch.float32, **settings), inputs(1, 12, torch.float32)
        x[0, 5, 3] = torch.inf
        y, _ = m(x.requires_grad_())
        y.sum().backward()
        assert not y.isfinite().all() and not x.grad.isfinite().all(), form


@pytest.mark.filterwarnings("ignore:least squares")
@pytest.mark.parametrize("case", CASES)
def test_weights_after_a_step_much_too_large_raise_nothing(case):
    """optimizer.lr=1e4: AdamW's first step moves every weight by as much."""
    preset, settings = CASES[case]
    for form in FORMS:
        m, g = mixer(preset, form, torch.float32, **settings), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in m.parameters():
                p.add_(1e4 * torch.randn(p.shape, generator=g).sign())
        m(inputs(1, 12, torch.float32))[0].sum().backward()


def test_a_system_without_a_solution_is_nan_and_its_neighbours_are_solved():
    good, indefinite, singular = torch.eye(2) * 4, torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.ones(2, 2)
    A = torch.stack([good, indefinite, torch.full((2, 2), torch.nan)])
    assert torch.equal(solves.cholesky(A)[0], good / 2) and solves.cholesky(A)[1:].isnan().all()
    A[1] = singular
    b = torch.full((3, 2), 8.0)
    assert torch.equal(solves.solve(A, b)[0], b[0] / 4) and solves.solve(A, b)[1:].isnan().all()
    assert torch.equal(solves.inverse(A)[0], good / 16) and solves.inverse(A)[1:].isnan().all()
    found = solves.pseudo_inverse(A, 1e-6)
    assert torch.allclose(found[0], good / 16) and torch.allclose(found[1], singular / 4) and found[2].isnan().all()
