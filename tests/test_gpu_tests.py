"""scripts/gpu_tests.py spreads tests over processes, and one that ends its process is one that failed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scripts import gpu_tests
from tests.conftest import ROOT
from tests.laws.presets import PRESETS

TESTS = """
import os, pytest

@pytest.fixture(scope="module")
def made():
    return []

@pytest.mark.parametrize("i", range(6))
def test_of_many(made, i):
    if i == 1:
        os._exit(7)
    assert i != 3, "three is wrong"

def test_that_is_skipped():
    pytest.skip("not here")
"""


def test_the_longest_are_begun_first_and_alone(monkeypatch):
    """Others of one file go together while they are few and short, and keep their order."""
    monkeypatch.setattr(gpu_tests, "SECONDS", {"b.py long": 100.0, "b.py": 12.0})
    names = [*(f"a.py::x[{i}]" for i in range(8)), "b.py::x[short]", "b.py::x[long]", *(f"b.py::x[{i}]" for i in "123")]
    assert gpu_tests.chunks_of(names) == [
        ["b.py::x[long]"],
        ["b.py::x[1]", "b.py::x[2]"],
        names[:6],
        ["b.py::x[short]"],
        ["b.py::x[3]"],
        names[6:8],
    ]


def test_the_table_of_seconds_names_files_with_tests_of_a_gpu():
    """Each by words that no other before it has; presets are still there."""
    files = " ".join(path.rsplit("/")[-1] for path in gpu_tests.files())
    for words in gpu_tests.SECONDS:
        file, *presets = words.split()
        assert file in files, words
        if file != "test_least_squares.py" and presets != ["compiled"]:
            assert all(any(word in preset for preset in PRESETS) for word in presets), words
        assert next(known for known in gpu_tests.SECONDS if set(known.split()) <= set(words.split())) == words


@pytest.mark.slow
def test_each_test_is_run_and_failures_are_told(tmp_path):
    (tmp_path / "test_them.py").write_text(TESTS)
    command = [sys.executable, "scripts/gpu_tests.py", "--workers", "2", "--rootdir", str(tmp_path), str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1, found.stderr
    assert "7 of 7 done, 2 failed" in found.stdout.splitlines()[-1], found.stdout
    assert "test_of_many[1]: its process ended there, exit code 7" in found.stdout
    assert "three is wrong" in found.stdout and "7 tests, 2 processes" in found.stdout
