"""The workspace and the report of an ablation in wandb, as objects of wandb-workspaces, which is an extra
(github.com/wandb/wandb-workspaces). Nothing here asks the network: scripts/dashboard.py sends what this builds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from models.training.loggers.identity import known
from scripts.reports.presets import mixers
from scripts.reports.runs import NATS, NUMBERS, Record
from scripts.reports.variants import differing, settings

AXES = {"tokens": "progress/tokens", "FLOPs": "progress/flops", "seconds of training": "speed/seconds"}
TOKENS = AXES["tokens"]
TRAINING = {
    "train/loss": "training loss",
    "train/gradient_norm": "gradient norm",
    "train/learning_rate": "learning rate",
}
SPEED = {"speed/tokens_per_second": "tokens/s", "speed/mfu": "MFU", "speed/peak_memory_gb": "memory, GB"}
INNER = re.compile(r"regression/(.+)/layer_\d+\w*")
TITLES = {"before": "loss before the write", "after": "loss after the write", "half_life": "half-life"}
PICTURES = ["regression/picture", "loss"]


@dataclass(frozen=True)
class Plan:
    """Which runs, and what there is to draw of them. entity: whose project it is. only: wandb's expression for the
    runs. by: keys of the config in which the variants differ. mixers: by what a mixer is called, wandb's expression for
    its runs and the metrics of its inner regression.
    """

    entity: str
    project: str
    title: str
    only: str
    by: list[str]
    metrics: list[str]
    mixers: dict[str, tuple[str, list[str]]]

    @property
    def validation(self) -> dict[str, str]:
        names = NUMBERS | {"validation/nats": NATS}
        return {metric: unit for metric, unit in names.items() if metric in self.metrics}

    @property
    def positions(self) -> list[str]:
        found = [name for name in self.metrics if name.startswith("validation/nats_at/")]
        return sorted(found, key=lambda name: int(re.findall(r"\d+", name)[0]))


def plan(records: list[Record], title: str, entity: str | None = None) -> Plan:
    """Raises ValueError, in a sentence, for runs that are not in wandb or in several projects of it. entity: where it
    is other than the runs' own."""
    found = [record for record in records if record.config]
    nodes = {record.folder: record.config.get("logger", {}).get("wandb") for record in found}
    if missing := [folder for folder, node in nodes.items() if not node]:
        raise ValueError(f"{missing[0]} was not logged to wandb; runs that were trained with logger=wandb are")
    for name in ("project", "entity"):
        if len(several := {str(node.get(name)) for node in nodes.values()}) > 1:
            raise ValueError(f"these runs are in several places of wandb: logger.wandb.{name}={', '.join(several)}")
    node = next(iter(nodes.values()))
    by_mixer: dict[str, list[Record]] = {}
    for record in found:
        by_mixer.setdefault(mixers(record.config["model"])[0], []).append(record)
    inner = {name: (_ids(of), [m for m in _metrics(of) if INNER.fullmatch(m)]) for name, of in by_mixer.items()}
    looked = {name: both for name, both in inner.items() if both[1]}
    who = entity or node.get("entity") or ""
    return Plan(who, node["project"], title, _only(found), list(_by(found)), _metrics(found), looked)


def _metrics(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for row in record.rows for name in row))


def _only(records: list[Record]) -> str:
    """Jobs of one sweep by its name, so that those which follow are seen too; other runs by their ids."""
    sweeps = {record.config["logger"]["wandb"].get("group") for record in records}
    if len(sweeps) == 1 and (sweep := sweeps.pop()):
        return f"Metric('Group') in [{sweep!r}]"
    return _ids(records)


def _ids(records: list[Record]) -> str:
    names = [known(record.folder, "wandb") or record.config["logger"]["wandb"].get("id") for record in records]
    return f"Metric('ID') in [{', '.join(map(repr, names))}]"


def _by(records: list[Record]) -> Iterator[str]:
    """models/training/loggers/about.py writes `mixer`, which says what the mixers are."""
    patterns = {part for record in records for part in record.config["model"]["pattern"]}
    inside = f"model.mixers.{patterns.pop()}" if len(patterns) == 1 else "model.mixers"
    own = {name for record in records for name in mixers(record.config["model"])[1]}
    for name in differing([settings(record.config) for record in records]):
        yield f"{inside}.{name}" if name in own else name


# what is drawn


def line(title: str, names: list[str], x: str = TOKENS) -> wr.LinePlot:
    """A mean over the runs of a group, and their range."""
    label = next(label for label, axis in AXES.items() if axis == x)
    return wr.LinePlot(
        title=f"{title} against {label}",
        x=x,
        y=list[Any](names),
        title_x=label,
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
    )


