"""The one door from a config node to an object.

A node with `_target_` names a class and its settings; `build` makes it, after `problems` has found nothing wrong. Only
classes that belong here can be named: a config, and above all the config inside somebody else's checkpoint, must not be
able to run what it likes.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf

TARGETS = ("models.", "data.", "torch.", "lightning.")
PACKAGES = "TTR_PACKAGES"  # an environment variable, so that no config can set it
KNOWN = ("models", "data", "torch", "lightning", "transformers", "hydra", "omegaconf")  # not somebody's own
HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}
OWNERS = (
    "hidden_size",
    "layer_index",
    "sizes",
)  # settings of a layer and its parts that the model gives

# Where classes stood before. Runs and exported models of that time name them so, and are read all the same.
MOVED = {
    "models.mixer": "models.mixers",
    "models.memory_attention": "models.mixers",
    "models.memory_context": "models.mixers",
    "models.mosaic": "models.mixers",
    "models.decay": "models.parts.decay",
    "models.features": "models.parts.features",
    "models.regression.delta": "models.regression.linear",
    "models.regression.delta_product": "models.regression.linear",
    "models.regression.longhorn": "models.regression.linear",
    "models.regression.momentum": "models.regression.linear",
    "models.regression.omega": "models.regression.linear",
    "models.regression.preconditioned": "models.regression.linear",
    "models.regression.kernel": "models.regression.local",
    "models.regression.local_polynomial": "models.regression.local",
    "models.regression.sliding_window": "models.regression.local",
    "models.regression.ttt": "models.regression.deep",
    "models.regression.deep.lact": "models.regression.deep",
}


def current(node: Any) -> Any:
    """The node with classes named as they are today."""
    if isinstance(node, dict):
        found = {key: current(value) for key, value in node.items()}
        module, _, name = str(found.get("_target_", "")).rpartition(".")
        return found | {"_target_": f"{MOVED[module]}.{name}"} if module in MOVED else found
    return [current(item) for item in node] if isinstance(node, list) else node


def build(node: Any, *, targets: tuple[str, ...] = TARGETS, **settings: Any) -> Any:
    """The object that a config node describes; `settings` are added to the node's own (sizes, say, that only the caller
    knows).

    Nested nodes are built first; one with `_partial_: true` becomes a constructor that its owner calls with what only
    the owner knows. Raises ValueError, naming the key, for a class that is not allowed or a setting that it does not
    have.
    """
    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    node = current(node)
    if found := list(problems(node, targets=targets)):
        raise ValueError("\n".join(found))
    try:
        return hydra.utils.instantiate(node, **settings, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while isinstance(cause, InstantiationException):
            cause = cause.__cause__
        if isinstance(cause, ValueError):  # the user's mistake, without Hydra's wrapping
            raise cause from None
        raise


def problems(node: Any, path: str = "", targets: tuple[str, ...] = TARGETS) -> Iterator[str]:
    """One sentence for every class that is not allowed, every setting that its class does not have, and every value
    that is no number where one is wanted, or the like, anywhere below node.
    """
    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, list):
        for i, item in enumerate(node):
            yield from problems(item, f"{path}[{i}]", targets)
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        yield from _problems_of_target(node, path, targets)
    for key, value in node.items():
        yield from problems(value, f"{path}.{key}" if path else str(key), targets)


def allowed_packages() -> tuple[str, ...]:
    """Packages of somebody else whose classes a config may name: TTR_PACKAGES=first,second. Raises ValueError for one
    that can't be found."""
    names = tuple(name.strip() for name in os.environ.get(PACKAGES, "").split(",") if name.strip())
    for name in names:
        if name in (*KNOWN, "conf", "scripts", "train"):
            raise ValueError(f"{PACKAGES}={os.environ[PACKAGES]}: {name!r} is taken; give your package another name")
        if not name.isidentifier() or name == "__main__" or importlib.util.find_spec(name) is None:
            raise ValueError(
                f"{PACKAGES}={os.environ[PACKAGES]}: {name!r} is not a package that Python finds; it must be "
                "the name of one that is installed, or whose folder is on PYTHONPATH"
            )
    return names


def parameters(name: str) -> list[str]:
    """The settings of the class that a `_target_` names, if a config may name it."""
    if not name.startswith((*TARGETS, *(f"{package}." for package in allowed_packages()))):
        return []
    module, _, attribute = name.rpartition(".")
    try:
        return _typed(settings_of(getattr(importlib.import_module(module), attribute)))
    except (ImportError, AttributeError):
        return []


def settings_of(target: Any) -> dict[str, inspect.Parameter]:
    """What can be given to a class or function by name; `**settings` are those of the class above it."""
    own = inspect.signature(target).parameters.items()
    found = {name: p for name, p in own if p.kind is not inspect.Parameter.VAR_POSITIONAL}
    for above in inspect.getmro(target)[1:-1] if inspect.isclass(target) else ():
        rest = next((name for name, p in found.items() if p.kind is inspect.Parameter.VAR_KEYWORD), None)
        if rest != "settings":
            break
        del found[rest]
        found = dict(inspect.signature(above).parameters) | found
    return found


