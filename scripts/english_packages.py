"""A corpus of English out of Debian's packages: manuals, manual pages, dictionaries, books.

    python scripts/english_packages.py                                  # on Debian; writes english_packages/
    python train.py data=english_packages tokenizer=bpe

It asks apt-get for the packages that scripts/packages/names.py names, reads their files without installing anything,
and keeps the paragraphs that are English prose. A paragraph is kept once. A document is left out where half of its
words stand in documents before it. Packages of the validation split come first, and share no package with the training
split; so what is validated on was not in training. Texts of a package that follow each other are one document, of
about 32,000 characters, so that there is something to remember. Of a package at most --most megabytes are taken.

    english_packages/train/PACKAGE.jsonl.xz        a document a line, in the column `text`
    english_packages/validation/PACKAGE.jsonl.xz
    english_packages/packages.json                 their versions, and how much of each was kept

Each text stays under the licence of its package, which is in the package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.packages.english import Seen, documents
from scripts.packages.names import TRAIN, VALIDATION

LONG = 32_000  # characters of a document, about 8,000 tokens
LARGEST = 8_000_000  # bytes of a file: pages are parsed whole


def download(names: list[str], folder: Path) -> list[Path]:
    """Their files, those asked for that are not there yet. Raises ValueError where this is not Debian."""
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise ValueError(f"{tool} is not on this machine; the packages are read on Debian or a system made from it")
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.name.partition("_")[0] for path in folder.glob("*.deb")}
    missing = [name for name in names if name not in there]
    if missing:
        said = subprocess.run(["apt-cache", "pkgnames"], capture_output=True, text=True, check=True)
        known = set(said.stdout.split())
        if unknown := [name for name in missing if name not in known]:
            print(f"not in this release, left out: {' '.join(unknown)}", flush=True)
        wanted = [name for name in missing if name in known]
        done = subprocess.run(["apt-get", "download", *wanted], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"apt-get download did not succeed; try apt-get update: {done.stderr.strip()[-300:]}")
    found = {path.name.partition("_")[0]: path for path in sorted(folder.glob("*.deb"))}
    return [found[name] for name in names if name in found]


Texts = list[tuple[str, str]]  # paths and what is read of each


def read(package: Path, most: int) -> Texts:
    """Its texts, in the order of their paths' hashes, so that what is left out at the end is of all kinds."""
    found: Texts = []
    size = 0
    with tempfile.TemporaryFile() as content:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", package], stdout=content, check=True)
        content.seek(0)
        with tarfile.open(fileobj=content) as archive:
            files = [file for file in archive if file.isfile() and (file.size <= LARGEST or file.name.endswith(".dz"))]
            for file in sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest()):
                opened = archive.extractfile(file)
                for text in documents(file.name, opened.read()) if opened else ():
                    found.append((file.name, text))
                    size += len(text)
                    if size > most:
                        return found
    return found


def packages(paths: list[Path], most: int, processes: int) -> Iterator[tuple[Path, Texts]]:
    with ProcessPoolExecutor(processes) as pool:
        yield from zip(paths, pool.map(partial(read, most=most), paths), strict=True)


def joined(texts: Texts) -> list[str]:
    """Texts that follow each other by their paths, as the chapters of a manual do, as documents of some length."""
    found: list[list[str]] = [[]]
    size = 0
    for _, text in sorted(texts, key=lambda pair: pair[0]):
        if size > LONG:
            found, size = [*found, []], 0
        found[-1].append(text)
        size += len(text)
    return ["\n\n".join(part) for part in found if part]


def write(split: str, paths: list[Path], to: Path, seen: Seen, most: int, processes: int) -> list[dict[str, Any]]:
    rows = []
    (to / split).mkdir(parents=True, exist_ok=True)
    for path, texts in packages(paths, most, processes):
        name, version = path.name.removesuffix(".deb").split("_")[:2]
        kept = joined([(file, new) for file, text in texts if (new := seen.new(text))])
        if kept:
            with lzma.open(to / split / f"{name}.jsonl.xz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in kept)
        sizes = {"read": sum(len(text.encode()) for _, text in texts), "kept": sum(len(text.encode()) for text in kept)}
        rows.append({"package": name, "version": version, "split": split, "documents": len(kept), **sizes})
        read_and_kept = (f"{size / 1e6:7.2f} MB {key}" for key, size in sizes.items())
        print(f"{split:10}  {name:28}", *read_and_kept, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("english_packages"), help="(default: english_packages)")
    parser.add_argument("--downloads", type=Path, help="of the packages (default: FOLDER/downloads)")
    parser.add_argument("--train", nargs="+", default=TRAIN, metavar="PACKAGE")
    parser.add_argument("--validation", nargs="+", default=VALIDATION, metavar="PACKAGE")
    parser.add_argument("--most", type=float, default=5.0, help="megabytes of text of a package (default: 5)")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    downloads, seen = given.downloads or given.folder / "downloads", Seen()
    rows: list[dict[str, Any]] = []
    try:
        if both := set(given.train) & set(given.validation):
            raise ValueError(f"--train and --validation share {', '.join(sorted(both))}")
        for split, names in (("validation", given.validation), ("train", given.train)):
            paths = download(list(names), downloads)
            rows += write(split, paths, given.folder, seen, int(given.most * 1e6), given.processes)
    except ValueError as error:
        sys.exit(f"error: {error}")
    (given.folder / "packages.json").write_text(json.dumps(rows, indent=1) + "\n")
    for split in ("train", "validation"):
        total = sum(row["kept"] for row in rows if row["split"] == split)
        size = sum(path.stat().st_size for path in (given.folder / split).glob("*.xz"))
        print(f"{split}: {total / 1e6:.1f} MB of text, {size / 1e6:.1f} MB on the disk")


if __name__ == "__main__":
    main()
