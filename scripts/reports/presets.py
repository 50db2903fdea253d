"""Which preset of conf/mixer the config of a mixer is, and how far from it: a config.yaml has classes and numbers, and
a reader knows names.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[2] / "conf"
ABSENT = "(absent)"


def mixers(model: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """In words what the layers are, like '3 gated_delta, softmax', and the settings that are not their presets'."""
    names: dict[str, str] = {}
    others: dict[str, Any] = {}
    parts = list(dict.fromkeys(model["pattern"]))
    for part in parts:
        names[part], differ = nearest(model["mixers"][part])
        others |= {key if len(parts) == 1 else f"{part}.{key}": value for key, value in differ.items()}
    layers = [(name, len(list(same))) for name, same in groupby(names[part] for part in model["pattern"])]
    if len(layers) == 1:
        return layers[0][0], others
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in layers), others


def nearest(mixer: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the preset with the same classes and the fewest other settings, and these, by their path; among
    equals that of which the mixer lacks the fewest settings. Where no preset has the mixer's regressor, the name of the
    regressor's class, and all settings. A baseline has none, and is known by its own class."""
    classes = {path: value for path, value in leaves(mixer) if path.endswith("_target_")}
    alike = {name: len(classes.items() ^ of.items()) for name, of in all_classes().items()}
    own = {path: value for path, value in classes.items() if "regressor" in path} or classes
    alike = {name: count for name, count in alike.items() if own.items() <= all_classes()[name].items()}
    if not alike:
        name = classes.get("regressor._target_", mixer.get("_target_", "a mixer without a class"))
        return str(name).rpartition(".")[2], dict(leaves(mixer))
    candidates = sorted(name for name, count in alike.items() if count == min(alike.values()))
    others = {name: _others(mixer, composed(name)) for name in candidates}
    own_keys = dict(leaves(mixer)).keys()
    lacks = {name: len(dict(leaves(composed(name))).keys() - own_keys) for name in candidates}
    best = min(candidates, key=lambda name: (len(others[name]), lacks[name]))
    return best, others[best]


def _others(mixer: dict[str, Any], preset: dict[str, Any]) -> dict[str, Any]:
    """What the mixer has and the preset has not. A value that the preset takes from elsewhere is no setting of it."""
    known = dict(leaves(preset))
    return {
        path: value
        for path, value in leaves(mixer)
        if value != (before := known.get(path, ABSENT)) and "${" not in str(before)
    }


def leaves(node: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """('a.b', value) of all values; a list is one."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


@cache
def all_classes() -> dict[str, dict[str, str]]:
    """Of every preset, the class of each of its parts, like {'regressor._target_': 'models. ...'}."""
    return {
        path.stem: dict(_classes(_group(path.stem), path.stem)) for path in sorted((CONF / "mixer").rglob("*.yaml"))
    }


def _group(name: str) -> str:
    """Of a preset."""
    return "mixer" if (CONF / "mixer" / f"{name}.yaml").exists() else "mixer/baseline"


def _classes(group: str, name: str, before: str = "") -> Iterator[tuple[str, str]]:
    """By the lists of defaults alone: to compose all presets takes seconds."""
    node = _file(group, name)
    for entry in node.get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":  # another file of the group, which this one adds to
            yield from _classes(group, entry, before)
        for key, option in entry.items() if isinstance(entry, dict) else ():
            part, _, package = key.lstrip("/").partition("@")
            yield from _classes(part, option, f"{before}{package}.")
    if "_target_" in node:
        yield f"{before}_target_", node["_target_"]


@cache
def _file(group: str, name: str) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
    return found


@cache
def composed(name: str) -> dict[str, Any]:
    """The preset as Hydra composes it, with what it takes from the model left open."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found: Any = OmegaConf.to_container(compose(f"{_group(name)}/{name}"))
    for key in _group(name).split("/"):
        found = found[key]
    return found
