"""Law 6: it is the regression it claims. Each preset's reads equal its stated objective, minimised or stepped by other
means: tests/laws/objectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.laws.objectives import CHECKS, Call
from tests.laws.presets import PRESETS, inputs, mixer


def call_of(preset: str, T: int = 12, **settings: Any) -> Call:
    """The regressor's arguments inside its own mixer."""
    m, seen = mixer(preset, **settings), []
    m.regressor.register_forward_hook(lambda module, args, result: seen.append(Call(module, *args[0][:5], result[0])))
    with torch.no_grad():
        m(inputs(1, T))
    return seen[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_6_it_is_the_regression_it_claims(preset):
    assert preset in CHECKS, (
        f"{preset}: nothing says what it minimises; write a check with @states({preset!r}), as those in "
        "tests/laws/objectives, and name its module with --objective where it is not in that folder"
    )
    CHECKS[preset](call_of(preset))
