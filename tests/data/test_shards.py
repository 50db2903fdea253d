"""What is written comes back, all of it or nothing."""

import errno
import json
import multiprocessing
import os
import pickle
import re
import shutil

import numpy as np
import pytest

from data.files import TextFiles
from data.prepare import prepare
from data.shards import TokenShards, cache_folder, check, hash_file, shard_folder
from data.text import Text
from data.tokenizer import Bpe, Bytes
from tests.data.conftest import Documents

TRAIN = ["one", "zwölf", "", "three " * 20, "4"]
VALIDATION = ["held out", "this too"]


def tokens_of(texts: list[str]) -> list[int]:
    return [i for text in texts if text for i in [*text.encode(), Bytes.eos]]


@pytest.mark.parametrize("shard_tokens", [1, 7, 2**20])
def test_round_trip_over_shards(documents, tmp_path, shard_tokens):
    prepare(documents(TRAIN, VALIDATION), Bytes(), tmp_path / "shards", shard_tokens)
    for split, texts in (("train", TRAIN), ("validation", VALIDATION)):
        shards = TokenShards(tmp_path / "shards", split)
        expected = tokens_of(texts)
        written = [text for text in texts if text]
        assert (shards.num_tokens, shards.num_documents) == (len(expected), len(written))
        assert shards.num_bytes == sum(len(text.encode()) for text in texts)
        assert len(shards.shards) == -(-len(expected) // shard_tokens)
        for start in range(0, len(expected), 5):
            for stop in (start, start + 1, len(expected)):
                assert shards.read(start, stop).tolist() == expected[start:stop]
        ends = np.flatnonzero(shards.read(0, shards.num_tokens) == Bytes.eos) + 1
        assert shards.offsets.tolist() == [0, *ends]


def test_rows_are_what_is_read_and_know_where_documents_begin(documents, tmp_path):
    prepare(documents(["ab", "c", "defg"], ["x"]), Bytes(), tmp_path / "shards", shard_tokens=4)
    shards = TokenShards(tmp_path / "shards", "train")
    begins = [True, False, False, True, False, True, False, False, False, False]
    for length in range(1, 11):
        starts = np.arange(0, 11 - length)
        rows, found = shards.rows(starts, length), shards.document_starts(starts, length)
        for start, row, begin in zip(starts, rows, found, strict=True):
            assert row.tolist() == shards.read(start, start + length).tolist()
            assert begin.tolist() == [False, *begins[start + 1 : start + length]]


def test_small_vocabularies_take_two_bytes_a_token_and_large_ones_four(documents, tmp_path):
    class Wide(Bytes):
        vocab_size = 2**16 + 1

    prepare(documents(TRAIN, VALIDATION), Bytes(), tmp_path / "narrow")
    prepare(documents(TRAIN, VALIDATION), Wide(), tmp_path / "wide")
    sizes = [(tmp_path / name / "train_00000.bin").stat().st_size for name in ("narrow", "wide")]
    assert sizes == [2 * len(tokens_of(TRAIN)), 4 * len(tokens_of(TRAIN))]


class Interrupted(Documents):
    """Ends the process, as it were, before its fourth document; then no more."""

    def read(self, position=None):
        for number, document in enumerate(super().read(position)):
            if number == 3 and position is None:
                raise KeyboardInterrupt
            yield document


@pytest.mark.parametrize("shard_tokens", [7, 2**20])
@pytest.mark.parametrize("torn", ["", "train_00000.bin", "train_offsets.bin", "journal.jsonl"])
def test_what_was_done_before_a_kill_is_kept_and_what_is_torn_is_not(tmp_path, monkeypatch, torn, shard_tokens):
    monkeypatch.setattr("data.pieces.PIECE", 1)  # a document each
    folder, partial = tmp_path / "shards", tmp_path / "shards.partial"
    prepare(Documents(TRAIN, VALIDATION), Bytes(), tmp_path / "whole", shard_tokens)
    corpus = Interrupted(TRAIN, VALIDATION)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, Bytes(), folder, shard_tokens)
    assert not folder.exists() and len((partial / "journal.jsonl").read_text().splitlines()) == 3
    if torn:
        with open(partial / torn, "r+b") as file:
            file.truncate((partial / torn).stat().st_size - 3)
    with open(partial / "train_00000.bin", "ab") as file:
        file.write(b"what is behind the last line of the journal")
    prepare(corpus, Bytes(), folder, shard_tokens)
    assert content(folder) == content(tmp_path / "whole") and not partial.exists()


