"""pytest tests/laws --recipe conf/mixer/NAME.yaml --objective MODULE: the laws on one recipe, maybe somebody else's."""

from __future__ import annotations

import importlib
from collections.abc import Generator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("laws")
    group.addoption("--recipe", help="try the laws on this conf/mixer/NAME.yaml alone, whoever's conf it is")
    group.addoption("--objective", help="a module with the check, @states('NAME'), of what the recipe minimises")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is collected, and in every worker. What is wrong with either option is said in a sentence."""
    from tests.laws import presets  # here, where pytest has seen to sys.path

    recipe, objective = config.getoption("recipe", None), config.getoption("objective", None)
    try:
        if recipe is not None:
            presets.only(Path(recipe))
    except ValueError as error:
        raise pytest.UsageError(f"--recipe {recipe}: {error}") from None
    if objective is not None:
        pytest.register_assert_rewrite(objective)
        try:
            importlib.import_module(objective)
        except ModuleNotFoundError as error:
            raise pytest.UsageError(f"--objective {objective}: {error}; its folder must be on PYTHONPATH") from None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Of somebody's own recipe that breaks a law only the sentence is shown, which otherwise stands far above the end,
    among the law's own code. --tb=long shows both."""
    report = yield
    config = item.config
    if report.failed and config.getoption("recipe", None) and config.getoption("tbstyle") != "long":
        said = str(call.excinfo.value) if call.excinfo and call.excinfo.errisinstance(AssertionError) else ""
        if said and not said.startswith("assert "):
            report.longrepr = said.splitlines()[0]
    return report
