"""Few documents, or one: validation is the end of the longest, never empty and no part of training.

Reported of others: https://github.com/scikit-learn/scikit-learn/issues/11028,
https://github.com/jzhang38/TinyLlama/issues/171, https://github.com/Joluck/RWKV-PEFT/issues/52,
https://github.com/sherjilozair/char-rnn-tensorflow/issues/9, https://github.com/MIC-DKFZ/nnssl/pull/15,
https://github.com/Lightning-AI/litgpt/issues/1450, https://github.com/encord-team/text-to-image-eval/pull/73.
"""

import json
from itertools import pairwise

import pytest

from data.files import TextFiles
from data.held_out import LEAST, EndHeldOut
from data.prepare import prepare
from data.shards import TokenShards
from data.tokenizer import Bpe, Bytes

BOOK = "\n\n".join(f"Paragraph {i} of a book, in wörds and\nlines {i}." for i in range(3000))


def prepared(corpus, folder, tokenizer=None) -> dict[str, list[str]]:
    """The documents of each split."""
    tokenizer = tokenizer or Bytes()
    prepare(corpus, tokenizer, folder)
    found = {}
    for split in ("train", "validation"):
        shards = TokenShards(folder, split)
        ends = shards.offsets.tolist()
        found[split] = [tokenizer.decode(shards.read(a, b - 1)) for a, b in pairwise(ends)]
    return found


