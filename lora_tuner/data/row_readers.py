"""Turn the rows of a table into texts and conversations, by its layout."""

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ..config import MAX_LABEL_CHARS, CleanMode, TrainConfig
from ..errors import DataError, InvalidRowError
from . import chat, preferences
from .cleaning import clean_message, clean_text
from .readers import Row, Table
from .row_template import RowTemplate

TEXT_COLUMNS = ("text", "content")  # names that are taken for the text, whatever is beside them
INPUTS = ("input", "context")  # Alpaca's input, under the name of Dolly too
ROW_WEIGHTS = ("weight", "train")  # 1 or true beside a conversation changes nothing
UNREADABLE = (
    *("image", "images", "video", "videos", "audio", "audios"),
    *("context", "documents", "chat_template_kwargs", "input", "history"),
)
PREFERENCES = "preferences"  # a format, as it is recorded and shown
_WHOLE = re.compile(r"(?<=\d)(\.0+|[T ]00:00:00(\.0+)?)")  # end of a number or a day, as some tools write it
# Numpy has no commas in arrays, and writes one within an object as `array([...], dtype=object)`.
_OF_ARRAY = re.compile(
    r"""(?P<text>'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+")"""
    r"|(?<=[\]}])(?P<between>(?:,\s*dtype=object\))?\s+(?:array\()?)(?=[\[{])|\barray\(|,\s*dtype=object\)"
)


@dataclass(frozen=True)
class Layout:
    """Layout of a table.

    Attributes:
        format: "text", "template", `PREFERENCES`, or one of conversations: a value of `formats.FORMATS`.
        column: Column of the text, of the list of messages, or of the prompt; empty for a txt file,
            and if the answers of preferences begin with it.
        answer: Column of the answer beside the prompt; of preferences the better one.
        rejected: Column of the worse answer.
        label: Column that says whether the answer is desired.
        unread: Columns with text that may belong to a conversation and are not read.
        other: Value of the setting `format` that reads the columns in `unread`, if one does.
        template: The template that makes the text, for the format "template".
        has_labels: The answer in the template is a label.
    """

    format: str
    column: str = ""
    answer: str = ""
    rejected: str = ""
    label: str = ""
    unread: tuple[str, ...] = ()
    other: str = ""
    template: RowTemplate | None = None
    has_labels: bool = False

    def __str__(self) -> str:
        if self.template is not None and self.has_labels:
            texts = [name for name in self.template.columns if name != self.template.answer]
            return f"label '{self.template.answer}' of {', '.join(map(repr, texts))}"
        if self.template is not None:
            answer = f", of which '{self.template.answer}' alone is learned" if self.template.answer else ""
            return f"template of {', '.join(map(repr, self.template.columns))}{answer}"
        if self.format == "text":
            return f"column '{self.column}'" if self.column else "plain text"
        if self.format == PREFERENCES:
            names = filter(None, (self.column, self.answer, self.rejected, self.label))
            return f"{self.format} in {', '.join(map(repr, names))}"
        usual = ("messages", "conversations", "promptcompletion", "instructionoutput")
        if self.column + self.answer in usual:
            return self.format
        answer = f" and '{self.answer}'" if self.answer else ""
        return f"{self.format} in '{self.column}'{answer}"


def text_reader(
    table: Table, layout: Layout, config: TrainConfig, mode: CleanMode
) -> Callable[[Row], tuple[str, str]]:
    """Return a function from a row to its text before and after cleaning; "" if it has none."""
    if layout.template is not None:
        return partial(_fill_template, table, layout, layout.template, config, mode)
    if layout.format == PREFERENCES:
        return partial(_read_preference, layout, partial(clean_message, mode=mode))
    if layout.format != "text":
        return partial(_read_conversation, layout, partial(clean_message, mode=mode))
    column = layout.column or "text"
    is_guess = (
        table.peeked and config.text_column is None and config.template is None and column not in TEXT_COLUMNS
    )

    def read_text(row: Row) -> tuple[str, str]:
        if is_guess:
            for name, other in row.items():
                if name != column and name not in table.text_columns and type(other) in (str, list, dict):
                    kind = "text" if isinstance(other, str) else "a list or object"
                    raise DataError(
                        f"{table.source}: a row has {kind} in '{name}', and the first rows in "
                        f"'{column}': name one with --text-column."
                    )
        text = _read_text(row, column)
        return text, clean_text(text, mode) if text else ""

    return read_text


