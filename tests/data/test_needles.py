"""Needles: the text says what is asked for, once, anywhere; the rest is as long as it must be."""

from __future__ import annotations

import re

import pytest

from data.needles import DIGITS, KEYS, NOISE, QUESTION, WORDS, Needles, least
from data.text import IGNORE

VALUE = {"s1": r"[1-9]\d{6}", "s2": r"[1-9]\d{6}", "s3": r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"}


@pytest.mark.parametrize("task", DIGITS)
def test_every_text_says_what_is_asked_for(task):
    needles = Needles(512, task, test_lengths=(300, 2048))
    places, answers = [], set()
    rows = [
        (512, needles.train_samples().__getitems__(range(60))),
        (300, needles.test_points()["300"].__getitems__([5])),
    ]
    rows.append((2048, needles.test_points()["2048"].__getitems__([3, 4])))
    for length, samples in rows:
        for row in zip(samples["input_ids"], samples["labels"], strict=True):
            ids, labels = (x.tolist() for x in row)
            assert len(ids) == length
            text = bytes([*ids, labels[-1]]).decode()
            (key, value), *more = re.findall(rf"magic numbers for (\w+) is: ({VALUE[task]})[.] ", text)
            assert not more and key in KEYS and text.endswith(f" {QUESTION.format(key=key)}{value}")
            asked = [t for t, y in enumerate(labels) if y != IGNORE]
            assert "".join(chr(labels[t]) for t in asked) == value.replace("-", "")
            assert all(text[t + 1] == chr(labels[t]) for t in asked)
            places.append(text.index("One of the special") / length)
            answers.add(value)
            before = text[: text.index("One of the special")]
            assert (
                NOISE.startswith(before[:90]) if task == "s1" else set(re.findall(r"\w+", before.lower())) <= {*WORDS}
            )
    assert len(answers) > 50 and min(places) < 0.1 and max(places) > 0.4
    assert needles.targets_per_token == len(asked) / 512


def test_texts_depend_on_seed_split_and_index_alone():
    one = Needles(400, "s2").train_samples()
    assert one[7]["input_ids"].equal(one.__getitems__([3, 7])["input_ids"][1])
    others = [one[8], Needles(400, "s2").validation_samples()[7], Needles(400, "s2", seed=1).train_samples()[7]]
    assert not any(one[7]["input_ids"].equal(other["input_ids"]) for other in others)
    assert "a needle in a haystack" in Needles(400, "s2").describe()[0]


def test_errors_name_the_setting():
    with pytest.raises(ValueError, match=r"data.task=s4 is not one of s1, s2, s3"):
        Needles(512, "s4")
    with pytest.raises(
        ValueError, match=rf"seq_len=100 is too short for needle, question and answer, {least('s1')} bytes"
    ):
        Needles(100, "s1")
    with pytest.raises(ValueError, match=r"data.test_lengths=64 is too short"):
        Needles(512, "s1", test_lengths=(64,))
    assert len(Needles(least("s3"), "s3").train_samples()[0]["labels"]) == least("s3")  # the limit itself is allowed
