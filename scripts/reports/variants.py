"""Runs that differ in nothing but the seed are one variant; its name is what it has and others have not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from conf.folders import FREE_TO_CHANGE
from scripts.reports.intervals import Interval, interval, paired
from scripts.reports.presets import ABSENT, leaves, mixers
from scripts.reports.runs import NATS, NUMBERS, Record

NO_DIFFERENCE = {"name", "seed", "validate_every", "checkpoint_every", *FREE_TO_CHANGE}  # to what a run learns
MIXER = "mixer"
BASELINE = "softmax"


@dataclass
class Variant:
    """runs: one a seed, finished. baseline: the variant with softmax attention that it is compared with."""

    label: str
    settings: dict[str, Any]  # those that differ among the variants
    runs: list[Record] = field(default_factory=list)
    baseline: Variant | None = None
    rank: int = 0  # 0 is the best

    @property
    def by_seed(self) -> dict[int, Record]:
        return {run.seed: run for run in self.runs}

    def number(self, name: str) -> Interval:
        """Of a number in result.json, over the runs that have it."""
        return interval([run.result[name] for run in self.runs if run.result and run.result.get(name) is not None])

    def minus_baseline(self, name: str) -> Interval | None:
        if self.baseline is None or self.baseline is self:
            return None

        ours, theirs = (
            {seed: (run.result or {}).get(name, math.nan) for seed, run in of.by_seed.items()}
            for of in (self, self.baseline)
        )
        return paired(ours, theirs)


@dataclass(frozen=True)
class Comparison:
    """All that a page compares. metric: the number of result.json by which it ranks; unit: what it is called."""

    variants: list[Variant]  # the best first
    metric: str
    unit: str
    twice: list[tuple[Record, Record]]  # runs with the config and the seed of another, which is counted
    common: dict[str, Any]  # the settings that all runs have
    unlike: dict[
        Any, dict[str, Any]
    ]  # by folder of a run that is not finished, what it has of the settings that differ

    @property
    def higher_is_better(self) -> bool:
        return self.metric.endswith("accuracy")


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """What decides the numbers of a run, flat, the mixers first and by the names of their presets."""
    model = config.get("model", {})
    found: dict[str, Any] = {}
    if model.get("mixers") and model.get("pattern"):
        name, others = mixers(model)
        found = {MIXER: name} | others
        model = {key: value for key, value in model.items() if key not in ("mixers", "pattern")}
    rest = {key: value for key, value in config.items() if key not in NO_DIFFERENCE and key != "model"}
    return found | dict(leaves({"model": model, **rest}))


def differing(all_settings: Sequence[dict[str, Any]]) -> list[str]:
    """The settings in which they are not all alike. Where the class of a node differs, settings that follow from the
    class are left out."""
    keys = list(dict.fromkeys(key for of in all_settings for key in of))
    differ = [key for key in keys if len({str(of.get(key, ABSENT)) for of in all_settings}) > 1]

    def follows(key: str) -> bool:
        node = next((k for k in differ if k.endswith("._target_") and key.startswith(k.removesuffix("_target_"))), key)
        if node == key:
            return False
        return len({(str(of.get(node)), str(of.get(key, ABSENT))) for of in all_settings}) == len(
            {str(of.get(node)) for of in all_settings}
        )

    return [key for key in differ if not follows(key)]


def compare(records: Sequence[Record]) -> Comparison:
    known = {record.folder: settings(record.config) for record in records if record.config}
    done = [record for record in records if record.finished]
    differ = differing([known[record.folder] for record in done])
    variants: dict[tuple[str, ...], Variant] = {}
    twice = []
    for record in done:
        values = {key: known[record.folder].get(key, ABSENT) for key in differ}
        variant = variants.setdefault(tuple(map(str, values.values())), Variant("", values))
        same = [run for run in variant.runs if run.seed == record.seed]
        if same:
            twice.append((record, same[0]))
        else:
            variant.runs.append(record)
    found = list(variants.values())
    name_by = _least([variant.settings for variant in found], differ)
    for variant, label in zip(found, _labels([variant.settings for variant in found], name_by), strict=True):
        variant.runs.sort(key=lambda run: run.seed)
        first = known[variant.runs[0].folder]
        variant.label = label or str(first.get(MIXER, variant.runs[0].folder.name))
    _find_baselines(found, known, name_by)
    metric, unit = _metric(done)
    sign = -1 if metric.endswith("accuracy") else 1

    def place(variant: Variant) -> tuple[bool, float]:
        mean = variant.number(metric).mean
        return (not math.isfinite(mean), sign * mean)

    found.sort(key=place)
    for rank, variant in enumerate(found):
        variant.rank = rank
    common = {k: v for k, v in known[done[0].folder].items() if k not in differ and not k.endswith("_partial_")}
    every = differing(list(known.values()))
    unlike = {
        record.folder: {key: known[record.folder].get(key, ABSENT) for key in every}
        for record in records
        if record.config and not record.finished
    }
    return Comparison(found, metric, unit, twice, common, unlike)


def _least(all_settings: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[str]:
    """The first of the settings that are enough to tell all apart."""
    chosen: list[str] = []
    for key in keys:
        before = {tuple(str(of[k]) for k in chosen) for of in all_settings}
        after = {tuple(str(of[k]) for k in (*chosen, key)) for of in all_settings}
        if len(after) > len(before):
            chosen.append(key)
    return chosen


def _labels(all_settings: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[str]:
    """A setting that only others have is left out where the rest tells them apart."""
    whole = [[(key, of[key]) for key in keys] for of in all_settings]
    short = [[(key, value) for key, value in words if value != ABSENT] for words in whole]
    said, all_said = ([", ".join(shown(*word, keys) for word in words) for words in of] for of in (short, whole))
    return said if len(set(said)) == len(said) and all(said) else all_said


def shown(key: str, value: Any, among: Sequence[str] = ()) -> str:
    """A setting in words: the mixer by its name alone, others by the last part of their key where that is enough."""
    text = value_of(key, value)
    if key == MIXER:
        return text
    plain = key.removesuffix("._target_")
    last = plain.rpartition(".")[2]
    alone = [k for k in among if k.removesuffix("._target_").rpartition(".")[2] == last] in ([], [key])
    return f"{last if alone else plain}={text}"


def value_of(key: str, value: Any) -> str:
    if key.endswith("_target_"):
        return str(value).rpartition(".")[2]
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


def _find_baselines(variants: list[Variant], known: dict[Any, dict[str, Any]], names: Sequence[str]) -> None:
    """Softmax attention with the same other settings, as far as they are in a label; else the only one there is."""
    mixer = {id(variant): known[variant.runs[0].folder].get(MIXER) for variant in variants}
    softmax = [variant for variant in variants if mixer[id(variant)] == BASELINE]
    for variant in variants:

        def alike(other: Variant, variant: Variant = variant) -> bool:
            return all(other.settings[key] == variant.settings[key] for key in names if key != MIXER)

        same = [variant] if variant in softmax else [other for other in softmax if alike(other)]
        fits = same or softmax
        variant.baseline = fits[0] if len(fits) == 1 else None


def _metric(done: Sequence[Record]) -> tuple[str, str]:
    for name, unit in NUMBERS.items():
        if all(name in (record.result or {}) for record in done):
            return name, unit
    return "validation/nats", NATS
