"""No test of the data reads or writes outside its own folder, or asks the network."""

from collections.abc import Iterator

import pytest

from data.corpora import Corpus, Document


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TTR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


class Documents(Corpus):
    """A corpus from two lists."""

    def __init__(self, train: list[str], validation: list[str]):
        self.by_split = {"train": train, "validation": validation}

    def read(self, position: int | None = None) -> Iterator[Document]:
        every = [(split, i, text) for split, texts in self.by_split.items() for i, text in enumerate(texts)]
        for number, (split, index, text) in enumerate(every[position or 0 :], start=position or 0):
            yield Document(split, str(index), text, position=number + 1)

    def fingerprint(self) -> str:
        return repr(self.by_split)

    def describe(self) -> str:
        return "two lists"


@pytest.fixture
def documents():
    return Documents
