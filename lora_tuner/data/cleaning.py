"""Clean the text of a row: HTML tags and entities, control characters, whitespace."""

import html
import re
import unicodedata
from collections.abc import Sequence

from ..config import CleanMode

# A tag is a known name, then only attributes: "if a <b and c> d" stays.
_INLINE_TAGS = "a abbr b cite code del em font i ins label mark q s small span strike strong sub sup tt u"
_BLOCK_TAGS = (
    "article aside blockquote body br center dd div dl dt figure footer h[1-6] head header hr "
    "html iframe img li link main meta nav ol p pre script section style table tbody td tfoot th "
    "thead title tr ul video"
)
_TAG_REST = r"(?:\s+(?:noshade|nowrap))?(?:\s+[\w:-]+\s*=[^<>]*+)?\s*+/?>"
_INLINE_TAG = re.compile(rf"</?(?:{'|'.join(_INLINE_TAGS.split())}){_TAG_REST}", re.IGNORECASE)
_BLOCK_TAG = re.compile(rf"</?(?:{'|'.join(_BLOCK_TAGS.split())}){_TAG_REST}", re.IGNORECASE)
_MAX_COMMENT_CHARS = 4000
_HUGE_ENTITY = re.compile(r"&#\d{4000,}+;?")  # Python converts no more than 4,300 digits
_INVISIBLE = re.compile("[\u00ad\u200b\ufeff]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\ufeff]")
_LINE_BREAK = re.compile("\r\n?|[\x0b\x0c\x85]")
_SPACE = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
_MARKS = re.compile("[\x02\x03]")  # chat.CHAT_MARK and splitting.GOES_ON, which no text may have
# Lines of program code and of settings. Verse has none of these, though its lines may be indented.
_CODE_LINE = re.compile(
    r"[{}\[\]=\\|<>]|\w\(|\)[;:,]?$|\$[A-Za-z{(]|^\s*(?://|/\*|#|\$ |(?:end|fi|done)$|(?:- )?[\"']?[a-z_][\w.-]*[\"']?:(?:\s|$))"
    r"|^\s*(?:import|return|elif|def|class|const|var|func|fn|struct|static|public|private|echo|export|SELECT|CREATE|INSERT)\b"
)
_MARKDOWN_LINE = re.compile(r"\s*(?:#{1,6} |[-*+] |\d+[.)] |> |\||```|~~~)|.*(?:\*\*\w|\]\(|`[^`]+`)")
# Of the lines of a text.
_CODE_SHARE, _INDENTED_CODE_SHARE, _INDENT_SHARE, _MARKDOWN_SHARE = 0.6, 0.3, 0.2, 0.25
_STRUCTURED_SHARE = 0.25  # of the texts


def clean_text(text: str, mode: CleanMode = "full") -> str:
    """Return a text without what is no part of it.

    Args:
        mode: "full": no HTML tags, entities and control characters, single spaces, NFC, one line.
            "lines": the same with its line breaks, several in a row as one blank line. "none": as it
            is, but for lone surrogates, which cannot be encoded; "" for white space alone.
    """
    if mode == "none":
        text = _MARKS.sub("", text).encode("utf-8", "replace").decode("utf-8")
        return text if text.strip() else ""
    # Each step is left out where it would change nothing: most texts have no tags, entities or accents.
    if "<" in text:
        text = _BLOCK_TAG.sub("\n", "".join(_INLINE_TAG.sub("", part) for part in _split_at_comments(text)))
    if "&" in text:
        text = html.unescape(_HUGE_ENTITY.sub("\ufffd", text))
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be encoded
        text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    if mode == "full":
        return _SPACE.sub(" ", text).strip()
    lines = [_SPACE.sub(" ", line).strip() for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def has_line_breaks(text: str) -> bool:
    """Return whether a text has lines of its own; those of HTML mean nothing."""
    return len(text.strip().splitlines()) > 1 and _BLOCK_TAG.search(text) is None


def _split_at_comments(text: str) -> list[str]:
    """Return the parts of a text between its HTML comments. A longer comment is text."""
    parts, begin, position, close = [], 0, 0, 0
    while (start := text.find("<!--", position)) >= 0:
        position = start + 4
        if 0 <= close < position:
            close = text.find("-->", position)
        if close < 0:
            break
        if close - position <= _MAX_COMMENT_CHARS:
            parts.append(text[begin:start])
            begin = position = close + 3
    return [*parts, text[begin:]]


def clean_message(text: str, mode: CleanMode) -> str:
    """Remove control characters, and outer white space unless `mode` is "none"; keep the rest. Each
    kind of line break becomes a newline character."""
    text = _LINE_BREAK.sub("\n", text.encode("utf-8", "replace").decode("utf-8"))
    text = unicodedata.normalize("NFC", _CONTROL.sub("", text))
    return text if mode == "none" and text.strip() else text.strip()


def are_structured(texts: Sequence[str]) -> bool:
    """Return whether texts are program code, settings or Markdown, which cleaning would destroy."""
    return sum(map(_is_structured, texts)) > _STRUCTURED_SHARE * len(texts)


def _is_structured(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip()]
    # Most lines are HTML.
    if len(lines) < 2 or 2 * sum(line.lstrip().startswith("<") for line in lines) > len(lines):
        return False
    code, indented, markdown = (
        sum(map(bool, matches)) / len(lines)
        for matches in (
            map(_CODE_LINE.search, lines),
            (line.startswith(("  ", "\t")) for line in lines),
            map(_MARKDOWN_LINE.match, lines),
        )
    )
    is_code = code >= _CODE_SHARE or (code >= _INDENTED_CODE_SHARE and indented >= _INDENT_SHARE)
    return is_code or markdown >= _MARKDOWN_SHARE
