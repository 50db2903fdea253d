"""The package: what the code imports is what pyproject.toml asks for, and what it holds is what is installed."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_namespace_packages

from tests.conftest import ROOT
from tests.test_imports import FILES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIRED = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["project"]["dependencies"])}
# imported where they are asked for
EXTRAS = {"lm_eval": "evaluation", "wandb_workspaces": "dashboard", "pytest": "dev"}
PEERS = "scripts.benchmarks.peers"  # imports what it is compared with, where that is installed
WITH_TORCH = {"triton"}  # comes with a CUDA build of torch; code that needs it asks first


def imported() -> set[str]:
    """The distributions of all modules that are no part of Python and none of ours."""
    names, ours = set(), {name.split(".")[0] for name in FILES}
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())) if name != PEERS else ():
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    others = names - ours - set(sys.stdlib_module_names) - WITH_TORCH
    found = packages_distributions() | {name: [name] for name in EXTRAS}  # which may not be installed
    return {canonicalize_name(found[name][0]) for name in others}


def pinned(file: str) -> dict[str, Requirement]:
    """The lines of a file of requirements, by name."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def test_every_import_is_asked_for():
    # fla is two distributions, of which flash-linear-attention brings the other
    assert imported() - {"fla-core"} <= REQUIRED.keys() | set(map(canonicalize_name, EXTRAS))


def test_an_extra_brings_what_its_code_imports():
    extras = PROJECT["project"]["optional-dependencies"]
    for name, extra in EXTRAS.items():
        assert canonicalize_name(name) in {canonicalize_name(Requirement(line).name) for line in extras[extra]}


@pytest.mark.parametrize(
    ("file", "ranges"),
    [
        ("requirements.txt", PROJECT["project"]["dependencies"]),
        ("requirements-dev.txt", PROJECT["project"]["optional-dependencies"]["dev"]),
    ],
)
def test_pins_are_within_the_ranges(file, ranges):
    """All are pinned but what depends on the machine, which has the same range in both files."""
    wanted = {canonicalize_name(r.name): r for r in map(Requirement, ranges)}
    pins = pinned(file)
    assert pins.keys() == wanted.keys()
    for name, pin in pins.items():
        (only,) = pin.specifier
        assert pin.marker == wanted[name].marker, name
        assert only.version in wanted[name].specifier if only.operator == "==" else pin.marker, name


def test_what_builds_the_site_is_pinned_in_one_place():
    site = pinned("docs/requirements.txt")
    assert all([clause.operator for clause in pin.specifier] == ["=="] for pin in site.values())
    asked = chain(PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values())
    others = {canonicalize_name(r.name) for r in map(Requirement, asked)}
    assert not site.keys() & (others | pinned("requirements.txt").keys() | pinned("requirements-dev.txt").keys())


def test_every_folder_is_packed():
    patterns = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    packed = set(find_namespace_packages(str(ROOT), include=patterns))
    assert {".".join(path.relative_to(ROOT).parent.parts) for path in FILES.values()} - {""} <= packed
    assert {f"conf.{path.parent.name}" for path in (ROOT / "conf").glob("*/*.yaml")} <= packed


@pytest.mark.slow
def test_it_can_be_imported_from_another_folder(tmp_path):
    def run(code: str) -> int:
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode

    if run("from importlib.metadata import version; version('test-time-regression')"):
        pytest.skip("not installed: pip install --no-deps -e .")
    assert run("import conf.schema, models.language_model") == 0
