"""A corpus that is prepared in parts is that of one machine, byte for byte, whatever dies on the way.

What others asked for: https://github.com/NVIDIA-NeMo/Speech/issues/13529 (several nodes, one pair of files) and
https://github.com/NVIDIA/Megatron-LM/issues/452 (text cut by hand, merged by another script).
"""

import json

import pytest

from data.corpora import PythonSource
from data.divided import divided, merge, parts_folder, prepare_part
from data.files import TextFiles
from data.hub import Hub
from data.prepare import prepare
from data.shards import TokenShards, check
from data.tokenizer import Bpe, Bytes
from tests.data.test_shards import content

ROWS = [["a b c", "", "d" * 40], ["δ", "f g"], ["h"], ["i " * 30, "j", "k", "l"], ["m n o p q"], ["r"]]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pieces, chunks and shards of which each part has several."""
    monkeypatch.setattr("data.pieces.PIECE", 20)
    monkeypatch.setattr("data.divided.CHUNK", 32)


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number, rows in enumerate(ROWS):
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    (tmp_path / "held.txt").write_text("held out " * 3)
    return {"path": str(folder), "validation": str(tmp_path / "held.txt")}


CORPORA = {
    "its own validation": lambda files: TextFiles(**files),
    "held out by names": lambda files: TextFiles(files["path"], validation_fraction=0.4),
    "documents held out": lambda files: TextFiles(files["path"], validation_fraction=0.01),
}


@pytest.mark.parametrize("tokenizer", [Bytes, lambda: Bpe(262)], ids=["bytes", "bpe"])
@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("parts", [1, 2, 6])
def test_parts_are_merged_to_the_same_bytes(files, tmp_path, corpus, parts, tokenizer):
    def made():
        return CORPORA[corpus](files)

    prepare(made(), tokenizer(), tmp_path / "one", shard_tokens=50)
    whole = tmp_path / "whole"
    for part in reversed(range(parts)):  # in any order
        prepare_part(made(), tokenizer(), whole, part, parts, shard_tokens=50)
    assert divided(whole)
    learnt = tokenizer()
    merge(made(), learnt, whole, shard_tokens=50)
    check(whole, learnt, everything=True)
    assert content(whole) == content(tmp_path / "one")
    assert not divided(whole) and not parts_folder(whole).exists()
    assert prepare_part(made(), tokenizer(), whole, 0, parts) == whole  # nothing is left to do


def killed_after(corpus, count):
    """The corpus, whose reading ends the process, as it were, behind so many documents."""
    read = corpus.read

    def until(position=None):
        for number, document in enumerate(read(position)):
            if number == count:
                raise KeyboardInterrupt
            yield document

    corpus.read = until
    return corpus


def test_killed_parts_and_a_killed_merge_go_on(files, tmp_path, monkeypatch, capsys):
    prepare(TextFiles(**files), Bytes(), tmp_path / "one")
    whole = tmp_path / "whole"
    corpus = TextFiles(**files)
    monkeypatch.setattr(corpus, "part", lambda *which: killed_after(TextFiles(**files).part(*which), 3))
    with pytest.raises(KeyboardInterrupt):
        prepare_part(corpus, Bytes(), whole, 0, 2)
    assert (parts_folder(whole) / "00000-of-00002.partial").exists()
    for part in (1, 0):
        prepare_part(TextFiles(**files), Bytes(), whole, part, 2)
    assert "Going on with 00000-of-00002 behind" in capsys.readouterr().out
    read, reads = TokenShards.read, []

    def killed(shards, start, stop):
        reads.append(start)
        if len(reads) == 4:
            raise KeyboardInterrupt
        return read(shards, start, stop)

    monkeypatch.setattr(TokenShards, "read", killed)
    with pytest.raises(KeyboardInterrupt):
        merge(TextFiles(**files), Bytes(), whole)
    merge(TextFiles(**files), Bytes(), whole)
    assert "Going on with whole behind" in capsys.readouterr().out
    assert content(whole) == content(tmp_path / "one")


def test_the_standard_library_in_parts_is_the_whole():
    whole = [(document.split, document.name) for document in PythonSource()]
    parts = [document for part in range(3) for document in PythonSource().part(part, 3)]
    assert [(document.split, document.name) for document in parts] == whole
    third = PythonSource().part(2, 3)
    assert 0 < third.fraction(parts[-2].position) < third.fraction(parts[-1].position) == 1


def test_parts_have_about_as_many_bytes(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text("x" * (1000 + 50 * (number % 7)))
    corpus = TextFiles(str(tmp_path))
    sizes = [sum(len(document.text) for document in corpus.part(part, 4)) for part in range(4)]
    assert max(sizes) - min(sizes) < 2000 and sum(sizes) == sum(len(document.text) for document in corpus)


def test_mistakes_are_told(files, tmp_path):
    corpus, whole = TextFiles(**files), tmp_path / "whole"
    with pytest.raises(ValueError, match=r"^part=2 of parts=2 must be a whole number from 0 to 1$"):
        prepare_part(corpus, Bytes(), whole, 2, 2)
    with pytest.raises(ValueError, match=r"^parts=0 must be a whole number, at least 1: into how many parts"):
        prepare_part(corpus, Bytes(), whole, 1, 0)
    with pytest.raises(ValueError, match=r"parts=8 is more than the 7 files of"):
        prepare_part(corpus, Bytes(), whole, 0, 8)
    with pytest.raises(ValueError, match=r"data.drop_duplicates=true compares all documents, of which a part sees"):
        prepare_part(corpus, Bytes(), whole, 0, 2, drop_duplicates=True)
    with pytest.raises(
        ValueError, match=r"parts=2: data.corpus.validation_split=None needs all rows .*hf://datasets/x/"
    ):
        Hub("x").part(0, 2)
    for part in (0, 2):
        prepare_part(corpus, Bytes(), whole, part, 4)
    with pytest.raises(ValueError, match=r"preparation in parts=4, of which 2 are not there: part=1, 3; prepare them"):
        merge(corpus, Bytes(), whole)
    assert (parts_folder(whole) / "00000-of-00004").exists()
