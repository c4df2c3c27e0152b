"""Figures of the texts of rows: languages, personal data, and trouble with their encoding."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..data import chat
from ..errors import EventHandler, Progress
from ..text import format_rows
from . import phones, text_checks
from .personal_data import KINDS, find_personal_data
from .sample import Example, Excerpts, SampledRow, named_texts, readable
from .text_checks import TROUBLES, Trouble

_EXAMPLES = 5
_BATCH = 1_000
_CONTEXT_CHARS, _READ_CHARS = 40, 4_000


@dataclass(frozen=True)
class Language:
    code: str
    name: str
    rows: int
    share: float
    first_row: int


@dataclass(frozen=True)
class PersonalData:
    """Personal data of a kind: how many rows have it, how often, masked examples, kinds of keys."""

    kind: str
    rows: int
    count: int
    examples: list[Example]
    details: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodingTrouble:
    """Rows with a kind of trouble. `removed`: training cleans these texts of it."""

    kind: str
    advice: str
    rows: int
    removed: bool
    examples: list[Example]


@dataclass(frozen=True)
class TextFigures:
    """`languages` is None without its library; `personal_rows` have personal data of any kind."""

    languages: list[Language] | None
    personal_data: list[PersonalData]
    personal_rows: int
    encoding: list[EncodingTrouble]


class _Tally:
    """Rows of a kind, and examples of different texts."""

    def __init__(self) -> None:
        self.rows = self.count = 0
        self.examples: list[Example] = []
        self.details: Counter[str] = Counter()

    def add_example(self, row: SampledRow, text: str, note: str = "") -> None:
        is_new = note not in [example.note for example in self.examples] or not note
        if len(self.examples) < _EXAMPLES and is_new:
            self.examples.append(row.example(" ".join(text_checks.reveal(text).split()), note))


def check_texts(
    rows: Sequence[SampledRow], clean: str, excerpts: Excerpts, hints: list[str], notify: EventHandler
) -> TextFigures:
    """Return the figures of the texts of rows."""
    languages: dict[str, list[SampledRow]] = {}
    kinds = {kind: _Tally() for kind in KINDS}
    tallies = {trouble.name: _Tally() for trouble in TROUBLES}
    composed_rows = personal_rows = 0
    has_languages = text_checks.language_guesser() is not None
    for number, row in enumerate(rows, 1):
        if has_languages:
            languages.setdefault(text_checks.detect_language(readable(row.text)), []).append(row)
        personal_rows += _add_personal_data(kinds, row, excerpts)
        # Before cleaning; conversations as they are learned, as only their parts are texts.
        raw = readable(row.text) if chat.is_chat(chat.plain_text(row.text)) else row.raw
        composed_rows += text_checks.has_composed(raw)
        for trouble in TROUBLES:
            if place := trouble.find(raw):
                _add_trouble(tallies[trouble.name], row, raw, trouble, place, excerpts)
        if number % _BATCH == 0 or number == len(rows):
            notify(Progress("checking texts", number, len(rows)))
    if not has_languages:
        hints.append("Languages are not told: `pip install py3langid` adds them.")
    if not phones.finds_phones():
        hints.append("Phone numbers are not searched: `pip install phonenumbers` adds them.")
    if not text_checks.finds_mojibake():
        hints.append("Mojibake is not searched: `pip install ftfy` adds it.")
    return TextFigures(
        _describe_languages(languages, len(rows)) if has_languages else None,
        [
            PersonalData(kind, tally.rows, tally.count, tally.examples, dict(tally.details.most_common()))
            for kind, tally in kinds.items()
        ],
        personal_rows,
        [
            _describe_trouble(trouble, tallies[trouble.name], clean, composed_rows)
            for trouble in TROUBLES
            if tallies[trouble.name].rows
        ],
    )


def _describe_trouble(trouble: Trouble, tally: _Tally, clean: str, composed_rows: int) -> EncodingTrouble:
    kind, advice = trouble.name, trouble.advice
    if trouble is text_checks.DECOMPOSED and composed_rows:
        kind, advice = "mixed NFC and NFD", f"{advice} In {format_rows(composed_rows)} they are one character."
    return EncodingTrouble(kind, advice, tally.rows, trouble.removed and clean != "none", tally.examples)


def _describe_languages(languages: dict[str, list[SampledRow]], total: int) -> list[Language]:
    by_rows = sorted(languages.items(), key=lambda item: -len(item[1]))
    names = text_checks.LANGUAGES
    return [
        Language(code, names.get(code, code), len(rows), len(rows) / total, rows[0].number)
        for code, rows in by_rows
    ]


def _add_personal_data(kinds: dict[str, _Tally], row: SampledRow, excerpts: Excerpts) -> bool:
    """Count the personal data of a row; return whether it has any."""
    seen = set()
    for name, text in named_texts(row.text):
        findings = find_personal_data(text, excerpts.region, name)
        for found in findings:
            tally = kinds[found.kind]
            tally.rows += found.kind not in seen
            tally.count += 1
            seen.add(found.kind)
            if found.detail:
                tally.details[found.detail] += 1
            if len(tally.examples) < _EXAMPLES:
                tally.add_example(row, excerpts.in_context(text, findings, found), found.masked)
    return bool(seen)


def _add_trouble(
    tally: _Tally, row: SampledRow, text: str, trouble: Trouble, place: tuple[int, int], excerpts: Excerpts
) -> None:
    """Count a row, with the text around the first place, unless that is within personal data."""
    tally.rows += 1
    if len(tally.examples) < _EXAMPLES:
        masked = excerpts.mask(text[max(place[0] - _READ_CHARS, 0) : place[1] + _READ_CHARS])
        if shown := trouble.find(masked):
            begin, end = max(shown[0] - _CONTEXT_CHARS, 0), shown[0] + _CONTEXT_CHARS
            tally.add_example(row, masked[begin:end])
