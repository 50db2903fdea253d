"""scripts/gpu_tests.py spreads tests over processes, and one that ends its process is one that failed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

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


@pytest.mark.slow
def test_each_test_is_run_and_failures_are_told(tmp_path):
    (tmp_path / "test_them.py").write_text(TESTS)
    command = [sys.executable, "scripts/gpu_tests.py", "--workers", "2", "--rootdir", str(tmp_path), str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1, found.stderr
    assert "7 of 7 done, 2 failed" in found.stdout.splitlines()[-1], found.stdout
    assert "test_of_many[1]: its process ended there, exit code 7" in found.stdout
    assert "three is wrong" in found.stdout and "7 tests, 2 processes" in found.stdout
