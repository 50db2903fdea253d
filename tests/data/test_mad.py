"""MAD's tasks against the published generator, and against their descriptions."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import yaml

from data.mad import TASKS, Mad, compression, fuzzy_recall, memorization, recall, shifted, spread
from data.text import IGNORE
from models.build import build
from tests.conftest import ROOT

X = IGNORE
# The second sequence that mad-lab makes with default_rng(7) (mad/data/instances.py, commit 0f49a45), for lengths of 24
# (recall), 40 (fuzzy recall), 12 (memorization) and 10 (compression): tokens, and answers of a test.
FUZZY = [15, 15, 15, 15, 15, 15, 15, 4, 5, 11, 3, 2, 1, 13, 5, 0, 11, 12, 9, 2, 13, 2, 13, 3, 8, 10, 5, 9, 8, 14, 3, 6]
FUZZY += [7, 11, 12, 4, 6, 13, 4, 6, 13]
ASKED = [15, 15, 15, 15, 15, 15, 15, 0, 5, 4, 14, 5, 2, 4, 8, 14, 1, 2, 0, 8, 0, 4, 5, 13, 10, 11, 6, 1, 5, 7, 14, 6]
ASKED += [5, 3, 12, 9, 11, 1, 2, 0]
PUBLISHED = {
    "recall": (
        [6, 10, 2, 10, 5, 10, 7, 11, 3, 12, 4, 12, 4, 12, 7, 11, 6, 10, 6, 10, 5, 10, 7],
        [X, X, X, X, X, X, X, X, X, X, X, X, 12, X, 11, X, 10, X, 10, X, 10, X, 11],
    ),
    "noisy": (
        [29, 25, 23, 16, 1, 12, 6, 15, 3, 12, 3, 12, 19, 17, 1, 12, 5, 10, 25, 29, 24, 20, 5],
        [X, X, X, X, X, X, X, X, X, X, 12, X, X, X, 12, X, X, X, X, X, X, X, 10],
    ),
    "fuzzy, training": (FUZZY[:-1], FUZZY[1:]),
    "fuzzy": (ASKED, [X] * 39 + [8]),
    "memorization": ([11, 31, 4, 31, 4, 31, 14, 31, 14, 31, 11, 31], [X, 15, X, 18, X, 18, X, 20, X, 20, X, 15]),
    "compression": ([4, 4, 13, 13, 0, 7, 12, 1, 11, 15], [4, 4, 13, 13, 0, 7, 12, 1, 11, 15]),
}
MAKERS = {
    "recall": lambda random: shifted(*recall(random, 16, 24), False),
    "noisy": lambda random: shifted(*recall(random, 32, 24, 16, 0.2), False),
    "fuzzy, training": lambda random: shifted(*fuzzy_recall(random, 16, 40, True), True),
    "fuzzy": lambda random: shifted(*fuzzy_recall(random, 16, 40, False), False),
    "memorization": lambda random: memorization(random, 32, 12),
    "compression": lambda random: compression(random, 16, 10),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sequences_bit_for_bit(name):
    random = np.random.default_rng(7)
    MAKERS[name](random)
    assert tuple(map(list, MAKERS[name](random))) == PUBLISHED[name]


def test_published_copying_from_its_own_draws():
    """Its blanks come from NumPy's global generator."""
    random, state = np.random.default_rng(7), np.random.RandomState(7)
    found = [spread(random.integers(14, size=4), state.randint(0, 4, 11), 14) for _ in range(2)]
    assert found[1][0] == [14, 14, 14, 14, 8, 14, 10, 14, 14, 14, 14, 11, 14, 14, 3, 15, 14, 14, 14, 14]
    assert found[1][1] == [X] * 16 + [8, 10, 11, 3]


@pytest.fixture(scope="module")
def tasks() -> dict[str, Mad]:
    """Those of conf/data, with fewer sequences."""
    found = {}
    for name in TASKS:
        config = yaml.safe_load((ROOT / f"conf/data/mad_{name}.yaml").read_text())
        found[name] = build(config | {"train_size": 60, "validation_size": 30}, seq_len=config["length"])
    return found


@pytest.mark.parametrize("name", TASKS)
def test_every_sequence_is_what_the_task_says(name, tasks):
    task = tasks[name]
    for split in ("train", "validation"):
        samples = getattr(task, f"{split}_samples")()
        labels = torch.stack([sample["labels"] for sample in samples])
        ids = torch.stack([sample["input_ids"] for sample in samples])
        assert ids.shape == labels.shape == (60 if split == "train" else 30, task.seq_len)
        assert ids.min() >= 0 and max(ids.max(), labels.max()) < task.vocab_size
        if split == "train":  # the constant that a loss is divided by
            assert (labels != IGNORE).float().mean().item() == pytest.approx(task.targets_per_token)
        for tokens, answers in zip(ids.tolist(), labels.tolist(), strict=True):
            asked = [t for t, y in enumerate(answers) if y != IGNORE]
            if name == "copying":
                assert [tokens[t] for t in range(240) if tokens[t] < 14] == [answers[t] for t in asked]
            elif name == "memorization":
                assert all(tokens[t] == 255 and 127 <= answers[t] < 255 for t in asked) and len(asked) == 16
            elif name == "compression":
                assert tokens == answers and task.reconstructs
            elif split == "train":
                assert answers[: len(asked)] == tokens[1 : len(asked)] + answers[len(asked) - 1 : len(asked)]
            elif name != "fuzzy_recall":
                before = [{tokens[i]: tokens[i + 1] for i in range(0, t, 2)} for t in asked]
                assert all(seen[tokens[t]] == answers[t] for seen, t in zip(before, asked, strict=True))
    assert f"MAD, {name.replace('_', ' ')}" in task.describe()[0]


def test_sequences_depend_on_seed_split_and_index_alone(tasks):
    one = tasks["recall"].train_samples()[3]["input_ids"]
    kind = {"task": "recall", "vocab_size": 16, "length": 128}
    assert one.equal(Mad(128, **kind, train_size=5).train_samples()[3]["input_ids"])
    assert not one.equal(Mad(128, **kind, train_size=5, seed=1).train_samples()[3]["input_ids"])
    assert not one.equal(tasks["recall"].validation_samples()[3]["input_ids"])
    memories = {task.train_samples()[0]["labels"][1].item() for task in (tasks["memorization"],)}
    assert memories and tasks["recall"].fingerprint != tasks["noisy_recall"].fingerprint
    began = time.process_time()
    for i in range(100):
        tasks["fuzzy_recall"].sequence("train", i)
    assert time.process_time() - began < 1  # so that 12,800 take less than two minutes on any machine


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "sorting"}, "data.task=sorting is not one of recall, noisy_recall"),
        ({"length": 64}, "seq_len=128 must be data.length=64"),
        ({"noise": 1}, "data.noise=1 must be at least 0 and below 1"),
        ({"noise": 0.2}, "data.vocab_size=16 is too small for data.noise_vocab=0"),
        ({"task": "copying", "num_copied": 64}, "data.num_copied=64 does not fit data.length=128; at most 63"),
    ],
)
def test_errors_name_the_setting(settings, message):
    with pytest.raises(ValueError, match=message):
        Mad(128, **{"task": "recall", "vocab_size": 16, "length": 128} | settings)
    with pytest.raises(ValueError, match=r"seq_len=256: data.task=recall has sequences of data.length=128 alone"):
        Mad(128, "recall", 16, 128).validation_samples(256)
