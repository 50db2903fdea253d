"""`dry_run=true` tells what a run takes, equal to what a run then has, and leaves nothing behind.

What others asked for: https://github.com/caikit/caikit-nlp/issues/226 and
https://github.com/NVIDIA-NeMo/Automodel/issues/1592 (memory before a GPU is paid for),
https://github.com/pytorch/rfcs/issues/108 (the parts of it, activations told apart).
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import train as entry
from data.batch import batch_arithmetic
from models.build import build
from models.language_model import LanguageModel, LanguageModelConfig
from scripts.planning.dry_run import parts, plan, repeated, six_n, span, vocabulary
from scripts.planning.memory import Planned, kept_by_autograd, num_bytes
from tests.test_config import composed
from tests.training.test_sweep import JOB

BATCH = batch_arithmetic(batch_tokens=512, seq_len=64, micro_batch=4, world_size=1, tokens=5120)


def settings(*words: str) -> dict:
    return OmegaConf.to_container(composed(*words), resolve=True)


@pytest.mark.slow
def test_what_is_told_is_what_a_run_has():
    """A hybrid of three layers with a step of its optimizer, counted in real tensors."""
    config = settings("model=hybrid", "model.pattern=[recurrent,attention]", "optimizer=muon")
    shape = LanguageModelConfig(vocab_size=300, **config["model"] | {"num_layers": 3, "tie_embeddings": False})
    planned = Planned(shape, "32-true")
    told = planned.memory(config["optimizer"], BATCH)
    model = LanguageModel(shape)
    ids = torch.zeros(4, 64, dtype=torch.long)
    activations = kept_by_autograd(model, lambda: model.sum_nats(ids, ids))
    step = build(config["optimizer"])(model)
    model.sum_nats(ids, ids).backward()
    weights = num_bytes(model.parameters())
    step.step()
    state = num_bytes(x for each in step.state.values() for x in each.values())
    assert (told.weights, told.gradients, told.optimizer) == (weights, weights, state)
    assert told.activations == pytest.approx(activations, rel=0.02)
    halves = planned.memory(config["optimizer"], BATCH, shards=2)
    assert halves.weights == weights // 2 and halves.activations == told.activations
    counts = {part.split()[0]: int(part.split()[1].replace(",", "")) for part in parts(planned.model).split(", ")}
    assert sum(counts.values()) == model.num_parameters() and counts["head"] == model.head.weight.numel()
    assert six_n(planned.model) == 6 * (model.num_parameters() - model.embedding.weight.numel())


@pytest.mark.slow
def test_the_largest_model_is_told_on_any_machine(tmp_path):
    config = settings("model=softmax", "size=1300m", "tokenizer=bpe", "data=mqar", "trainer.precision=bf16-mixed")
    config |= {"run_dir": str(tmp_path / "none")}
    batch = batch_arithmetic(config["batch_tokens"], config["seq_len"], config["micro_batch"], 8, config["tokens"])
    lines, said = plan(config, batch)
    text = "\n".join(lines)
    assert "would begin" in lines[0] and str(batch) in text and "softmax" not in said
    assert "optimizer 9.1" in text and "activations" in text and "on 8 devices: A100" in text
    assert said.startswith("1,2") and " GiB a device" in said


def test_what_looks_at_numbers_is_said_to_be_unknown():
    config = settings("model=mesa")
    shape = LanguageModelConfig(vocab_size=300, **config["model"] | {"num_layers": 1})
    told = Planned(shape, "32-true").memory(config["optimizer"], BATCH)
    assert told.activations is None and "can't be told" in told.unknown


def test_in_the_words_of_people():
    assert [span(s) for s in (0.2, 5, 90, 7200, 86400 * 12.34)] == [
        "under a second", "5 seconds", "1.5 minutes", "2.0 hours", "12.3 days"]  # fmt: skip


def test_a_text_that_is_read_often_is_told():
    text = SimpleNamespace(train_samples=lambda: range(16))  # 1,024 of 5,120 tokens
    assert repeated(text, BATCH) == [
        "tokens=5,120 reads the text 5.0 times; up to 4 times it is worth about as much as new text: take more text, "
        "or tokens=4096"
    ]
    assert repeated(SimpleNamespace(train_samples=lambda: range(20)), BATCH) == []


def test_a_dry_run_leaves_nothing_and_a_sweep_has_a_line_for_each_job(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RUNS", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["train.py", "-m", "name=s", "model.num_heads=2,5", "dry_run=true", *JOB])
    GlobalHydra.instance().clear()
    try:
        with pytest.raises(SystemExit) as stop:
            entry.main()
    finally:
        GlobalHydra.instance().clear()
    said = capsys.readouterr().out
    assert stop.value.code == 1 and said.count(" would begin\n") == 1
    jobs = said.split("2 jobs, 1 failed")[1].splitlines()[1:3]
    assert jobs[0].startswith("  model.num_heads=2   ") and jobs[0].endswith(" a device") and "FAILED" in jobs[1]
    assert "num_heads=5 does not divide hidden_size=32" in said
    assert [path.name for path in tmp_path.iterdir()] == ["multirun.yaml"]  # Hydra's, of every sweep


def test_weights_that_the_run_would_refuse_are_refused(tmp_path):
    """By names and shapes; of a name on the hub, where nothing is downloaded, it is said that nobody looked."""
    config = settings("data=mqar") | {"run_dir": str(tmp_path / "none")}
    other = LanguageModelConfig(vocab_size=300, **settings("model=softmax")["model"])
    LanguageModel(other).save_pretrained(tmp_path / "softmax")
    with pytest.raises(ValueError, match="holds another model"):
        plan(config | {"init_from": str(tmp_path / "softmax")}, BATCH)
    lines, _ = plan(config | {"init_from": "somebody/a-model"}, BATCH)
    assert "weights   of somebody/a-model on the hub, which was not looked at" in lines


def test_of_a_mixture_the_share_of_each_part_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TTR_CACHE", str(tmp_path))
    words = [
        "+data@data.parts.code=python_source",
        "+data@data.parts.books=text_files",
        "data.parts.books.corpus.path=.",
    ]
    size, lines = vocabulary(settings("data=mixture", *words, "+data.weights.code=3", "+data.weights.books=1"), BATCH)
    assert size == 257 and lines[0].startswith("code: python_source: to be prepared, into ")
    assert lines[1].startswith("books: text_files: ")
    assert lines[2:] == ["code: 75 % of the tokens, 3,840", "books: 25 % of the tokens, 1,280"]
    assert not list(tmp_path.iterdir())
