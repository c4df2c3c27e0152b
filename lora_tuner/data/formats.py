"""Detect the layout of a table by its columns, and turn its rows into texts and conversations."""

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from ..config import CleanMode, TrainConfig
from ..errors import DataError, InvalidRowError
from ..text import format_names
from . import chat
from .cleaning import clean_message, clean_text
from .readers import PEEKED_ROWS, Row, Table

_TEXT_COLUMNS = ("text", "content")  # names that are taken for the text, whatever is beside them
_COLUMNS = {  # layout of conversations -> columns without which a row has no conversation
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "Alpaca": ("instruction", "output"),
}
_MOSTLY = 0.9  # share of a column's values that determine its kind
# An identifier, hash, number, URL or date without a space; or a file name. Words alone are none.
_CODE = re.compile(
    r"(?=.*[^A-Za-z])[!-~]{1,100}|\w+://\S+|[^\n]{1,250}\.[A-Za-z][A-Za-z0-9]{1,4}|[^A-Za-z\x80-\U0010ffff]+"
)
_NESTED_TEXT = re.compile(r"\[.*\]|\{.*\}", re.DOTALL)  # JSON, or lists as Python writes them
_UNREADABLE_PARTS = (
    *("image", "images", "video", "videos", "audio", "audios"),
    *("context", "documents", "functions", "chat_template_kwargs"),
)


@dataclass(frozen=True)
class Layout:
    """Layout of a table: `format` is "text", with the column that is read, or a key of `_COLUMNS`."""

    format: str
    column: str = ""  # empty for a txt file

    def __str__(self) -> str:
        if self.format != "text":
            return self.format
        return f"column '{self.column}'" if self.column else "plain text"


def detect_layout(table: Table, config: TrainConfig) -> Layout:
    """Return the layout of a table by its columns. A column of text by its name takes precedence.

    Raises:
        DataError: The columns do not tell what is to be learned.
    """
    if table.is_plain_text:
        return Layout("text")
    if config.text_column is not None:
        if config.text_column not in table.columns:
            raise table.missing_column(config.text_column)
        return Layout("text", config.text_column)
    columns = set(table.columns)
    if "text" in columns:
        return Layout("text", "text")
    if "messages" in columns:
        return Layout("messages")
    if {"prompt", "completion"} <= columns:
        return Layout("prompt and completion")
    if {"instruction", "output"} <= set(table.text_columns):
        return Layout("Alpaca")
    rows = list(itertools.islice(table.rows, PEEKED_ROWS))
    nested = [name for name in table.columns if _is_nested(table, name, rows)]
    if "conversations" in nested:
        return Layout("ShareGPT")
    return Layout("text", _find_text_column(table, nested, rows))


def _find_text_column(table: Table, nested: list[str], rows: list[Row]) -> str:
    """Return the column named content, else the only one that can hold the text."""
    question = (
        f"{table.source}: which column is the text? Name one with --text-column: {format_names(table.columns)}."
    )
    if "content" in table.columns:
        if "role" in table.columns:
            raise DataError(
                f"{question} To read conversations, put the messages of each into one list, `messages`."
            )
        return "content"
    if nested:
        raise DataError(
            f"{question} Lists, objects or bytes are in {format_names(nested)}; of such layouts these are read: messages; "
            "prompt and completion; conversations (ShareGPT); instruction and output as texts (Alpaca)."
        )
    codes = [name for name in table.text_columns if _are_codes(_strings(rows, name))]
    texts = [name for name in table.text_columns if name not in codes]
    if len(texts) == 1:
        return texts[0]
    if codes and not texts:
        example = _strings(rows, codes[0])[0]
        question += f" There are only codes in {format_names(codes)}, such as {example[:60]}."
    raise DataError(question)


def _strings(rows: list[Row], column: str) -> list[str]:
    """Return the strings of a column that are not empty, without outer spaces."""
    values = [row.get(column) for row in rows]
    return [value.strip() for value in values if isinstance(value, str) and value.strip()]


