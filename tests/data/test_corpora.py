"""Documents, their splits, and the sentences a wrong path gets."""

import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from data.corpora import SPLITS, PythonSource, split_of
from data.files import TextFiles
from data.hub import Hub

TEXTS = [f"document {i}: naïve 世界\nsecond line" for i in range(40)]


def write(folder, suffix):
    """The same documents in every format."""
    rows = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))
    path = folder / f"documents{suffix}"
    if suffix == ".jsonl":
        path.write_text(rows)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(rows.encode()))
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "id": list(range(len(TEXTS)))}), path)
    elif suffix == ".txt.gz":
        path.write_bytes(gzip.compress("<|>".join(TEXTS).encode()))
    else:
        path.write_text("<|>".join(TEXTS))
    return path


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet"])
def test_every_format_gives_the_same_documents_in_order(tmp_path, suffix):
    path = write(tmp_path, suffix)
    corpus = TextFiles(str(path), validation_fraction=0.2, separator="<|>")
    documents = list(corpus)
    assert [document.text for document in documents] == TEXTS
    splits = {document.split for document in documents}
    assert splits == {"train", "validation"}
    assert list(corpus.texts("train")) == [d.text for d in documents if d.split == "train"]


def test_a_text_file_is_a_document_and_order_is_by_path(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.text for d in TextFiles(str(tmp_path / "**/*.txt"))] == ["a/1.txt", "b/2.txt", "c.txt"]


def test_the_split_does_not_depend_on_the_folder_or_on_other_files(tmp_path):
    def splits(folder, count):
        folder.mkdir()
        for i in range(count):
            (folder / f"{i:03}.txt").write_text("x")
        return {d.name: d.split for d in TextFiles(str(folder / "*.txt"), validation_fraction=0.3)}

    few, many = splits(tmp_path / "few", 30), splits(tmp_path / "many", 60)
    assert few.items() <= many.items()
    assert 5 <= sum(split == "validation" for split in many.values()) <= 31


def test_a_validation_glob_is_the_validation_split(tmp_path):
    (tmp_path / "a.txt").write_text("train")
    (tmp_path / "b.txt").write_text("held out")
    corpus = TextFiles(str(tmp_path / "a.txt"), validation=str(tmp_path / "b.*"))
    assert [(d.split, d.text) for d in corpus] == [("train", "train"), ("validation", "held out")]


