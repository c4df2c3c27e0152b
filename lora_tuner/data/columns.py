"""Match names of columns, and describe the columns of a table in an error."""

import re
from collections.abc import Collection, Mapping, Sequence

from ..text import format_names, shorten

_MOSTLY = 0.9  # share of a column's values that determine its kind
# An identifier, hash, number, URL or date without a space; or a file name. Words alone are none.
_CODE = re.compile(
    r"(?=.*[^A-Za-z])[!-~]{1,100}|\w+://\S+|[^\n]{1,250}\.[A-Za-z][A-Za-z0-9]{1,4}|[^A-Za-z\x80-\U0010ffff]+"
)
_NUMBER = re.compile(r"[-+]?[\d.,' \xa0\u202f]*\d[\d.,]*(?:[eE][-+]?\d+)?\s?[%\u20ac$\u00a3]?")
_NESTED_TEXT = re.compile(r"\[.*\]|\{.*\}", re.DOTALL)  # JSON, or lists as Python writes them
_LABEL_CHARS, _LABEL_SHARE = 40, 0.2  # longest label, and the most of the values that differ
_SHOWN_COLUMNS = 20
_CLEARLY_LONGER = 2.0  # times the length of any other column


def match_column(name: str, columns: Collection[str]) -> str | None:
    """Return the column of a name: itself, else the only one that differs by case or spaces alone.

    None if there is none, or if several columns differ so.
    """
    same = similar_columns(name, columns)
    if name in columns:
        return name
    return same[0] if len(same) == 1 else None


def similar_columns(name: str, columns: Collection[str]) -> list[str]:
    """Return the columns whose names differ from one by case or spaces alone."""
    folded = fold_name(name)
    return [column for column in columns if fold_name(column) == folded]


def is_same_name(one: str, other: str) -> bool:
    """Return whether two names differ by case or spaces alone, if at all."""
    return fold_name(one) == fold_name(other)


def fold_name(name: str) -> str:
    """Return a name without case and spaces."""
    return "".join(name.split()).casefold()


def describe_columns(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    """Describe columns: name, kind of the values, and their average length."""
    described: list[str] = []
    for column in columns[:_SHOWN_COLUMNS]:
        length = round(average_length(rows, column))
        unit = "" if described else f" character{'s' * (length != 1)} on average"
        size = f", {length:,}{unit}" if length else ""
        described.append(f"'{column[:100]}' ({_kind(rows, column)}{size})")
    rest = [*columns[_SHOWN_COLUMNS:]]
    return format_names([*described, *rest])


def describe_for_text(
    columns: Sequence[str], text_columns: Sequence[str], rows: Sequence[Mapping[str, object]]
) -> str:
    """Describe columns, and say which looks like text; without rows, list them."""
    if not rows:
        return f"{format_names(columns)}."
    likely = likely_text(text_columns, rows)
    hint = f" '{shorten(likely, 100)}' looks like text." if likely else ""
    return f"{describe_columns(columns, rows)}.{hint}"


def likely_text(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    """Return the column that looks like text: of texts, and far longer than any other; else ""."""
    columns = columns[:_SHOWN_COLUMNS]
    lengths = {column: average_length(rows, column) for column in columns if _kind(rows, column) == "text"}
    longest = max(lengths, key=lengths.__getitem__, default="")
    others = [length for column, length in lengths.items() if column != longest]
    return longest if longest and lengths[longest] >= _CLEARLY_LONGER * max(others, default=0) else ""


def average_length(rows: Sequence[Mapping[str, object]], column: str) -> float:
    """Return the average length in characters of the values that are texts or numbers."""
    values = [row.get(column) for row in rows]
    lengths = [len(str(value)) for value in values if isinstance(value, str | int | float) and value != ""]
    return sum(lengths) / max(len(lengths), 1)


def _kind(rows: Sequence[Mapping[str, object]], column: str) -> str:
    values = [value for row in rows if (value := row.get(column)) not in (None, "")]
    texts = strings(rows, column)
    if not values:
        return "empty"
    if is_nested(texts) or any(isinstance(value, list | dict | bytes) for value in values):
        return "lists, objects or bytes"
    if all(isinstance(value, bool) for value in values):
        return "true or false"
    if all(isinstance(value, int | float) or _NUMBER.fullmatch(str(value).strip()) for value in values):
        return "numbers"
    if are_codes(texts):
        return "codes"
    is_short = max(map(len, texts), default=0) <= _LABEL_CHARS
    return "labels" if is_short and len({*texts}) <= max(1, _LABEL_SHARE * len(texts)) else "text"


def strings(rows: Sequence[Mapping[str, object]], column: str) -> list[str]:
    """Return the strings of a column that are not empty, without outer spaces."""
    values = [row.get(column) for row in rows]
    return [value.strip() for value in values if isinstance(value, str) and value.strip()]


def are_codes(texts: list[str]) -> bool:
    """Return whether texts are short, mostly unique codes: ids, hashes, file names, URLs, dates."""
    codes = sum(bool(_CODE.fullmatch(text)) for text in texts)
    return bool(texts) and codes >= _MOSTLY * len(texts) and len(set(texts)) > len(texts) / 2


def is_nested(texts: list[str]) -> bool:
    """Return whether texts are lists or objects, as a csv file may have them."""
    nested = sum(bool(_NESTED_TEXT.fullmatch(text)) for text in texts)
    return bool(texts) and nested >= _MOSTLY * len(texts)
