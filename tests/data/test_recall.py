"""The mixture of associative recall against Zoology's generator, and what made tasks share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml

from data.batch import batch_arithmetic
from data.made import distinct, stream, uniform, weighted
from data.module import Share
from data.order import GlobalOrder
from data.recall import RecallMixture
from data.synthetic import gap_probabilities, place
from data.text import IGNORE
from tests.conftest import ROOT

MIXTURE = {"train": [[16, 2, 40], [32, 4, 20], [32, 8, 24]], "test": [[16, 2, 5], [64, 16, 3]], "vocab_size": 64}

# What Zoology's multiquery_ar makes of vocab_size=32, input_seq_len=16, num_kv_pairs=3, seed=7 (HazyResearch/zoology,
# commit d88d6f5, NumPy's legacy generator): three sequences, and their labels.
PUBLISHED = [
    [9, 18, 6, 24, 11, 27, 0, 0, 9, 0, 6, 0, 0, 0, 11, 0],
    [13, 16, 6, 18, 2, 22, 6, 0, 0, 0, 13, 0, 2, 0, 0, 0],
    [10, 26, 13, 22, 11, 25, 10, 0, 0, 0, 0, 0, 11, 0, 13, 0],
]
ANSWERS = [{8: 18, 10: 24, 14: 27}, {6: 18, 10: 16, 12: 22}, {6: 26, 12: 25, 14: 22}]
FILLED = [9, 18, 6, 24, 11, 27, 0, 21, 9, 19, 6, 11, 25, 9, 11, 21]  # the first with random_non_queries, torch's seed 3


def mixture(seq_len=32, **settings) -> RecallMixture:
    return RecallMixture(seq_len, **MIXTURE | settings)


def test_the_published_sequences_bit_for_bit():
    """From the same draws: all keys first, then all values, then all gaps, in NumPy's global generator."""
    np.random.seed(7)

    def draw(choices: np.ndarray, p: np.ndarray | None = None) -> np.ndarray:
        return np.stack([np.random.choice(choices, size=3, replace=False, p=p) for _ in range(3)])

    keys, values = draw(np.arange(1, 16)), draw(np.arange(16, 32))
    input_ids, labels = place(keys, values, draw(np.arange(5), gap_probabilities(16, 3, 0.01)), 16)
    assert input_ids.tolist() == PUBLISHED
    assert [{t: y for t, y in enumerate(row) if y != IGNORE} for row in labels.tolist()] == ANSWERS
    filler = torch.randint(32, (3, 16), generator=torch.Generator().manual_seed(3)).numpy()
    assert np.where(input_ids == 0, filler, input_ids)[0].tolist() == FILLED


def test_a_stream_is_uniform_and_may_be_entered_anywhere():
    u = uniform(0, "train", np.arange(400), 50)
    assert (uniform(0, "train", np.array([7, 399]), 50) == u[[7, 399]]).all()
    assert u.min() >= 0 and u.max() < 1 and len(np.unique(u)) == u.size
    assert abs(np.histogram(u, 20, (0, 1))[0] - 1000).max() < 5 * 1000**0.5
    flat = u.ravel()
    assert abs(np.corrcoef(flat[:-1], flat[1:])[0, 1]) < 0.03 and abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.2
    others = uniform(1, "train", np.arange(400), 50), uniform(0, "test", np.arange(400), 50)
    assert all(abs(np.corrcoef(flat, other.ravel())[0, 1]) < 0.03 for other in others)
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # of https://prng.di.unimi.it/splitmix64.c
    assert stream(0, np.arange(3, dtype=np.uint64)).tolist() == first


def test_draws_without_repetition_have_their_probabilities():
    u = uniform(3, "draws", np.arange(6000), 4)
    chosen = distinct(u[:, :3], 5)
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    _, counts = np.unique(chosen @ [25, 5, 1], return_counts=True)
    assert len(counts) == 60 and abs(counts - 100).max() < 45  # each ordered triple of 5
    p = np.array([0.4, 0.3, 0.2, 0.1])
    pairs = weighted(u, p, 2)
    for i in range(4):
        for j in set(range(4)) - {i}:  # the second among what is left
            assert np.mean((pairs == [i, j]).all(1)) == pytest.approx(p[i] * p[j] / (1 - p[i]), abs=0.02)


