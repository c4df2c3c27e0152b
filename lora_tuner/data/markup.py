"""Turn the events of HTML and XML parsers into plain text, and bytes into characters.

Paragraphs and headings are separated by blank lines; items of lists and rows of tables are lines.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType

from ..errors import DataError
from .cleaning import clean_message

_SKIPPED = "head script style nav template noscript svg iframe object canvas audio video select button"
_PARAGRAPHS = (
    "address article aside blockquote body center details dialog div fieldset figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 header hr main p pre section summary ul ol dl table caption"
)
_SKIPPED_TAGS, _PARAGRAPH_TAGS = frozenset(_SKIPPED.split()), frozenset(_PARAGRAPHS.split())
_MAX_DEPTH = 50  # of tables in tables
_CHARSET = re.compile(
    rb"""<meta[^>]{1,200}?charset\s*=\s*["']?\s*([\w.:-]+)|<\?xml[^>]{1,100}?encoding\s*=\s*["']([\w.:-]+)""",
    re.I,
)
# As browsers read these names.
_CHARSETS = dict.fromkeys(("iso-8859-1", "iso8859-1", "latin-1", "latin1"), "cp1252")
_CHARSETS |= {
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc-kr": "cp949",
    "ks_c_5601-1987": "cp949",
}
_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"<\0": "utf-16-le",
    b"\0<": "utf-16-be",
}
_DOCTYPE = re.compile(r"<!DOCTYPE[^>\[]*\[.*?\]\s*>", re.I | re.DOTALL)
_UNDECODABLE = "characters that are not of their encoding"
_SPACE = re.compile(r"\s+")

_Block = tuple[str, str]  # white space before it, text


@dataclass
class _Frame:
    """Blocks of the document or of one cell. `cells` are those of the table row that is open in it."""

    blocks: list[_Block] = field(default_factory=list)
    separator: str = ""  # before the next block
    items: int = 0  # open items of lists
    cells: list[list[_Block]] | None = None


class TextBlocks:
    """Paragraphs, lines and rows of tables, from the events of a parser."""

    def __init__(self) -> None:
        self._frames, self._pieces, self._is_pre = [_Frame()], list[str](), False
        self._cell_has_frame: list[bool] = []

    def add_text(self, text: str, *, is_pre: bool = False) -> None:
        self._is_pre = self._is_pre or is_pre
        self._pieces.append(text if is_pre else _SPACE.sub(" ", text))

    def separate(self, separator: str) -> None:
        """Set the least white space before the next block: within an item of a list, a line break."""
        frame = self._frames[-1]
        frame.separator = max(frame.separator, "\n" if frame.items else separator, key=len)

    def end_block(self, separator: str = "\n\n") -> None:
        """End the current block, if there is one."""
        frame, text = self._frames[-1], "".join(self._pieces)
        if self._is_pre:
            text = "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")
        else:
            text = "\n".join(" ".join(line.split()) for line in text.split("\n")).strip()
        self._pieces, self._is_pre = [], False
        if text.strip():
            frame.blocks.append((frame.separator, text))
            frame.separator = ""
        self.separate(separator)

    def start_item(self) -> None:
        self.end_block("\n")
        self._frames[-1].items += 1

    def end_item(self) -> None:
        self.end_block("\n")
        self._frames[-1].items = max(0, self._frames[-1].items - 1)

    def start_row(self) -> None:
        self.end_block("\n")
        if self._frames[-1].cells:
            self.end_row()
        if len(self._frames) < _MAX_DEPTH:
            self._frames[-1].cells = []

    def start_cell(self) -> None:
        self.end_block("\n")
        self._cell_has_frame.append(self._frames[-1].cells is not None)
        if self._cell_has_frame[-1]:
            self._frames.append(_Frame())

    def end_cell(self) -> None:
        self.end_block("\n")
        if self._cell_has_frame and self._cell_has_frame.pop():
            cell = self._frames.pop()
            if (row := self._frames[-1].cells) is not None:
                row.append(cell.blocks)

    def end_row(self) -> None:
        """Write a row as one line; one whose cells hold paragraphs, as for a layout, as these."""
        self.end_block("\n")
        frame = self._frames[-1]
        cells = [cell for cell in frame.cells or [] if cell]
        frame.cells = None
        if not cells:
            return
        if all(len(cell) == 1 for cell in cells):
            line = "\t".join(" ".join(cell[0][1].split()) for cell in cells)
            frame.blocks.append((frame.separator, line))
            frame.separator = "\n"
            return
        for cell in cells:
            frame.blocks += [("\n\n", cell[0][1]), *cell[1:]]
        frame.separator = "\n\n"

    def close(self) -> str:
        """Return the text of the document."""
        self.end_block()
        while self._cell_has_frame:
            self.end_cell()
            self.end_row()
        text = "".join(part for block in self._frames[0].blocks for part in block)
        return clean_message(text, "none").strip("\n")


