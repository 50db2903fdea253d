"""The script that measures several GPUs, at toy size on a CPU."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict

import pytest

from scripts import scaling
from scripts.figures.speed import several
from scripts.scaled import link
from scripts.scaled.faults import STEPS, Checks
from scripts.scaled.launch import Scratch, innermost, side_by_side
from scripts.scaled.sending import of_step
from scripts.scaled.speed import Timed, cases, warming
from scripts.scaling import ITEMS, Told
from tests.conftest import ROOT

STACKS = f"""Thread 0x1 [watchdog] (most recent call first):
  File "{ROOT}/models/training/watchdog.py", line 54 in _watch
Thread 0x2 (most recent call first):
  File "/site/torch/distributed.py", line 5 in work
  File "{ROOT}/models/context.py", line 120 in backward
  File "{ROOT}/models/training/module.py", line 9 in step

Current thread 0x3 (most recent call first):
  File "/site/torch/autograd.py", line 7 in backward
"""


def test_every_item_has_cases():
    """On eight GPUs; two of them have one size less, and no replicas that are sharded."""
    found = [case for group in cases(8, toy=False) for case in group]
    assert {case.item for case in found} | {"link", "checks", "kills"} == set(ITEMS)
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


def test_a_check_has_a_time_of_its_own():
    def task(turns):
        for _ in range(turns):
            yield

    failed = side_by_side({"long": task(10**9), "short": task(2)}, 60, 1, each=0.05)
    assert failed == {"long": "not done within 0 s"}


def test_where_a_run_is():
    """The innermost line of models/ of each thread, but of the one that watches."""
    assert innermost(STACKS) == ["models/context.py:120 backward"]


def test_checks_are_chosen_by_their_names(tmp_path):
    """With what they are compared with."""
    checks = Checks(2, Scratch(str(tmp_path)), toy=True, fork=True)
    assert list(checks.chosen(checks.kills(), ["fsdp, step", "shards x2, SIGTERM"])) == [
        "one", "fsdp, step x2, SIGKILL", "fsdp, step x2, SIGTERM", "fsdp, shards x2, SIGTERM"]  # fmt: skip
    assert set(checks.like) == {"fsdp, step x2, SIGKILL", "fsdp, step x2, SIGTERM", "fsdp, shards x2, SIGTERM"}


def told(path, machine="2 x CPU", **stamp):
    return Told(path, {"machine": machine, "devices": 2, "toy": True, "steps": 3, "warm": False}, stamp)


def steps(tokens_per_second, median=1.0):
    """Of 512 tokens, the one in the middle so many times the mean."""
    return {"tokens_per_second": tokens_per_second, "tokens": 512.0, "step": median * 512 / tokens_per_second}


def test_uneven_steps_are_compared_with_no_others(tmp_path):
    found = told(None)
    found.add("rows", asdict(Timed("one", 1, [], **steps(100.0))))
    found.add("rows", asdict(Timed("uneven", 2, [], "one", **steps(100.0, 0.8))))
    found.add("rows", asdict(Timed("even", 2, [], "one", **steps(100.0, 0.95))))
    assert [row["of_linear"] for row in found.found["rows"]] == [None, None, 0.5]


def test_rows_stay_until_they_are_measured_again(tmp_path):
    """Each with its date and commit; and the page has them all, with what is sent beside what a step takes longer."""
    path, model = tmp_path / "found.json", ["model=gated_delta"]
    first = told(path, date="one day", commit="a", torch="2")
    first.add("rows", asdict(Timed("one", 1, model, **steps(100.0))))
    first.add("rows", asdict(Timed("ddp x2", 2, [*model, "strategy=ddp"], "one", **steps(150.0))))
    first.add("rows", asdict(Timed("context_parallel=2", 2, [*model, "strategy=ddp"], reason="not done")))
    again = told(path, date="another", commit="b", torch="2")
    again.add("rows", asdict(Timed("ddp x2", 2, [*model, "strategy=ddp"], "one", **steps(160.0))))
    rates = [{"kind": kind, "bytes": size, "seconds": 1.0, "gb_per_second": 1e-3} for kind in link.KINDS
             for size in (2**20, 2**25)]  # fmt: skip
    given = {"rates": rates, "peer": False, "topology": ["GPU0 X SYS"], "transport": ["SHM/direct"]}
    again.add("link", given | {"copy_gb_per_second": 2.0, "reason": ""})
    again.finish()
    found = json.loads(path.read_text())
    assert [(row["name"], row["commit"]) for row in found["rows"]] == [
        ("one", "a"), ("ddp x2", "b"), ("context_parallel=2", "a")]  # fmt: skip
    row = found["rows"][1]
    assert row["of_linear"] == 0.8 and row["sent"]["sum"] > 0
    page = "\n".join(several(found))
    longer = 512 / 160 - 512 / 200
    expected = row["sent"]["sum"] / 1e6
    assert f"| ddp x2 | 3.200 | {longer:.3f} | 0.00 | {expected:.3f} |" in page
    assert "one day with torch 2 (a) and another with torch 2 (b)" in page and "`SHM/direct`" in page
    with pytest.raises(ValueError, match=r"rows with machine=2 x CPU, and these have 2 x H200"):
        told(path, "2 x H200")


def test_what_a_row_sends():
    """`auto` is what the run said it was."""
    words = ["data=python_source", "tokenizer=bpe", "model=gated_delta", "size=340m"]
    step, block = (of_step([*words, "strategy=fsdp"], 2, whole_for, toy=False) for whole_for in ("step", "block"))
    assert step["gather"] == step["divide"] and block["divide"] == 8 * step["divide"] and step["sum"] == 0
    assert of_step([*words, "strategy=ddp"], 2, None, toy=False)["sum"] == 2 * step["gather"]


@pytest.mark.slow
def test_a_link_is_measured(tmp_path):
    found = link.measured(2, True, tmp_path, 60)
    assert not found["reason"] and {row["kind"] for row in found["rates"]} == set(link.KINDS)
    assert all(row["gb_per_second"] > 0 for row in found["rates"]) and found["peer"] is None
    assert link.measured(2, True, tmp_path, 0)["reason"] == "not done within 0 s"
    (tmp_path / "nccl.txt").write_text("0[0] -> 1[1] via P2P/CUMEM\n1[1] -> 0[0] via P2P/CUMEM\n")
    assert link.transport(tmp_path / "nccl.txt") == ["P2P/CUMEM"]


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


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"a": 1}', '{"rows": [1]}'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"^--json=.*other\.json is there and has no rows of this script"):
        scaling.rows_before(tmp_path / "other.json")
    assert (tmp_path / "other.json").read_text() == text


def test_nothing_after_the_link():
    scaling.one_after_the_other([], {}, None, None, None)
