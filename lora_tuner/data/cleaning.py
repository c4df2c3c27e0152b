"""Clean the text of a row: HTML tags and entities, control characters, white space."""

import html
import re
import unicodedata

# Tags by name, and what follows the name must be an attribute, so that "if a <b and c> d" stays.
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
    """Plain text: no HTML tags or entities, no control characters, single spaces, Unicode form NFC.

    One line, unless lines are kept: then a break stays a break, and several in a row become one blank line.
    """
    text = html.unescape(_BLOCK_TAG.sub("\n", _INLINE_TAG.sub("", text)))
    text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be written to any file
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    if not keep_lines:
        return _SPACE.sub(" ", text).strip()
    lines = [_SPACE.sub(" ", line).strip() for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def clean_message(text: str) -> str:
    """What a message says, as it was written: its lines, indents and tags stay, control characters and outer space go."""
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n")
    return unicodedata.normalize("NFC", _CONTROL.sub("", text)).strip()
