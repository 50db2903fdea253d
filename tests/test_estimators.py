"""Estimators without a trained parameter at toy size, and their pages."""

from __future__ import annotations

import json

import pytest

from scripts.figures import estimate
from scripts.figures.estimators import distances, functions, half_lives, optimizers, parabola, switching, taylor

SMALL = {
    "switching": lambda: switching.finding(sequences=3, tokens=48),
    "distances": lambda: distances.finding(steps=3),
    "taylor": lambda: taylor.finding(num_queries=8, num_keys=128),
    "optimizers": lambda: optimizers.finding(sequences=2, count=64, rates=(0.1, 0.3)),
    "parabola": lambda: parabola.finding(sequences=2, pairs=64),
    "functions": lambda: functions.finding(sequences=4, pairs=24),
    "half_lives": lambda: half_lives.finding(size="tiny", tokens=16),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", estimate.FINDINGS)
def test_a_page_is_made_of_what_was_found(name, tmp_path):
    found = SMALL[name]()
    estimate.write(name, found, 1.0, tmp_path)
    page, picture = (tmp_path / name / "README.md").read_text(), (tmp_path / name / "figure.svg").read_text()
    assert json.loads((tmp_path / name / "table.json").read_text()) == json.loads(json.dumps(found.table))
    assert f"python scripts/figures/estimate.py {name}\n" in page and found.says in page and len(picture) < 200_000
    assert all(f"* {'Seen' if holds else '**Not seen**'}: {what}." in page for what, holds in found.checks)
    exact = {"taylor": 2, "parabola": 1, "distances": 2}.get(name, 0)  # of the claims, those that hold at any size
    assert all(holds for _, holds in found.checks[:exact]) and len(found.checks) >= 2
