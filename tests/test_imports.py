"""Arrows run one way: a module imports from its own floor or from those below it, and no two import each other."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the roof to the ground; the longest prefix that fits a module is its floor.
FLOORS = (
    ("train", "scripts"),
    ("models.training",),
    ("conf",),
    ("data",),
    ("models.reconstruction", "models.continuous"),
    (
        *("models.language_model", "models.config", "models.generation"),
        *("models.calls", "models.cache", "models.context", "models.decoding"),
    ),
    ("models.block",),
    ("models.mixers",),
    ("models.regression.deep",),
    ("models.regression.local", "models.regression.least_squares", "models.regression.linear"),
    ("models.regression",),
    ("models.loss",),
    ("models.kernels",),
    ("models.parts", "models.build", "models"),
)
ONLY = {
    "fla": ("models.kernels.fla", "scripts.benchmarks.peers", "scripts.exporting.fla_models"),
    "lightning": ("models.training", "conf.checks", "data.module", "train"),
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] in
         ("train.py", "scripts", "conf", "data", "models")}  # fmt: skip


@cache
def imports(name: str) -> frozenset[str]:
    """Every module that it names in an import, wherever in the file; a package where no module of it is named."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & FILES.keys() or {node.module}
    return frozenset(found)


def floor(name: str) -> int:
    fits = [(len(part), i) for i, parts in enumerate(FLOORS) for part in parts if f"{name}.".startswith(f"{part}.")]
    return max(fits)[1]


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_arrow_goes_up(name):
    for other in imports(name) & FILES.keys():
        assert floor(other) >= floor(name), f"{name} imports {other}, which stands above it"


def test_there_is_no_circle():
    """A package's __init__ shows what its modules hold, so that a module may not ask its own package for it."""
    graph = {name: imports(name) & FILES.keys() - {name} for name in FILES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"these import each other: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("library", ONLY)
def test_a_library_is_imported_where_it_belongs_and_nowhere_else(library):
    for name in FILES:
        if any(other.split(".")[0] == library for other in imports(name)):
            assert f"{name}.".startswith(tuple(f"{part}." for part in ONLY[library])), f"{name} imports {library}"
