"""State tracking against the published generators, and against arithmetic by Python and by permutations."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from data.state_tracking import FormalLanguage, WordProblem, bracketed, multiplication, parity_of, value_of
from data.text import IGNORE

# Sequences with their answers of automl/unlocking_state_tracking (commit df8f840), tasks/*.py, for lengths 3 to 24 and
# default_rng(43), (44), (45).
PARITY = [[2, 2, 1, 1, 2, 1, 1, 2, 1, 2, 2, 1, 2, 2, 1, 1, 1, 1, 2, 1, 1, 2], [2, 1, 2, 1, 2, 1, 1, 2, 2, 1, 2, 1]]
PARITY += [[2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 2, 2, 2, 2, 2, 1, 1, 2, 2, 2]]
ARITHMETIC = [[7, 4, 7], [8, 2, 9, 3, 8, 3, 5, 3, 7, 2, 9, 4, 9], [9, 1, 8, 3, 7, 3, 8, 4, 7]]
BRACKETS = [[8, 8, 2, 6, 0, 9, 5, 8, 0, 9, 9, 10, 2], [8, 6, 4, 6, 8, 6, 3, 5, 8, 6, 2, 9, 9, 9, 10, 1]]
BRACKETS += [[8, 8, 8, 2, 6, 2, 9, 6, 6, 3, 9, 6, 8, 6, 2, 6, 6, 2, 9, 9, 10, 3]]
LENGTH = 24


def whole(input_ids: np.ndarray, labels: np.ndarray, filler: int = 0) -> list[int]:
    """A sequence up to its question, and the answer behind it."""
    (place,) = np.flatnonzero(labels != IGNORE)
    assert (input_ids[place + 1 :] == filler).all()
    return [*input_ids[: place + 1].tolist(), int(labels[place])]


@pytest.mark.parametrize("i", range(3))
def test_the_published_sequences_bit_for_bit(i):
    """From the same draws of the same generators."""
    random = np.random.default_rng(43 + i)
    bits = np.pad(random.integers(1, 3, size=(1, LENGTH - 1)), ((0, 0), (0, 1)))
    made = parity_of(bits, random.integers(3, LENGTH + 1, size=1), 2)
    assert whole(*(x[0] for x in made)) == PARITY[i]
    random = np.random.default_rng(43 + i)
    tokens = random.integers(5, size=(1, LENGTH)) + 5
    tokens[:, 1::2] = random.integers(3, size=(1, LENGTH // 2)) + 1
    made = value_of(tokens, 2 * random.integers(2, 13, size=1) - 1, 5)
    assert whole(*(x[0] for x in made)) == ARITHMETIC[i]
    random = np.random.default_rng(43 + i)
    tokens, answer = bracketed(lambda n: int(random.integers(n)), (3, LENGTH), 5)
    assert [*tokens, answer] == BRACKETS[i]


@pytest.mark.parametrize("language", ["parity", "modular_arithmetic", "modular_brackets"])
def test_answers_are_right(language):
    """By Python's own arithmetic, at lengths of training and of the test."""
    task = FormalLanguage(40, language)
    brackets, lengths = language == "modular_brackets", {"train": set(), "longer": set()}
    filler = 12 - 1 if brackets else 0
    shown = "01234+-*()=" if brackets else " +-*=01234"
    for name, samples in (("train", task.train_samples()), ("longer", task.test_points()["longer"])):
        batch = samples.__getitems__(range(200))
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            *tokens, answer = whole(ids.numpy(), labels.numpy(), filler)
            lengths[name].add(len(tokens) + 1)
            if language == "parity":
                assert set(tokens) <= {1, 2} and answer == 1 + tokens.count(2) % 2
            else:
                text = "".join(shown[t] for t in tokens)
                assert text.endswith("=") and shown[answer] == str(eval(text[:-1]) % 5), text
        assert int(batch["input_ids"].max()) < task.vocab_size
    assert 3 <= min(lengths["train"]) <= 5 and max(lengths["train"]) in (38, 39, 40)
    assert 39 <= min(lengths["longer"]) < 45 and 250 < max(lengths["longer"]) <= 256


@pytest.mark.parametrize("group", ["S3", "A4", "A5"])
def test_a_group_is_a_group(group):
    """Of permutations: a b applies b first. A word's answers are the products."""
    table, n = multiplication(group), int(group[1])
    size = len(table)
    assert all(sorted(row) == list(range(size)) for row in (*table.tolist(), *table.T.tolist()))
    assert (table[0] == range(size)).all() and (table[:, 0] == range(size)).all()
    abc = [np.random.default_rng(0).integers(size, size=200) for _ in range(3)]
    assert (table[table[abc[0], abc[1]], abc[2]] == table[abc[0], table[abc[1], abc[2]]]).all()
    task = WordProblem(16, group)
    inputs, answers = (task.train_samples()[4][name].tolist() for name in ("input_ids", "labels"))
    assert (inputs[0], answers[0], task.vocab_size) == (size, IGNORE, size + 1) and max(inputs[1:]) < size
    if group[0] == "S":
        elements, state = list(permutations(range(n))), tuple(range(n))
        for g, answer in zip(inputs[1:], answers[1:], strict=True):
            state = tuple(elements[g][x] for x in state)
            assert state == elements[answer]
    assert size == {"S3": 6, "A4": 12, "A5": 60}[group]


def test_sequences_depend_on_seed_split_and_index_alone():
    task = WordProblem(16, "S3", test_length=64)
    assert task.targets_per_token == 15 / 16 and task.by_position and task.chance == 1 / 6
    (name, longer), train = *task.test_points().items(), task.train_samples()
    assert name == "longer" and longer[0]["labels"].shape == (64,) and train[0]["labels"].shape == (16,)
    others = [train[6], task.validation_samples()[5], WordProblem(16, "S3", seed=1).train_samples()[5]]
    assert not any(train[5]["input_ids"].equal(other["input_ids"]) for other in others)
    assert train[5]["input_ids"].equal(train.__getitems__([9, 5])["input_ids"][1])
    assert FormalLanguage(40, "parity").fingerprint != FormalLanguage(40, "modular_arithmetic").fingerprint
    assert FormalLanguage(40, "parity").targets_per_token == 1 / 40
    assert FormalLanguage(40, "parity").validation_samples(80)[0]["labels"].shape == (80,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FormalLanguage(40, "dyck"), "data.language=dyck is not one of parity, modular_arithmetic"),
        (lambda: FormalLanguage(32, "parity"), r"seq_len=32 is shorter than the longest of data.train_lengths=\[3, 40"),
        (lambda: FormalLanguage(40, "parity", test_lengths=(9, 8)), r"data.test_lengths=\[9, 8\] must be the shortest"),
        (lambda: FormalLanguage(40, "modular_arithmetic", modulus=1), "data.modulus=1 must be at least 2"),
        (lambda: WordProblem(16, "S6"), "data.group=S6 is not one of S3, S4, S5, A3, A4, A5"),
        (lambda: WordProblem(1, "S3"), "seq_len=1 and data.test_length=513 must be at least 2"),
        (lambda: WordProblem(16, "S3", train_size=0), "data.train_size=0 must be a whole number"),
    ],
)
def test_errors_name_the_setting(make, message):
    with pytest.raises(ValueError, match=message):
        make()
