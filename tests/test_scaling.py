"""The script that measures several GPUs, at toy size on a CPU."""

from __future__ import annotations

import json
import signal

import pytest

from scripts import scaling
from scripts.scaled.faults import STEPS, Checks
from scripts.scaled.launch import Scratch, side_by_side
from scripts.scaled.speed import cases, warming
from scripts.scaling import ITEMS


def test_every_item_has_cases():
    """On eight GPUs; two of them have one size less, and no replicas that are sharded."""
    found = [case for group in cases(8, toy=False) for case in group]
    assert {case.item for case in found} | {"checks", "kills"} == set(ITEMS)
    assert len({case.name for case in found}) == len(found)
    assert {case.beside for case in found} <= {"", *(case.name for case in found)}
    assert {case.devices for case in found} == {1, 2, 4, 8}
    assert {case.devices for group in cases(2, toy=False) for case in group} == {1, 2}
    assert all(sum(case.devices for case in group) <= 2 for group in cases(2, toy=False))
    warm = [case.name for case in warming(cases(2, toy=False))]
    sequence = "context_parallel=2, seq_len=262144"
    assert warm == ["ddp x2", "fsdp x2", sequence, "1300m fsdp x2", "1300m, 80 GB, micro_batch=8"]


def test_few_at_once():
    order = []

    def task(name):
        for _ in range(2):
            order.append(name)
            yield

    assert side_by_side({name: task(name) for name in "abc"}, 60, 2) == {}
    assert order == ["a", "b", "a", "b", "c", "c"]


def test_what_was_begun_ends_with_the_script():
    """Where `timeout` ends it, say."""
    ended = []

    def waits():
        try:
            while True:
                yield
        finally:
            ended.append("waits")

    def stops():
        yield
        raise SystemExit("SIGTERM")

    with pytest.raises(SystemExit):
        side_by_side({"waits": waits(), "stops": stops()}, 60)
    assert ended == ["waits"]
    assert side_by_side({"waits": waits()}, 0) == {"waits": "not done within 0 s"} and len(ended) == 2


@pytest.mark.slow
def test_rows_are_timed_and_kills_checked(tmp_path, monkeypatch, cache, capsys):
    """One process, timed, and killed twice: what is printed, written and told of it."""
    monkeypatch.setenv("TTR_CACHE", str(cache))
    path = tmp_path / "found.json"
    words = ["--toy", "--only", "one", "--devices", "1", "--steps", "1", "--scratch", f"{tmp_path}/runs"]
    monkeypatch.setattr("sys.argv", ["scaling.py", *words, "--json", str(path)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        scaling.main()
        with pytest.raises(SystemExit, match="SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    (row,) = json.loads(path.read_text())["rows"]
    assert row["name"] == "one" and not row["reason"] and row["tokens_per_second"] > 0 and len(row["losses"]) > 1
    assert f"{row['tokens_per_second']:,.0f}" in capsys.readouterr().out
    checks = Checks(1, Scratch(str(tmp_path)), toy=True, fork=True)
    assert not side_by_side({"killed": checks.killed("killed", [], signal.SIGTERM)}, 170)
    checks.losses["one"] = [loss * 1.01 for loss in checks.losses["killed"]]
    checks.like = {"killed": ("one", 0.0), "lost": ("one", 0.0), "left out": ("one", 0.0)}
    killed, lost, left_out = checks.told({"lost": "a reason"})
    assert len(checks.losses["killed"]) == STEPS and killed["difference"] == pytest.approx(0.01, rel=0.02)
    assert (lost["reason"], left_out["reason"]) == ("a reason", "not run")
