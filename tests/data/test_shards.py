"""What is written comes back, all of it or nothing."""

import json
import multiprocessing
import pickle

import numpy as np
import pytest

from data.shards import TokenShards, cache_folder, prepare, shard_folder
from data.text import Text
from data.tokenizer import Bpe, Bytes

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


def test_document_numbers_start_at_zero_in_every_range(documents, tmp_path):
    prepare(documents(["ab", "c", "defg"], ["x"]), Bytes(), tmp_path / "shards")
    shards = TokenShards(tmp_path / "shards", "train")
    whole = [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    for start in range(10):
        for stop in range(start + 1, 11):
            expected = [n - whole[start] for n in whole[start:stop]]
            assert shards.document_numbers(start, stop).tolist() == expected


def test_small_vocabularies_take_two_bytes_a_token_and_large_ones_four(documents, tmp_path):
    class Wide(Bytes):
        vocab_size = 2**16 + 1

    prepare(documents(TRAIN, VALIDATION), Bytes(), tmp_path / "narrow")
    prepare(documents(TRAIN, VALIDATION), Wide(), tmp_path / "wide")
    sizes = [(tmp_path / name / "train_00000.bin").stat().st_size for name in ("narrow", "wide")]
    assert sizes == [2 * len(tokens_of(TRAIN)), 4 * len(tokens_of(TRAIN))]


def test_a_kill_leaves_nothing_half_written(documents, tmp_path):
    class Interrupted(documents):
        def __iter__(self):
            yield from list(super().__iter__())[:3]
            raise KeyboardInterrupt

    folder = tmp_path / "shards"
    (tmp_path / "shards.partial").mkdir()  # what a process that was killed outright leaves
    (tmp_path / "shards.partial" / "train_00000.bin").write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt):
        prepare(Interrupted(TRAIN, VALIDATION), Bytes(), folder)
    assert not folder.exists() and not (tmp_path / "shards.partial").exists()
    prepare(documents(TRAIN, VALIDATION), Bytes(), folder)
    assert TokenShards(folder, "train").num_tokens == len(tokens_of(TRAIN))


def _prepare_and_count(corpus, folder, queue):
    class Counting(type(corpus)):
        read = 0

        def __iter__(self):
            self.read += 1
            return super().__iter__()

    counting = Counting(**{k: v for k, v in zip(("train", "validation"), corpus.by_split.values(), strict=True)})
    prepare(counting, Bytes(), folder)
    queue.put((counting.read, TokenShards(folder, "train").num_tokens))


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
    with pytest.raises(ValueError, match=r"delete the folder, and it is made again"):
        TokenShards(tmp_path / "shards", "train")
    with pytest.raises(ValueError, match=r"data.name='a/b' names a folder"):
        Text(documents(TRAIN, VALIDATION), Bytes(), seq_len=4, name="a/b")
