"""What people's folders hold: each file is read once, or left out and counted, or refused in a sentence.

Beside a case stands a public report of it.
"""

import gzip
import json
import os
import re

import pyarrow
import pyarrow.parquet
import pytest

from data.files import TextFiles
from data.prepare import prepare
from data.shards import TokenShards
from data.text import Text
from data.tokenizer import Bytes

MARK = "\ufeff".encode()


def texts(path, **settings) -> list[str]:
    return [document.text for document in TextFiles(str(path), **settings)]


def long_window(content: bytes) -> bytes:
    """A zstd frame of one raw block that asks for a window of 2 GiB, as `zstd --long=31` does (RFC 8878, 3.1.1)."""
    header = bytes.fromhex("28b52ffd") + bytes([0, (31 - 10) << 3])
    return header + (len(content) << 3 | 1).to_bytes(3, "little") + content


READ = {  # what is said of it -> name, content, documents
    # https://github.com/langchain-ai/langchain-community/pull/138, https://github.com/ultrajson/ultrajson/issues/640
    "a byte-order mark": ("a.txt", MARK + b"one\ntwo", ["one\ntwo"]),
    "a mark in JSON lines": ("a.jsonl", MARK + b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
    "a mark in an array": ("a.json", MARK + b' [{"text": "a"}]', ["a"]),
    "a mark in a table": ("a.csv", MARK + b"text,id\na,1\n", ["a"]),
    "a mark alone": ("a.txt", MARK, [""]),
    # https://github.com/huggingface/datasets/pull/5872, https://github.com/h2oai/h2o-llmstudio/issues/928
    "capitals": ("A.TXT", b"a", ["a"]),
    "capitals of a table": ("A.CSV", b"text\na\n", ["a"]),
    # https://github.com/huggingface/datasets/issues/7153
    "ndjson": ("a.ndjson", b'{"text": "a"}\n', ["a"]),
    "markdown": ("a.md", b"# a\n", ["# a\n"]),
    "restructured text": ("a.rst", b"a\n=\n", ["a\n=\n"]),
    # https://github.com/huggingface/datasets/issues/1784: rows over several lines
    "one object over lines": ("a.json", b'{\n "text": "a",\n "id": 3\n}\n', ["a"]),
    "rows in a .json": ("a.json", b'{"text": "a"}\n{"text": "b"}', ["a", "b"]),
    # https://github.com/huggingface/datasets/issues/622, https://github.com/huggingface/datasets/issues/3729
    "line ends of Windows": ("a.txt", b"a\r\nb\r\n", ["a\r\nb\r\n"]),
    "line ends of Unicode": ("a.jsonl", '{"text": "a\u2028b\u2029c\x85d"}\n'.encode(), ["a\u2028b\u2029c\x85d"]),
    "line ends of Windows in JSON": ("a.jsonl", b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', ["a", "b"]),
    # https://github.com/Lightning-AI/litgpt/issues/1759, https://github.com/webis-de/small-text/issues/73
    "a null row": ("a.jsonl", b'{"text": null}\n{"text": "b"}\n', ["", "b"]),
    "a later row without the column": ("a.jsonl", b'{"text": "a"}\n{"id": 1}\n', ["a", ""]),
    "a later item without the column": ("a.json", b'[{"text": "a"}, {}]', ["a", ""]),
    "a short row": ("a.csv", b"id,text\n1,a\n2\n", ["a", ""]),
    # https://github.com/huggingface/datasets/issues/4467, https://github.com/pandas-dev/pandas/issues/10647
    "words that mean nothing": ("a.csv", b"text\nnull\nNA\nNone\n", ["null", "NA", "None"]),
    # https://github.com/dotnet/machinelearning/pull/5125, https://github.com/minimaxir/gpt-2-simple/pull/235
    "lines within quotes": ("a.csv", b'id,text\n1,"a\r\nb ""c"", d"\n\n2,e\n', ['a\r\nb "c", d', "e"]),
    # https://github.com/biolab/orange3/issues/2404
    "a long field": ("a.csv", b"text\n" + b"x" * 200_000 + b"\n", ["x" * 200_000]),
    "semicolons": ("a.csv", b"n;text\n1,5;a, b\n", ["a, b"]),
    "a comma at the end": ("a.csv", b"id,text\n1,a,\n", ["a"]),
    "a header over lines": ("a.csv", b'text,"other\ncolumn"\na,1\nb,2\n', ["a", "b"]),
    "a header over lines before": ("a.csv", b'"other\n\ncolumn";text\n1;a\n2;b, c\n', ["a", "b, c"]),
    "a header with an open quote": ("a.csv", b'text,"id\na,1\n', ["a"]),
    "a blank line before the header": ("a.csv", b"\n \nid,text\n1,a\n", ["a"]),
    "line ends of an old Mac": ("a.csv", b'id,text\r1,a\r\r2,"b\rc"\r', ["a", "b\rc"]),
    "tabs": ("a.tsv", b'n\ttext\n1\t5" wide, red\n', ['5" wide, red']),
    # https://github.com/html-to-text/node-html-to-text/issues/268, https://github.com/yasserg/crawler4j/issues/259
    "a page": (
        "a.html",
        b"<html><head><title>t</title><style>p {}</style></head><body><h1>A &amp; B</h1><p>one <b>word</b>\n and"
        b'<script>var a = "<p>no</p>";</script> more<br>line<pre>  x\n    y</pre><tr><td>1<td>2</html>',
        ["A & B\n\none word and more\nline\n  x\n    y\n\n1\t2"],
    ),
    "a page without an end": ("a.HTM", b"<p>open <i>and", ["open and"]),
    "a file without a byte": ("a.jsonl", b"", [""]),
    "a compressed file of nothing": ("a.jsonl.gz", gzip.compress(b""), [""]),
    "a compressed table of nothing": ("a.csv.gz", gzip.compress(b""), [""]),
    "a table of a blank line": ("a.csv", b"\r\n", [""]),
    "a table of a mark": ("a.tsv", MARK, [""]),
    "a parquet without a byte": ("a.parquet", b"", [""]),
    # https://github.com/openai/tiktoken/issues/82
    "half of a pair": ("a.jsonl", b'{"text": "a\\ud83d"}\n', ["a\ud83d"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_is_read(tmp_path, kind):
    """And read on from any document."""
    name, content, expected = READ[kind]
    (tmp_path / name).write_bytes(content)
    corpus = TextFiles(str(tmp_path))
    documents = list(corpus)
    assert [document.text for document in documents] == expected
    for i, document in enumerate(documents):
        assert list(corpus.read(document.position)) == documents[i + 1 :]


def own_validation(folder):
    (folder.parent / "held out.txt").write_text("held out")
    return folder.parent / "held out.txt"


def test_parquet_of_other_programs(tmp_path):
    """https://github.com/duckdb/duckdb-java/issues/113 (text as bytes), https://github.com/apache/arrow/issues/43068"""
    for name, kind in (("a", pyarrow.binary()), ("b", pyarrow.large_string())):
        column = pyarrow.array(["é".encode(), None], pyarrow.binary()).cast(kind)
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{name}.parquet")
    words = pyarrow.array(["é", None]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": words}), tmp_path / "c.PARQUET")
    assert texts(tmp_path) == ["é", ""] * 3


REFUSED = {
    # https://github.com/axolotl-ai-cloud/axolotl/issues/618, https://github.com/jingyaogong/minimind/issues/288
    "another column": ("a.jsonl", b'{"body": "a", "id": 1}\n', "not a column of line 1 of {}/a.jsonl, which has body"),
    "another column of a table": ("a.csv", b"id;body\n1;a\n", "is not a column of {}/a.csv, which has id;body; name"),
    "no column at all": ("a.json", b'[{}]', "is not a column of item 1 of {}/a.json, which has none; name"),
    # https://github.com/huggingface/datasets/issues/6460: one object around all rows
    "rows in an object": ("a.json", b'{"v": 1,\n"data": [{"text": "a"}]}', "a column of {}/a.json, which has data, v"),
    # https://github.com/wireservice/csvkit/issues/382
    "an open quote": ("a.csv", b'text\na\n"b\nc\n', "row 2 of {}/a.csv can't be read as csv (unexpected end of data)"),
    "commas without quotes": (
        "a.csv",
        b"text\na\nhello, world\n",
        "row 2 of {}/a.csv has more fields than the header; put a text that holds ',' in quotes",
    ),
    "another column over lines": ("a.csv", b'"a\nb",c\n1,2\n', "is not a column of {}/a.csv, which has a b, c; name"),
    # https://github.com/wonderwhy-er/DesktopCommanderMCP/issues/610
    "UTF-16": ("a.txt", "text".encode("utf-16"), "UTF-8 at byte 0 (0xff); convert it (iconv -f UTF-16 -t UTF-8"),
    # https://github.com/nshepperd/gpt-2/pull/39, https://github.com/pytorch/text/issues/228
    "Latin-1": ("a.txt", "garçon".encode("latin-1"), "UTF-8 at byte 3 (0xe7); convert it (iconv -f LATIN1 -t UTF-8"),
    "Latin-1 in a table": ("a.csv", "text\ngarçon".encode("latin-1"), "a.csv is not UTF-8 at byte 8 (0xe7)"),
    # https://github.com/indygreg/python-zstandard/issues/157, https://github.com/facebook/zstd/issues/3444
    "a long window": ("a.b.txt.zst", long_window(b"text"), "a.b.txt.zst was compressed with too long a window to be"),
    "no gzip": ("a.b.txt.gz", b"text", "a.b.txt.gz can't be read as txt.gz (Not a gzipped file"),
    # https://github.com/hiyouga/LlamaFactory/issues/4034
    "no text at all": ("a.pdf", b"%PDF", "'{}' matches nothing that can be read, but 1 .pdf; what can be is .txt, "),
    "an archive": ("a.tar.gz", b"", "matches nothing that can be read, but 1 .tar.gz; "),
    "only empty files": ("a.txt", b"", "data.corpus has no text: {} (1 files) holds 1 documents, all empty"),
    "a number for text": ("a.jsonl", b'{"text": 3}\n', "text_field='text' of line 1 of {}/a.jsonl holds int, text is"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_is_refused_in_one_sentence(tmp_path, kind):
    name, content, said = REFUSED[kind]
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(said.format(tmp_path / "f"))) as caught:
        prepare(TextFiles(str(tmp_path / "f")), Bytes(), tmp_path / "shards")
    assert "\n" not in str(caught.value)


def test_a_folder_is_all_of_its_files_once(tmp_path, capsys):
    """https://github.com/neuromorphs/tonic/pull/325, https://github.com/mxmlnkn/mfusepy/pull/27 (hidden files),
    https://github.com/nanoporetech/ont_fast5_api/issues/25, https://github.com/rclone/rclone/pull/9947 (loops),
    https://github.com/huggingface/datasets/issues/6410 (mixed folders).
    """
    folder = tmp_path / "mixed"
    for name in ("a.txt", "sub/b.md", "sub/deep/c.jsonl", "d.pdf", "e.tar.gz", "Makefile", "empty.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "c"}' if name.endswith("jsonl") else name[:-3] * (name != "empty.txt"))
    for name in (".git/x.txt", ".hidden.txt", "__MACOSX/._a.txt", "sub/.ipynb_checkpoints/b.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\xff")
    (folder / "loop").symlink_to(folder)
    (folder / "twice.txt").symlink_to(folder / "a.txt")
    os.link(folder / "sub" / "b.md", folder / "z.md")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "circle.txt").symlink_to(folder / "circle.txt")
    os.mkfifo(folder / "pipe.txt")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "f.txt").write_text("f")
    (folder / "link").symlink_to(elsewhere)
    corpus = TextFiles(str(folder))
    names = [(document.name, document.text) for document in corpus]
    assert names == [
        ("a.txt:0", "a."),
        ("empty.txt:0", ""),
        ("link/f.txt:0", "f"),
        ("sub/b.md:0", "sub/b"),
        ("sub/deep/c.jsonl:0", "c"),
    ]
    counted = "1 .pdf, 1 .tar.gz, 4 hidden, 2 links to nothing, 3 reached twice, 1 without a suffix"
    assert corpus.left_out() == counted
    task = Text(TextFiles(str(folder), validation=str(own_validation(folder))), Bytes(), seq_len=1)
    task.prepare()
    assert task.describe()[1] == f"left out: {counted}"
    assert "1 of 6 documents are empty or null and were left out" in capsys.readouterr().out
    with_loops = TextFiles(str(folder / "**"))
    assert sorted(d.text for d in with_loops) == sorted(text for _, text in names)
    assert "1 .pdf" in with_loops.left_out()
    several = TextFiles([str(folder / "*.txt"), str(folder), str(elsewhere)])
    assert sorted(d.text for d in several) == sorted(text for _, text in names)


def test_a_file_has_its_name_from_where_it_lies(tmp_path):
    """And not from a link to it or to its folder, whatever comes first; the order is that of the paths."""
    for name in ("a.txt", "real/b.TXT", "x/c.txt"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_text(name)
    (tmp_path / "f" / "A.txt").symlink_to("real/b.TXT")
    (tmp_path / "f" / "real" / "link").symlink_to("../x")
    (tmp_path / "f" / "gone").symlink_to("nowhere")
    corpus = TextFiles(str(tmp_path / "f"))
    assert [d.name for d in corpus] == ["a.txt:0", "real/b.TXT:0", "x/c.txt:0"]
    assert corpus.left_out() == "1 link to nothing, 2 reached twice"
    assert [d.name for d in TextFiles([str(tmp_path / "f" / name) for name in ("x", "*.txt")])] == [
        "c.txt:0",
        "A.txt:0",
        "a.txt:0",
    ]


def test_runs_within_the_folder_are_no_text(tmp_path, monkeypatch):
    """Else the same command, given again in the folder of the texts, would find other data than before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUNS", raising=False)
    (tmp_path / "a.txt").write_text("a")
    before = TextFiles(".").fingerprint()
    for name in ("runs/first/metrics.csv", "cache/text_files/meta.json"):  # the cache of these tests is tmp_path/cache
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("step\n1\n")
    corpus = TextFiles(".")
    assert corpus.fingerprint() == before and corpus.left_out() == "2 of runs or prepared data"
    (tmp_path / "runs" / "first" / "sample.txt").write_text("what a model wrote")
    assert texts("runs/first/sample.txt") == texts("runs/first/*.txt") == ["what a model wrote"]
    assert texts("runs/first/sample.txt", validation="a.txt") == ["what a model wrote", "a"]


def test_a_path_is_taken_as_it_is_written(tmp_path):
    """https://github.com/huggingface/datasets/issues/7468, https://github.com/ultralytics/ultralytics/pull/24353"""
    folder = tmp_path / "[Draft] notes *"
    folder.mkdir()
    (folder / "a[1].txt").write_text("brackets")
    (folder / "a1.txt").write_text("none")
    assert texts(folder) == ["none", "brackets"]
    assert texts(folder / "a[1].txt") == ["brackets"]  # not a1.txt, which the pattern means
    assert texts(folder / "a[0-9].txt") == ["none"] and texts(folder / "*.txt") == ["none", "brackets"]
    assert [d.name for d in TextFiles(str(folder / "a[1].txt"))] == ["a[1].txt:0"]
    # https://github.com/huggingface/datasets/issues/6073
    hidden = tmp_path / ".d" / "train"
    hidden.mkdir(parents=True)
    (hidden / "a.txt").write_text("below a hidden folder")
    assert texts(hidden / "a.txt") == texts(hidden) == texts(hidden / "*.txt") == ["below a hidden folder"]


def test_what_is_not_a_path(tmp_path):
    (tmp_path / "texts").mkdir()
    with pytest.raises(ValueError, match=r"text/\*.txt' matches no file: .* has no 'text'; did you mean 'texts'\?"):
        TextFiles(str(tmp_path / "text" / "*.txt"))
    with pytest.raises(ValueError, match=r"texts/\*.txt' matches no file$"):
        TextFiles(str(tmp_path / "texts" / "*.txt"))
    for path in ("", [" "], None, []):
        with pytest.raises(ValueError, match="names nothing; a file, a folder or a pattern is needed"):
            TextFiles(path)
    with pytest.raises(ValueError, match=r"matches no file: .* has no 'x{300}'$"):
        TextFiles(str(tmp_path / ("x" * 300)))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "v.txt").symlink_to(tmp_path / "a.txt")
    with pytest.raises(
        ValueError, match=r"share 1 files, such as .*v.txt; keep what to validate on in a folder of its"
    ):
        TextFiles(str(tmp_path / "a.txt"), validation=str(tmp_path / "v.txt"))


def test_a_separator_has_the_line_ends_of_its_file(tmp_path):
    (tmp_path / "unix.txt").write_bytes(b"a\nb\n\nc")
    (tmp_path / "windows.txt").write_bytes(b"a\r\nb\r\n\r\nc")
    assert texts(tmp_path, separator="\n\n") == ["a\nb", "c", "a\r\nb", "c"]
    assert texts(tmp_path, separator="\r\n\r\n") == ["a\nb\n\nc", "a\r\nb", "c"]


def test_prepared_data_of_before_are_found_again(tmp_path, monkeypatch):
    """The fingerprint of files that were read before is what it was: of settings, paths, sizes and times of change."""
    monkeypatch.chdir(tmp_path)
    for name in ("b/a.txt", "c.jsonl"):
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "w") as file:
            file.write(json.dumps({"text": name}))
        os.utime(name, ns=(0, 0))
    expected = {
        "c.jsonl": "b9ff652d",
        "**/*.txt": "f44f0ce4",
        "./b/*.txt": "f44f0ce4",
    }
    assert {path: TextFiles(path).fingerprint()[:8] for path in expected} == expected


@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", "csv.zst", "parquet"])
def test_a_name_that_is_not_utf8(tmp_path, kind):
    (tmp_path / "f").mkdir()
    path = tmp_path / "f" / os.fsdecode(b"caf\xe9." + kind.encode())
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a")
        (tmp_path / "a").rename(path)
    else:
        raw = {"txt": b"a", "jsonl.gz": gzip.compress(b'{"text": "a"}'), "csv.zst": long_window(b"")}[kind]
        path.write_bytes(raw)
    path.with_name(os.fsdecode(b"x.\xe9")).touch()
    for given in (path, path.parent):
        corpus = TextFiles(str(given), validation=str(own_validation(tmp_path / "f")))
        assert corpus.fingerprint() and corpus.describe().encode()
        if kind == "csv.zst":
            with pytest.raises(ValueError, match="compressed with too long a window") as caught:
                list(corpus)
            assert str(caught.value).encode()
            continue
        prepare(corpus, Bytes(), tmp_path / f"shards {given == path}")
        assert next(d.name for d in corpus) == f"caf\\udce9.{kind}:0"
    assert corpus.left_out() == "1 .\\udce9"
    if kind == "txt":
        path.write_bytes(b"\xff")
        with pytest.raises(ValueError, match=r"caf.*txt is not UTF-8 at byte 0") as caught:
            list(TextFiles(str(path)))
        assert str(caught.value).encode()


def test_a_folder_and_one_within_it_are_two_corpora(tmp_path):
    """Of the same files, but of other names, and so split another way, unless there is a validation path."""
    (tmp_path / "f" / "a").mkdir(parents=True)
    for number in range(30):
        (tmp_path / "f" / "a" / f"{number}.txt").write_text(f"document {number} " * 800)
    outer, inner = (TextFiles(str(tmp_path / path), validation_fraction=0.2) for path in ("f", "f/a"))
    assert [d.split for d in outer] != [d.split for d in inner]
    assert outer.fingerprint() != inner.fingerprint()
    assert inner.fingerprint() == TextFiles(f"{tmp_path}/f/a/*.txt", validation_fraction=0.2).fingerprint()
    held_out = str(own_validation(tmp_path / "f"))
    outer, inner = (TextFiles(str(tmp_path / path), validation=held_out) for path in ("f", "f/a"))
    assert outer.fingerprint() == inner.fingerprint()


def test_rows_without_text_are_counted_after_a_kill_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data.pieces.PIECE", 1)
    rows = [None, "a", "", "b", None, "c"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    corpus = TextFiles(str(tmp_path / "a.jsonl"), validation=str(own_validation(tmp_path)))
    read = corpus.read

    def killed(position=None):
        for number, document in enumerate(read(position)):
            if number == 4 and position is None:
                raise KeyboardInterrupt
            yield document

    corpus.read = killed
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, Bytes(), tmp_path / "shards")
    prepare(corpus, Bytes(), tmp_path / "shards")
    assert "3 of 7 documents are empty or null" in capsys.readouterr().out
    assert TokenShards(tmp_path / "shards", "train").num_documents == 3
