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

    def __iter__(self) -> Iterator[Document]:
        for split, texts in self.by_split.items():
            for index, text in enumerate(texts):
                yield Document(split, str(index), text)

    def fingerprint(self) -> str:
        return repr(self.by_split)

    def describe(self) -> str:
        return "two lists"


@pytest.fixture
def documents():
    return Documents
