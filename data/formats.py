"""The documents of one file, in bounded memory whatever its size, from any position on.

    .txt .text .md .markdown .rst   a document, or several where a separator is given; as it is, line ends and all
    .html .htm                      a document: the text that a browser shows, without tags, scripts and styles
    .jsonl .ndjson .json            a document a line, or an item of one JSON array, in the column `text_field`
    .csv .tsv                       a document a row, likewise; the first row names the columns
    .parquet                        a document a row, likewise

All but parquet may be compressed: .gz, .bz2, .xz, .zst. Suffixes may be in capitals. A byte-order mark is left out.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from data.corpora import escaped, text_of
from data.pages import visible_text
from data.remote import is_remote, opened, size_of

PART = 2**20  # bytes of a text that are read at once; a longer document comes in parts of at most so many
LONGEST_ROW = 2**28  # bytes of a row or a page, which can only be parsed whole; a JSON array may be four times as long
TEXT = (".txt", ".text", ".md", ".markdown", ".rst")
PAGES, ROWS, TABLES = (".html", ".htm"), (".jsonl", ".ndjson"), (".csv", ".tsv")
SUFFIXES = (*TEXT, *PAGES, *ROWS, ".json", *TABLES, ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
MARK = "\ufeff".encode()  # a byte-order mark, which Windows puts first; it is no part of the text
ELSE = "; name the column that holds the text, or choose files by a pattern such as '**/*.txt'"

Part = tuple[str, bool, list[int]]  # a text, whether its document ends with it, and [byte or row, document] behind it

csv.field_size_limit(LONGEST_ROW)  # the module's own limit is 131,072 characters


def suffix_of(file: str) -> str:
    """The format of a file in small letters, without the suffix of its compression: ".jsonl" of "A.JSONL.GZ"."""
    path = Path(file)
    return Path(path.stem if compressed(file) else path).suffix.lower()


def compressed(file: str) -> bool:
    return Path(file).suffix.lower() in COMPRESSED


def readable(file: str) -> bool:
    """Whether a file of this name can be read at all."""
    suffix = suffix_of(file)
    return suffix in SUFFIXES and not (suffix == ".parquet" and compressed(file))


@dataclass(frozen=True)
class Reader:
    """Reads files of any of the formats.

    text_field    the column of a table or of JSON that holds the text
    separator     splits a text file into documents; its \\n is \\r\\n where the file's first lines end so
    invalid_utf8  what to do with bytes that are not UTF-8: "error", or "replace" by U+FFFD
    """

    text_field: str = "text"
    separator: str | None = None
    invalid_utf8: str = "error"

    def parts(self, file: str, offset: int = 0, index: int = 0) -> Iterator[Part]:
        """The texts behind this position, of which those of rows without text are "". Raises ValueError, naming the
        file and where in it, for what can't be read.
        """
        kind, path, file = suffix_of(file), file, escaped(file)
        try:
            if size_of(path) == 0:
                yield from [("", True, [0, 1])][index:]
            elif kind == ".parquet":
                yield from self._parquet(path, file, index)
            else:
                with _open(path) as stream:
                    yield from self._stream(stream, kind, file, offset, index)
        except BROKEN as error:
            if "too much memory" in str(error):  # a window of more than 128 MB, which pyarrow does not take
                raise ValueError(
                    f"{file} was compressed with too long a window to be read here (zstd --long); unpack it first: "
                    f"zstd -d --long=31 {file}"
                ) from error
            what = "".join(s for s in Path(file).suffixes[-1 - compressed(file) :])[1:]
            raise ValueError(f"{file} can't be read as {what} ({escaped(str(error))})") from error

    def _stream(self, stream: BinaryIO, kind: str, file: str, offset: int, index: int) -> Iterator[Part]:
        if not _peek(stream):  # compressed, and nothing in it
            yield from [("", True, [0, 1])][index:]
            return
        windows = b"\r\n" in _peek(stream)
        mark = len(stream.read(len(MARK))) if _peek(stream).startswith(MARK) else 0
        if kind in PAGES:
            page = self._decode(_whole(stream, LONGEST_ROW, file, "a page"), file, mark)
            yield from [(visible_text(page), True, [0, 1])][index:]
        elif kind in TABLES:
            yield from self._table(stream, kind, file, mark, index)
        elif kind == ".json" and not _is_rows(stream):
            yield from self._array(stream, file, mark, index)
        else:
            _skip(stream, file, offset, mark)
            offset = max(offset, mark)
            if kind in TEXT:
                yield from self._text(stream, file, offset, index, windows)
            else:
                yield from self._rows(stream, file, offset, index)

    def _text(self, stream: BinaryIO, file: str, offset: int, index: int, windows: bool) -> Iterator[Part]:
        separator = self.separator or ""
        if windows and "\r" not in separator:
            separator = separator.replace("\n", "\r\n")
        for raw, last, behind in _cut(stream, separator.encode(), offset, index):
            yield self._decode(raw, file, offset), last, behind
            offset = behind[0]

    def _rows(self, stream: BinaryIO, file: str, offset: int, index: int) -> Iterator[Part]:
        first = not index
        for text, behind in self._lines(stream, file, offset, index):
            if not text.isspace():
                where = f"line {behind[1]} of {file}"
                yield self._text_of(_parsed(text, where), where, first), True, behind
                first = False

    def _lines(self, stream: BinaryIO, file: str, offset: int, index: int = 0) -> Iterator[tuple[str, list[int]]]:
        while line := stream.readline(LONGEST_ROW + 1):
            if len(line) > LONGEST_ROW:
                raise ValueError(
                    f"line {index + 1} of {file} is longer than {LONGEST_ROW:,} bytes, and a row must be held in "
                    "memory whole; a .txt file is read in parts"
                )
            text = self._decode(line, file, offset)
            offset, index = offset + len(line), index + 1
            yield text, [offset, index]

    def _array(self, stream: BinaryIO, file: str, mark: int, index: int) -> Iterator[Part]:
        found = _parsed(self._decode(_whole(stream, 4 * LONGEST_ROW, file, "a JSON array"), file, mark), file)
        rows = found if isinstance(found, list) else [found]
        for number in range(index, len(rows)):
            where = f"item {number + 1} of {file}" if rows is found else file
            yield self._text_of(rows[number], where, number == 0), True, [0, number + 1]

    def _table(self, stream: BinaryIO, kind: str, file: str, mark: int, index: int) -> Iterator[Part]:
        # a line ends in \n, \r\n or, from an old Mac, \r
        lines = (line for text, _ in self._lines(stream, file, mark) for line in io.StringIO(text, newline=""))
        number = 0
        try:
            columns, delimiter, rest = self._header(lines, kind)
            if not columns:
                yield from [("", True, [0, 1])][index:]
                return
            if self.text_field not in columns:
                shown = (" ".join(name.split()) for name in columns)
                text_of(dict.fromkeys(shown), self.text_field, file, ELSE)  # raises
            column, rows = columns.index(self.text_field), csv.reader(rest, delimiter=delimiter, strict=True)
            for number, row in enumerate((row for row in rows if row), start=1):
                if any(map(str.strip, row[len(columns) :])):
                    raise ValueError(
                        f"row {number} of {file} has more fields than the header; put a text that holds {delimiter!r} "
                        "in quotes"
                    )
                if number > index:
                    yield row[column] if column < len(row) else "", True, [number, number]
        except csv.Error as error:
            raise ValueError(
                f"row {number + 1} of {file} can't be read as {kind[1:]} ({error}); a field that begins with a quote "
                'must end with one, and have those within doubled: """Yes"", she said."'
            ) from None

    def _header(self, lines: Iterator[str], kind: str) -> tuple[list[str], str, Iterator[str]]:
        """The columns, the delimiter, and the lines behind: the first delimiter that gives a column of the text, else
        the usual one. No columns where all lines are blank.
        """
        head: list[str] = []

        def from_the_first() -> Iterator[str]:
            yield from head
            for line in lines:
                head.append(line)
                yield line

        # spreadsheets of many countries write semicolons, since a comma is in their numbers
        found: dict[str, tuple[list[str], int]] = {}
        for delimiter in "\t" if kind == ".tsv" else ",;\t|":
            found[delimiter] = _first_row(csv.reader(from_the_first(), delimiter=delimiter, strict=True))
            if found[delimiter][1] < 0:  # quotes that do not end: of its line alone
                number = next(n for n, line in enumerate(head, start=1) if line.strip())
                found[delimiter] = _first_row(csv.reader(head[number - 1 : number], delimiter=delimiter))[0], number
            if self.text_field in found[delimiter][0]:
                break
        else:
            delimiter = next(iter(found))
        columns, number = found[delimiter]
        return columns, delimiter, chain(head[number:], lines)

    def _parquet(self, path: str, file: str, index: int) -> Iterator[Part]:
        table, row = pyarrow.parquet.ParquetFile(_arrow(path)), 0
        if self.text_field not in table.schema_arrow.names:
            text_of(dict.fromkeys(table.schema_arrow.names), self.text_field, file, ELSE)  # raises
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
                        text = self._decode(text, where, 0) if isinstance(text, bytes) else text
                        yield self._text_of({self.text_field: text}, where, False), True, [row, row]

    def _text_of(self, row: Any, where: str, first: bool) -> str:
        """The first row of a file must have the column; a later one may lack it, as one may be null."""
        if not first and isinstance(row, dict) and self.text_field not in row:
            return ""
        return text_of(row, self.text_field, where, ELSE)

    def _decode(self, raw: bytes, file: str, offset: int) -> str:
        try:
            return raw.decode("utf-8", errors="replace" if self.invalid_utf8 == "replace" else "strict")
        except UnicodeDecodeError as error:
            likely = "UTF-16" if not offset and raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
            raise ValueError(
                f"{file} is not UTF-8 at byte {offset + error.start:,} (0x{raw[error.start]:02x}); convert it (iconv "
                f"-f {likely} -t UTF-8, if that is what it is), or data.corpus.invalid_utf8=replace puts U+FFFD in "
                "place of such bytes"
            ) from None