def content(folder):
    """What must not depend on how it was prepared: all but the times of change."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "stamps.json")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("tokenizer", [Bytes, lambda: Bpe(300)], ids=["bytes", "bpe"])
def test_one_worker_or_three_give_the_same_bytes(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr("data.pieces.PIECE", 50)
    corpus = Documents([f"{text} <eos> {i}" for i in range(30) for text in TRAIN], VALIDATION)
    for num_workers in (0, 1, 3):
        prepare(corpus, tokenizer(), tmp_path / str(num_workers), num_workers=num_workers)
    assert content(tmp_path / "0") == content(tmp_path / "1") == content(tmp_path / "3")


def test_duplicates_are_dropped_on_demand_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("data.pieces.PIECE", 1)
    corpus = Documents(["a", "b", "a", "a", "c"], ["v", "b"])
    prepare(corpus, Bytes(), tmp_path / "all")
    prepare(corpus, Bytes(), tmp_path / "once", drop_duplicates=True)
    metas = [json.loads((tmp_path / name / "meta.json").read_text()) for name in ("all", "once")]
    assert [meta["duplicates_dropped"] for meta in metas] == [0, 3]
    assert [[meta["splits"][s]["documents"] for s in ("train", "validation")] for meta in metas] == [[5, 2], [3, 1]]
    interrupted = Interrupted(["a", "b", "c", "a"], ["b", "v"])
    with pytest.raises(KeyboardInterrupt):
        prepare(interrupted, Bytes(), tmp_path / "resumed", drop_duplicates=True)
    prepare(interrupted, Bytes(), tmp_path / "resumed", drop_duplicates=True)
    assert TokenShards(tmp_path / "resumed", "validation").num_documents == 1


def test_the_end_of_a_long_document_is_no_duplicate_after_a_kill(tmp_path, monkeypatch):
    for module in ("formats", "pieces"):
        monkeypatch.setattr(f"data.{module}.PART", 8)
    monkeypatch.setattr("data.pieces.PIECE", 1)
    for name, text in (("a", "x" * 8 + "hello"), ("b", "hello"), ("c", "hello")):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "v.txt").write_text("held out")
    corpus = TextFiles(str(tmp_path / "*.txt"), validation=str(tmp_path / "v"))
    prepare(corpus, Bytes(), tmp_path / "whole", drop_duplicates=True)
    assert TokenShards(tmp_path / "whole", "train").num_documents == 2
    read = corpus.read

    def killed(position=None):
        yield next(read(position))
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "read", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, Bytes(), tmp_path / "killed", drop_duplicates=True)
    monkeypatch.setattr(corpus, "read", read)
    prepare(corpus, Bytes(), tmp_path / "killed", drop_duplicates=True)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


DAMAGES = {  # what is done to a folder -> what is said of it
    "missing": (lambda f: (f / "train_00000.bin").unlink(), "train_00000.bin has gone"),
    "truncated": (lambda f: os.truncate(f / "train_00000.bin", 8), "train_00000.bin has 8 bytes, and 56 were written"),
    "grown": (lambda f: (f / "validation_offsets.bin").write_bytes(bytes(99)), "validation_offsets.bin has 99 bytes"),
    "changed": (lambda f: flip(f / "train_00000.bin"), "train_00000.bin is not what was written"),
    "meta": (lambda f: (f / "meta.json").write_text("{"), "meta.json can't be read"),
    "tokenizer": (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{"), "tokenizer.json can't be read as a"),
    "retrained": (
        lambda f: retrain(f / "tokenizer"),
        "is not the tokenizer that the tokens beside it were written with",
    ),
}


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[5] ^= 1
    file.write_bytes(raw)


def retrain(folder):
    other = Bpe(270)
    other.train(["quite another text, with other pairs"] * 3)
    other.save(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_at_the_start(tmp_path, damage):
    def start():
        tokenizer = Bpe(270)
        prepare(Documents(TRAIN, VALIDATION), tokenizer, tmp_path / "shards")
        check(tmp_path / "shards", tokenizer)

    start()
    start()
    harm, said = DAMAGES[damage]
    harm(tmp_path / "shards")
    with pytest.raises(ValueError, match=f"{re.escape(said)}.*delete the folder"):
        start()


def test_a_bit_flipped_on_the_disk_is_found_by_the_full_check(tmp_path):
    folder = tmp_path / "shards"
    prepare(Documents(TRAIN, VALIDATION), Bytes(), folder)
    shard = folder / "train_00000.bin"
    before = shard.stat()
    flip(shard)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    check(folder, Bytes())
    with pytest.raises(ValueError, match=r"train_00000.bin is not what was written"):
        check(folder, Bytes(), everything=True)


def test_a_copied_folder_is_hashed_once(tmp_path, monkeypatch):
    prepare(Documents(TRAIN, VALIDATION), Bytes(), tmp_path / "shards")
    shutil.copytree(tmp_path / "shards", tmp_path / "copy", copy_function=shutil.copyfile)
    hashed = []
    monkeypatch.setattr("data.shards.hash_file", lambda file, own=hash_file: hashed.append(file.name) or own(file))
    check(tmp_path / "shards", Bytes())
    check(tmp_path / "copy", Bytes())
    check(tmp_path / "copy", Bytes())
    assert sorted(hashed) == sorted(json.loads((tmp_path / "copy" / "meta.json").read_text())["files"])


def test_a_folder_that_vanishes_under_a_run_is_read_to_the_end(tmp_path):
    prepare(Documents(TRAIN, VALIDATION), Bytes(), tmp_path / "shards")
    shards = TokenShards(tmp_path / "shards", "train")
    pickled = pickle.dumps(shards)
    shutil.rmtree(tmp_path / "shards")
    assert shards.read(0, shards.num_tokens).tolist() == tokens_of(TRAIN)
    assert shards.document_starts(np.array([0]), 9)[0].nonzero()[0].tolist() == [4]
    with pytest.raises(ValueError, match=r"shards/meta.json can't be read .*No such file"):
        pickle.loads(pickled)  # as a worker does that begins now


def test_a_shard_that_is_cut_under_a_run_is_named(tmp_path):
    prepare(Documents(TRAIN, VALIDATION), Bytes(), tmp_path / "shards")
    shards = TokenShards(tmp_path / "shards", "train")
    os.truncate(tmp_path / "shards" / "train_00000.bin", 9)
    with pytest.raises(ValueError, match=r"train_00000.bin ends at byte 9: it has been cut since the start"):
        shards.read(0, 20)


def _prepare_and_count(corpus, folder, queue):
    class Counting(type(corpus)):
        times = 0

        def read(self, position=None):
            self.times += 1
            return super().read(position)

    counting = Counting(**{k: v for k, v in zip(("train", "validation"), corpus.by_split.values(), strict=True)})
    prepare(counting, Bytes(), folder)
    queue.put((counting.times, TokenShards(folder, "train").num_tokens))


def test_of_processes_that_start_together_one_prepares(documents, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (documents(TRAIN * 200, VALIDATION), tmp_path / "shards", queue)
    processes = [context.Process(target=_prepare_and_count, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    results = sorted(queue.get(timeout=20) for _ in processes)
    for process in processes:
        process.join()
    assert results == [(read, len(tokens_of(TRAIN * 200))) for read in (0, 0, 1)]


def test_the_folder_follows_corpus_and_tokenizer(documents, monkeypatch, tmp_path):
    folders = {
        shard_folder("name", corpus, tokenizer)
        for corpus in (documents(TRAIN, VALIDATION), documents(TRAIN[:2], VALIDATION))
        for tokenizer in (Bytes(), Bpe(300), Bpe(400))
    }
    assert len(folders) == 6 and {folder.parent for folder in folders} == {cache_folder()}
    monkeypatch.setenv("TTR_CACHE", str(tmp_path / "elsewhere"))
    assert shard_folder("name", documents(TRAIN, VALIDATION), Bytes()).parent == tmp_path / "elsewhere"


def test_a_tokenizer_is_trained_once_and_found_again(documents, tmp_path):
    first, second = Bpe(270), Bpe(270)
    prepare(documents(TRAIN, VALIDATION), first, tmp_path / "shards")
    prepare(documents([], []), second, tmp_path / "shards")  # reads no document: all is there
    assert (
        second.fingerprint()
        == first.fingerprint()
        == TokenShards(tmp_path / "shards", "train").meta["tokenizer_fingerprint"]
    )


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("data.shards.SplitWriter.append", full)
    with pytest.raises(ValueError, match=r"No space left on device\); make room there, or set TTR_CACHE to a folder"):
        prepare(Documents(TRAIN, VALIDATION), Bytes(), tmp_path / "shards")
    assert (tmp_path / "shards.partial").exists()


def test_a_pickled_reader_maps_the_files_again(documents, tmp_path):
    prepare(documents(TRAIN * 1000, VALIDATION), Bytes(), tmp_path / "shards")
    shards = TokenShards(tmp_path / "shards", "train")
    pickled = pickle.dumps(shards)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).read(5, 9).tolist() == shards.read(5, 9).tolist()


def test_errors_name_what_is_missing(documents, tmp_path):
    with pytest.raises(ValueError, match=r"data.corpus leaves the validation split without a document, of 4"):
        prepare(documents(TRAIN, []), Bytes(), tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    prepare(documents(TRAIN, VALIDATION), Bytes(), tmp_path / "shards")
    meta = json.loads((tmp_path / "shards" / "meta.json").read_text())
    meta["splits"]["train"]["tokens"] += 1
    (tmp_path / "shards" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"holds other train tokens than its meta.json counts, 135; delete"):
        TokenShards(tmp_path / "shards", "train")
    with pytest.raises(ValueError, match=r"data.name='a/b' names a folder"):
        Text(documents(TRAIN, VALIDATION), Bytes(), seq_len=4, name="a/b")
