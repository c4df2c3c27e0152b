"""Prompts that fit the data of an adapter, from its held-out rows."""

import re
from collections.abc import Sequence

from ..text import CONTROL_CHARACTERS
from . import chat

MAX_WORDS, MAX_CHARACTERS, MAX_ROWS = 12, 80, 1000
# An address, a link or a long number may be personal; the others would break a command or Markdown.
_UNFIT = re.compile(r"@|://|www\.|\d[\d \-./]{3,}\d|\d{4}|`|^-|^\s*$")

_MARKS = re.compile(r"(?:[^\w\s]+\s+)*")  # such as that of a heading in Markdown: no prompt without a word


def held_out_prompts(rows: Sequence[str], *, conversations: bool, count: int = 3) -> list[str]:
    """Choose prompts for a model card: of conversations the user's first question, of a row with an
    answer what precedes it, of plain text the first words.

    Prompts of at most a dozen words come before longer ones, of which the shortest are chosen. What
    an answer follows is not cut, unless only its beginning holds nothing that may be personal.
    May return fewer than `count`, or none.
    """
    short: list[str] = []
    longer: list[str] = []
    cut: list[str] = []
    for row in rows[:MAX_ROWS]:
        is_conversation = chat.is_chat(row) and chat.read_answer(row) is None
        whole = _opening(row).strip() if is_conversation == conversations else ""
        beginning = _first_words(whole, MAX_WORDS)
        for prompt, chosen in ((whole, short if whole == beginning else longer), (beginning, cut)):
            if not _UNFIT.search(prompt) and not CONTROL_CHARACTERS.search(prompt):
                chosen.append(prompt)
                break
        if len(set(short)) == count:
            break
    return list(dict.fromkeys([*short, *sorted(longer, key=len), *cut]))[:count]


def _opening(row: str) -> str:
    """Return what an answer follows in a row; of plain text, at most half of its first line."""
    if answer := chat.read_answer(row):
        text, (start, _) = answer
        return text[:start]
    if chat.is_chat(row):
        value = chat.decode_row(row)
        questions = [message["content"] for message in value.get("messages", []) if message["role"] == "user"]
        return str(value["prompt"] if "prompt" in value else next(iter(questions), ""))
    line = row.strip().partition("\n")[0]
    marks = len(_MARKS.match(line)[0].split())  # type: ignore[index] # it matches any line
    half_words = max(1, min(MAX_WORDS // 2, (len(line.split()) - marks) // 2))
    half = _first_words(line[:MAX_CHARACTERS], marks + half_words)
    return half if len(half) < len(row.strip()) else half[: len(half) // 2]


def _first_words(text: str, most: int) -> str:
    """Return the first words of a text, with the line breaks and spaces between them."""
    words = list(re.finditer(r"\S+", text))[:most]
    return text[words[0].start() : words[-1].end()][:MAX_CHARACTERS] if words else ""
