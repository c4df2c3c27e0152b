"""A sample of the rows of a dataset, and excerpts of rows without personal data."""

import hashlib
import heapq
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..config import TrainConfig
from ..data import chat, preferences
from ..data.rows import Source, iter_rows
from ..text import display_name
from . import phones
from .personal_data import Finding, in_context, replace_personal_data
from .text_checks import reveal

_EXCERPT_CHARS, _READ_CHARS = 240, 8_000
_DIGITS = re.compile(r"[+(]?\d(?:[ ()./-]{0,2}\d){6,}")


@dataclass(frozen=True)
class Example:
    """Excerpt of a row, which is number `row` of those read of its source.

    `note` says more, such as its loss. `source` is the name of its dataset, if there are several.
    """

    row: int
    text: str
    note: str = ""
    source: str = ""


@dataclass(frozen=True)
class SampledRow:
    """A usable row: its number among those read of its source, its text, and that before cleaning."""

    number: int
    text: str
    raw: str
    source: str = ""

    def example(self, text: str, note: str = "") -> Example:
        return Example(self.number, text, note, self.source)


def read_sample(config: TrainConfig, limit: int) -> tuple[list[SampledRow], bool]:
    """Return usable rows without duplicates, in the order of the data, and whether others were left out.

    They are those that a `max_rows` of this size takes.
    """
    limit = min(limit, config.max_rows or limit)
    digests: set[bytes] = set()

    def unique_rows() -> Iterator[tuple[bytes, int, SampledRow]]:
        names = config.dataset_names
        for name in names:
            source, shown = Source(name), display_name(name) if len(names) > 1 else ""
            for row in iter_rows(config, source):
                if row.digest not in digests:
                    digests.add(row.digest)
                    sampled = SampledRow(source.counts.read, row.text, row.raw, shown)
                    yield hashlib.sha256(row.digest).digest(), len(digests), sampled

    chosen = heapq.nsmallest(limit, unique_rows())
    usable = min(len(digests), config.max_rows or len(digests))
    return [row for _, _, row in sorted(chosen, key=lambda item: item[1])], len(chosen) < usable


def named_texts(text: str) -> list[tuple[str, str]]:
    """Return the texts of a row with the names of their fields; of a plain text, itself."""
    text = chat.plain_text(text)
    if not chat.is_chat(text):
        return [("", text)]
    return list(iter_named_texts(chat.decode_row(text)))


def iter_named_texts(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield all texts in a nested value, each with the name of its field."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from iter_named_texts(item, str(key))
    elif isinstance(value, list):
        for item in value:
            yield from iter_named_texts(item, name)


def readable(text: str) -> str:
    """Return a row as a person reads it: of a conversation roles and contents, of a preference its answers."""
    if preferences.is_preference(text):
        answers = [f"[{name}] {answer}" for name, answer in preferences.answer_texts(text).items()]
        return " ".join([preferences.prompt_of(text), *answers])
    text = chat.plain_text(text)
    if not chat.is_chat(text):
        return text
    value = chat.decode_row(text)
    if "messages" not in value:
        return f"{value['prompt']} → {value['completion']}"
    return " ".join(f"[{message['role']}] {message['content']}" for message in value["messages"])


@dataclass(frozen=True)
class Excerpts:
    """Excerpts of rows in which personal data is replaced. `region`: see `phones`."""

    region: str | None = None

    def mask(self, text: str) -> str:
        """Replace personal data in a text; also what may be a phone number, where these are not found."""
        replaced, _ = replace_personal_data(text, self.region)
        return replaced if phones.finds_phones() else _DIGITS.sub("[NUMBER]", replaced)

    def excerpt(self, text: str) -> str:
        """Return the beginning of a row, masked before it is cut, so that nothing is cut into two."""
        masked = " ".join(reveal(self.mask(readable(text)[:_READ_CHARS])).split())
        return masked if len(masked) <= _EXCERPT_CHARS else f"{masked[:_EXCERPT_CHARS].rstrip()} …"

    def in_context(self, text: str, findings: list[Finding], shown: Finding) -> str:
        """Return personal data, masked, with the text around it."""
        context = in_context(text, findings, shown)
        return context if phones.finds_phones() else _DIGITS.sub("[NUMBER]", context)

    def example(self, row: SampledRow, note: str = "") -> Example:
        return row.example(self.excerpt(row.text), note)


def spread(rows: Sequence[SampledRow], limit: int) -> list[SampledRow]:
    """Return some of the rows, by a hash of their text."""
    return heapq.nsmallest(limit, rows, key=lambda row: hashlib.sha256(row.text.encode()).digest())
