"""Find out the encoding of a text file: UTF-8, UTF-16 by its mark, or else Western European.

Other encodings are not guessed: their bytes are letters in many of them, and a wrong guess is text
that nobody wrote. An error names the option.
"""

import codecs
import contextlib
import re
from pathlib import Path

from .opening import UTF8, UnreadableFileError, not_encoded, open_file, unpack

_MARKS = {  # first bytes -> encoding and its name; the longest first
    codecs.BOM_UTF32_LE: ("utf-32", "UTF-32"),
    codecs.BOM_UTF32_BE: ("utf-32", "UTF-32"),
    codecs.BOM_UTF16_LE: ("utf-16", "UTF-16"),
    codecs.BOM_UTF16_BE: ("utf-16", "UTF-16"),
}
_CHUNK = 2**20
_CHECKED = 2**26  # bytes of a file; what follows them is checked as it is read
_JUDGED = 2**18  # bytes around the first that is not UTF-8, which tell the encoding
_UTF8_CHARACTER = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_HIGH_BYTE = re.compile(rb"[\x80-\xff]")
_MAX_LETTERS = 0.35  # share of the letters that are not ASCII, in Western European text
_MAX_IMPLAUSIBLE = 0.02  # of the characters that are not ASCII
# A capital in the middle of a word, a symbol between letters, or an opening quote behind one.
_IMPLAUSIBLE = re.compile(
    "[a-z][\u00c0-\u00d6\u00d8-\u00de\u0160\u017d\u0152\u0178]"
    "|[^\\W\\d_][\u00a1-\u00a9\u00ab\u00ac\u00ae-\u00b1\u00b4-\u00b6\u00b8\u00b9\u00bb-\u00bf\u00d7\u00f7\u20ac\u0192\u2020\u2021\u02c6\u2030\u2039\u02dc\u2122\u203a][^\\W\\d_]"
    "|[^\\W\\d_][\u201a\u201e\u02c6\u02dc]"
)
_EXAMPLE = re.compile("\\w*[^\\W\\d_\x00-\x7f]\\w*|\\w*[^\x00-\x7f]\\w*")


def find_encoding(path: Path, encoding: str) -> tuple[str, str, str]:
    """Return the encoding of a text file, how that is known, and an example.

    The latter two are empty if it is UTF-8, or named.

    Args:
        encoding: As in `TrainConfig`.

    Raises:
        DataError: It is none of those that are recognized.
    """
    if encoding != "auto":
        return (UTF8 if codecs.lookup(encoding).name == "utf-8" else encoding), "", ""
    with open_file(path) as file:
        start = file.read(4)
        packed = unpack(file)
        start = packed.read(4) or b""
        for mark, (name, label) in _MARKS.items():
            if start.startswith(mark):
                return name, f"it is read as {label}, as its first bytes say", ""
        data, checked, decoder = start, 0, codecs.getincrementaldecoder("utf-8")()
        try:
            while data and checked < _CHECKED:
                decoder.decode(data)
                checked += len(data)
                data = packed.read(_CHUNK) or b""
            if not data:
                decoder.decode(b"", final=True)
            return UTF8, "", ""
        except UnicodeDecodeError as error:
            position = checked + error.start - (len(error.object) - len(data))
        packed, content, size = unpack(file), b"", 0
        while size < position + _JUDGED // 2 and (data := packed.read(_CHUNK) or b""):
            content = (content + data)[-_JUDGED - _CHUNK :]
            size += len(data)
        start_judged = max(0, position - _JUDGED // 2) - (size - len(content))
    return _as_western(path, content[start_judged:][:_JUDGED], position)


def guess_encodings(path: Path) -> list[str]:
    """Return encodings in which the beginning of a file may be read to look at it."""
    with contextlib.suppress(UnreadableFileError), open_file(path) as file:
        start = unpack(file).read(4) or b""
        if name := next((name for mark, (name, _) in _MARKS.items() if start.startswith(mark)), None):
            return [name]
    return [UTF8, "latin-1"]


def _as_western(path: Path, content: bytes, position: int) -> tuple[str, str, str]:
    """Return cp1252, of which Latin-1 is a part, for text that looks like it.

    Args:
        content: The bytes around `position`, that of the first which is not UTF-8.
    """
    with open_file(path):  # errors name the file
        high = len(_HIGH_BYTE.findall(content))
        if b"\0" in content:
            return UTF8, "", ""  # no text in any of these encodings: reading it says so
        if 2 * sum(map(len, _UTF8_CHARACTER.findall(content))) > high:
            raise ValueError(
                f"byte {position} is not UTF-8, though others are: correct it, or save the file as UTF-8 text"
            )
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError:
            text = ""
        letters = sum(map(str.isalpha, text))
        other_letters = sum(character.isalpha() for character in text if character > "\x7f")
        implausible = len(_IMPLAUSIBLE.findall(text))
        if not text or other_letters > _MAX_LETTERS * letters or implausible > _MAX_IMPLAUSIBLE * high:
            raise ValueError(not_encoded(position))
        example = _EXAMPLE.search(text)
        return (
            "cp1252",
            "it is not UTF-8, and is read as cp1252 (Western European, with Latin-1)",
            (example[0] if example else ""),
        )
