"""What a trained model remembers of a text, counted beside models of which it is known."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from data.text import IGNORE
from scripts import memory
from tests.evaluating.conftest import TEXT, finished


class Copier(torch.nn.Module):
    """Knows a token if the pair before it has been in the row within so many tokens, and guesses among 8 else."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach, self.weight = reach, torch.nn.Parameter(torch.zeros(1))

    def score(self, ids: Tensor, labels: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
        nats = torch.full(ids.shape, float(np.log(8)))
        for b, row in enumerate(ids.tolist()):
            for t in range(1, len(row)):
                past = range(max(1, t - self.reach), t)
                if any(row[s - 1 : s + 1] == row[t - 1 : t + 1] and row[s + 1] == labels[b, t] for s in past):
                    nats[b, t] = 0.0
        return nats.masked_fill(labels == IGNORE, 0.0), ids


def test_a_stretch_that_was_seen_is_cheaper_as_far_as_the_memory_reaches():
    text = torch.from_numpy(np.random.default_rng(0).integers(1000, size=(2, 320)))
    found = memory.copied(Copier(reach=100), text, (0, 64, 192))
    assert found["memory/copied/0"] == pytest.approx(np.log(8)) and found["memory/copied/64"] == 0.0
    assert memory.copied(Copier(reach=400), text, (192, 1024)) == {"memory/copied/192": pytest.approx(np.log(8))}


def test_pairs_that_were_seen_in_the_document_and_pairs_that_are_rare():
    ids = np.array([[1, 2, 1, 2, 3, 1, 2]])
    labels = np.array([[2, 1, 2, 3, 1, IGNORE, 4]])
    segments = np.array([[0, 0, 0, 0, 0, 0, 1]])
    assert memory.seen_before(ids, labels, segments, 10).tolist() == [[False, False, True, False, False, False, False]]
    again = memory.seen_before(np.array([[1, 5, 1]]), np.array([[2, 1, 2]]), np.array([[0, 0, 1]]), 10)
    assert not again.any(), "another document"
    train = np.array([1, 2] * 30 + [3, 1])  # 1 2 and 2 1 are common, 3 1 is rare, 2 4 was never there
    rare = memory.rare_in(train, np.array([[1, 2, 3, 2]]), np.array([[2, 1, 1, 4]]), 10)
    assert rare.tolist() == [[False, False, True, True]]


def test_the_inner_loss_is_that_of_the_last_look(tmp_path):
    """The mean over layers and heads; a range without a number counts for nothing."""
    rows = [
        {"step": step, "positions": [[0, 16], [16, 32]], "before": [[x, x], [3 * x, None]], "after": [[0.5, 0.25]]}
        for step, x in ((10, 9.0), (20, 1.0), (20, 2.0))
    ]
    (tmp_path / "regression.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = dict(memory.inner(tmp_path))
    assert found["memory/before/0-15"] == pytest.approx((1 + 3 + 2 + 6) / 4) and found["memory/after/16-31"] == 0.25
    assert found["memory/before/16-31"] == 1.5 and dict(memory.inner(tmp_path / "none")) == {}


@pytest.mark.slow
def test_runs_of_a_sweep_are_looked_into_once(tmp_path, monkeypatch, cache, capsys):
    """A run of text in miniature; its line gets the numbers, and the second call leaves it alone."""
    monkeypatch.setenv("TTR_CACHE", str(cache))
    (tmp_path / "texts").mkdir()
    for i in range(4):
        (tmp_path / "texts" / f"{i}.txt").write_text("".join(TEXT[i::4]))
    where = ["data=text_files", f"data.corpus.path={tmp_path / 'texts'}", "data.corpus.validation_fraction=0.4"]
    folder = finished(tmp_path / "run", *where, "validation_tokens=500")
    capsys.readouterr()
    monkeypatch.setattr(memory, "Job", lambda name, words: SimpleNamespace(folder=folder))
    monkeypatch.setattr(memory, "STRETCH", 8)  # twice as many fill a row
    monkeypatch.setattr(memory, "KNOWN", 2)
    counted, rare_in = [], memory.rare_in
    monkeypatch.setattr(memory, "rare_in", lambda *given: counted.append(1) or rare_in(*given))
    path = tmp_path / "results.jsonl"
    row = {"job": "ablation/x", "words": ["experiment=ablation", "model=gated_delta"], "validation/nats": 5.0}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"job": "ablation/again"}) + "\n")
    monkeypatch.setattr("sys.argv", ["memory.py", "ablation", "--results", str(path)])
    memory.main()
    said, (line, other) = capsys.readouterr().out, memory.Results(path).read()
    assert other | {"job": line["job"]} == line and counted == [1], "once for all models of a text"
    assert said.startswith("ablation/x {"), "nothing is prepared again"
    assert line["validation/nats"] == 5.0
    assert abs(line["memory/copied/0"]) < 1 and "memory/copied/64" not in line
    assert 0 < line["memory/seen"] < 7 and 0 < line["memory/new"] < 7 and 0 <= line["memory/share"] < 1
    memory.main()
    assert capsys.readouterr().out == "" and memory.Results(path).read() == [line, other]
    monkeypatch.setenv("RUNS", "runs")
    elsewhere = row | {"job": "ablation/y"}
    path.write_text(json.dumps(line) + "\n" + json.dumps(elsewhere) + "\n")
    monkeypatch.setattr(memory, "Job", lambda name, words: SimpleNamespace(folder=tmp_path / "none"))
    memory.main()
    assert "1 of 2 runs have no folder in runs here: ablation/y" in capsys.readouterr().out
    path.write_text(json.dumps(elsewhere) + "\n")
    with pytest.raises(SystemExit, match="error: 1 of 1 runs have no folder in runs here: ablation/y"):
        memory.main()
    for given, why in {"none.jsonl": "is not there", "": "is a folder, and not a file of results"}.items():
        monkeypatch.setattr("sys.argv", ["memory.py", "ablation", "--results", str(tmp_path / given)])
        with pytest.raises(SystemExit, match=why):
            memory.main()
