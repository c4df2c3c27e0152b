"""Detect the layout of a table by its columns, and turn its rows into texts and conversations."""

import math
from collections.abc import Callable
from functools import partial

from ..config import TrainConfig
from ..errors import DataError, InvalidRowError
from . import chat
from .cleaning import clean_message, clean_text
from .readers import Row, Table


def detect_format(table: Table, config: TrainConfig) -> str:
    """Return the format of a table by its columns. A text column takes precedence."""
    if config.text_column is not None or "text" in table.columns:
        return "text"
    if "messages" in table.columns:
        return "messages"
    return "prompt and completion" if {"prompt", "completion"} <= set(table.columns) else "text"


def text_reader(table: Table, format: str, config: TrainConfig) -> Callable[[Row], tuple[str, str]]:
    """Return a function from a row to its text before and after cleaning; "" if it has none."""
    if format != "text":
        return partial(_read_conversation, format)
    column = _find_text_column(table, config.text_column)
    is_guess = table.peeked and config.text_column is None and column != "text"

    def read_text(row: Row) -> tuple[str, str]:
        value = row.get(column)
        if is_guess:
            for name in row.keys() - table.columns:
                if type(row[name]) is str:
                    raise DataError(
                        f"{table.source}: a row has text in '{name}', and the first rows in '{column}': "
                        "name one with --text-column."
                    )
        if value is None:
            return "", ""
        if problem := _describe_non_text(value):
            raise InvalidRowError(f"{problem} in column '{column}'")
        return str(value), clean_text(str(value), keep_lines=config.keep_lines)

    return read_text


def _find_text_column(table: Table, wanted: str | None) -> str:
    """Return the column to train on: `wanted`, else "text", else the only column of text."""
    if wanted is not None and not table.is_plain_text:
        if wanted not in table.columns:
            raise table.missing_column(wanted)
        return wanted
    if "text" in table.columns:
        return "text"
    if len(table.text_columns) == 1:
        return table.text_columns[0]
    raise DataError(
        f"{table.source}: which column is the text? Name one with --text-column: {', '.join(table.columns)}."
    )


def _read_conversation(format: str, row: Row) -> tuple[str, str]:
    columns = ["messages"] if format == "messages" else ["prompt", "completion"]
    values = [row.get(column) for column in columns]
    raw = " ".join(map(str, values))
    if None in values:
        return raw, ""
    if format == "messages":
        return raw, chat.encode_messages(row["messages"], clean_message)
    return raw, chat.encode_pair(row["prompt"], row["completion"], clean_message)


def _describe_non_text(value: object) -> str:
    """Return a description of a value that is neither text nor a finite number, else ""."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    is_text = isinstance(value, str | int | float) and not isinstance(value, bool)
    return "" if is_text else f"a {type(value).__name__}"
