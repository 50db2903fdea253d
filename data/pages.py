"""The text that a browser shows of a page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

# Elements that are not shown; each of them must have an end tag, so that what comes behind it is not lost.
HIDDEN = frozenset(("script", "style", "template", "noscript", "title", "svg"))
CELLS = ("td", "th")
KEPT = "\x00"  # a blank within <pre>, until the others have been joined
# Elements that do not begin a line of their own; all others do.
NAMES = """
    a abbr acronym b bdi bdo big button cite code data del dfn em font i img input ins kbd label mark meter output q
    ruby rb rp rt rtc s samp select small span strike strong sub sup time tt u var wbr
"""
INLINE = frozenset(NAMES.split())


def visible_text(page: str) -> str:
    """A page without its tags, scripts and styles. Blanks are joined, outside <pre>; blocks begin on a new line, cells
    of a table behind a tab.
    """
    parser = _Visible()
    parser.feed(page)
    parser.close()
    lines = "".join(parser.pieces).split("\n")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.strip(" ") for line in lines)).strip("\n").replace(KEPT, " ")


class _Visible(HTMLParser):
    def __init__(self) -> None:
        super().__init__()  # which turns &eacute; into a letter
        self.pieces: list[str] = []
        self.hidden = self.preformatted = 0  # elements of the kind that are open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in HIDDEN
        self.preformatted += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(0, self.hidden - (tag in HIDDEN))
        self.preformatted = max(0, self.preformatted - (tag == "pre"))
        if tag not in CELLS:
            self._break(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._break(tag)  # <script/> opens nothing

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.pieces.append(data.replace(" ", KEPT) if self.preformatted else re.sub(r"\s+", " ", data))

    def _break(self, tag: str) -> None:
        if self.hidden or tag in HIDDEN or tag in INLINE:
            return
        in_row = tag in CELLS and self.pieces and not self.pieces[-1].endswith("\n")
        self.pieces.append("\t" if in_row else "\n")
