"""Clean the text of a row: HTML tags and entities, control characters, whitespace."""

import html
import re
import unicodedata

# A tag is a known name, then only attributes: "if a <b and c> d" stays.
_INLINE_TAGS = "a abbr b cite code del em font i ins label mark q s small span strike strong sub sup tt u"
_BLOCK_TAGS = (
    "article aside blockquote body br center dd div dl dt figure footer h[1-6] head header hr html iframe img li link main "
    "meta nav ol p pre script section style table tbody td tfoot th thead title tr ul video"
)
_TAG_REST = r"(?:\s+(?:noshade|nowrap))?(?:\s+[\w:-]+\s*=[^<>]*+)?\s*+/?>"
_INLINE_TAG = re.compile(
    rf"<!--.{{0,4000}}?-->|</?(?:{'|'.join(_INLINE_TAGS.split())}){_TAG_REST}", re.IGNORECASE | re.DOTALL
)
_BLOCK_TAG = re.compile(rf"</?(?:{'|'.join(_BLOCK_TAGS.split())}){_TAG_REST}", re.IGNORECASE)
_INVISIBLE = re.compile("[\u00ad\u200b\ufeff]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\ufeff]")
_SPACE = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")


def clean_text(text: str, *, keep_lines: bool = False) -> str:
    """Return text without HTML tags, entities and control characters, with single spaces, in NFC.

    Args:
        keep_lines: Keep line breaks, and several in a row as one blank line; else the text becomes
            one line.
    """
    text = html.unescape(_BLOCK_TAG.sub("\n", _INLINE_TAG.sub("", text)))
    text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be encoded
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    if not keep_lines:
        return _SPACE.sub(" ", text).strip()
    lines = [_SPACE.sub(" ", line).strip() for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def clean_message(text: str) -> str:
    """Remove control characters and outer whitespace; keep lines, indents and tags."""
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n")
    return unicodedata.normalize("NFC", _CONTROL.sub("", text)).strip()
