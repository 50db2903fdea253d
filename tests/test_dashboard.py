"""What scripts/dashboard.py would send to wandb, without a network: which runs, how grouped, and what against what.

https://github.com/marin-community/marin/issues/1918 and https://github.com/wandb/wandb/issues/6993: workspaces that are
set up by hand for every project; https://github.com/wandb/wandb/issues/1963: a report without the axis of one's own.
"""

from __future__ import annotations

import csv
import json
from typing import Any

import pytest

from models.training.logger import read_metrics
from models.training.loggers import identity
from scripts import dashboard as script
from scripts.reports import runs
from tests.test_report import run

pytest.importorskip("wandb_workspaces")

from scripts.reports import dashboard

WANDB = {"_target_": "models.training.loggers.wandb.Wandb", "project": "p", "id": "ablation-x"}
EVERY = ["validation/nats_at/16-31", "validation/nats_at/0-15", "train/loss", "speed/tokens_per_second"]
INNER = {"mesa": ["residual"], "softmax": ["reach", "entropy"]}


@pytest.fixture
def ablation(tmp_path, monkeypatch):
    """Two mixers, two seeds, in wandb."""
    monkeypatch.setenv("RUNS", str(tmp_path))
    for mixer, quantities in INNER.items():
        for seed in (1, 2):
            folder = tmp_path / "ablation" / f"model={mixer},seed={seed}"
            run(folder, mixer, 1.5, seed, logger={"wandb": WANDB | {"group": "ablation"}})
            identity.keep(folder, "wandb", f"{mixer}-{seed}")
            names = [f"regression/{name}/layer_{i}" for name in ("after", *quantities) for i in (0, 2)]
            rows = [row | dict.fromkeys([*EVERY, *names], 1.0) for row in read_metrics(folder / "metrics.csv")]
            with (folder / "metrics.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    return tmp_path / "ablation"


def panels(node: Any) -> list[dict[str, Any]]:
    """All that are anywhere below, as they are sent."""
    if isinstance(node, list):
        return [panel for item in node for panel in panels(item)]
    if not isinstance(node, dict):
        return []
    return [node] if "viewType" in node else [panel for value in node.values() for panel in panels(value)]


def drawn(found: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """(axis, metric) of the lines."""
    lines = [panel["config"] for panel in found if panel["viewType"] == "Run History Line Plot"]
    return {(line["xAxis"], metric) for line in lines for metric in line["metrics"]}


AXES = ("progress/tokens", "progress/flops", "speed/seconds")
OUTER = {(x, f"validation/{name}") for x in AXES for name in ("bits_per_byte", "nats")} | {
    ("progress/tokens", name) for name in EVERY
}


def inner(*names: str) -> set[tuple[str, str]]:
    return {("progress/tokens", f"regression/{name}/layer_{i}") for name in names for i in (0, 2)}


def test_the_workspace(ablation):
    plan = dashboard.plan(runs.find([ablation]), "ablation", "me")
    made = dashboard.workspace(plan)._to_model()
    spec = json.loads(made.spec.model_dump_json(by_alias=True, exclude_none=True))
    assert (made.entity, made.project, made.display_name) == ("me", "p", "ablation")
    sections = {of["name"]: of["panels"] for of in spec["section"]["panelBankConfig"]["sections"]}
    assert list(sections) == [
        "Validation",
        "Loss by position",
        "Training",
        "Speed, memory and state",
        "Inner regression",
        "Samples",
    ]
    assert drawn(panels(spec)) == OUTER | inner("after", "residual", "reach", "entropy")
    assert len(sections["Inner regression"]) == 4, "a panel a quantity, a line a layer"
    (bars,) = [of["config"] for of in sections["Loss by position"] if of["viewType"] == "Bar Chart"]
    assert bars["metrics"] == ["validation/nats_at/0-15", "validation/nats_at/16-31"]
    (scatter,) = [of["config"] for of in sections["Speed, memory and state"] if of["viewType"] == "Scatter Plot"]
    assert (scatter["xAxis"], scatter["yAxis"]) == ("config:state_size.value", "summary:validation/bits_per_byte")
    assert "regression/picture" in json.dumps(sections["Samples"]) and '"sample"' in json.dumps(sections["Samples"])
    (chosen,) = spec["section"]["runSets"]
    assert '"group"' in json.dumps(chosen["filters"]) and '"ablation"' in json.dumps(chosen["filters"])
    assert [(key["section"], key["name"]) for key in chosen["grouping"]] == [("config", "mixer.value")]


def test_the_report(ablation, monkeypatch):
    """Mixer by mixer, each with its own runs and its own quantities."""
    from wandb_workspaces.reports.v2 import interface

    monkeypatch.setattr(interface, "_get_api", lambda: None)
    monkeypatch.setattr(interface, "execute_graphql", lambda *_: {"project": {"internalId": "1"}})
    made = dashboard.report(dashboard.plan(runs.find([ablation]), "ablation", "me"))._to_model()
    blocks = json.loads(made.spec.model_dump_json(by_alias=True, exclude_none=True))["blocks"]
    headings = [of["children"][0]["text"] for of in blocks if of["type"] == "heading"]
    assert headings[-3:] == ["Inner regression: mesa", "Inner regression: softmax", "Samples"]
    grids = dict(zip(headings, [of for of in blocks if of["type"] == "panel-grid"], strict=True))
    for mixer, quantities in INNER.items():
        grid = grids[f"Inner regression: {mixer}"]
        assert drawn(panels(grid)) == inner("after", *quantities)
        (chosen,) = grid["metadata"]["runSets"]
        assert chosen["filters"]["filters"][0]["value"] == [f"{mixer}-{seed}" for seed in (1, 2)]
        assert [key["name"] for key in chosen["grouping"]] == ["mixer.value"]
    assert drawn(panels(list(grids.values())[:4])) == OUTER


def test_what_it_says(ablation, tmp_path, monkeypatch, capsys):
    """A dry run prints all panels and asks nobody; what is wrong is a sentence."""

    def ended(*words: object) -> str:
        monkeypatch.setattr("sys.argv", ["dashboard.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            script.main()
        return str(stop.value.code)

    monkeypatch.setattr("wandb.Api", lambda: pytest.fail("the network was asked"))
    monkeypatch.setattr("sys.argv", ["dashboard.py", str(ablation), "--dry-run"])
    script.main()
    said = capsys.readouterr().out
    assert "workspace and report 'ablation' in (your entity)/p" in said and "Metric('Group') in ['ablation']" in said
    assert "bits per byte against FLOPs: validation/bits_per_byte" in said and "Inner regression: mesa" in said

    def refused() -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("wandb.Api", refused)
    assert ended(ablation) == "error: wandb can't be reached, or knows no account here: no route to host"
    run(tmp_path / "other", "mesa", 1.0)
    assert ended(tmp_path / "other").startswith(f"error: {tmp_path / 'other'} was not logged to wandb")
    run(tmp_path / "alone", "mesa", 1.0, logger={"wandb": WANDB | {"project": "q"}})
    assert "logger.wandb.project=" in ended(ablation, tmp_path / "alone")
    identity.keep(tmp_path / "alone", "wandb", "alone-1")
    assert dashboard.plan(runs.find([tmp_path / "alone"]), "a").only == "Metric('ID') in ['alone-1']"
