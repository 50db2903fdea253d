"""English out of the files of packages: which are read, how, and what of them is prose."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import PurePosixPath

from data.pages import visible_text

# Those that make up a third of the words of any English text, and few of the words of another language or of code.
WORDS = """
    the of and to a in is that for it as with be on by this are or an from at which not can if you will have was but
    when all one has may any its use used more other than then they there these should would their we his he i her she
"""
COMMON = frozenset(WORDS.split())
MOSTLY_LETTERS = 0.78  # and blanks; code and tables have fewer
SHORTEST = 200  # characters of a document
WORD = re.compile(r"[A-Za-z']+")
PAGES, TEXTS = (".html", ".htm", ".xhtml", ".page", ".docbook"), (".txt", ".rst", ".md", ".pod")
HEADING_MARK = "[\u00b6\uf0c1]"  # which pages show beside a heading, to be pointed at
MAN = re.compile(r"/man/man[1-9]/")
MANY = 8_000  # characters of a document made of short entries


def documents(path: str, content: bytes) -> Iterator[str]:
    """The prose of a file, if it is one that has any: pages, manual pages, plain text, dictionaries."""
    name, packed = PurePosixPath(path), path.endswith((".gz", ".dz"))
    suffix = name.with_suffix("").suffix if packed else name.suffix
    of_entries = path.endswith(".dict.dz") or ("/games/fortunes/" in path and not suffix)
    manual_page = MAN.search(path) is not None
    if suffix not in (*PAGES, *TEXTS) and not (manual_page or of_entries):
        return
    if packed:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            return
    text = content.decode("utf-8", errors="replace")
    if of_entries:
        entries = text.split("\n%\n") if "fortunes" in path else re.split(r"\n(?=\S)", text)
        yield from gathered(entry for entry in entries if english(entry))
    elif suffix in PAGES:
        yield from long_enough(prose(re.sub(HEADING_MARK, "", visible_text(text)).split("\n"), "\n"))
    elif "/_sources/" not in path:  # of the pages, which have the same
        text = manual(text) if manual_page else pod(text) if suffix == ".pod" else text
        yield from long_enough(prose(re.split(r"\n\s*\n", text), "\n\n"))


def gathered(entries: Iterator[str]) -> Iterator[str]:
    """Many short entries as documents of some length."""
    found, size = [], 0
    for entry in entries:
        found.append(entry.strip("\n"))
        size += len(entry)
        if size > MANY:
            yield "\n\n".join(found)
            found, size = [], 0
    yield from long_enough("\n\n".join(found))


def long_enough(text: str) -> Iterator[str]:
    if len(text) >= SHORTEST:
        yield text


def pod(text: str) -> str:
    """Perl's own format of manuals without its commands."""
    return re.sub(r"^=.*$", "", re.sub(r"[A-Z]<+\s*([^<>]*?)\s*>+", r"\1", text), flags=re.MULTILINE)


def manual(text: str) -> str:
    """A manual page without the macros of its typesetting."""
    text = re.sub(r"^[.']\s*\\\".*$|\\\".*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\.(SH|SS|TP|PP|P|LP|IP|nf|fi|sp|br|RS|RE|TH|EX|EE).*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^\.(B|I|BR|RB|IR|RI|BI|IB|SM|MR)\s+(.*)$", r"\2", text, flags=re.MULTILINE)
    text = re.sub(r"^[.'].*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\\s[-+]?\d|\\\*\([LR]?[\"`']?|\\\*\(--", "", text.replace("\\*(Aq", "'"))
    text = re.sub(r"\\f(\[\w*\]|\(..|.)|\\[&|^c]", "", text).replace("\\-", "-").replace("\\e", "\\")
    return re.sub(r"\\\((..)|\\\[(\w+)\]", " ", text)


def prose(blocks: list[str], between: str) -> str:
    """Those that are English, and the headings above them."""
    found: list[str] = []
    heading = ""
    for block in blocks:
        block = block.strip("\n") if "\n" in block else block.strip()
        if not block:
            continue
        if english(block):
            found += [heading, block] if heading else [block]
            heading = ""
        else:
            short = len(block) <= 80 and letters(block) >= MOSTLY_LETTERS and "\n" not in block
            heading = block if short else ""
    return between.join(found)


def english(block: str) -> bool:
    words = WORD.findall(block)
    if len(words) < 6 or letters(block) < MOSTLY_LETTERS:
        return False
    return sum(word.lower() in COMMON for word in words) >= 0.2 * len(words)


def letters(block: str) -> float:
    """The share of letters and blanks."""
    return (sum(map(str.isalpha, block)) + sum(map(block.count, " \n\t"))) / max(1, len(block))


class Seen:
    """What has been before: paragraphs, and stretches of words by which near duplicates are known."""

    STRETCH, ONE_IN = 8, 8  # words; one stretch in so many is looked at, chosen by its first word's hash
    MOST = 0.5  # of a document's stretches that may have been before

    def __init__(self) -> None:
        self.paragraphs: set[int] = set()
        self.stretches: set[int] = set()

    def new(self, text: str) -> str:
        """The text without paragraphs that have been before; "" where most of it was, in other paragraphs."""
        kept = []
        for block in text.split("\n"):
            key = hash_of(" ".join(block.split()))
            if len(block) < 60 or key not in self.paragraphs:
                kept.append(block)
                self.paragraphs.add(key)
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")
        found = self.of(text)
        if len(text) < SHORTEST or len(found & self.stretches) > self.MOST * len(found):
            return ""
        self.stretches |= found
        return text

    def of(self, text: str) -> set[int]:
        words = [word.lower() for word in WORD.findall(text)]
        chosen = (i for i in range(len(words) - self.STRETCH) if begins_a_stretch(words[i]))
        return {hash_of(" ".join(words[i : i + self.STRETCH])) for i in chosen}


@lru_cache(1_000_000)
def begins_a_stretch(word: str) -> bool:
    return hash_of(word) % Seen.ONE_IN == 0


def hash_of(text: str) -> int:
    """The same in every process; two of 32 bits, since collisions of one would be many."""
    data = text.encode("utf-8", errors="replace")
    return zlib.crc32(data) << 32 | zlib.adler32(data)
