"""Random folders: neither split is empty, training has no document of validation, and kills change no byte."""

import csv
import gzip
import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from data.files import TextFiles
from data.prepare import prepare
from data.shards import TokenShards
from data.tokenizer import Bytes
from tests.data.test_shards import content

WORDS = ["a ", "é", "\n", "\n\n", "世", "wörd ", '"', ","]


def write(folder, draw: random.Random) -> None:
    for number in range(draw.randint(1, 6)):
        rows = [draw.choice([None, "".join(draw.choices(WORDS, k=draw.choice([0, 3, 400])))]) for _ in range(5)]
        kind = draw.choice(["txt", "md", "txt.gz", "html", "csv", "jsonl", "json", "parquet"])
        path = folder / f"{number}.{kind}"
        text = "".join(filter(None, rows))
        if kind == "csv":
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([["id", "text"], *([1, row] for row in rows)])
        elif kind == "parquet":
            table = pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())})
            pyarrow.parquet.write_table(table, path, row_group_size=draw.choice([1, 2, 9]))
        elif kind == "jsonl":
            path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        elif kind == "json":
            path.write_text(json.dumps([{"text": row} for row in rows]))
        else:
            raw = (f"<p>{text}</p>" if kind == "html" else text).encode()
            path.write_bytes(gzip.compress(raw) if kind == "txt.gz" else raw)
    (folder / "z.txt").write_text("some text that is there always")


class Killed(TextFiles):
    """Reads so many documents, and then no more."""

    documents = 0

    def with_both_splits(self):
        corpus = super().with_both_splits()
        read = corpus.read

        def some(position=None):
            for number, document in enumerate(read(position)):
                if number == self.documents:
                    raise KeyboardInterrupt
                yield document

        corpus.read = some
        return corpus


@pytest.mark.parametrize("seed", range(12))
def test_a_random_folder(tmp_path, monkeypatch, seed):
    for module in ("formats", "pieces"):
        monkeypatch.setattr(f"data.{module}.PART", 300)
    monkeypatch.setattr("data.pieces.PIECE", 500)
    (tmp_path / "texts").mkdir()
    draw = random.Random(seed)
    write(tmp_path / "texts", draw)
    settings = {"separator": draw.choice([None, "\n\n", "世"]), "validation_fraction": draw.choice([1e-6, 0.01, 0.3])}
    corpus = Killed(str(tmp_path / "texts"), **settings)
    prepare(TextFiles(str(tmp_path / "texts"), **settings), Bytes(), tmp_path / "whole")
    assert all(TokenShards(tmp_path / "whole", split).num_bytes for split in ("train", "validation"))
    split_documents = list(TextFiles(str(tmp_path / "texts"), **settings).with_both_splits())
    train, validation = ({d.name for d in split_documents if d.split == s} for s in ("train", "validation"))
    assert not train & validation
    for documents in range(3, 999):
        corpus.documents = documents
        try:
            prepare(corpus, Bytes(), tmp_path / "killed")
            break
        except KeyboardInterrupt:
            pass
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
