"""Read documents, one row each: html, docx and epub as plain text, Markdown and txt as they are.

Nothing in a document is executed, and no entity, link or image in it is followed.
"""

import io
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from ..text import MARKDOWN_EXTENSIONS, data_extension, format_bytes
from .markup import TextBlocks, decode_html, import_etree
from .opening import CHANGED, Container, UnreadableFileError, open_file, read_document, text_lines

if TYPE_CHECKING:
    import lxml.etree

_DECLARES_TYPE = "it declares a document type, which Office files do not"
_MAX_INDEX = 20_000_000  # bytes of a part that only names others


def _read_html(file: io.FileIO, unread: Counter[str], encoding: str) -> str:
    return decode_html(read_document(file), unread, None if encoding == "auto" else encoding)


# docx


class _DocxTarget(TextBlocks):
    """Receives the events of lxml's XML parser for a part of a Word document."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self._root, self._is_first, self._is_item = root, True, False
        self._skipped = self._texts = 0

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        name = tag.rpartition("}")[2]
        if self._is_first and name != self._root:
            raise ValueError(f"it is no Word document: its main part is a {name[:50]}")
        self._is_first = False
        value = next((text for key, text in attributes.items() if key.endswith("}val")), "")
        if self._skipped or name in ("Fallback", "moveFrom", "del"):
            self._skipped += 1
        elif name == "t":
            self._texts += 1
        elif name in ("br", "cr"):
            self._pieces.append("\n")
        elif name in ("tab", "noBreakHyphen"):
            self.add_text(" " if name == "tab" else "-")
        elif name in ("p", "tbl"):
            self.end_block("\n" if name == "p" else "\n\n")
            self._is_item = False
        elif name in ("numPr", "pStyle"):  # pStyle comes first
            self._is_item = name == "numPr" or value.startswith("List")
        elif name == "numId" and value == "0":
            self._is_item = False
        elif name == "tr":
            self.start_row()
        elif name == "tc":
            self.start_cell()

    def end(self, tag: str) -> None:
        name = tag.rpartition("}")[2]
        if self._skipped:
            self._skipped -= 1
        elif name == "t":
            self._texts -= 1
        elif name == "p":
            if not self._is_item:
                self.separate("\n\n")
            self.end_block("\n" if self._is_item else "\n\n")
        elif name == "tr":
            self.end_row()
        elif name == "tc":
            self.end_cell()
        elif name == "tbl":
            self.end_block()

    def data(self, text: str) -> None:
        if self._texts and not self._skipped:
            self.add_text(text)

    def doctype(self, *_declaration: str | None) -> None:
        raise ValueError(_DECLARES_TYPE)


def _read_docx(file: io.FileIO, unread: Counter[str], encoding: str) -> str:
    """Return the text of the body and the notes; headers, footers and comments are not read."""
    etree, container = import_etree(), Container(file)
    relations = _parse_xml(container, "_rels/.rels")
    main = next(
        (node.get("Target", "") for node in relations if node.get("Type", "").endswith("/officeDocument")), ""
    )
    main = posixpath.normpath(main.lstrip("/"))
    texts = []
    for root in ("document", "footnotes", "endnotes"):
        part = main if root == "document" else posixpath.join(posixpath.dirname(main), f"{root}.xml")
        if root != "document" and part not in container.names():
            continue
        parser = etree.XMLParser(target=_DocxTarget(root), resolve_entities=False, no_network=True)
        try:
            for chunk in container.read_chunks(part):
                parser.feed(chunk)
            texts.append(str(parser.close()))
        except etree.LxmlError as error:
            raise ValueError(f"its part {part[:100]!r} is damaged ({error})") from error
    return "\n\n".join(filter(None, texts))


# epub


def _read_epub(file: io.FileIO, unread: Counter[str], encoding: str) -> str:
    """Return the text of the chapters, in the order of the spine."""
    container = Container(file)
    roots = [node.get("full-path", "") for node in _nodes(container, "META-INF/container.xml", "rootfile")]
    if not roots:
        raise ValueError("its META-INF/container.xml names no book")
    folder, items = posixpath.dirname(roots[0]), dict[str, str]()
    for node in _nodes(container, roots[0], "item"):
        if node.get("media-type") in ("application/xhtml+xml", "text/html"):
            items[node.get("id", "")] = posixpath.normpath(posixpath.join(folder, unquote(node.get("href", ""))))
    spine = [node.get("idref", "") for node in _nodes(container, roots[0], "itemref")]
    chapters = [items[name] for name in spine if name in items]
    if not chapters:
        raise ValueError(f"its part {roots[0][:100]!r} names no chapter")
    encryption = "META-INF/encryption.xml"
    if encryption in container.names():
        encrypted = {unquote(node.get("URI", "")) for node in _nodes(container, encryption, "CipherReference")}
        if encrypted.intersection(chapters):
            raise ValueError("its chapters are encrypted")
    texts = [decode_html(container.read(chapter), unread) for chapter in chapters]
    return "\n\n".join(filter(None, texts))


def _nodes(container: Container, part: str, name: str) -> "list[lxml.etree._Element]":
    return list(_parse_xml(container, part).iter("{*}" + name))


def _parse_xml(container: Container, part: str) -> "lxml.etree._Element":
    """Parse a small part. Entities are not resolved, and nothing outside of it is read."""
    etree, content = import_etree(), container.read(part)
    if len(content) > _MAX_INDEX:
        raise ValueError(f"its part {part[:100]!r} has more than {format_bytes(_MAX_INDEX)}")
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
    try:
        root: lxml.etree._Element = etree.fromstring(content, parser)
    except etree.LxmlError as error:
        raise ValueError(f"its part {part[:100]!r} is damaged ({error})") from error
    return root


# Rows


class UnreadableRow(dict[str, object]):
    """The row of a document or message that cannot be read; `reason` is a noun phrase."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason


def _read_text(file: io.FileIO, unread: Counter[str], encoding: str) -> str:
    return "".join(text_lines(file, encoding))


_READERS: dict[str, Callable[[io.FileIO, Counter[str], str], str]] = {
    **dict.fromkeys((*MARKDOWN_EXTENSIONS, ".txt"), _read_text),
    **dict.fromkeys((".html", ".htm"), _read_html),
    ".docx": _read_docx,
    ".epub": _read_epub,
}


def read_document_row(
    path: Path, name: str, unread: Counter[str], encoding: str = "auto"
) -> Iterator[dict[str, object]]:
    """Yield the row of a document; no row if it has no text.

    Args:
        name: Value of the column `file`.
        unread: Counts what is in it and not read.
        encoding: That of Markdown and txt; of HTML "auto" for the one that the page names.
    """
    with open_file(path) as file:
        text = _READERS[data_extension(path)](file, unread, encoding)
    if text.strip():
        yield {"text": text, "file": name}


def count_unreadable(read: Callable[[], Iterator[dict[str, object]]]) -> Iterator[dict[str, object]]:
    """Yield the rows of a document. An error in it ends them with an `UnreadableRow`."""
    try:
        yield from read()
    except UnreadableFileError as error:
        if error.reason == CHANGED:
            raise
        yield UnreadableRow(f"a document that cannot be read: {error.reason}")
