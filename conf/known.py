"""What a word of the command line may be: the names of the config that the other words mean, for near matches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from models.build import near, parameters

AT_MOST = 12  # names in one sentence


class Word(NamedTuple):
    """A setting as it was typed, and as Hydra reads it."""

    typed: str
    read: Override

    @property
    def key(self) -> str:
        """Of a group with its package."""
        return self.read.get_key_element().lstrip("+~")

    @property
    def group(self) -> str:
        return self.key.partition("@")[0]

    @property
    def value(self) -> str:
        return self.typed.partition("=")[2]

    @property
    def bare(self) -> str:
        return self.typed.lstrip("+~")


def read(words: Iterable[str]) -> list[Word]:
    """Those that Hydra can read."""
    found = []
    for word in words:
        try:
            found.append(Word(word, OverridesParser.create().parse_override(word)))
        except HydraException:
            continue
    return found


class Known:
    """A config, and the groups that it was chosen from."""

    def __init__(self, config: DictConfig, loader: ConfigLoader, words: list[str]) -> None:
        self.config, self.loader, self.words = config, loader, words
        self.groups = [group for group in loader.list_groups("") if group != "hydra"]

    def groups_in(self, path: str) -> list[str]:
        """Groups of groups: hydra/launcher."""
        folder = path.rpartition("/")[0]
        return [f"{folder}/{group}" for group in self.loader.list_groups(folder)]

    def options(self, group: str) -> list[str]:
        """Those in a folder of the group with its name: baseline/mamba."""
        inside = [] if group == "hydra" else self.loader.list_groups(group)
        each = {"": group} | {f"{folder}/": f"{group}/{folder}" for folder in inside}
        found = ((name, self._options(of)) for name, of in each.items())
        return [f"{name}{option}" for name, options in found for option in options]

    def _options(self, group: str) -> list[str]:
        return self.loader.get_group_options(group, config_name="train", overrides=self.words)

    def keys(self, path: str) -> list[str]:
        """What is written in the node there, and what its class has besides where that needs torch and no more; of the
        whole config, with the groups."""
        node = OmegaConf.select(self.config, path) if path else self.config
        if not isinstance(node, DictConfig):
            return []
        target = self.target(path)
        quick = target.startswith("models.") and not target.startswith("models.training.")
        more = (self.groups if not path else []) + (parameters(target) if quick else [])
        return list(dict.fromkeys([*map(str, node), *more]))

    def unwritten(self, path: str) -> list[str]:
        """The settings of the node's class, written or not; the import may take seconds."""
        return parameters(self.target(path))

    def target(self, path: str) -> str:
        return str(OmegaConf.select(self.config, f"{path}._target_", default="")) if path else ""

    def elsewhere(self, name: str) -> list[str]:
        """Settings of this name, wherever they stand; the nearest to the root first."""
        paths = [path for path in _paths(self.config) if path.rpartition(".")[2] == name]
        return sorted(paths, key=lambda path: (path.startswith("hydra."), path.count("."), path))

    def option(self, name: str) -> str | None:
        """GROUP=NAME for a name that stands alone."""
        of = {option: group for group in ["size", *self.groups, "model"] for option in self.options(group)}
        meant = near(name.rpartition("/")[2], of)
        return None if meant is None else f"{of[meant]}={meant}"


def _paths(node: DictConfig, path: str = "") -> Iterator[str]:
    for key in node:
        here = f"{path}.{key!s}" if path else str(key)
        yield here
        child = node._get_node(key)  # an interpolation is not followed
        if isinstance(child, DictConfig) and not child._is_interpolation():
            yield from _paths(child, here)


def known(typed: list[Word], mistaken: str = "") -> Known:
    """`mistaken` is the key of the word that is left out."""
    return _known(tuple(w.typed for w in typed if w.key != mistaken and not w.read.is_sweep_override()))


@cache
def _known(words: tuple[str, ...]) -> Known:
    with initialize_config_dir(str(Path(__file__).parent), version_base="1.3"):
        try:
            config = compose("train", list(words), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, ValueError):  # another mistake, which is told after this one
            words = ()
            config = compose("train", return_hydra_config=True)
        return Known(config, GlobalHydra.instance().config_loader(), list(words))


def hidden() -> Iterator[str]:
    """Files of another folder (hydra.searchpath) that are never read, since a folder before it has one of that name.
    Called in the job."""
    runtime = HydraConfig.get().runtime
    places = [folder for source in runtime.config_sources for folder in folders(source.schema, source.path)]
    for group, choice in runtime.choices.items():
        file = f"{group.partition('@')[0]}/{choice}.yaml"
        there = [place / file for place in places if (place / file).is_file()]
        for other in there[1:]:
            yield f"{group}={choice} is {there[0]}, and {other} would never be read; give it another name"


def folders(schema: str, path: str) -> list[Path]:
    """Where a source of configs has its files; a package has them beside its code."""
    if schema == "pkg" and (package := find_spec(path.replace("/", "."))):
        return list(map(Path, package.submodule_search_locations or ()))
    return [Path(path)] if schema == "file" else []


def choices(names: Iterable[str]) -> str:
    shown = sorted(names)
    more = f", ... (python train.py --help lists all {len(shown)})" if len(shown) > AT_MOST else ""
    return f"there {'is only' if len(shown) == 1 else 'are'} {', '.join(shown[:AT_MOST]) or 'none'}{more}"
