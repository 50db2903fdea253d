"""English out of packages: what is read of a file, what counts as prose, what has been before; and a corpus of packages
that are made here.
"""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import english_packages
from scripts.packages.english import Seen, documents, english

SENTENCE = (
    "The parser reads a file from the disk, and it will not write to any other file than the one that was named. "
)
OTHER = (
    "When a server has been stopped for an hour, its users may find that their mail is on the way to another place. "
)
GERMAN = "Der Zerteiler liest eine Datei von der Platte und schreibt in keine andere Datei als in die genannte hinein. "


def read(path: str, text: str) -> list[str]:
    content = text.encode()
    return list(documents(path, gzip.compress(content) if path.endswith((".gz", ".dz")) else content))


def test_prose_is_kept_with_its_heading_and_nothing_else():
    """Code, tables and other languages are not what a language model of English should be measured on."""
    page = (
        f"<h1>Reading\u00b6</h1><p>{SENTENCE * 3}</p><pre>for (i = 0; i < n; i++) x[i] = a[i] * b;</pre><p>{GERMAN}</p>"
    )
    assert read("./usr/share/doc/a/index.html", page) == [f"Reading\n{(SENTENCE * 3).strip()}"]
    notes = (SENTENCE * 3).strip()
    assert read("./usr/share/doc/a/notes.txt.gz", f"Use\n\n{notes}\n\nx = 3; y = 4;\n") == [f"Use\n\n{notes}"]
    assert (
        english(SENTENCE)
        and not english(GERMAN)
        and not english("for (i = 0; i < n; i++) { x[i] += a * b; } /* the sum */")
    )
    assert read("./usr/share/doc/a/short.txt", SENTENCE) == [] and read("./usr/bin/a", SENTENCE * 9) == []
    assert read("./usr/share/doc/a/_sources/index.rst.txt", SENTENCE * 9) == [], "of a page, which is read"
    assert list(documents("./broken.txt.gz", b"no gzip")) == []


def test_manual_pages_and_dictionaries_lose_their_marks():
    manual = f'.\\" a comment\n.TH LS 1\n.SH NAME\n.B ls\n\\- list \\fIfiles\\fP\n{SENTENCE * 3}\n.PP\n{OTHER}\n'
    (page,) = read("./usr/share/man/man1/ls.1.gz", manual)
    assert (
        page.startswith("ls\n- list files\nThe parser")
        and "\\" not in page
        and ".SH" not in page
        and OTHER.strip() in page
    )
    entries = f"parser\n   {SENTENCE}\nZerteiler\n   {GERMAN}\nserver\n   {OTHER}\n"
    (found,) = read("./usr/share/dictd/words.dict.dz", entries)
    assert found == f"parser\n   {SENTENCE}\n\nserver\n   {OTHER}".strip("\n") and "Zerteiler" not in found


def test_what_has_been_before_is_left_out():
    """A paragraph word for word, and a text most of whose stretches of words were in others."""
    seen, more = Seen(), " ".join(f"Number {i} of them is the one that comes behind number {i - 1}." for i in range(40))
    assert seen.new(f"{SENTENCE * 3}\n{more}") == f"{SENTENCE * 3}\n{more}"
    assert seen.new(f"{SENTENCE * 3}\n{OTHER * 3}") == OTHER * 3
    assert seen.new("  " + more) == "", "the same, laid out otherwise"
    near = more.replace("comes behind", "stands behind", 3)
    assert seen.new(near) == "" and seen.new(more.replace("is the one that", "was what")) != ""


def package(folder: Path, name: str, files: dict[str, str]) -> None:
    root = folder / f"{name}-root"
    for path, text in ({"DEBIAN/control": f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: a\n"
                        "Description: d\n"} | files).items():  # fmt: skip
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    build = ["dpkg-deb", "-Znone", "--build", root, folder / f"{name}_1.0_all.deb"]
    subprocess.run(build, check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="reads Debian's packages")
def test_a_corpus_is_made_and_validated_on_other_packages(tmp_path, monkeypatch, capsys):
    own = {
        n: " ".join(f"In {n} the {w} is what you will find at {i}." for i, w in enumerate("abcdefgh")) for n in "xyz"
    }
    package(tmp_path, "first", {"usr/share/doc/first/2.txt": own["x"], "usr/share/doc/first/1.txt": own["y"]})
    package(tmp_path, "held", {"usr/share/doc/held/1.txt": own["z"], "usr/share/doc/held/2.txt": own["y"]})
    monkeypatch.setattr(english_packages, "ProcessPoolExecutor", OneProcess)
    words = ["--downloads", tmp_path, "--train", "first", "--validation", "held", "--folder", tmp_path / "corpus"]
    monkeypatch.setattr(sys, "argv", ["english_packages.py", *map(str, words)])
    english_packages.main()

    def texts(path: str) -> list[str]:
        return [json.loads(line)["text"] for line in lzma.open(tmp_path / "corpus" / path, "rt")]

    assert texts("validation/held.jsonl.xz") == [f"{own['z']}\n\n{own['y']}"], "one document, in the order of the paths"
    assert texts("train/first.jsonl.xz") == [own["x"]], "what is validated on is not in training"
    assert "train: 0.0 MB of text" in capsys.readouterr().out
    rows = json.loads((tmp_path / "corpus" / "packages.json").read_text())
    assert [(row["package"], row["version"], row["split"]) for row in rows] == [
        ("held", "1.0", "validation"),
        ("first", "1.0", "train"),
    ]
    monkeypatch.setattr(sys, "argv", ["english_packages.py", "--train", "held", "--validation", "held"])
    with pytest.raises(SystemExit, match="--train and --validation share held"):
        english_packages.main()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="apt-get is not on this machine"):
        english_packages.download(["held"], tmp_path)


class OneProcess:
    """In place of several, which would each import all of it."""

    def __init__(self, processes: int) -> None: ...

    def __enter__(self) -> OneProcess:
        return self

    def __exit__(self, *_: object) -> None: ...

    map = staticmethod(map)