def _fill_template(
    table: Table, layout: Layout, template: RowTemplate, config: TrainConfig, mode: CleanMode, row: Row
) -> tuple[str, str]:
    """Return the text of a template before and after its values are cleaned; "" without a value, or
    without a text beside the label."""
    names = [name for name in template.columns if not (layout.has_labels and name == template.answer)]
    values = {name: read_value(table, row, name) for name in names}
    cleaned = {name: clean_text(value, mode) if value else "" for name, value in values.items()}
    if not any(cleaned.values()):
        return "", ""
    if layout.has_labels:
        values[template.answer] = cleaned[template.answer] = _read_label(table, row, template.answer, config)
    text = template.fill(cleaned)
    if template.answer:
        if not cleaned[template.answer]:
            raise InvalidRowError(f"nothing in the answer column '{template.answer}'")
        text = chat.encode_answer(text, template.answer_span(cleaned), keep=layout.has_labels)
    return template.fill(values), text


def _read_label(table: Table, row: Row, column: str, config: TrainConfig) -> str:
    """Return the name of a row's label: that of --label-names, else of the class, else the value."""
    names, value = config.label_name_of, row.get(column)
    plain = value_name(value, [])
    label = names.get(plain) or names.get(f"{plain}.0") or value_name(value, table.label_names.get(column, []))
    label = names.get(label, label)
    if not label:
        raise InvalidRowError(f"no label in '{column}'")
    if isinstance(value, list | dict) or len(label) > MAX_LABEL_CHARS:
        raise InvalidRowError(f"a label of over {MAX_LABEL_CHARS} characters, or a list, in '{column}'")
    if config.labels and label not in config.labels:
        raise InvalidRowError("a label that --labels does not name", repr(label))
    return label


def read_value(table: Table, row: Row, column: str) -> str:
    """Return the text of a column; of class labels the name, "" for none."""
    value = row.get(column)
    if column in table.label_names and isinstance(value, int):
        names = table.label_names[column]
        return names[value] if 0 <= value < len(names) else ""
    return _read_text(row, column)


def value_name(value: object, label_names: Sequence[str]) -> str:
    """Return the name of a group or label, "" for no value: the same one from a file of any type."""
    if label_names and isinstance(value, int):
        value = label_names[value] if 0 <= value < len(label_names) else None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | dict):
        return json.dumps(chat.json_value(value), ensure_ascii=False) if value else ""
    text = " ".join(str(value).split())
    whole = _WHOLE.search(text)
    if whole and whole.end() == len(text):
        return text[: whole.start()]
    return text.lower() if text.lower() in ("true", "false") else text


def _read_text(row: Row, column: str) -> str:
    """Return the text or number of a column, "" for null."""
    value = row.get(column)
    if value is None:
        return ""
    is_text = isinstance(value, str | int | float) and not isinstance(value, bool)
    if not is_text or (isinstance(value, float) and not math.isfinite(value)):
        kind = str(value) if isinstance(value, float) else f"a {type(value).__name__}"
        raise InvalidRowError(f"{kind} in column '{column}'")
    return str(value)


def _read_preference(layout: Layout, clean: chat.Clean, row: Row) -> tuple[str, str]:
    parts = _read_parts(layout, row)
    prompt = _read_prompt(layout, row)
    if isinstance(prompt, dict):
        parts |= {name: prompt[name] for name in chat.PARTS if prompt.get(name)}
        if not isinstance(prompt.get("messages"), list):
            raise InvalidRowError(f"{layout.column} without a list of messages")
        prompt = prompt["messages"]
    columns = filter(None, (layout.answer, layout.rejected))
    answers = {name: _one_message(_read_side(row, name)) for name in columns}
    raw = " ".join(str(value) for value in (prompt, *answers.values(), *parts.values()) if value is not None)
    if layout.label:
        return raw, preferences.encode_labelled(prompt, answers, row.get(layout.label), clean, parts)
    return raw, preferences.encode_pair(prompt, answers, clean, parts)


def _read_prompt(layout: Layout, row: Row) -> object:
    """Return the prompt of a preference: a text, with Alpaca's input below it, a list of messages or an
    object of OpenAI; None without a column of it."""
    if not layout.column:
        return None
    prompt = _one_message(_read_side(row, layout.column))
    if layout.answer == "preferred_output":  # OpenAI's input is an object, in a csv file as text
        prompt = _decode_json(prompt)
    inputs = [name for name in _joined_inputs(layout) if row.get(name) not in (None, "")]
    if inputs and isinstance(prompt, str):
        return "\n".join([prompt, *(_read_text(row, name) for name in inputs)])
    return "" if prompt is None else prompt


