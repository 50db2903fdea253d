"""The script that measures several GPUs, at toy size on a CPU."""

from __future__ import annotations

import json
import signal

import pytest

from scripts.scaled.faults import ROUNDING, Checks
from scripts.scaled.launch import Scratch, side_by_side
from scripts.scaled.speed import cases
from scripts.scaling import ITEMS
from tests.started import Started


def test_every_item_has_cases():
    """On eight GPUs; two of them have one size less, and no replicas that are sharded."""
    found = [case for group in cases(8, toy=False) for case in group]
    assert {case.item for case in found} | {"checks", "kills"} == set(ITEMS)
    assert len({case.name for case in found}) == len(found)
    assert {case.beside for case in found} <= {"", *(case.name for case in found)}
    assert {case.devices for case in found} == {1, 2, 4, 8}
    assert {case.devices for group in cases(2, toy=False) for case in group} == {1, 2}
    assert all(sum(case.devices for case in group) <= 2 for group in cases(2, toy=False))


@pytest.mark.slow
def test_rows_are_timed(tmp_path, cache):
    path = tmp_path / "found.json"
    words = ["--toy", "--only", "one", "--steps", "1", "--scratch", f"{tmp_path}/runs", "--json", str(path)]
    started = Started(tmp_path, words, {"TTR_CACHE": str(cache)}, "scripts.scaling")
    said = started.end(170)
    assert started.returncode == 0, said
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == ["one", "one, no graph"]
    for row in rows:
        assert not row["reason"] and row["tokens_per_second"] > 0 and row["name"] in said
        assert row["losses"][:2] == rows[0]["losses"][:2]


@pytest.mark.slow
def test_a_killed_run_is_checked(tmp_path, monkeypatch, cache):
    """Of one process, twice, and what is told of it."""
    monkeypatch.setenv("TTR_CACHE", str(cache))
    checks = Checks(1, Scratch(str(tmp_path)), toy=True, fork=True)
    tasks = {"one": checks.runs()["one"], "killed": checks.killed("killed", [], signal.SIGTERM)}
    checks.like = {"killed": ("one", ROUNDING["float32"]), "lost": ("one", 0.0), "left out": ("one", 0.0)}
    assert not side_by_side(tasks, 170)
    killed, lost, left_out = checks.told({"lost": "a reason"})
    assert killed["difference"] == 0  # one device, twice the same
    assert (lost["reason"], left_out["reason"]) == ("a reason", "not run")