def _are_codes(texts: list[str]) -> bool:
    """Return whether texts are short, mostly unique codes: ids, hashes, file names, URLs, dates."""
    codes = sum(bool(_CODE.fullmatch(text)) for text in texts)
    return bool(texts) and codes >= _MOSTLY * len(texts) and len(set(texts)) > len(texts) / 2


def _is_nested(table: Table, column: str, rows: list[Row]) -> bool:
    """Return whether a column holds lists or objects, or strings of such, as a csv file may."""
    if column in table.nested_columns:
        return True
    texts = _strings(rows, column)
    return bool(texts) and sum(bool(_NESTED_TEXT.fullmatch(text)) for text in texts) >= _MOSTLY * len(texts)


def text_reader(table: Table, layout: Layout, config: TrainConfig) -> Callable[[Row], tuple[str, str]]:
    """Return a function from a row to its text before and after cleaning; "" if it has none."""
    if layout.format != "text":
        mode: CleanMode = "none" if config.clean == "auto" else config.clean
        return partial(_read_conversation, layout.format, partial(clean_message, mode=mode))
    column = layout.column or "text"
    is_guess = table.peeked and config.text_column is None and column not in _TEXT_COLUMNS

    def read_text(row: Row) -> tuple[str, str]:
        value = row.get(column)
        if is_guess:
            for name, other in row.items():
                if name != column and name not in table.text_columns and type(other) in (str, list, dict):
                    kind = "text" if isinstance(other, str) else "a list or object"
                    raise DataError(
                        f"{table.source}: a row has {kind} in '{name}', and the first rows in '{column}': name one with "
                        "--text-column."
                    )
        if value is None:
            return "", ""
        if problem := _describe_non_text(value):
            raise InvalidRowError(f"{problem} in column '{column}'")
        return str(value), clean_text(str(value), "full" if config.clean == "auto" else config.clean)

    return read_text


def _read_conversation(format: str, clean: chat.Clean, row: Row) -> tuple[str, str]:
    unreadable = _UNREADABLE_PARTS if format == "Alpaca" else (*_UNREADABLE_PARTS, "input", "history")
    for name in unreadable:
        if row.get(name):
            raise InvalidRowError(f"{name} beside the conversation")
    values = [row.get(column) for column in _COLUMNS[format]]
    parts = {name: row[name] for name in chat.PARTS if row.get(name)}
    raw = " ".join(map(str, [*values, *parts.values()]))
    if format == "Alpaca":
        return raw, _encode_alpaca(row, clean, parts)
    if format == "prompt and completion":
        return raw, chat.encode_pair(row.get("prompt"), row.get("completion"), clean, parts)
    return raw, chat.encode_messages(_decode_json(values[0]), clean, parts)


def _decode_json(value: object) -> object:
    """Return the list that a string holds as JSON, as in a csv file; other values as they are."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _encode_alpaca(row: Row, clean: chat.Clean, parts: Mapping[str, object]) -> str:
    """Return an Alpaca row as a prompt and its answer; with a history, as messages.

    Instruction and input are joined by a line break, as in LLaMA-Factory.
    """
    texts = [text for text in (row.get("instruction"), row.get("input")) if text not in (None, "")]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRowError("an instruction or input that is no text")
    prompt, history = "\n".join(map(str, texts)), row.get("history") or []
    if not history:
        return chat.encode_pair(prompt, row.get("output"), clean, parts)
    messages: list[object] = []
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise InvalidRowError("a history that is no list of pairs of texts")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": row.get("output")}]
    return chat.encode_messages(messages, clean, parts)


def _describe_non_text(value: object) -> str:
    """Return a description of a value that is neither text nor a finite number, else ""."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    is_text = isinstance(value, str | int | float) and not isinstance(value, bool)
    return "" if is_text else f"a {type(value).__name__}"