@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.2, 0.999])
def test_a_book_is_cut_at_a_paragraph(tmp_path, fraction):
    (tmp_path / "book.txt").write_text(BOOK)
    corpus = TextFiles(str(tmp_path), validation_fraction=fraction)
    splits = prepared(corpus, tmp_path / "shards")
    (train,), (validation,) = splits.values()
    assert train + validation == BOOK and train.endswith("\n\n") and validation.startswith("Paragraph ")
    total = len(BOOK.encode())
    amount = min(max(int(fraction * total), LEAST), total // 2)  # an eighth of the book is more
    assert amount <= len(validation.encode()) < amount + 100
    said = json.loads((tmp_path / "shards" / "meta.json").read_text())["source"]
    assert said == (
        f"{tmp_path} (1 files); these are few documents, so that the end of book.txt, some {amount:,} bytes, is the "
        "validation split"
    )


TEXTS = {  # a text -> what its training part ends with
    "lines": ("line by line\n" * 900, "line\n"),
    "windows": ("one\r\n\r\ntwo\r\n" * 900, "\r\n\r\n"),
    "words": ("word " * 2000, "word"),
    "no blanks": ("世界" * 3000, "界"),
    "two letters": ("é世", "é"),
    "blank": (" \n" * 9, "\n"),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("part", [1000, 2**20])
def test_a_text_without_paragraphs(tmp_path, monkeypatch, kind, part):
    """However it is read, and read on from any place."""
    text, end = TEXTS[kind]
    monkeypatch.setattr("data.formats.PART", part)
    (tmp_path / "a.txt").write_bytes(text.encode())
    corpus = TextFiles(str(tmp_path / "a.txt"), validation_fraction=0.4).with_both_splits()
    assert isinstance(corpus, EndHeldOut)
    documents = list(corpus)
    splits = {s: "".join(d.text for d in documents if d.split == s) for s in ("train", "validation")}
    assert splits["train"] + splits["validation"] == text and all(splits.values()) and splits["train"].endswith(end)
    assert [d.last for d in documents if d.split == "train"][-1] and documents[-1].last
    for i in range(0, len(documents), 1 + len(documents) // 20):
        if documents[i].position is not None:
            rest = list(corpus.read(json.loads(json.dumps(documents[i].position))))
            assert "".join(d.text for d in rest) == "".join(d.text for d in documents[i + 1 :])
            assert {(d.split, d.name) for d in rest} == {(d.split, d.name) for d in documents[i + 1 :]}


def test_the_longest_of_few_is_cut_and_the_others_are_trained_on(tmp_path):
    """Not the short one, which the hash of its name may choose: no sequence would fit into it."""
    short = next(n for n in (f"{i}.txt" for i in range(10**4)) if list(split(tmp_path, n)) == ["validation"])
    (tmp_path / "book.txt").write_text(BOOK)
    (tmp_path / "notes.jsonl").write_text('{"text": "a note"}\n{"text": null}\n')
    splits = prepared(TextFiles(str(tmp_path)), tmp_path / "shards")
    assert [text[:9] for text in splits["train"]] == ["short", "Paragraph", "a note"] and short
    assert len(splits["validation"]) == 1 and BOOK.endswith(splits["validation"][0])


def split(folder, name):
    (folder / name).write_text("short")
    found = [d.split for d in TextFiles(str(folder / name))]
    if found != ["validation"]:
        (folder / name).unlink()
    return found


@pytest.mark.parametrize("fraction", [1e-9, 0.4, 0.999])
def test_of_short_documents_some_are_held_out(tmp_path, fraction):
    """A copy is on the side of its document."""
    notes = [f"note {i % 50}: {'short ' * (i % 50)}" for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": note}) + "\n" for note in notes))
    corpus = TextFiles(str(tmp_path / "a.jsonl"), validation_fraction=fraction).with_both_splits()
    documents = list(corpus)
    assert [d.text for d in documents] == notes
    train, validation = ({d.text for d in documents if d.split == s} for s in ("train", "validation"))
    assert train and not train & validation
    held = sum(len(d.text) for d in documents if d.split == "validation")
    total = sum(map(len, notes))
    amount = min(max(int(fraction * total), total // 8), total // 2)
    assert amount <= held < amount + 2 * max(map(len, notes))
    if fraction == 1e-9:
        many = sum(d.split == "validation" for d in documents)
        assert corpus.describe().endswith(f"so that {many} of them, {held:,} bytes, are the validation split")
        assert list(corpus.read(json.loads(json.dumps(documents[30].position)))) == [
            d._replace(position=tuple(d.position)) for d in documents[31:]
        ]


def test_enough_documents_are_split_by_their_names(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 50}) + "\n" for i in range(900)))
    corpus = TextFiles(str(tmp_path), validation_fraction=0.05)
    assert corpus.with_both_splits() is corpus
    (tmp_path / "one.txt").write_text("one")
    corpus = TextFiles(str(tmp_path / "one.txt"), validation=str(tmp_path / "a.jsonl"))
    assert corpus.with_both_splits() is corpus


def test_a_tokenizer_does_not_see_what_is_held_out(tmp_path, monkeypatch):
    seen = []
    train = Bpe.train
    monkeypatch.setattr(Bpe, "train", lambda self, texts: seen.extend(texts) or train(self, seen))
    (tmp_path / "a.txt").write_text(BOOK)
    splits = prepared(TextFiles(str(tmp_path / "a.txt")), tmp_path / "shards", Bpe(300))
    assert "".join(seen) == splits["train"][0] and splits["train"][0] + splits["validation"][0] == BOOK


def test_copies_of_what_is_cut_are_left_out(tmp_path):
    """Else training would hold what is validated on."""
    for name, text in (("a", BOOK), ("b", "b" * len(BOOK.encode())), ("c", BOOK), ("d", "d")):
        (tmp_path / f"{name}.txt").write_text(text)
    splits = prepared(TextFiles(str(tmp_path / "*.txt")), tmp_path / "shards")
    assert [text[:1] for text in splits["train"]] == ["P", "b", "d"]
    assert splits["train"][0] + splits["validation"][0] == BOOK
    assert "the validation split, and 1 copies of it are left out" in (tmp_path / "shards" / "meta.json").read_text()


def test_a_single_character_can_not_be_cut(tmp_path):
    (tmp_path / "a.txt").write_text("世")
    with pytest.raises(
        ValueError, match=r"leaves the validation split without a document, of 1 in .*a.txt \(1 files\)"
    ):
        prepare(TextFiles(str(tmp_path / "a.txt")), Bytes(), tmp_path / "shards")


def test_a_killed_preparation_cuts_at_the_same_place(tmp_path, monkeypatch):
    monkeypatch.setattr("data.formats.PART", 1000)
    monkeypatch.setattr("data.pieces.PIECE", 3000)
    for name, text in (("a", "a" * 7000), ("b", BOOK[:30000]), ("c", "c")):
        (tmp_path / f"{name}.txt").write_text(text)
    whole = prepared(TextFiles(str(tmp_path / "*.txt")), tmp_path / "whole")
    read, count = EndHeldOut.read, 0

    def killed(self, position=None):
        nonlocal count
        for document in read(self, position):
            count += 1
            if count % 9 == 8:
                raise KeyboardInterrupt
            yield document

    monkeypatch.setattr(EndHeldOut, "read", killed)
    for _ in range(20):
        try:
            assert prepared(TextFiles(str(tmp_path / "*.txt")), tmp_path / "killed") == whole
            break
        except KeyboardInterrupt:
            pass
    assert count > 20 and (tmp_path / "killed").exists()


def test_what_was_prepared_without_a_cut_is_begun_anew(tmp_path, monkeypatch):
    """A position of the corpus itself, in the journal of a release that did not cut, is none of the one that is cut."""
    monkeypatch.setattr("data.formats.PART", 1000)
    monkeypatch.setattr("data.pieces.PIECE", 3000)
    (tmp_path / "a.txt").write_text(BOOK[:30000])
    path, read = str(tmp_path / "a.txt"), TextFiles.read

    def killed(self, position=None):
        for number, document in enumerate(read(self, position)):
            if number == 20:
                raise KeyboardInterrupt
            yield document

    with monkeypatch.context() as before, pytest.raises(KeyboardInterrupt):
        before.setattr(TextFiles, "with_both_splits", lambda self: self)
        before.setattr(TextFiles, "read", killed)
        prepare(TextFiles(path), Bytes(), tmp_path / "shards")
    assert len((tmp_path / "shards.partial" / "journal.jsonl").read_text().splitlines()) > 3
    splits = prepared(TextFiles(path), tmp_path / "shards")
    assert splits["train"] + splits["validation"] == [splits["train"][0], BOOK[len(splits["train"][0]) : 30000]]