def parts(plan: Plan) -> dict[str, list[Any]]:
    """The sections, and the panels of each."""
    positions = [line(f"positions {name.rpartition('/')[2]}", [name]) for name in plan.positions]
    best = next(iter(plan.validation), "validation/nats")
    speed = [line(title, [name]) for name, title in SPEED.items() if name in plan.metrics]
    size = wr.ScatterPlot(
        title="state size against the last validation", x=wr.Config("state_size"), y=wr.SummaryMetric(best), log_x=True
    )
    return {
        "Validation": [line(unit, [name], x) for name, unit in plan.validation.items() for x in AXES.values()],
        "Loss by position": [
            wr.BarPlot(title="at the end", metrics=list[Any](plan.positions), orientation="v"),
            *positions,
        ],
        "Training": [line(title, [name]) for name, title in TRAINING.items() if name in plan.metrics],
        "Speed, memory and state": [*speed, size],
        "Samples": [wr.WeavePanelSummaryTable(table_name="sample"), wr.MediaBrowser(media_keys=PICTURES)],
    }


def inner(metrics: list[str]) -> list[Any]:
    """A panel for each quantity, with a line for each layer."""
    layers: dict[str, list[str]] = {}
    for metric in metrics:
        if found := INNER.fullmatch(metric):
            layers.setdefault(found[1], []).append(metric)
    return [line(TITLES.get(name, name.replace("_", " ")), of) for name, of in layers.items()]


def workspace(plan: Plan) -> ws.Workspace:
    """One section for each subject, with the inner regression of all mixers in one."""
    sections = parts(plan)
    together = list(dict.fromkeys(metric for _, of in plan.mixers.values() for metric in of))
    samples = sections.pop("Samples")
    sections |= {"Inner regression": inner(together)} if together else {}
    return ws.Workspace(
        entity=plan.entity,
        project=plan.project,
        name=plan.title,
        sections=[
            ws.Section(name=name, panels=panels, is_open=name == "Validation")
            for name, panels in (sections | {"Samples": samples}).items()
        ],
        settings=ws.WorkspaceSettings(x_axis=TOKENS),
        runset_settings=ws.RunsetSettings(filters=plan.only, groupby=[ws.Config(key) for key in plan.by]),
    )


def report(plan: Plan) -> wr.Report:
    """As the workspace; the inner regression mixer by mixer."""
    blocks: list[Any] = [wr.TableOfContents()]
    sections = parts(plan)
    samples = sections.pop("Samples")
    for name, panels in sections.items():
        blocks += [wr.H1(name), wr.PanelGrid(runsets=[_runs(plan)], panels=panels)]
    for name, (only, metrics) in plan.mixers.items():
        blocks += [
            wr.H1(f"Inner regression: {name}"),
            wr.P("The loss is |v - m(k)|² / |v|², a mean over heads; 1 is what a memory that knows nothing has."),
            wr.PanelGrid(runsets=[_runs(plan, only)], panels=inner(metrics)),
        ]
    blocks += [wr.H1("Samples"), wr.PanelGrid(runsets=[_runs(plan)], panels=samples)]
    return wr.Report(
        entity=plan.entity,
        project=plan.project,
        title=plan.title,
        description="Made by scripts/dashboard.py. Lines are means over runs that differ in their seed.",
        blocks=blocks,
        width="fluid",
    )


def _runs(plan: Plan, only: str = "") -> wr.Runset:
    groups = [f"config.{key}" for key in plan.by]
    return wr.Runset(entity=plan.entity, project=plan.project, filters=only or plan.only, groupby=groups)


def outline(plan: Plan) -> str:
    """In words what is sent."""
    lines = [f"workspace and report '{plan.title}' in {plan.entity or '(your entity)'}/{plan.project}"]
    lines += [f"runs      {plan.only}", f"grouped   {', '.join(plan.by) or '(not)'}"]
    for name, panels in (
        parts(plan) | {f"Inner regression: {m}": inner(of) for m, (_, of) in plan.mixers.items()}
    ).items():
        lines += ["", name, *(f"  {_said(panel)}" for panel in panels)]
    return "\n".join(lines)


def _said(panel: Any) -> str:
    names = getattr(panel, "y", None) or getattr(panel, "metrics", None) or getattr(panel, "media_keys", None)
    shown = names if isinstance(names, list) else [getattr(names, "name", None) or panel.table_name]
    kind = "pictures" if isinstance(panel, wr.MediaBrowser) else "texts"
    return f"{getattr(panel, 'title', None) or kind}: {', '.join(map(str, shown))}"


def title_of(folders: list[Path]) -> str:
    return ", ".join(folder.resolve().name for folder in folders)[:128]