KINDS = {  # by annotation, what a value has to be
    "None": "null",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a word",
    "Sequence[int]": "a list of whole numbers",
    "Sequence[float]": "a list of numbers",
    "tuple[int, ...]": "a list of whole numbers",
    "tuple[int, int]": "two whole numbers",
    "tuple[float, float]": "two numbers",
    "list[list[int]]": "a list of lists of whole numbers",
}


def wanted(key: str, value: Any, setting: inspect.Parameter) -> str | None:
    """What a setting must be, in words, if the value is something else: of one annotated `float | None`, "a number or
    null". None if it may be so; a setting of another annotation, a part's node and a default are not looked at."""
    part, names = isinstance(value, dict) and "_target_" in value, str(setting.annotation).split(" | ")
    if part or value in ("???", setting.default):
        return None
    if names[0].startswith("Callable[..., "):
        chosen = f"; {key}@...{key}={value} chooses one" if isinstance(value, str) else ""
        return None if value is None and "None" in names else f"a part, with a _target_{chosen}"
    if not set(names) <= KINDS.keys() or any(_fits(value, name) for name in names):
        return None
    return " or ".join(KINDS[name] for name in sorted(names, key="None".__eq__))


def _fits(value: Any, name: str) -> bool:
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "None": (type(None),)}
    if name in kinds or name == "bool":
        return isinstance(value, bool) if name == "bool" else type(value) is not bool and isinstance(value, kinds[name])
    if not isinstance(value, list) or (name.startswith("tuple") and "..." not in name and len(value) != 2):
        return False
    if name.startswith("list[list"):
        return all(_fits(item, "Sequence[int]") for item in value)
    return all(_fits(item, "float" if "float" in name else "int") for item in value)


def _typed(found: dict[str, inspect.Parameter]) -> list[str]:
    """Those that a config may give."""
    return [name for name, p in found.items() if name not in OWNERS or p.default is not inspect.Parameter.empty]


def near(word: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant: as many letters in the same order, the first above all (Winkler's measure);
    capitals and hyphens count for nothing."""

    def plain(name: str) -> str:
        return name.lower().replace("-", "_")

    def likeness(name: str) -> float:
        same = difflib.SequenceMatcher(None, plain(name), plain(word)).ratio()
        first = takewhile(lambda pair: pair[0] == pair[1], zip(plain(name)[:4], plain(word), strict=False))
        return same + (1 - same) * 0.1 * len(list(first))

    best = max(names, key=likeness, default="")
    return best if likeness(best) > 0.65 else None


def _belongs(target: Any, module: str) -> bool:
    """Whether this is one of our own classes or functions, from the module or package that defines it, or a class of a
    library. What a module imports from elsewhere (a way around TARGETS) and a library's functions (torch.load) are
    neither.
    """
    if module.split(".")[0] in ("models", "data", *allowed_packages()):
        ours = inspect.isclass(target) or inspect.isfunction(target)
        return ours and f"{target.__module__}.".startswith(f"{module}.")
    return inspect.isclass(target)


def _problems_of_target(node: dict[str, Any], path: str, targets: tuple[str, ...]) -> Iterator[str]:
    here = path or "config"
    name, own = node["_target_"], tuple(f"{package}." for package in allowed_packages())
    if not isinstance(name, str) or not name.startswith(targets + own):
        allowed = ", ".join(f"{t}*" for t in targets + own)
        said = f"{here}._target_={name} is not allowed; a config may name only {allowed}"
        package = str(name).split(".")[0]
        yours = package.isidentifier() and package not in sys.stdlib_module_names and package not in KNOWN
        yield f"{said} ({PACKAGES}={package} allows a package of your own)" if yours else said
        return
    module, _, attribute = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        yield f"{here}._target_={name} does not exist"
        return
    if not _belongs(target, module):
        yield f"{here}._target_={name} is not allowed; it is not a class of {module}, which a config may name"
        return
    found = settings_of(target)
    if f"{module}.".startswith(("models.", "data.", *own)):
        for key, value in node.items():
            if key in found and (kind := wanted(key, value, found[key])) is not None:
                yield f"{path}.{key}={'null' if value is None else value} must be {kind}".lstrip(".")
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values()):
        return
    typed = _typed(found)
    for key in node.keys() - HYDRA_KEYS - set(typed):
        meant = near(key, typed)
        hint = f"did you mean {meant}?" if meant else f"it has {', '.join(typed) or 'none'}"
        yield f"{path}.{key}={node[key]} is not a setting of {name}; {hint}".lstrip(".")