def test_a_changed_file_has_another_fingerprint(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = TextFiles(str(path)).fingerprint()
    assert TextFiles(str(path)).fingerprint() == before
    path.write_text("another")
    assert TextFiles(str(path)).fingerprint() != before


def test_errors_name_the_setting(tmp_path):
    def fails(match, *arguments, **settings):
        with pytest.raises(ValueError, match=match):
            list(TextFiles(*arguments, **settings))

    nothing = str(tmp_path / "none/*.txt")
    fails(re.escape(f"data.corpus.path={nothing!r} matches no file"), nothing)
    rows = write(tmp_path, ".jsonl")
    fails(re.escape(f"data.corpus.validation={nothing!r} matches no file"), str(rows), validation=nothing)
    fails("share 1 files", str(rows), validation=str(rows))
    fails("data.corpus.text_field='body' is not a column of .*, which has id, text", str(rows), text_field="body")
    fails("data.corpus.text_field='id' of .* holds int, text is needed", str(rows), text_field="id")
    fails("data.corpus.validation_fraction=1.5 must lie between 0 and 1", str(rows), validation_fraction=1.5)
    (tmp_path / "image.png").write_bytes(b"")
    fails("matches nothing that can be read, but 1 .png; what can be is .txt, .text", str(tmp_path / "*.png"))
    (tmp_path / "broken.jsonl").write_text("not json at all")
    fails("line 1 of .*broken.jsonl is not JSON", str(tmp_path / "broken.jsonl"))
    (tmp_path / "broken.parquet").write_text("not parquet at all")
    fails("broken.parquet can't be read as parquet", str(tmp_path / "broken.parquet"))


def test_python_source_has_no_packages_and_no_tests():
    corpus = PythonSource()
    names = [document.name for document in corpus]
    assert names == sorted(names) and len(names) > 300
    assert "json/decoder.py" in names and "dataclasses.py" in names
    assert not any(re.search(r"site-packages|dist-packages|(^|/)(tests?|idle_test)/", name) for name in names)
    assert corpus.fingerprint() == PythonSource().fingerprint() != PythonSource(0.1).fingerprint()
    # the split is by name, and stays: these two are known
    assert (split_of("json/decoder.py", 0.05), split_of("ftplib.py", 0.05)) == ("train", "train")


@pytest.fixture
def hub(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")  # a folder called test_... would be a test split to `datasets`


def on_the_hub(folder, **files):
    """A data set as it lies on the hub, in a folder: train_0="a b c" is a file of three rows."""
    for name, texts in files.items():
        rows = "".join(
            json.dumps({"text": text}) + "\n" for text in (texts.split() if isinstance(texts, str) else texts)
        )
        (folder / f"{name.replace('_', '-')}.jsonl").write_text(rows)
    return str(folder)


def test_hub_with_a_validation_split_of_its_own(hub):
    path = on_the_hub(hub, train="a b c", validation="v w")
    corpus = Hub(path, validation_split="validation", max_documents=2)
    assert [(d.split, d.text) for d in corpus] == [
        ("validation", "v"),
        ("validation", "w"),
        ("train", "a"),
        ("train", "b"),
    ]


def test_hub_without_one_holds_documents_out(hub):
    documents = list(Hub(on_the_hub(hub, train=TEXTS), validation_fraction=0.2))
    assert [d.text for d in documents] == TEXTS
    assert {d.split for d in documents} == {"train", "validation"}


def test_hub_rows_without_text_are_empty(hub):
    """https://github.com/Lightning-AI/litgpt/issues/1759"""
    assert [d.text for d in Hub(on_the_hub(hub, train=["a", None, "b"]))] == ["a", "", "b"]


LINES = ["", " = One = \n", "text\n", " = = Section = = \n", "more\n", " = Two = \n", "end\n"]


def test_hub_joins_lines_to_documents(hub):
    texts = [d.text for d in Hub(on_the_hub(hub, train=LINES), document_start="^ = [^=]")]
    assert texts == ["", "".join(LINES[1:5]), "".join(LINES[5:])]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("lines", [False, True])
def test_hub_is_read_on_from_any_document(hub, streaming, lines):
    path = on_the_hub(hub, train_0=LINES[:4] if lines else "a b", train_1=LINES[4:] if lines else "c", validation="v")
    settings = {"validation_split": "validation", "streaming": streaming, "max_documents": 3}
    corpus = Hub(path, **settings, document_start="^ = [^=]" if lines else None)
    documents = list(corpus)
    assert [d.name for d in documents] == ["validation:0", "train:0", "train:1", "train:2"]
    for i, document in enumerate(documents):
        assert list(corpus.read(json.loads(json.dumps(document.position)))) == documents[i + 1 :]


def test_hub_in_parts_is_the_whole(hub):
    rows = {f"train_{number}": f"a{number} b{number}" for number in range(5)}
    path = on_the_hub(hub, **rows, validation_0="v", validation_1="w")
    corpus = Hub(path, validation_split="validation")
    parts = [document for part in range(3) for document in corpus.part(part, 3)]
    for split in SPLITS:
        texts = [[d.text for d in documents if d.split == split] for documents in (parts, corpus)]
        assert texts[0] == texts[1] and len(texts[0]) in (2, 10)


def test_hub_errors_are_one_sentence(hub):
    path = on_the_hub(hub, train=TEXTS)
    with pytest.raises(ValueError, match=r"data.corpus.path='.*' \(name=None, split='dev'\) can't be loaded .*dev"):
        list(Hub(path, split="dev"))
    with pytest.raises(ValueError, match=r"data.corpus.text_field='body' is not a column of .*, which has text"):
        list(Hub(path, text_field="body"))
