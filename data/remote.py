"""Files beside those of this machine: of every file system that `fsspec` knows (s3://, gs://, hf://, http://, memory://).

A URL stands where a path may. What is asked of a file is asked here, so that the rest need not know where it lies.
"""

from __future__ import annotations

import glob
import io
import os
import re
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

import fsspec
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from data.corpora import BrokenOffError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
# What a file system tells of a file that is another when its content is: the first that there is.
MARKS = "ETag etag md5Hash blob_id Content-MD5 Digest mtime LastModified Last-Modified last_modified updated created"
BUFFER = 2**20  # bytes

Id = tuple[int, int] | str


def is_remote(path: str | Path) -> bool:
    return URL.match(str(path)) is not None


def file_system(url: str, setting: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system and the path in it. Raises ValueError, with the setting's name, for one that is not there, or
    whose package is not installed.
    """
    protocol = re.split("://|::", url)[0]
    try:
        return url_to_fs(url)
    except ImportError as error:
        known = known_implementations.get(protocol, {})
        package = str(known.get("class", "")).split(".")[0]
        install = f"pip install {package}" if package not in ("", "fsspec") else str(error)
        raise ValueError(
            f"{setting}={url} needs a package for {protocol}:// that is not installed: {install}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{setting}={url} can't be read: fsspec knows no {protocol}://, but http, https, s3, gs, hf and others"
        ) from error


def listed(url: str, setting: str) -> tuple[str, dict[str, str]]:
    """Where a file, a folder or a pattern starts, and its files, hidden ones too: URL -> name relative to the start."""
    system, path = file_system(url, setting)
    try:
        if glob.has_magic(path):
            start = path
            while glob.has_magic(start):
                start = start.rpartition("/")[0]
            found = [file for file in system.glob(path) if system.isfile(file)]
        elif Path(path).suffix and not path.endswith("/") and system.isfile(path):
            start, found = path.rpartition("/")[0], [path]
        else:
            # a server's pages are followed one by one, and one that fails would be passed over
            start, found = path, system.find(path, **({"on_error": "raise"} if path.startswith("http") else {}))
    except FileNotFoundError:
        start, found = path, []
    except Exception as error:  # of any library: it is told, whatever it is
        raise ValueError(f"{setting}={url} can't be read ({said(error)})") from error
    plain = unquote if path.startswith("http") else str
    return start, {str(system.unstrip_protocol(file)): plain(file[len(start) :].strip("/")) for file in found}


def size_of(file: str) -> int | None:
    """In bytes; None where a server does not say."""
    if not is_remote(file):
        return os.stat(file).st_size
    return _info(file).get("size")


def stamp_of(file: str) -> str:
    """Another one when the file has been changed. Raises OSError where it has gone."""
    if not is_remote(file):
        stat = os.stat(file)
        return f"{stat.st_size} {stat.st_mtime_ns}"
    info = _info(file)
    return f"{info.get('size')} {next((info[mark] for mark in MARKS.split() if info.get(mark)), None)}"


def id_of(file: str) -> Id:
    """The same for all paths of one file, and for no other file. Raises OSError for a link to nothing."""
    if is_remote(file):
        return file
    stat = os.stat(file)
    return stat.st_dev, stat.st_ino


def _info(url: str) -> dict[str, Any]:
    system, path = file_system(url, "file")
    try:
        return system.info(path)
    except OSError:
        raise
    except Exception as error:
        raise OSError(0, said(error), url) from error


def opened(file: str, random: bool = False) -> BinaryIO:
    """For reading, at random or from the beginning on. Raises BrokenOffError where a connection ends too early."""
    if not is_remote(file):
        return open(file, "rb")
    system, path = file_system(file, "file")
    stream = file.startswith(("http://", "https://")) and not random  # not every server gives a part of a file
    try:
        raw = system.open(path, "rb", **({"block_size": 0} if stream else {}))
    except Exception as error:
        raise BrokenOffError(f"{file} can't be read ({said(error)})") from error
    return cast("BinaryIO", io.BufferedReader(_Raw(raw, file, not stream), BUFFER))


class _Raw(io.RawIOBase):
    """A file of fsspec, whose errors are those of reading that broke off."""

    def __init__(self, file: Any, url: str, seekable: bool):
        self.file, self.url, self._seekable = file, url, seekable

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._seekable

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            raw = self.file.read(len(buffer))
        except Exception as error:
            raise BrokenOffError(f"{self.url} broke off ({said(error)})") from error
        buffer[: len(raw)] = raw
        return len(raw)

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def said(error: Exception) -> str:
    """An error of a library, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
