"""Text and prepared shards that lie elsewhere: in memory, and behind an HTTP server of this machine.

What others asked for: https://github.com/huggingface/datasets/issues/5281 (any file system for text),
https://github.com/NovaSky-AI/SkyRL/pull/1933 (a local cache of what lies in a bucket).
"""

import gzip
import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from data.files import TextFiles
from data.prepare import prepare
from data.shards import TokenShards
from data.store import fetch, put
from data.text import Text
from data.tokenizer import Bpe, Bytes
from tests.data.test_shards import content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file of each kind, some below others."""
    folder = tmp_path_factory.mktemp("remote") / "text"
    (folder / "below").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    rows = [{"text": f"row {number} " * 20} for number in range(30)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(folder / "below" / "b.txt.gz", "wt") as file:
        file.write("packed text " * 200)
    (folder / "below" / "c d.txt").write_text("δ plain text\n" * 300)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "below" / "e.parquet")
    (folder / "f.txt.zst").write_bytes(pyarrow.compress(b"zst text " * 300, "zstd", asbytes=True))
    (folder / ".hidden" / "g.txt").write_text("never read")
    (folder / "h.bin").write_bytes(b"never read")
    return folder


class Handler(SimpleHTTPRequestHandler):
    """Python's own server, which gives whole files only."""

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture(scope="module")
def http(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder.parent)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def memory(folder):
    system = fsspec.filesystem("memory")
    system.put(str(folder), "/text", recursive=True)
    yield "memory://text"
    system.rm("/", recursive=True)


def documents(corpus):
    return [(document.split, document.name, document.text) for document in corpus]


def test_a_folder_in_memory_is_read_as_the_same_folder_here(memory, folder):
    here, there = TextFiles(str(folder), validation_fraction=0.2), TextFiles(memory, validation_fraction=0.2)
    assert documents(there) == documents(here) and len(documents(here)) > 60
    assert there.left_out() == here.left_out() == "1 .bin, 1 hidden"
    for pattern, names in {"*.jsonl": 1, "**/*.txt": 1, "below/*": 3}.items():
        assert len(TextFiles(f"{memory}/{pattern}").files) == names
    assert documents(TextFiles(f"{memory}/a.jsonl"))[3][1] == "a.jsonl:3"


def test_a_folder_behind_a_server_is_read_as_the_same_folder_here(http, folder):
    pages = [f"{http}/text/a.jsonl", f"{http}/text/below/", f"{http}/text/f.txt.zst"]
    there = TextFiles(pages, validation_fraction=0.2)
    assert [file.rpartition("/")[2] for _, file in there.files] == [
        "a.jsonl", "b.txt.gz", "c%20d.txt", "e.parquet", "f.txt.zst"]  # fmt: skip
    texts = sorted(document.text for document in TextFiles(str(folder)))
    assert sorted(document.text for document in TextFiles(f"{http}/text/")) == texts


@pytest.mark.parametrize("place", ["memory", "http"])
def test_reading_goes_on_behind_any_document(place, request):
    where = request.getfixturevalue(place)
    corpus = TextFiles(where if place == "memory" else f"{where}/text/")
    whole = list(corpus)
    for number in (0, 3, 31, len(whole) - 2):
        assert list(corpus.read(whole[number].position)) == whole[number + 1 :]
    assert 0 < corpus.fraction(whole[5].position) < 1


def test_a_file_that_was_written_again_is_another_corpus(memory):
    before = TextFiles(memory).fingerprint()
    assert TextFiles(memory).fingerprint() == before
    fsspec.filesystem("memory").pipe("/text/a.jsonl", b'{"text": "other"}\n')
    assert TextFiles(memory).fingerprint() != before


def test_a_connection_that_ends_loses_nothing(memory, tmp_path, monkeypatch):
    monkeypatch.setattr("data.pieces.PIECE", 100)
    corpus = TextFiles(f"{memory}/a.jsonl", validation=f"{memory}/f.txt.zst")
    from fsspec.implementations.memory import MemoryFile

    def cut(file, size=-1):
        if file.tell():
            raise TimeoutError("no answer")
        return MemoryFile.__bases__[0].read(file, 1000)

    with monkeypatch.context() as broken:
        broken.setattr(MemoryFile, "read", cut, raising=False)
        with pytest.raises(ValueError, match=r"a.jsonl broke off \(TimeoutError: no answer\); what has been"):
            prepare(corpus, Bytes(), tmp_path / "shards")
    prepare(corpus, Bytes(), tmp_path / "shards")
    prepare(corpus, Bytes(), tmp_path / "at once")
    assert content(tmp_path / "shards") == content(tmp_path / "at once")