@pytest.mark.parametrize("filler", [False, True])
def test_every_sequence_is_as_described(filler):
    task = mixture(random_filler=filler)
    samples, points = task.train_samples(), task.test_points()
    assert samples.sizes == [40, 20, 24] and list(points) == ["16x2", "64x16"] and len(points["64x16"]) == 3
    rows = [(16, 2, samples[3]), (32, 4, samples[41]), (32, 8, samples[83]), (64, 16, points["64x16"][2])]
    for length, pairs, sample in rows:
        ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
        assert len(ids) == max(length, 32) and not any(ids[length:]) and not sample["segments"].any()
        stored = dict(zip(ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2], strict=True))
        assert len(stored) == pairs and all(1 <= k < 32 <= v < 64 for k, v in stored.items())
        queries = [t for t, y in enumerate(labels) if y != IGNORE]
        assert len(queries) == pairs and all(t % 2 == 0 and 2 * pairs <= t < length for t in queries)
        assert sorted(ids[t] for t in queries) == sorted(stored) and all(labels[t] == stored[ids[t]] for t in queries)
        assert filler or not any(ids[t] for t in range(2 * pairs, length) if t not in queries)
    alone, batch = samples[41], samples.__getitems__([45, 41])
    assert all(alone[name].equal(batch[name][1]) for name in alone)
    mixed = samples.__getitems__([41, 3, 45])
    assert all(mixed["input_ids"][i].equal(samples[n]["input_ids"]) for i, n in enumerate((41, 3, 45))), "in order"


def test_a_batch_is_of_one_kind_whoever_asks_and_an_epoch_has_each():
    """As on one process, so on two, and from the middle on."""
    sizes, batch = mixture().train_samples().sizes, batch_arithmetic(8 * 32, 32, 4, 1, 30 * 8 * 32)
    steps = list(GlobalOrder(sizes, batch, seed=5))
    whole = [sorted(steps[i] + steps[i + 1]) for i in range(0, len(steps), 2)]
    begins = [0, 40, 60, 84]
    kinds = [[sum(begin <= i for begin in begins) - 1 for i in step] for step in whole]
    assert all(len(set(kind)) == 1 for kind in kinds)
    epoch = [kind[0] for kind in kinds[:10]]
    assert sorted(epoch) == [0] * 5 + [1] * 2 + [2] * 3 and epoch != sorted(epoch)
    assert len({i for step in whole[:10] for i in step}) == 80 and whole[:10] != whole[10:20]
    two = batch_arithmetic(8 * 32, 32, 2, 2, 30 * 8 * 32)
    ranks = [list(GlobalOrder(sizes, two, 5, rank, first_step=13)) for rank in (0, 1)]
    again = [sorted(x for rank in ranks for part in rank[2 * i : 2 * i + 2] for x in part) for i in range(17)]
    assert again == whole[13:]


def test_a_share_of_a_test_point_is_made_a_batch_at_a_time():
    """The same as one by one; what fills up the last batch has no label."""
    points = mixture().test_points()["16x2"]
    share = Share(points, 5, 4, rank=0, world=1)
    assert len(share) == 8
    batch = share.__getitems__([4, 5, 6, 7])
    assert all(batch[name][0].equal(points[4][name]) for name in batch)
    assert (batch["labels"][1:] == IGNORE).all() and len(batch["labels"]) == 4
    assert all(labels.equal(share[i]["labels"]) for i, labels in enumerate(share.__getitems__([0, 1, 2, 3])["labels"]))
    with pytest.raises(IndexError):
        mixture().train_samples()[84]


def test_the_published_setting():
    """conf/data/mqar_mixture.yaml: 180,000 sequences to train on, seven points to test on, of which two are longer."""
    config = yaml.safe_load((ROOT / "conf/data/mqar_mixture.yaml").read_text())
    config.pop("_target_")
    task = RecallMixture(256, **config)
    assert sum(task.train_samples().sizes) == 180_000 and task.random_filler and task.chance == 1 / 4096
    assert [len(points) for points in task.test_points().values()] == [1000] * 7
    assert [points.length for points in task.test_points().values()] == [64, 64, 64, 128, 256, 512, 1024]
    assert "a mixture of 5" in task.describe()[0] and task.targets_per_token is None
    assert task.fingerprint != RecallMixture(256, **config | {"seed": 1}).fingerprint
    assert task.fingerprint == RecallMixture(256, **config | {"test": []}).fingerprint  # a test changes no training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": [[16, 2]]}, r"data.train has \[16, 2\], which is not \[tokens, pairs, sequences\]"),
        ({"test": [[16, 5, 1]]}, r"data.test has \[16, 5, 1\]: data.num_pairs=5 does not fit seq_len=16"),
        ({"train": []}, "data.train=.. has nothing to train on"),
        ({"seq_len": 16}, "seq_len=16 is shorter than the longest of data.train, 32 tokens"),
        ({"power_a": 2}, "data.power_a=2 must lie above 0"),
        ({"validation_size": 0}, "data.validation_size=0 must be a whole number from 1 on"),
        ({"seed": -1}, "data.seed=-1 must not be negative"),
    ],
)
def test_errors_name_the_setting(settings, message):
    with pytest.raises(ValueError, match=message):
        mixture(**settings)
