"""Associative recall against its description, and against the original's way of drawing it."""

import numpy as np
import pytest
import torch

from data.synthetic import AssociativeRecall, gap_probabilities, place
from data.text import IGNORE

L, PAIRS, VOCAB = 64, 8, 128


def task(**settings):
    return AssociativeRecall(**{"seq_len": L, "num_pairs": PAIRS, "vocab_size": VOCAB, "train_size": 300, **settings})


def check(input_ids, labels, random_filler=False):
    """The description, position by position."""
    context = 2 * PAIRS
    keys, values = input_ids[0:context:2], input_ids[1:context:2]
    assert len(set(keys)) == len(set(values)) == PAIRS
    assert all(1 <= key < VOCAB // 2 for key in keys) and all(VOCAB // 2 <= value < VOCAB for value in values)
    stored = dict(zip(keys, values, strict=True))
    queries = [t for t in range(L) if labels[t] != IGNORE]
    assert sorted(input_ids[t] for t in queries) == sorted(keys)  # each key once
    for t in range(L):
        if t in queries:
            assert t >= context and t % 2 == 0 and labels[t] == stored[input_ids[t]]
        elif t >= context and not random_filler:
            assert input_ids[t] == 0


@pytest.mark.parametrize("random_filler", [False, True])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_sequence_is_as_described(random_filler, split):
    recall = task(random_filler=random_filler, validation_size=50)
    samples = getattr(recall, f"{split}_samples")()
    assert len(samples) == (300 if split == "train" else 50)
    for sample in samples:
        assert all(x.dtype == torch.int64 and x.shape == (L,) for x in sample.values())
        assert not sample["segments"].any()
        check(sample["input_ids"].tolist(), sample["labels"].tolist(), random_filler)
    if random_filler:
        filler = torch.stack([s["input_ids"][s["labels"] == IGNORE][2 * PAIRS :] for s in samples])
        assert 0.4 * VOCAB < filler.float().mean() < 0.6 * VOCAB


def original(seed: int, num_examples: int, power_a: float) -> tuple[np.ndarray, np.ndarray]:
    """All sequences at once, in the order in which Zoology draws from NumPy's global generator."""
    np.random.seed(seed)
    context, space = 2 * PAIRS, (L - 2 * PAIRS) // 2
    p = power_a * np.arange(1, space + 1) ** (power_a - 1)

    def draw(choices, p=None):
        return np.stack([np.random.choice(choices, PAIRS, replace=False, p=p) for _ in range(num_examples)])

    keys, values = draw(np.arange(1, VOCAB // 2)), draw(np.arange(VOCAB // 2, VOCAB))
    gaps = draw(np.arange(space), p / p.sum())
    examples = np.zeros((num_examples, L + 1), dtype=np.int64)
    labels = np.full((num_examples, L + 1), IGNORE, dtype=np.int64)
    rows = np.arange(num_examples)[:, None]
    examples[:, 0:context:2], examples[:, 1:context:2] = keys, values
    examples[rows, context + 2 * gaps] = keys
    labels[rows, context + 2 * gaps + 1] = values
    for i in range(num_examples):  # the same draws, placed by our function
        ours = place(keys[i], values[i], gaps[i], L)
        assert (ours[0] == examples[i, :-1]).all() and (ours[1] == labels[i, 1:]).all()
    return examples[:, :-1], labels[:, 1:]


@pytest.mark.parametrize("power_a", [0.01, 1.0])
def test_the_original_draws_the_same_distribution(power_a):
    """Placement bit for bit (within `original`); where the queries are, and which values, in distribution."""
    count = 1500
    inputs, labels = original(0, count, power_a)
    for i in range(50):
        check(inputs[i].tolist(), labels[i].tolist())
    samples = task(power_a=power_a, train_size=count).train_samples()
    ours = torch.stack([samples[i]["labels"] for i in range(count)]).numpy()
    difference = np.abs((ours != IGNORE).mean(0) - (labels != IGNORE).mean(0))
    assert difference.max() < 0.07  # 4.5 standard deviations of a difference of two frequencies near one half
    assert abs(ours[ours != IGNORE].mean() - labels[labels != IGNORE].mean()) < 2


def test_the_power_law():
    uniform, early = gap_probabilities(L, PAIRS, 1.0), gap_probabilities(L, PAIRS, 0.01)
    assert len(uniform) == (L - 2 * PAIRS) // 2 and np.allclose(uniform, 1 / len(uniform))
    assert np.allclose(early / early[0], np.arange(1, len(early) + 1) ** -0.99)


def test_a_sequence_depends_on_seed_split_and_index_alone():
    samples = task().train_samples()
    alone = {k: v.tolist() for k, v in samples[7].items()}
    assert {k: v.tolist() for k, v in task(train_size=9).train_samples()[7].items()} == alone
    others = [samples[8], task().validation_samples()[7], task(seed=1).train_samples()[7]]
    assert all(other["input_ids"].tolist() != alone["input_ids"] for other in others)


def test_interface():
    recall = task(tokenizer=object())
    recall.prepare()
    assert recall.tokenizer is None and recall.bytes_per_token is None and recall.vocab_size == VOCAB
    assert recall.fingerprint == task().fingerprint != task(seed=1).fingerprint
    assert recall.validation_samples(seq_len=2 * L)[0]["labels"].shape == (2 * L,)
    assert "8 pairs in 64 tokens" in recall.describe()[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_pairs": 17}, "data.num_pairs=17 does not fit seq_len=64.*at most 16 pairs"),
        ({"num_pairs": 0}, "data.num_pairs=0 must be positive"),
        ({"vocab_size": 17}, "data.vocab_size=17 is too small for data.num_pairs=8.*at least 18"),
        ({"power_a": 0}, "data.power_a=0 must lie above 0"),
        ({"train_size": 0}, "data.train_size=0 must be positive"),
        ({"seed": -1}, "data.seed=-1 must not be negative"),
    ],
)
def test_errors_name_the_setting(settings, message):
    with pytest.raises(ValueError, match=message):
        task(**settings)
    task(num_pairs=16), task(vocab_size=18)  # the limits themselves are allowed
    assert len(task(num_pairs=16).train_samples()[0]["labels"].unique()) == 17
    assert task(vocab_size=18).train_samples()[0]["input_ids"].max() < 18
