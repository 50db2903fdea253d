"""micro_batch=auto: the largest that fits, tried once and remembered.

What others ask of such a search: to leave some memory (https://github.com/Lightning-AI/pytorch-lightning/issues/21154),
to fall back on what did fit (https://github.com/dice-group/dice-embeddings/issues/435), and to say what it found
(https://github.com/huggingface/transformers/issues/21950).
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from conf.checks import mistakes
from models.training import fitting
from models.training.job import kind_of
from tests.test_config import composed

WORDS = ("data=mqar", "data.vocab_size=64", "data.num_pairs=4", "seq_len=32", "batch_tokens=768", "micro_batch=auto")


@pytest.mark.parametrize(("most", "found"), [(0, 1), (1, 1), (5, 4), (6, 6), (100, 24)])
def test_the_last_that_fits(most, found):
    tried = []
    assert fitting.largest([1, 2, 3, 4, 6, 8, 12, 24], lambda n: tried.append(n) or n <= most) == found
    assert len([n for n in tried if n > most]) <= 1


def test_on_a_cpu_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(fitting, "Trial", None)
    for words, found in ((WORDS, 8), ((*WORDS, "batch_tokens=32"), 1), ((*WORDS, "micro_batch=3"), 3)):
        cfg = composed(*words)
        assert not mistakes(cfg)
        fitting.settle(cfg, kind_of)
        assert cfg.micro_batch == found


def test_what_was_found_is_remembered(monkeypatch, tmp_path, capsys):
    """By what it depends on, for any other run."""
    monkeypatch.setenv("TTR_CACHE", str(tmp_path))
    tried = []

    class Trial:
        def __init__(self, *_):
            tried.append([])

        def fits(self, n):
            tried[-1].append(n)
            return n <= 4

    monkeypatch.setattr(fitting, "Trial", Trial)
    monkeypatch.setattr(fitting, "device", lambda trainer: torch.device("cuda"))
    gpu = SimpleNamespace(name="some GPU", total_memory=80)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda where: gpu)
    for words in (WORDS, (*WORDS, "seed=3", "name=other"), (*WORDS, "model.num_layers=2")):
        cfg = composed(*words)
        fitting.settle(cfg, kind_of)
        assert cfg.micro_batch == 4 and "micro_batch=4" in capsys.readouterr().out
    assert tried == [[1, 2, 3, 4, 6]] * 2  # of the first and of the last
    assert list(json.loads((tmp_path / "micro_batch.json").read_text()).values()) == [4, 4]


def test_it_needs_all_parameters_on_a_device():
    assert any(
        "micro_batch=auto needs strategy=single or ddp" in said for said in mistakes(composed(*WORDS, "strategy=fsdp"))
    )
    said = "micro_batch=most is not a number; it must be at least 1, or auto"
    assert said in mistakes(composed(*WORDS, "micro_batch=most"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_trial_leaves_nothing(monkeypatch):
    config = OmegaConf.to_container(composed(*WORDS), resolve=True)
    trial = fitting.Trial(config, kind_of, torch.device("cuda", 0))
    before, drawn = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    assert trial.fits(2)
    monkeypatch.setattr(fitting, "USABLE", 0.0)
    assert not trial.fits(2)
    assert torch.cuda.memory_allocated() == before and torch.equal(torch.cuda.get_rng_state(), drawn)
