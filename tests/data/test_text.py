"""Samples: inputs, labels and segments against a plain loop over the documents."""

import math
import platform

import pytest
import torch

from data.corpora import PythonSource
from data.text import IGNORE, Text
from data.tokenizer import Bpe, Bytes

TRAIN = ["alpha", "b", "gamma gamma", "δ", "epsilon and more of it", "z"]
VALIDATION = ["held out", "this too"]


@pytest.fixture
def task(documents):
    task = Text(documents(TRAIN, VALIDATION), Bytes(), seq_len=4, name="lists")
    task.prepare()
    return task


@pytest.mark.parametrize("seq_len", [1, 4, 7, 30])
def test_samples_equal_a_loop_over_documents(documents, seq_len):
    task = Text(documents(TRAIN, VALIDATION), Bytes(), seq_len=seq_len)
    task.prepare()
    tokens = [i for text in TRAIN for i in [*text.encode(), Bytes.eos]]
    document = [n for n, text in enumerate(TRAIN) for _ in [*text.encode(), Bytes.eos]]
    samples = task.train_samples()
    assert len(samples) == (len(tokens) - 1) // seq_len
    for i, sample in enumerate(samples):
        at = range(i * seq_len, (i + 1) * seq_len)
        assert all(x.dtype == torch.int64 and x.shape == (seq_len,) for x in sample.values())
        assert sample["input_ids"].tolist() == [tokens[t] for t in at]
        labels = [tokens[t + 1] if document[t + 1] == document[t] else IGNORE for t in at]
        assert sample["labels"].tolist() == labels
        assert sample["segments"].tolist() == [document[t] - document[at[0]] for t in at]
    several = samples.__getitems__([len(samples) - 1, 0])
    for name, rows in several.items():
        assert rows.is_contiguous() and rows.tolist() == [samples[i][name].tolist() for i in (len(samples) - 1, 0)]


def test_every_token_is_predicted_once_but_the_first_of_documents(task):
    samples = task.train_samples()
    predicted = [label for sample in samples for label in sample["labels"].tolist() if label != IGNORE]
    expected = [i for text in TRAIN for i in [*text.encode(), Bytes.eos][1:]]
    assert (
        predicted == expected[: len(predicted)] and len(expected) - len(predicted) <= 4
    )  # what the last sample cuts off


def test_attributes(task):
    assert task.vocab_size == 257 and isinstance(task.tokenizer, Bytes)
    held_out = sum(len(text) for text in VALIDATION)
    assert math.isclose(task.bytes_per_token, held_out / (held_out + 2))
    assert "two lists" in task.describe()[0]
    task.prepare()  # again, to no effect
    assert task.identity == {"data fingerprint": task.fingerprint, "tokenizer": f"bytes, {Bytes().fingerprint()}"}
    assert len(task.validation_samples(seq_len=9)) == 1 and len(task.validation_samples()) == 4


def test_the_fingerprint_is_of_the_tokens(task, documents):
    def fingerprint(train, tokenizer):
        other = Text(documents(train, VALIDATION), tokenizer, seq_len=4, name="other")
        other.prepare()
        return other.fingerprint

    assert fingerprint(TRAIN, Bytes()) == task.fingerprint
    assert fingerprint(TRAIN[:-1], Bytes()) != task.fingerprint
    assert fingerprint(["".join(TRAIN)], Bytes()) != task.fingerprint
    assert fingerprint(TRAIN, Bpe(260)) != task.fingerprint


def test_python_source_in_bytes_end_to_end():
    task = Text(PythonSource(), Bytes(), seq_len=256, name="python_source")
    task.prepare()
    release = f"{platform.python_implementation()} {platform.python_version()}"
    assert task.describe()[0] == f"python_source ({release}): the standard library of {release}"
    samples = task.train_samples()
    assert len(samples) > 20_000
    text = task.tokenizer.decode(samples[1000]["input_ids"])
    assert 200 < len(text) <= 256 and "\ufffd" not in text[4:-4]


def test_errors(documents):
    task = Text(documents(TRAIN, VALIDATION), Bytes(), seq_len=500, name="lists")
    with pytest.raises(ValueError, match=r"call prepare\(\) first"):
        task.train_samples()
    task.prepare()
    with pytest.raises(ValueError, match=r"seq_len=500 is too long for the train split of data=lists.*at most 47 fit"):
        task.train_samples()
    with pytest.raises(ValueError, match=r"seq_len=0 must be positive"):
        Text(documents(TRAIN, VALIDATION), Bytes(), seq_len=0)