def test_what_can_not_be_read_is_told(http, memory):
    with pytest.raises(ValueError, match=r"data.corpus.path=s3://b/x needs a package for s3:// .*: pip install s3fs"):
        TextFiles("s3://b/x")
    with pytest.raises(ValueError, match=r"data.corpus.path=nonsense://x can't be read: fsspec knows no nonsense://"):
        TextFiles("nonsense://x")
    with pytest.raises(ValueError, match=r"data.corpus.path='memory://nothing' matches no file"):
        TextFiles("memory://nothing")
    with pytest.raises(ValueError, match=r"data.corpus.path=http://127.0.0.1:1/x can't be read \(.*Cannot connect"):
        TextFiles("http://127.0.0.1:1/x")
    with pytest.raises(ValueError, match=r"data.corpus.path='http://.*/nothing/' matches no file"):
        TextFiles(f"{http}/nothing/")
    with pytest.raises(ValueError, match=r"data.corpus.validation=.* share 1 files, such as memory://"):
        TextFiles(memory, validation=f"{memory}/a.jsonl")


def task(folder, tokenizer=None):
    return Text(TextFiles(str(folder / "a.jsonl"), validation_fraction=0.2), tokenizer or Bytes(), 16, name="stored")


def test_shards_are_fetched_from_a_store_and_read_from_the_cache(folder, http, memory, tmp_path, monkeypatch, capsys):
    def cache(name):
        monkeypatch.setenv("TTR_CACHE", str(tmp_path / name))

    cache("first")
    first = task(folder, Bpe(270))
    first.prepare()
    assert not put(first.folder)  # nowhere
    monkeypatch.setenv("TTR_STORE", "memory://store")
    assert put(first.folder) and not put(first.folder)
    cache("second")
    monkeypatch.setattr("data.text.prepare", lambda *_, **__: None)  # there is nothing to prepare
    second = task(folder, Bpe(270))
    assert not second.folder.exists()
    assert fetch(second.folder) and not fetch(second.folder)
    assert content(second.folder) == content(first.folder)
    shards = TokenShards(second.folder, "train")
    assert shards.num_tokens == TokenShards(first.folder, "train").num_tokens
    assert "Copying stored-" in capsys.readouterr().out
    shutil.copytree(first.folder, folder.parent / "store" / first.folder.name)
    fsspec.filesystem("memory").get_file(
        f"/store/{first.folder.name}/stored.json", str(folder.parent / "store" / first.folder.name / "stored.json")
    )
    cache("third")
    monkeypatch.setenv("TTR_STORE", f"{http}/store")
    assert fetch(task(folder, Bpe(270)).folder)


def test_a_copy_that_was_killed_goes_on_and_a_damaged_one_is_refused(folder, memory, tmp_path, monkeypatch):
    monkeypatch.setenv("TTR_STORE", "memory://store")
    monkeypatch.setenv("TTR_CACHE", str(tmp_path / "first"))
    made = task(folder)
    made.prepare()
    put(made.folder)
    monkeypatch.setenv("TTR_CACHE", str(tmp_path / "second"))
    system, copied = fsspec.filesystem("memory"), []
    get_file = type(system).get_file

    def killed(self, place, file, **settings):
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(place)
        return get_file(self, place, file, **settings)

    with monkeypatch.context() as once:
        once.setattr(type(system), "get_file", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch(task(folder).folder)
    again = []
    monkeypatch.setattr(type(system), "get_file", lambda self, *a, **s: (again.append(a[0]), get_file(self, *a, **s)))
    place = f"/store/{made.folder.name}"
    good = system.cat_file(f"{place}/train_00000.bin")
    system.pipe_file(f"{place}/train_00000.bin", bytes(len(good)))
    with pytest.raises(ValueError, match=r"train_00000.bin is not what was put there; delete"):
        fetch(task(folder).folder)
    system.pipe_file(f"{place}/train_00000.bin", good)
    assert fetch(task(folder).folder) and not set(copied) & set(again)
    monkeypatch.setenv("TTR_STORE", "http://127.0.0.1:1/store")
    with pytest.raises(ValueError, match=r"TTR_STORE=http://127.0.0.1:1/store can't be written \("):
        put(made.folder)
