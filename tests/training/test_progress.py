"""A run that can be read while it runs, and a result that says where it comes from.

https://github.com/ashleve/lightning-hydra-template/issues/467 (a log without a terminal stays empty),
https://github.com/Lightning-AI/pytorch-lightning/issues/6647 (or gets a line for every change of the bar).
"""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from models.training import origin
from models.training.progress import Progress
from models.training.speed import Throughput, memory_gb, mfu
from tests.training.test_interruptions import NUM_STEPS, Fit, Stopped

LINE = r"step +(\d+) of 12   loss \d\.\d{3} nats per token   [\d,]+ tokens/s   memory \d+\.\d GB   \d:\d\d:\d\d left"
VALIDATION = r"step +(\d+) of 12   loss \d\.\d{3}, validation \d\.\d{3} nats per token   \d\.\d{3} accuracy   .* left"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def said(folder, progress: Progress, capsys) -> tuple[Fit, str]:
    fit = Fit(folder)
    fit.callbacks[1:1] = [Throughput(), progress]
    fit.run()
    return fit, capsys.readouterr().out


def test_without_a_terminal_there_are_lines(tmp_path, capsys):
    """Every half minute, and here after every step; none where the clock has not gone so far."""
    fit, out = said(tmp_path, Progress(0), capsys)
    assert re.findall(LINE, out) == [str(step + 1) for step in range(NUM_STEPS)], out
    assert re.findall(VALIDATION, out) == ["6", "12"]
    assert fit.module.first_step == 0
    for row in fit.rows:  # validation's too
        tokens = 64 * (row["step"] + 1)
        assert row["progress/tokens"] == tokens
        assert row["progress/flops"] == tokens * 3 * fit.module.model.flops_per_token(16)
    assert [row["step"] for row in fit.rows if "validation/nats" in row] == [5, 11]


def test_with_a_terminal_there_is_a_bar_with_the_speed(tmp_path, capsys, monkeypatch):
    bar = Terminal()
    monkeypatch.setattr(sys, "stderr", bar)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, out = said(tmp_path, Progress(0), capsys)
    assert re.search(r"12/12 .*loss=\d\.\d{3} nats, tokens/s=[\d,]+, validation=\d\.\d{3} nats", bar.getvalue())
    assert not re.search(LINE, out) and re.findall(VALIDATION, out) == ["6", "12"]


def test_the_time_left_of_a_run_that_goes_on_is_from_where_it_went_on(tmp_path, capsys):
    """Not as if this process had done the steps before it."""
    with pytest.raises(Stopped):
        Fit(tmp_path, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 8 else None).run()
    progress = Progress(None)
    fit, out = said(tmp_path, progress, capsys)
    assert progress.first == fit.module.first_step == 8 and not re.search(LINE, out)


def test_the_speed_and_its_share_of_the_peak(monkeypatch):
    class Module:
        device, flops_per_token, trainer = torch.device("cuda"), 1e9, type("Trainer", (), {"world_size": 2})

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert mfu(Module(), 989e3) == pytest.approx(0.5)
    Module.device = torch.device("cpu")
    assert mfu(Module(), 989e3) is None
    assert 0.1 < memory_gb(torch.device("cpu")) < 100
    with pytest.raises(ValueError, match=r"callbacks\.progress\.seconds=-1 must be at least 0"):
        Progress(-1)


def test_a_result_says_where_it_comes_from(monkeypatch, tmp_path):
    found = origin.origin(torch.device("cpu"), 2)
    assert {"python", "torch", "lightning", "transformers"} <= found["versions"].keys()
    assert found["versions"]["torch"] == torch.__version__ and found["device"].startswith("2 x cpu")
    assert found["versions"]["python"] in origin.describe(found)
    run = {"cwd": tmp_path, "check": True, "capture_output": True}
    monkeypatch.setattr(origin, "ROOT", tmp_path)
    assert origin.commit() == {"commit": None, "changed": None}
    (tmp_path / "file").write_text("a")
    user = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], [*user, "commit", "-qm", "a"]):
        subprocess.run(["git", *words], **run)
    assert origin.commit()["changed"] is False and re.fullmatch(r"[0-9a-f]{40}", origin.commit()["commit"])
    (tmp_path / "file").write_text("b")
    assert origin.commit()["changed"] is True