class _HtmlTarget(TextBlocks):
    """Receives the events of lxml's HTML parser."""

    def __init__(self) -> None:
        super().__init__()
        self._skipped = self._pre = 0

    def start(self, tag: str, _attributes: Mapping[str, str]) -> None:
        if self._skipped or tag in _SKIPPED_TAGS:
            self._skipped += 1
        elif tag == "br":
            self._pieces.append("\n")
        else:
            self._pre += tag == "pre"
            self._change_block(tag, is_start=True)

    def end(self, tag: str) -> None:
        if self._skipped:
            self._skipped -= 1
        elif tag != "br":
            self._change_block(tag, is_start=False)
            self._pre -= tag == "pre"

    def _change_block(self, tag: str, *, is_start: bool) -> None:
        if tag in ("li", "dt", "dd"):
            self.start_item() if is_start else self.end_item()
        elif tag == "tr":
            self.start_row() if is_start else self.end_row()
        elif tag in ("td", "th"):
            self.start_cell() if is_start else self.end_cell()
        elif tag in _PARAGRAPH_TAGS:
            self.end_block()

    def data(self, text: str) -> None:
        if not self._skipped:
            self.add_text(text, is_pre=self._pre > 0)


def html_text(markup: str) -> str:
    """Return the text of an HTML page."""
    head = _DOCTYPE.sub("", markup[:4096], count=1)
    content = (head + markup[4096:]).replace("\0", "").encode("utf-8", "replace")
    parser = import_etree().HTMLParser(target=_HtmlTarget(), encoding="utf-8", no_network=True)
    parser.feed(content)
    return str(parser.close() or "") if content.strip() else ""


def decode(data: bytes, unread: Counter[str], charset: str | None = None) -> str:
    """Return text as browsers read it: by its mark, its charset, as UTF-8, else as windows-1252.

    Args:
        unread: Counts the characters that are not of the encoding.
    """
    name = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    if name is None and charset is not None and "ascii" not in charset.lower():
        name = _CHARSETS.get(charset.lower(), charset)
    try:
        text = data.decode(name or "utf-8", "strict" if name is None else "replace")
    except (LookupError, ValueError):  # an unknown charset, or none
        try:
            text = data.decode("utf-8")
        except ValueError:
            text = data.decode("cp1252", "replace")
    if broken := text.count("\ufffd"):
        unread[_UNDECODABLE] += broken
    return text


def decode_html(data: bytes, unread: Counter[str], charset: str | None = None) -> str:
    """Return the text of an HTML page, whose bytes may name their encoding, unless `charset` does."""
    if charset is not None:
        return html_text(decode(data, unread, charset))
    match = _CHARSET.search(data[:4096])
    charset = (match[1] or match[2]).decode("ascii", "replace") if match else None
    return html_text(decode(data, unread, "utf-8" if str(charset).lower().startswith("utf-16") else charset))


def import_etree() -> ModuleType:
    try:
        import lxml.etree
    except ImportError as error:
        raise needs_extra("html, docx and epub", "lxml") from error
    return lxml.etree


def needs_extra(kinds: str, package: str) -> DataError:
    """Return the error of a package that is not installed."""
    return DataError(
        f"Reading {kinds} needs the package {package}: pip install 'lora_tuner[documents]' or {package}."
    )
