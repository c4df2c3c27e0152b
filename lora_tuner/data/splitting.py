"""Assign each row to the training or the held-out side by a hash of its text, or of its group.

One long text alone, or a few documents, are split in themselves: blocks of them are held out, with
a gap of unused text at either side."""

import hashlib
import itertools
import re
from collections.abc import Sequence

from . import chat

HELD_OUT_SHARE = 0.2
GOES_ON = "\x03"  # last character of a text that goes on, so it has no end-of-text token
MIN_DOCUMENTS = 5  # of fewer, blocks are held out
MIN_TEXT_CHARS = 1_000  # shortest text of which blocks are held out
_BLOCK_PERIOD, _MAX_BLOCKS = 50_000, 10  # characters of a text per held-out block
_MIN_GAP_CHARS = 100  # unused text in front of a block and behind it
# Length of the rows of a held-out block: about the tokens that are measured.
_HELD_OUT_ROW_CHARS = 2_000
# White space in front of a sentence or a line; not after initials and titles. Empty after a full-width stop.
SENTENCE_START = re.compile(
    r"(?:(?<=[.!?\u2026\u0964\u061f\u06d4])|(?<=[.!?\u2026][\"'\u201d\u2019\u00bb)\]]))"
    r"(?<!\b[A-Za-z]\.)(?<!\b[DMS][rst]\.)(?<!\bMrs\.)\s+(?=\S)"
    r"|(?:(?<=[\u3002\uff01\uff1f])|(?<=[\u3002\uff01\uff1f][\u201d\u2019\u300d\u300f\uff09]))"
    r"(?![\u3002\uff01\uff1f\u201d\u2019\u300d\u300f\uff09])\s*(?=\S)"
    r"|\n+(?=[ \t]*+\S)"
)
PARAGRAPH_START = re.compile(r"\n[ \t]*\n\s*(?=\S)")
WORD_START = re.compile(r"\s+(?=\S)")


def row_hash(text: str, salt: str) -> bytes:
    """Return the hash of a cleaned row. It decides the split and the order of held-out rows.

    Line breaks count as spaces, so a row that keeps them is on the same side. Of a conversation all
    but the white space around its texts counts; its roles and contents alone decide the side, and
    the rest of the hash tells rows apart that differ in a reasoning or a tool.
    """
    text = chat.plain_text(text)
    if not chat.is_chat(text):
        return _salted_hash(" ".join(text.split()), salt)
    text = chat.strip_texts(text)
    decisive = chat.decisive_text(text)
    digest = _salted_hash(decisive, salt)
    return digest if decisive == text else digest[:8] + _salted_hash(text, salt)[8:]


def group_hash(group: str, salt: str) -> bytes:
    """Return the hash of a group of rows: it decides the side of all of them."""
    return _salted_hash(f"group\0{group}", salt)


def _salted_hash(text: str, salt: str) -> bytes:
    return hashlib.sha256(f"{salt}\0{text}".encode()).digest()


def is_held_out(digest: bytes) -> bool:
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def content_hash(texts: list[str]) -> str:
    """Return the hash of a list of rows in this order: the sha256 over the sha256 of each."""
    return hashlib.sha256(b"".join(hashlib.sha256(text.encode()).digest() for text in texts)).hexdigest()


def split_document(text: str) -> list[str]:
    """Split a held-out document into rows to measure, where a paragraph, sentence or line begins."""
    count = max(1, round(len(text) / _HELD_OUT_ROW_CHARS))
    size = len(text) / count
    patterns = (PARAGRAPH_START, SENTENCE_START, WORD_START)
    starts = [_next_start(text, round(size * number), size / 4, patterns) for number in range(1, count)]
    edges = [0, *starts, len(text)]
    return [_excerpt(text, *pair) for pair in itertools.pairwise(edges) if text[slice(*pair)].strip()]


def split_text(text: str) -> tuple[list[str], list[str]]:
    """Split one text into rows to train on and held-out rows, in the order of the text.

    The text is divided into periods. The last fifth of each is held out, and a fiftieth in front of
    it and behind it is not used. Rows begin where a sentence or a line does, if one is near.
    """
    periods = min(_MAX_BLOCKS, -(-len(text) // _BLOCK_PERIOD))
    size = len(text) / periods
    gap, reach = max(size / 50, _MIN_GAP_CHARS), size / 40
    train, held_out, begin = [], [], 0
    for number in range(1, periods + 1):
        end = round(number * size)
        block = round(end - HELD_OUT_SHARE * size)
        train.append(_excerpt(text, begin, round(block - gap)))
        rows = max(2, round((end - block) / _HELD_OUT_ROW_CHARS))
        edges = [
            _next_start(text, round(block + (end - block) * index / rows), reach) for index in range(rows + 1)
        ]
        held_out += [_excerpt(text, *pair) for pair in itertools.pairwise(edges)]
        begin = _next_start(text, round(edges[-1] + gap), reach)
    return train, held_out


def _excerpt(text: str, begin: int, end: int) -> str:
    return text[begin:end] + (GOES_ON if end < len(text) else "")


def _next_start(
    text: str, position: int, reach: float, patterns: Sequence[re.Pattern[str]] = (SENTENCE_START, WORD_START)
) -> int:
    """Return where the next sentence or line begins, else the next word, at most `reach` further."""
    if position < len(text):
        for pattern in patterns:
            if gap := pattern.search(text, position, round(position + reach)):
                return gap.end()
    return min(position, len(text))
