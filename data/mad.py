"""The six tasks of MAD, mechanistic architecture design (Poli et al. 2024, arXiv 2403.17844, section 3 and appendix B).

    recall         k v k v ...: keys come again, and their values with them. Tested where a key has been before.
    noisy_recall   the same with pairs of noise between, which mean nothing
    fuzzy_recall   keys and values of 1 to 3 tokens in training, and keys of 3 in the test; asked at the end
    memorization   k ? k ?: the value of a key, which is the same in all sequences
    copying        tokens between blanks; at the end they are to be said again, in their order
    compression    random tokens; all of them are to be said again from what is known at the last one, by a decoder that
                   sees nothing else (models/reconstruction.py)

Recall trains on every next token, as published, and the others on what is asked for. Tests are the validation split. A
sequence is drawn as mad-lab draws it, call by call (athms/mad-lab, mad/data/instances.py, commit 0f49a45), but from a
generator of its own, seeded by (seed, split, i); and copying draws its blanks from this one too, where mad-lab takes
NumPy's global one.

Published training: batches of 128, 200 epochs, AdamW with the rates 10^-4, 5 10^-4 and 10^-3 and weight decay 0 and
0.1, of which the best counts; a cosine to 10^-6; width 128, mixer and SwiGLU twice. mad-lab's accuracy is a mean over
classes of a batch, and here one over all answers. Classes are equally frequent, so that both mean nearly the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import permutations

import numpy as np

from data.made import Sequences, Task, positive
from data.text import IGNORE

Random = np.random.Generator
Row = tuple[list[int], list[int]]  # tokens, and what is to be said at each


class Mad(Task):
    """task: one of the six. length: of its sequences, which seq_len must be. noise_vocab, noise: how many of the tokens
    mean nothing, and how many pairs are made of them. num_copied: tokens that copying repeats.
    """

    def __init__(
        self,
        seq_len: int,
        task: str,
        vocab_size: int,
        length: int,
        noise_vocab: int = 0,
        noise: float = 0.0,
        num_copied: int = 16,
        train_size: int = 12_800,
        validation_size: int = 1_280,
        seed: int = 0,
        tokenizer: object = None,  # there is no text here: accepted, so that every task is built alike, and ignored
    ):
        if task not in TASKS:
            raise ValueError(f"data.task={task} is not one of {', '.join(TASKS)}")
        positive(vocab_size=vocab_size, length=length, train_size=train_size, validation_size=validation_size)
        if length != seq_len:
            raise ValueError(f"seq_len={seq_len} must be data.length={length}, that of the task's sequences")
        if not 0 <= noise < 1:
            raise ValueError(f"data.noise={noise} must be at least 0 and below 1")
        answers, targets = TASKS[task](vocab_size - noise_vocab, length, num_copied)
        if answers < 2 or (noise and not noise_vocab):
            raise ValueError(
                f"data.vocab_size={vocab_size} is too small for data.noise_vocab={noise_vocab} and answers"
            )
        if length % 2 or length < 20:
            raise ValueError(f"data.length={length} must be even and at least 20")
        if task == "copying" and length <= 2 * num_copied + 1:
            raise ValueError(
                f"data.num_copied={num_copied} does not fit data.length={length}; at most {length // 2 - 1}"
            )
        self.task, self.vocab_size, self.noise_vocab, self.noise = task, vocab_size, noise_vocab, noise
        self.num_copied, self.train_size, self.validation_size = num_copied, train_size, validation_size
        self.reconstructs = task == "compression"
        self.chance, self.targets_per_token = 1 / answers, targets / length
        settings = {"task": task, "vocab_size": vocab_size, "noise": (noise_vocab, noise), "copied": num_copied}
        super().__init__(seq_len, seed, **settings, sizes=(train_size, validation_size))
        self._made: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def describe(self) -> list[str]:
        return [
            f"MAD, {self.task.replace('_', ' ')}: {self.seq_len} tokens, vocabulary {self.vocab_size}",
            f"accuracy of a guess: {self.chance:.3g}",
            f"train: {self.train_size:,} sequences; test, the validation split: {self.validation_size:,}",
        ]

    def train_samples(self) -> Sequences:
        return self._samples("train", self.train_size)

    def validation_samples(self, seq_len: int | None = None) -> Sequences:
        """There is no other length."""
        if seq_len not in (None, self.seq_len):
            raise ValueError(
                f"seq_len={seq_len}: data.task={self.task} has sequences of data.length={self.seq_len} alone"
            )
        return self._samples("validation", self.validation_size)

    def _samples(self, split: str, size: int) -> Sequences:
        """All of them are made at once, since every epoch has the same ones: 12,800 take some seconds."""
        if split not in self._made:
            rows = [self.sequence(split, i) for i in range(size)]
            self._made[split] = tuple(np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))  # type: ignore[assignment]
        input_ids, labels = self._made[split]
        return Sequences(lambda i: (input_ids[i], labels[i]), size, self.seq_len)

    def sequence(self, split: str, i: int) -> Row:
        random, training = np.random.default_rng((self.seed, int(split == "validation"), i)), split == "train"
        if self.task in ("recall", "noisy_recall"):
            tokens, answers = recall(random, self.vocab_size, self.seq_len, self.noise_vocab, self.noise)
            made = shifted(tokens, answers, training)
            return [*made[0], 0], [*made[1], IGNORE]  # one token short, and padded at its end
        if self.task == "fuzzy_recall":
            return shifted(*fuzzy_recall(random, self.vocab_size, self.seq_len, training), training)
        if self.task == "memorization":
            return memorization(random, self.vocab_size, self.seq_len)
        if self.task == "copying":
            return copying(random, self.vocab_size, self.seq_len, self.num_copied)
        return compression(random, self.vocab_size, self.seq_len)


def shifted(tokens: list[int], answers: list[int], training: bool) -> Row:
    """Each position says the next token; in a test, the next answer."""
    return tokens[:-1], (tokens if training else answers)[1:]


def recall(random: Random, vocab_size: int, length: int, noise_vocab: int = 0, noise: float = 0.0) -> Row:
    """length / 2 pairs, the last of a key that has been before. Keys are the lower half of what is not noise, values
    the upper."""
    meaning = vocab_size - noise_vocab
    half, clean = meaning // 2, random.integers(length // 2)  # one pair is never noise
    tokens: list[int] = []
    answers: list[int] = []
    values: dict[int, int] = {}
    for pair in range(length // 2 - 1):
        if pair != clean and noise > 0 and random.random() < noise:
            tokens += (meaning + random.integers(noise_vocab, size=2)).tolist()
            answers += [IGNORE, IGNORE]
            continue
        key = int(random.integers(half))
        known = key in values
        if not known:
            values[key] = half + int(random.integers(meaning - half))
        tokens += [key, values[key]]
        answers += [IGNORE, values[key] if known else IGNORE]
    key = list(values)[random.integers(len(values))]
    return [*tokens, key, values[key]], [*answers, IGNORE, values[key]]


def fuzzy_recall(random: Random, vocab_size: int, length: int, training: bool, longest: int = 3) -> Row:
    """length + 1 tokens, padded at their beginning: keys and values of 1 to `longest` different tokens each, in a test
    keys of `longest` alone. The last pair asks for a key that has been before."""
    padding, half = vocab_size - 1, (vocab_size - 1) // 2
    sizes = range(1, longest + 1)
    keys = {size: words(random, range(half), size) for size in (sizes if training else [longest])}
    values = {size: words(random, range(half, padding), size) for size in sizes}

    def a_size(of: dict[int, list[tuple[int, ...]]], drawn: bool = True) -> int:
        return list(of)[random.integers(len(of))] if drawn else longest

    def one(of: list[tuple[int, ...]]) -> tuple[int, ...]:
        return of[random.integers(len(of))]

    key_size, value_size = a_size(keys, training), a_size(values)
    asked, answer = one(keys[key_size]), one(values[value_size])
    room = length - key_size - value_size
    place, there = random.integers(room - key_size - value_size), False
    tokens: list[int] = []
    answers: list[int] = []
    stored: dict[tuple[int, ...], tuple[int, ...]] = {}
    shown = set()
    while len(tokens) < room - 2 * longest:
        sizes_of_pair = a_size(keys, training), a_size(values)
        if len(tokens) >= place and not there:
            key, value, there, known = asked, answer, True, False
            stored[asked] = answer
        else:
            key = one(keys[sizes_of_pair[0]])
            there, known = there or key == asked, key in shown
            if key == asked:
                value = answer
            else:
                value = stored[key] if key in stored else stored.setdefault(key, one(values[sizes_of_pair[1]]))
        tokens += [*key, *value]
        answers += [IGNORE] * len(key) + (list(value) if known else [IGNORE] * len(value))
        shown.add(key)
    tokens, answers = [*tokens, *asked, *answer], [*answers, *[IGNORE] * key_size, *answer]
    before = length + 1 - len(tokens)
    return [padding] * before + tokens, [IGNORE] * before + answers


def words(random: Random, letters: range, size: int) -> list[tuple[int, ...]]:
    """All of so many different tokens, shuffled."""
    found = list(permutations(letters, size))
    random.shuffle(found)
    return found


def memorization(random: Random, vocab_size: int, length: int) -> Row:
    """Keys, and the last token in the place of their values."""
    keys, values = dictionary(vocab_size - 1)
    random.integers(length // 2)  # the pair that would never be noise
    chosen = random.integers(len(keys), size=length // 2)
    asked = zip(*((keys[i], vocab_size - 1) for i in chosen), strict=True)
    return (
        [x for pair in zip(*asked, strict=True) for x in pair],
        [x for i in chosen for x in (IGNORE, values[i])],
    )


@cache
def dictionary(size: int, seed: int = 12345) -> tuple[list[int], list[int]]:
    """Keys and their values, the same for every sequence and for every seed of a run, as mad-lab has them."""
    random = np.random.default_rng(seed)
    (keys, values) = ([x for (x,) in words(random, part, 1)] for part in (range(size // 2), range(size // 2, size)))
    return keys, values[: len(keys)]


def copying(random: Random, vocab_size: int, length: int, num_copied: int) -> Row:
    """Tokens with blanks before them, the sign to copy, and as many blanks as there are tokens."""
    blank, num_blanks = vocab_size - 2, length - 2 * num_copied - 1
    copied = random.integers(vocab_size - 2, size=num_copied)
    return spread(copied, random.integers(num_copied, size=num_blanks), blank)


def spread(copied: np.ndarray, places: np.ndarray, blank: int) -> Row:
    """places: before which token each blank comes."""
    tokens = [*np.insert(copied, places, blank).tolist(), blank + 1, *[blank] * len(copied)]
    return tokens, [IGNORE] * (len(tokens) - len(copied)) + copied.tolist()


def compression(random: Random, vocab_size: int, length: int) -> Row:
    tokens = [*random.integers(vocab_size - 1, size=length - 1).tolist(), vocab_size - 1]
    return tokens, tokens


# (tokens that mean something, length, num_copied) -> how many answers there are, and targets of a training sequence
TASKS: dict[str, Callable[[int, int, int], tuple[int, int]]] = {
    "recall": lambda vocab, length, copied: (vocab - vocab // 2, length - 1),
    "noisy_recall": lambda vocab, length, copied: (vocab - vocab // 2, length - 1),
    "fuzzy_recall": lambda vocab, length, copied: (vocab - 1 - (vocab - 1) // 2, length),
    "memorization": lambda vocab, length, copied: ((vocab - 1) // 2, length // 2),
    "copying": lambda vocab, length, copied: (vocab - 2, copied),
    "compression": lambda vocab, length, copied: (vocab - 1, length),
}