def _joined_inputs(layout: Layout) -> tuple[str, ...]:
    """Return the columns that are a part of the prompt below an instruction."""
    return INPUTS if layout.format == PREFERENCES and layout.column == "instruction" else ()


def _one_message(value: object) -> object:
    """Return a message alone as a list; other values as they are."""
    return [value] if isinstance(value, dict) and chat.are_messages([value]) else value


def _read_parts(layout: Layout, row: Row) -> dict[str, object]:
    """Return what belongs to a conversation beside it.

    Raises:
        InvalidRowError: A column has a part of it that cannot be read, or a weight.
    """
    for name in unreadable_columns(layout):
        if _decode_json(row.get(name)):
            raise InvalidRowError(f"{name} beside the conversation")
    for name in ROW_WEIGHTS:
        _check_weight(name, row.get(name))
    return {name: row[name] for name in chat.PARTS if row.get(name)}


def _read_conversation(layout: Layout, clean: chat.Clean, row: Row) -> tuple[str, str]:
    parts = _read_parts(layout, row)
    values = [row.get(column) for column in (layout.column, layout.answer) if column]
    raw = " ".join(map(str, [*values, *parts.values()]))
    if layout.format == "Alpaca":
        return raw, _encode_alpaca(layout, row, clean, parts)
    if layout.answer:
        prompt, completion = (_read_side(row, column) for column in (layout.column, layout.answer))
        return raw, chat.encode_pair(prompt, completion, clean, parts, (layout.column, layout.answer))
    return raw, chat.encode_messages(decode_messages(values[0]), clean, parts)


def unreadable_columns(layout: Layout) -> list[str]:
    """Return the columns that may hold a part of a conversation that is not read."""
    read = {layout.column, *((*INPUTS, "history") if layout.format == "Alpaca" else _joined_inputs(layout))}
    return [name for name in UNREADABLE if name not in read]


def _check_weight(name: str, value: object) -> None:
    """Raise InvalidRowError if a row is not to be learned, or only in part."""
    if value in (None, ""):
        return
    text = str(value).lower()
    if text in ("0", "0.0", "false"):
        raise InvalidRowError(
            f"{name} {value}, which leaves nothing to learn: choose rows with --where {name}=..."
        )
    if text not in ("1", "1.0", "true"):
        raise InvalidRowError(f"{name} other than 0 and 1 beside the conversation")


def _read_side(row: Row, column: str) -> object:
    """Return a prompt or a completion: a text, or a list of messages, also as JSON in a string."""
    value = row.get(column)
    messages = decode_messages(value)
    if isinstance(messages, list):
        return messages if not isinstance(value, str) or chat.are_messages(messages) else value
    return value if value is None or isinstance(value, dict) else _read_text(row, column)


def decode_messages(value: object) -> object:
    """Return a list of messages from a string, as in a csv file, or from an object of lists, as
    `datasets` writes a sequence of objects; other values as they are."""
    value = _decode_json(value)
    if not isinstance(value, dict) or not chat.are_messages([value]):
        return value
    lists = [field for field in value.values() if isinstance(field, list)]
    if len(lists) < len(value) or len({len(field) for field in lists}) != 1:
        return value
    return [dict(zip(value, fields, strict=True)) for fields in zip(*lists, strict=True)]


def _decode_json(value: object) -> object:
    """Return the list or object that a string holds as JSON, or as Python or numpy write it, as in
    the csv files of pandas and `datasets`; other values as they are."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    python = _OF_ARRAY.sub(lambda match: match["text"] or (", " if match["between"] else ""), value.strip())
    try:
        return ast.literal_eval(python)  # evaluates literals alone
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return value


def _encode_alpaca(layout: Layout, row: Row, clean: chat.Clean, parts: Mapping[str, object]) -> str:
    """Return an Alpaca row as a prompt and its answer; with a history, as messages.

    Instruction and input are joined by a line break, as in LLaMA-Factory.
    """
    inputs = [name for name in INPUTS if row.get(name) not in (None, "")]
    if len(inputs) > 1:
        raise InvalidRowError("input beside context")
    prompt = "\n".join(filter(None, (_read_text(row, name) for name in ("instruction", *inputs))))
    history, answer = _decode_json(row.get("history")) or [], _read_text(row, layout.answer)
    if not history:
        return chat.encode_pair(prompt, answer, clean, parts, (layout.column, layout.answer))
    messages: list[object] = []
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise InvalidRowError("a history that is no list of pairs of texts")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return chat.encode_messages(messages, clean, parts)