def _first_row(reader: Any) -> tuple[list[str], int]:
    """The first row that is not blank, and how many lines end with it; -1 where it can't be read."""
    try:
        row: list[str] = next((row for row in reader if any(map(str.strip, row))), [])
    except csv.Error:
        return [], -1
    return [name.strip() for name in row], reader.line_num


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
        elif begin < len(buffer) or not index:
            stop, last, behind = len(buffer), True, len(buffer)
        else:
            return  # behind the last separator, or where reading went on at the end
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


def _open(file: str) -> BinaryIO:
    suffix = Path(file).suffix.lower()
    if suffix == ".zst":  # Python 3.11 has no zstd; pyarrow has
        return io.BufferedReader(pyarrow.CompressedInputStream(_arrow(file, random=False), "zstd"))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    if suffix not in openers:
        return opened(file)
    return openers[suffix](opened(file) if is_remote(file) else file, "rb")


def _arrow(file: str, random: bool = True) -> pyarrow.NativeFile:
    remote = is_remote(file)
    return pyarrow.PythonFile(opened(file, random), "r") if remote else pyarrow.OSFile(os.fsencode(file))


def _peek(stream: BinaryIO) -> bytes:
    return stream.peek(8192)  # type: ignore[attr-defined]  # all that _open returns can


def _skip(stream: BinaryIO, file: str, offset: int, done: int) -> None:
    """Goes to a position, from one that is known."""
    if offset <= done:
        return
    if not compressed(file) and stream.seekable():
        stream.seek(offset)
        return
    while offset > done and (block := stream.read(min(offset - done, PART))):
        done += len(block)


def _whole(stream: BinaryIO, most: int, file: str, what: str) -> bytes:
    raw = stream.read(most + 1)
    if len(raw) > most:
        raise ValueError(
            f"{file} is {what} of more than {most:,} bytes, which must be held in memory whole; .jsonl, a row a line, "
            "and .txt are read as they come"
        )
    return raw


def _is_rows(stream: BinaryIO) -> bool:
    """Whether JSON comes a row a line: its first line is a row, and not the beginning of an array or a long object."""
    first, end, _ = _peek(stream).lstrip().partition(b"\n")
    if first.startswith(b"[") or not end:
        return not first.startswith(b"[")
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error})") from None
