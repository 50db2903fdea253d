"""Files of any size, in bounded memory, read on from any document; and a sentence for each that is broken."""

import bz2
import gzip
import json
import lzma
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from data.files import TextFiles
from data.formats import boundary
from data.prepare import prepare
from data.shards import TokenShards
from data.tokenizer import Bytes
from tests.conftest import ROOT
from tests.data.conftest import Documents

TEXTS = ["one", "", "naïve 世界 " * 9, "x" * 70, "two\nlines\n", "last"]


def zst(raw: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}
WRITE = {
    "txt": lambda texts: "<|>".join(texts).encode(),
    "jsonl": lambda texts: "\n".join(json.dumps({"text": text}) for text in texts).encode() + b"\n\n",
    "json": lambda texts: json.dumps([{"text": text, "n": None} for text in texts], indent=1).encode(),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", WRITE)
def test_reading_goes_on_from_any_document(tmp_path, monkeypatch, kind, compression):
    """Parts of 8 bytes: cut between characters, the same whether reading began before them or at them."""
    monkeypatch.setattr("data.formats.PART", 8)
    for name in "ab":
        (tmp_path / f"{name}.{kind}{compression}").write_bytes(COMPRESS[compression](WRITE[kind](TEXTS)))
    corpus = TextFiles(str(tmp_path / f"*.{kind}{compression}"), separator="<|>")
    parts = list(corpus)
    assert "".join(part.text + "|" * part.last for part in parts) == "".join(f"{text}|" for text in TEXTS) * 2
    assert [part.name for part in parts if part.last] == [
        f"{n}.{kind}{compression}:{i}" for n in "ab" for i in range(6)
    ]
    for i, part in enumerate(parts):
        assert list(corpus.read(json.loads(json.dumps(part.position)))) == parts[i + 1 :]


@pytest.mark.parametrize("groups", [1, 3, 100])
def test_parquet_goes_on_from_any_row(tmp_path, groups):
    table = pyarrow.table({"id": list(range(6)), "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=groups)
    corpus = TextFiles(str(tmp_path / "a.parquet"))
    documents = list(corpus)
    assert [d.text for d in documents] == TEXTS
    for i, document in enumerate(documents):
        assert list(corpus.read(document.position)) == documents[i + 1 :]


def test_a_long_text_is_the_same_tokens_from_txt_and_jsonl(tmp_path, monkeypatch):
    """Whatever the size of the parts; cut at blanks where there are any."""
    text = "".join(f"wörd {i} " for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    for part in (64, 2**20):
        for module in ("formats", "pieces"):
            monkeypatch.setattr(f"data.{module}.PART", part)
        monkeypatch.setattr("data.pieces.PIECE", 200)
        train = TextFiles(str(tmp_path / "a.txt"), validation_fraction=1e-9)
        pieces = [document.text for document in train]
        assert all(piece.startswith((" ", "wörd 0")) for piece in pieces) and (len(pieces) == 1) == (part > 64)
    # one document, then as many as there are
    (tmp_path / "v.txt").write_text("held out")
    corpus = TextFiles(str(tmp_path / "a.txt"), validation=str(tmp_path / "v.txt"))
    prepare(corpus, Bytes(), tmp_path / "txt")
    prepare(Documents([text], ["held out"]), Bytes(), tmp_path / "whole")
    for name in ("train_00000.bin", "train_offsets.bin"):
        assert (tmp_path / "txt" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_boundary_is_between_characters():
    raw = "aé世🙂".encode() * 4
    for stop in range(1, len(raw)):
        assert 0 <= stop - boundary(raw, 0, stop) < 4
        raw[: boundary(raw, 0, stop)].decode()


@pytest.mark.slow
def test_a_line_of_300_megabytes_takes_little_memory(tmp_path):
    """Without a blank to cut at. The whole process takes less than one and a half of it: 300 MB, for a longer line
    too."""
    with open(tmp_path / "line.txt", "wb") as file:
        for _ in range(256):
            file.write("0123456789abcdeé".encode()[:16] * 2**16)
    (tmp_path / "v.txt").write_text("held out")
    code = f"""
from pathlib import Path
from data.files import TextFiles
from data.prepare import prepare
from data.tokenizer import Bytes
path = "{tmp_path}"
prepare(TextFiles(f"{{path}}/line.txt", validation=f"{{path}}/v.txt", invalid_utf8="replace"), Bytes(), Path(path, "s"))
print(Path("/proc/self/status").read_text())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) < 450_000, done.stdout
    shards = TokenShards(tmp_path / "s", "train")
    assert shards.num_documents == 1 and shards.num_tokens > 2**28


BROKEN = {  # name, content -> what is said
    "not UTF-8": ("a.txt", b"good\xff\xfe", "a.txt is not UTF-8 at byte 4 (0xff)"),
    "half a character": ("a.txt", "世".encode()[:2], "a.txt is not UTF-8 at byte 0 (0xe4)"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "a.txt is not UTF-8 at byte 0 (0xff)"),
    "not UTF-8, far in": ("a.txt", b"ab " * 10**6 + b"\x80", "a.txt is not UTF-8 at byte 3,000,000 (0x80)"),
    "not UTF-8 in JSON": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl is not UTF-8 at byte 24 (0xff)"),
    "a torn line": ("a.jsonl", b'{"text": "a"}\n\n{"text": "b', "line 3 of {}a.jsonl is not JSON (Unterminated string"),
    "a number for a row": (
        "a.jsonl",
        b"3\n",
        "line 1 of {}a.jsonl holds int, a row with data.corpus.text_field='text'",
    ),
    "no such column": (
        "a.jsonl",
        b'{"body": "a", "id": 1}\n',
        "'text' is not a column of line 1 of {}a.jsonl, which has",
    ),
    "a list for text": (
        "a.jsonl",
        b'{"text": ["a"]}\n',
        "text_field='text' of line 1 of {}a.jsonl holds list, text is needed",
    ),
    "a torn array": ("a.json", b'[{"text": "a"}, ', "a.json is not JSON"),
    "no text in the first item": ("a.json", b'[{"id": 1}, {"text": "a"}]', "is not a column of item 1 of {}a.json"),
    "too deep": ("a.jsonl", b"[" * 10**6, "line 1 of {}a.jsonl is not JSON"),
    "torn gzip": (
        "a.txt.gz",
        gzip.compress(b"text" * 999)[:-9],
        "a.txt.gz can't be read as txt.gz (Compressed file ended",
    ),
    "no gzip": ("a.txt.gz", b"text", "a.txt.gz can't be read as txt.gz (Not a gzipped file"),
    "torn zst": ("a.jsonl.zst", zst(b"{}" * 999)[:-3], "a.jsonl.zst can't be read as jsonl.zst (Truncated compressed"),
    "no zst": ("a.txt.zst", b"text", "a.txt.zst can't be read as txt.zst"),
    "torn xz": ("a.txt.xz", lzma.compress(b"text" * 99)[:-9], "a.txt.xz can't be read as txt.xz"),
    "torn bz2": ("a.txt.bz2", bz2.compress(b"text" * 99)[:-9], "a.txt.bz2 can't be read as txt.bz2"),
    "no parquet": ("a.parquet", b"PAR1 and then nothing", "a.parquet can't be read as parquet"),
    "an empty parquet": ("a.parquet", b"PAR1", "a.parquet can't be read as parquet"),
    "a compressed parquet": (
        "a.parquet.gz",
        b"",
        "matches nothing that can be read, but 1 .parquet.gz; what can be is .txt",
    ),
    "an image": ("a.png", b"", "matches nothing that can be read, but 1 .png; what can be is .txt"),
    "empty files": ("a.txt", b"", "data.corpus has no text: {}*.txt (1 files) holds 1 documents, all empty"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_file_is_named(tmp_path, broken):
    name, content, said = BROKEN[broken]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(said.format(f"{tmp_path}/"))) as caught:
        prepare(TextFiles(str(tmp_path / f"*{name[1:]}")), Bytes(), tmp_path / "shards")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "shards").exists() and not (tmp_path / "shards.partial").exists()


def test_a_row_that_is_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("data.formats.LONGEST_ROW", 30)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "and a rather long one"}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*a.jsonl is longer than 30 bytes.*a .txt file is read in parts"):
        list(TextFiles(str(tmp_path / "a.jsonl")))
    (tmp_path / "a.json").write_text("[" + ", ".join(['{"text": "a"}'] * 20) + "]")
    with pytest.raises(ValueError, match=r"a.json is a JSON array of more than 120 bytes.*.jsonl, a row a line"):
        list(TextFiles(str(tmp_path / "a.json")))


def test_what_is_not_utf8_is_replaced_on_demand(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\xffb")
    assert [d.text for d in TextFiles(str(tmp_path / "a.txt"), invalid_utf8="replace")] == ["a\ufffdb"]


def test_files_that_change_or_go_while_they_are_read_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)

    def reading(harm):
        corpus = TextFiles(str(tmp_path / "*.txt"), validation_fraction=0.5)
        original = corpus.read

        def read(position=None):
            for document in original(position):
                yield document
                harm()

        corpus.read = read
        prepare(corpus, Bytes(), tmp_path / "shards")

    with pytest.raises(
        ValueError, match=r"\*.txt \(2 files\) has changed while it was read; the same command begins anew"
    ):
        reading(lambda: (tmp_path / "a.txt").write_text("more"))
    with pytest.raises(ValueError, match=r"b.txt can't be read as txt .*No such file"):
        reading(lambda: (tmp_path / "b.txt").unlink(missing_ok=True))
