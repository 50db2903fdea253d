"""The figure of docs/ablation.md: its numbers by hand, what it says where runs are missing, and the page's tables."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from scripts.figures import ablation
from tests.conftest import ROOT
from tests.test_report import run


def look(step: int, layer: int, recall: list[list[float]], **quantities: list[float]) -> str:
    """A line of regression.jsonl, of two heads at the ages 0, 1, 8 and 64; 0.4 was known before the write."""
    row = {"step": step, "tokens": 100 * (step + 1), "layer": layer, "part": "", "ages": [0, 1, 8, 64]}
    row |= {"recall": recall, "recall_before": [0.3, 0.5], "quantities": quantities}
    return json.dumps(row) + "\n"


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """Four mixers, two seeds of gated_delta, two layers, two looks."""
    folder = tmp_path_factory.mktemp("figure") / "ablation"
    flat, falling = [[1.0] * 4, [0.8] * 4], [[1.0, 0.8, 0.4, 0.2], [0.8, 0.6, 0.4, 0.2]]
    gates = {"momentum": [0.5, 0.3], "step_size": [0.6, 0.4]}
    later = {"momentum": [0.4, 0.3], "step_size": [0.7, 0.5]}
    for mixer, seed in (("softmax", 1), ("gated_delta", 1), ("gated_delta", 2), ("mesa", 1), ("titans", 1)):
        recall = flat if mixer == "softmax" else falling
        said = ""
        for step, of_titans in ((1, gates), (3, later)):
            own = {} if mixer == "softmax" else {"half_life": [4.0 * seed, None]}
            own |= of_titans if mixer == "titans" else {}
            said += look(step, 0, recall, **own) + look(step, 1, flat, **own)
        path = run(folder / f"{mixer}-{seed}", mixer, 2.0, seed)
        (path / "regression.jsonl").write_text(said)
    metrics = folder / "mesa-1" / "metrics.csv"
    rows = list(csv.DictReader(metrics.open()))
    for i, row in enumerate(rows):
        for layer in (0, 1):
            row |= {f"solver_steps/layer_{layer}": 5 + i, f"solver_steps_max/layer_{layer}": 9.0 - i}
            row[f"solver_residual/layer_{layer}"] = 1e-9
    with metrics.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_the_numbers(swept):
    """Of the last look, means over heads and layers; a head without a half-life counts for none."""
    found = ablation.numbers(ablation.read(swept))
    rows = {(row["mixer"], row["seed"], row["layer"]): row for row in found["forgetting"]}
    assert len(rows) == 5 + 4
    softmax, delta, layer = (
        rows[key] for key in (("softmax", 1, "all"), ("gated_delta", 2, "all"), ("gated_delta", 2, 0))
    )
    assert softmax["half-life"] is None and softmax["lost at"] is None
    assert [softmax[name] for name in ("before", "at 0", "at 64")] == pytest.approx([0.4, 0.9, 0.9])
    assert [delta[name] for name in ("at 0", "at 1", "at 8", "at 64")] == pytest.approx([0.9, 0.8, 0.65, 0.55])
    assert [layer[name] for name in ("at 8", "lost at", "half-life")] == pytest.approx([0.4, 8, 8.0])
    assert found["solving"][1] == {
        "seed": 1,
        "layer": 1,
        "first steps": 5.0,
        "last steps": 8.0,
        "most": 9,
        "residual": 1e-9,
        "half-life": 4.0,
    }
    moved = found["moving"][0]
    assert moved["momentum fell in"] == "1 of 2 heads"
    assert [moved[f"{when} momentum"] for when in ("first", "last")] == pytest.approx([0.4, 0.35])


def test_what_it_writes(swept, tmp_path, monkeypatch, capsys):
    """Tables and a picture that is light enough for a page; and a sentence where a mixer has no run."""

    def said(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["ablation.py", *words, "--folder", str(tmp_path)])
        ablation.main()
        return capsys.readouterr().out

    printed = said(str(swept), "--json", str(tmp_path / "numbers.json"))
    picture = (tmp_path / "ablation.svg").read_text()
    assert len(picture) < 300_000 and "titans: momentum" in picture and "seed 2" in picture
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert printed == "\n\n".join(map(ablation.table, found.values())) + "\n"
    with pytest.raises(SystemExit, match="mesa-1 has no finished run of softmax with a regression"):
        said(str(swept / "mesa-1"))


def test_the_page_has_the_tables_that_were_printed():
    page = (ROOT / "docs" / "ablation.md").read_text()
    for rows in json.loads((ROOT / "docs" / "ablation.json").read_text()).values():
        assert ablation.table(rows) in page
