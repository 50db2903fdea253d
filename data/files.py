"""Text files of one's own, read in bounded memory whatever their size, from any position on.

    .txt              a file is one document, or several where a separator is given
    .jsonl .json      a document a line, or an item of one JSON array, in the column `text_field`
    .parquet          a document a row, likewise

All but parquet may be compressed: .gz, .bz2, .xz, .zst.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from data.corpora import Corpus, Document, check_fraction, hash_of, split_of, text_of

PART = 2**20  # bytes of a text that are read at once; a longer document comes in parts of at most so many
LONGEST_ROW = 2**28  # bytes of a line of JSON, which can only be parsed whole; a JSON array may be four times as long
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)

Part = tuple[str, bool, list[int]]  # a text, whether its document ends with it, and [byte or row, document] behind it


class TextFiles(Corpus):
    """Files that match a glob (`**` crosses folders), or one file, in the order of their paths.

    validation    a second path or glob; without it, `validation_fraction` of the documents is held out
    separator     splits a .txt file into documents
    invalid_utf8  what to do with bytes that are not UTF-8: "error", or "replace" by U+FFFD
    """

    SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")

    def __init__(
        self,
        path: str,
        validation: str | None = None,
        validation_fraction: float = 0.01,
        text_field: str = "text",
        separator: str | None = None,
        invalid_utf8: str = "error",
    ):
        self.path, self.validation, self.text_field, self.separator = path, validation, text_field, separator
        self.validation_fraction = check_fraction(validation_fraction)
        if separator == "":
            raise ValueError("data.corpus.separator='' can't separate documents; use null for one document a file")
        if invalid_utf8 not in ("error", "replace"):
            raise ValueError(f"data.corpus.invalid_utf8={invalid_utf8!r} is not one of error, replace")
        self.invalid_utf8 = invalid_utf8
        files = {"train": self._find("data.corpus.path", path)}
        if validation is not None:
            files["validation"] = self._find("data.corpus.validation", validation)
            both = set(files["train"]) & set(files["validation"])
            if both:
                raise ValueError(
                    f"data.corpus.validation={validation!r} and data.corpus.path={path!r} share {len(both)} files, "
                    f"such as {min(both)}"
                )
        self.files = [(split, file) for split, found in files.items() for file in found]

    def _find(self, setting: str, pattern: str) -> list[str]:
        if Path(pattern).expanduser().is_dir():
            raise ValueError(
                f"{setting}={pattern!r} is a folder; {str(Path(pattern) / '**' / '*.txt')!r} takes the .txt files in it"
            )
        files = sorted(f for f in glob.glob(str(Path(pattern).expanduser()), recursive=True) if Path(f).is_file())
        if not files:
            raise ValueError(f"{setting}={pattern!r} matches no file")
        for file in files:
            if _suffix(file) not in self.SUFFIXES or (_suffix(file) == ".parquet" and file.endswith(COMPRESSED)):
                raise ValueError(
                    f"{setting}={pattern!r} matches {file}, which is not .txt, .json, .jsonl or .parquet; all but the "
                    f"last may be compressed ({', '.join(COMPRESSED)})"
                )
        return files

    def read(self, position: list[int] | None = None) -> Iterator[Document]:
        first, offset, index = position or (0, 0, 0)
        roots = {"train": _fixed_folder(self.path), "validation": _fixed_folder(self.validation or self.path)}
        for number in range(first, len(self.files)):
            split, file = self.files[number]
            name = Path(file).relative_to(roots[split]).as_posix()
            for text, last, behind in self._parts(file, offset, index):
                named = f"{name}:{behind[1] - last}"
                own = split if self.validation is not None else split_of(named, self.validation_fraction)
                yield Document(own, named, text, last, [number, *behind])
            offset = index = 0

    def _parts(self, file: str, offset: int, index: int) -> Iterator[Part]:
        kind = _suffix(file)
        try:
            if kind == ".parquet":
                yield from self._parquet(file, index)
                return
            with _open(file) as stream:
                if kind == ".txt":
                    _skip(stream, file, offset)
                    separator = self.separator.encode() if self.separator else b""
                    for raw, last, behind in _cut(stream, separator, offset, index):
                        yield self._decode(raw, file, offset), last, behind
                        offset = behind[0]
                elif kind == ".json" and _is_array(stream):
                    yield from self._array(stream, file, index)
                else:
                    _skip(stream, file, offset)
                    yield from self._lines(stream, file, offset, index)
        except BROKEN as error:
            raise ValueError(f"{file} can't be read as {Path(file).name.partition('.')[2]} ({error})") from error

    def _lines(self, stream: BinaryIO, file: str, offset: int, index: int) -> Iterator[Part]:
        while line := stream.readline(LONGEST_ROW + 1):
            where = f"line {index + 1} of {file}"
            if len(line) > LONGEST_ROW:
                raise ValueError(
                    f"{where} is longer than {LONGEST_ROW:,} bytes, and a row of JSON must be held in memory whole; a "
                    ".txt file is read in parts"
                )
            text = self._decode(line, file, offset)
            offset, index = offset + len(line), index + 1
            if not text.isspace():
                yield text_of(_parsed(text, where), self.text_field, where), True, [offset, index]

    def _array(self, stream: BinaryIO, file: str, index: int) -> Iterator[Part]:
        raw = stream.read(4 * LONGEST_ROW + 1)
        if len(raw) > 4 * LONGEST_ROW:
            raise ValueError(
                f"{file} is a JSON array of more than {4 * LONGEST_ROW:,} bytes, which must be held in memory whole; "
                ".jsonl, a row a line, is read as it comes"
            )
        rows = _parsed(self._decode(raw, file, 0), file)
        for number in range(index, len(rows)):
            yield text_of(rows[number], self.text_field, f"item {number + 1} of {file}"), True, [0, number + 1]

    def _parquet(self, file: str, index: int) -> Iterator[Part]:
        table, row = pyarrow.parquet.ParquetFile(file), 0
        if self.text_field not in table.schema_arrow.names:
            text_of(dict.fromkeys(table.schema_arrow.names), self.text_field, file)  # raises
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            if row + count <= index:
                row += count
                continue
            for batch in table.iter_batches(batch_size=256, row_groups=[group], columns=[self.text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if row > index:
                        where = f"row {row} of {file}"
                        yield text_of({self.text_field: text}, self.text_field, where), True, [row, row]

    def _decode(self, raw: bytes, file: str, offset: int) -> str:
        try:
            return raw.decode("utf-8", errors="replace" if self.invalid_utf8 == "replace" else "strict")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file} is not UTF-8 at byte {offset + error.start:,} (0x{raw[error.start]:02x}); convert it, or "
                "data.corpus.invalid_utf8=replace puts U+FFFD in place of such bytes"
            ) from None

    def fraction(self, position: list[int]) -> float:
        sizes = [Path(file).stat().st_size for _, file in self.files]
        number, offset, _ = position
        within = min(offset, sizes[number]) if self.files[number][1].endswith((".txt", ".jsonl")) else 0
        return (sum(sizes[:number]) + within) / max(1, sum(sizes))

    def fingerprint(self) -> str:
        """Names, sizes and times of change: a file that was edited is prepared again."""
        settings = (self.text_field, self.separator, self.validation, self.validation_fraction, self.invalid_utf8)
        files = []
        for split, file in self.files:
            try:
                stat = Path(file).stat()
            except OSError as error:
                raise ValueError(f"data.corpus.path={self.path!r}: {file} has gone ({error.strerror})") from error
            files.append(f"{split} {file} {stat.st_size} {stat.st_mtime_ns}")
        return hash_of("text_files", *settings, *files)

    def describe(self) -> str:
        return f"{self.path}{f' and {self.validation}' if self.validation else ''} ({len(self.files)} files)"


def _cut(stream: BinaryIO, separator: bytes, offset: int, index: int) -> Iterator[tuple[bytes, bool, list[int]]]:
    """The documents of a text, in parts of at most PART bytes. Where a part ends depends on what comes before it in
    its document and on nothing else, so that reading from any part on gives the same parts.
    """
    buffer, begin, ended = b"", 0, False
    while True:
        if len(buffer) - begin <= PART + len(separator) and not ended:
            block = stream.read(PART)
            buffer, begin, ended = buffer[begin:] + block, 0, not block
            continue
        at = buffer.find(separator, begin, begin + PART + len(separator)) if separator else -1
        if at >= 0:
            stop, last, behind = at, True, at + len(separator)
        elif len(buffer) - begin > PART:
            stop = behind = boundary(buffer, begin, begin + PART)
            last = False
        else:
            stop, last, behind = len(buffer), True, len(buffer)
        offset, index = offset + behind - begin, index + last
        yield buffer[begin:stop], last, [offset, index]
        begin = behind
        if ended and begin == len(buffer) and at < 0:
            return


def boundary(text: bytes, begin: int, stop: int) -> int:
    """Before the last blank or line of the last 4096 bytes before `stop`, where byte-level tokens begin; else between
    two characters.
    """
    near = max(begin + 1, stop - 4096)
    blank = max(text.rfind(b" ", near, stop), text.rfind(b"\n", near, stop))
    if blank >= 0:
        return blank
    for back in range(4):  # of the bytes of a character, all but the first are 10xxxxxx
        if stop - back > begin and text[stop - back] & 0xC0 != 0x80:
            return stop - back
    return stop


def _suffix(file: str) -> str:
    path = Path(file)
    return path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix


def _open(file: str) -> BinaryIO:
    suffix = Path(file).suffix
    if suffix == ".zst":  # Python 3.11 has no zstd; pyarrow has
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(file), "zstd"))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(suffix, open)(file, "rb")


def _skip(stream: BinaryIO, file: str, offset: int) -> None:
    if not file.endswith(COMPRESSED):
        stream.seek(offset)
        return
    while offset and (block := stream.read(min(offset, PART))):
        offset -= len(block)


def _is_array(stream: BinaryIO) -> bool:
    return stream.peek(64).lstrip().startswith(b"[")  # type: ignore[attr-defined]  # all that _open returns can


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error})") from None


def _fixed_folder(pattern: str) -> Path:
    """The folder a pattern starts from. Names relative to it, and with them the split, are the same wherever it is."""
    folder = Path(pattern).expanduser().parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    return folder
