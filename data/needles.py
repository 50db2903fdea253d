"""A needle in a haystack: one sentence in a long text says a number, and the end of the text asks for it.

The three single needles of RULER (Hsieh et al. 2024, arXiv 2404.06654, appendix B), on made text, in bytes:

    s1    the same five sentences over and over; a number of seven digits
    s2    sentences of common words; a number of seven digits
    s3    the same; a UUID, 32 hexadecimal digits in five groups

RULER asks models that were trained on text, and its haystacks are essays. Here a model is trained on the task itself,
at seq_len, and tested at longer texts. It answers by what comes next, byte by byte, with its answer so far before it as
it should have been; labels are at the digits alone. So accuracy is that of a digit, and a guess has 1/10 or 1/16.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from data.made import Made, Sequences, Task, positive, uniform, whole
from data.text import IGNORE

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "One of the special magic numbers for {key} is: {value}. "
QUESTION = "What is the special magic number for {key}? The special magic number for {key} is: "
NOUNS = (
    "anchor basket candle desert engine forest garden harbor island jacket kettle ladder meadow needle orange pepper "
    "quarry ribbon saddle temple umbrella valley window yellow zebra"
)
COMMON = (
    "the of and to in that was his he it with as had for at on by they we be this from have or one all which were but "
    "not are their said there an when each she do how if will way about many then them would like so these long make "
    "thing see him two has look more day could go come did my no most number who over know water than call first "
    "people may down side been now find any new work part take get place made live where after back little only round "
    "man year came show every good me give our under name very through just form much great think say help low line "
    "before turn"
)
KEYS, WORDS = NOUNS.split(), COMMON.split()
DIGITS = {"s1": 10, "s2": 10, "s3": 16}
GROUPS = (8, 4, 4, 4, 12)  # of a UUID


class Needles(Task):
    """task: s1, s2 or s3. test_lengths: bytes of the texts at the test points."""

    vocab_size = 256

    def __init__(
        self,
        seq_len: int,
        task: str,
        test_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192),
        train_size: int = 200_000,
        validation_size: int = 512,
        test_size: int = 256,
        seed: int = 0,
        tokenizer: object = None,  # bytes: accepted, so that every task is built alike, and ignored
    ):
        if task not in DIGITS:
            raise ValueError(f"data.task={task} is not one of {', '.join(DIGITS)}")
        positive(train_size=train_size, validation_size=validation_size, test_size=test_size)
        shortest = least(task)
        for name, length in (("seq_len", seq_len), *(("data.test_lengths", length) for length in test_lengths)):
            if length < shortest:
                raise ValueError(f"{name}={length} is too short for needle, question and answer, {shortest} bytes")
        self.task, self.test_lengths = task, tuple(test_lengths)
        self.train_size, self.validation_size, self.test_size = train_size, validation_size, test_size
        self.chance, self.targets_per_token = 1 / DIGITS[task], (7 if task != "s3" else 32) / seq_len
        super().__init__(seq_len, seed, task=task, train_size=train_size)

    def describe(self) -> list[str]:
        haystack = "five sentences over and over" if self.task == "s1" else "sentences of common words"
        return [
            f"a needle in a haystack of {haystack}: {'a UUID' if self.task == 's3' else 'a number of seven digits'}",
            f"bytes: {self.seq_len} in training, {', '.join(map(str, self.test_lengths))} in the test",
            f"accuracy of a guess at a digit: {self.chance:.3g}",
            f"train: {self.train_size:,} texts; validation: {self.validation_size:,}; test: {self.test_size:,} each",
        ]

    def train_samples(self) -> Sequences:
        return self._samples("train", self.train_size, self.seq_len)

    def validation_samples(self, seq_len: int | None = None) -> Sequences:
        return self._samples("validation", self.validation_size, seq_len or self.seq_len)

    def test_points(self) -> dict[str, Sequences]:
        return {str(length): self._samples("test", self.test_size, length) for length in self.test_lengths}

    def _samples(self, split: str, size: int, length: int) -> Sequences:
        return Sequences(partial(self.make, split, length), size, length)

    def make(self, split: str, length: int, indices: np.ndarray) -> Made:
        u = uniform(self.seed, f"{split} {length}", indices, 64 + length // 2)
        texts = [text_of(row, self.task, length) for row in u]
        found = np.frombuffer("".join(texts).encode("ascii"), dtype=np.uint8).reshape(len(u), length + 1)
        tokens, size = found.astype(np.int64), answer_size(self.task)
        labels = np.full((len(u), length), IGNORE)
        answer = tokens[:, -size:]
        labels[:, -size:] = np.where(answer == ord("-"), IGNORE, answer)
        return tokens[:, :-1], labels


def text_of(u: np.ndarray, task: str, length: int) -> str:
    """length + 1 bytes, the answer at their end. u: its draws."""
    key, depth = KEYS[int(u[0] * len(KEYS))], u[1]
    value = answer(u[2:34], task)
    needle, question = NEEDLE.format(key=key, value=value), QUESTION.format(key=key)
    room = length + 1 - len(needle) - len(question) - len(value)
    hay = haystack(u[34:], task, room)
    cuts = [0] + [i + 2 for i in range(len(hay) - 1) if hay[i : i + 2] == ". "]
    cut = cuts[int(depth * len(cuts))]
    return hay[:cut] + needle + hay[cut:] + question + value


def answer(u: np.ndarray, task: str) -> str:
    if task != "s3":
        return "".join(map(str, [1 + int(u[0] * 9), *whole(u[1:7], 10)]))
    digits = iter("".join(f"{x:x}" for x in whole(u, 16)))
    return "-".join("".join(next(digits) for _ in range(size)) for size in GROUPS)


def answer_size(task: str) -> int:
    return 7 if task != "s3" else 36


def least(task: str) -> int:
    key = max(KEYS, key=len)
    return len(NEEDLE.format(key=key, value="")) + len(QUESTION.format(key=key)) + 2 * answer_size(task)


def haystack(u: np.ndarray, task: str, room: int) -> str:
    """So many bytes of whole sentences, of which the last is cut off, and a blank."""
    if task == "s1":
        text = NOISE * (room // len(NOISE) + 1)
    else:
        # words in proportion to 1 / rank, as in any text; sentences of 5 to 12 words
        weights = np.cumsum(1 / np.arange(1, len(WORDS) + 1))
        chosen = [WORDS[i] for i in np.searchsorted(weights, u * weights[-1])]
        parts, at = [], 0
        lengths = 5 + whole(u[::-1], 8)
        for size in lengths:
            if at + size > len(chosen):
                break
            parts.append(" ".join(chosen[at : at + size]).capitalize() + ". ")
            at += int(size)
        text = "".join(parts)
    return text[: max(0, room - 1)].ljust(room)
