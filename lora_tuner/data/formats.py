"""Detect the layout of a table by its columns, or find the columns of the one that `format` names."""

import itertools
import shlex
from collections.abc import Sequence
from dataclasses import replace

from ..config import TrainConfig, is_conversation
from ..errors import DataError
from ..text import format_names
from . import chat
from .columns import are_codes, describe_for_text, fold_name, is_nested, is_same_name, strings
from .folders import has_columns
from .preferences import LABEL_COLUMNS, PAIR_COLUMNS
from .readers import PEEKED_ROWS, Row, Table
from .row_readers import (
    INPUTS,
    PREFERENCES,
    ROW_WEIGHTS,
    TEXT_COLUMNS,
    UNREADABLE,
    Layout,
    decode_messages,
    unreadable_columns,
)
from .row_template import RowTemplate, parse_template

FORMATS = {  # value of the setting `format` -> as it is recorded and shown
    "text": "text",
    "messages": "messages",
    "sharegpt": "ShareGPT",
    "alpaca": "Alpaca",
    "prompt-completion": "prompt and completion",
}
_LISTS = ("messages", "conversations", "conversation", "dialogue", "dialog", "dialogues", "dialogs", "chat")
_PROMPTS = ("prompt", "instruction", "question", "query", "input")
_ANSWERS = ("completion", "response", "answer", "output")
_NEEDS = {  # layout of conversations -> the columns that it needs, for an error
    "messages": "a list of messages, in a column such as messages",
    "ShareGPT": "a list of messages, in a column such as conversations",
    "Alpaca": "instruction, and output or response",
    "prompt and completion": f"one of {', '.join(_PROMPTS)}, and one of {', '.join(_ANSWERS)}",
}
_NEEDS_PAIRS = "chosen and rejected, or OpenAI's preferred_output and non_preferred_output"
_NEEDS_LABELS = f"prompt, completion and {' or '.join(LABEL_COLUMNS)}"
_SETTINGS = ("parallel_tool_calls", "tool_choice", "function_call")  # of generation, beside messages


def have_columns(config: TrainConfig) -> bool:
    """Return whether a dataset of the run has columns: settings that name some are not for plain
    text beside it. Price: all its files are listed."""
    return any(has_columns(name, config) for name in config.dataset_names)


def detect_layout(table: Table, config: TrainConfig, any_columns: bool) -> Layout:
    """Return the layout of a table. A column of text by its name takes precedence.

    Args:
        any_columns: As `have_columns` returns it.

    Raises:
        DataError: The columns do not tell what is to be learned, or are not those of the format.
    """
    if config.learns_preferences:
        return _find_preferences(table, config)
    if config.label_column is not None:
        return _label_layout(table, config, config.label_column)
    if config.template is not None:
        try:
            template = parse_template(table, config.template, config.answer_column)
            return Layout("template", template=template)
        except DataError:
            if not (table.is_plain_text and any_columns):
                raise
    chosen = FORMATS.get(config.format, "")
    if table.is_plain_text:
        if chosen not in ("", "text"):
            raise DataError(f"{table.source} is plain text: --format {config.format} needs {_NEEDS[chosen]}.")
        return Layout("text")
    if config.text_column is not None:
        return Layout("text", table.find_column(config.text_column))
    if "text" in table.columns and chosen in ("", "text"):
        beside = _detect_by_names(table) if not chosen else None
        if beside is None:
            return Layout("text", "text")
        unread = (beside.column, beside.answer)
        return Layout("text", "text", unread=tuple(filter(None, unread)), other=_option(beside))
    rows = list(itertools.islice(table.rows, PEEKED_ROWS))
    if chosen not in ("", "text"):
        found = _find_columns(table, chosen, rows)
        if found is None:
            raise DataError(
                f"{table.source}: --format {config.format} needs {_NEEDS[chosen]}: its columns are "
                f"{format_names(table.columns)}."
            )
        return _with_unread(table, found, rows)
    conversation = (_detect_by_names(table) or _detect_by_values(table, rows)) if not chosen else None
    if conversation is not None:
        _refuse_labels(table, config, rows)
        return _with_unread(table, conversation, rows)
    if not chosen:
        _refuse_preferences(table)
    return Layout("text", _find_text_column(table, rows, asks_format=not chosen))


def _label_layout(table: Table, config: TrainConfig, label_column: str) -> Layout:
    """Return the layout of texts with labels: those in --template, else a text column and below it the label."""
    if table.is_plain_text:
        raise DataError(f"{table.source} is plain text without columns: --label-column needs a table.")
    column = table.find_column(label_column, ", which --label-column names")
    if config.template is not None:
        pieces = parse_template(table, config.template, None).pieces
        columns = [name for _, name in pieces if name]
        if pieces[-1] != ("", column) or columns.count(column) > 1 or len(columns) < 2 or not pieces[-2][0]:
            raise DataError(
                f"--template must have a column of text, and end with some words and {{{column}}}, the label, which "
                "is in it only once."
            )
    else:
        others = [name for name in table.columns if name != column]
        rest = replace(
            table, columns=others, text_columns=[name for name in table.text_columns if name in others]
        )
        text_config = config.model_copy(update={"label_column": None, "format": "text"})
        text_column = detect_layout(rest, text_config, any_columns=True).column
        if any(mark in text_column + column for mark in "{}"):
            raise DataError(f"{table.source}: the name of a column has a brace: rename it, or use --template.")
        pieces = (("", text_column), (f"\n\n{label_column[:1].upper()}{label_column[1:]}: ", ""), ("", column))
    return Layout("template", template=RowTemplate(pieces, column), has_labels=True)


def common_format(source: str, tables: Sequence[Table], layouts: Sequence[Layout]) -> str:
    """Return the format of all tables. Plain text may lie beside rows of a template.

    Raises:
        DataError: They have several; it names a file of each of two.
    """
    formats = list(dict.fromkeys(layout.format for layout in layouts))
    if not any(map(is_conversation, formats)):
        return " + ".join(formats)
    for table, layout in zip(tables, layouts, strict=True):
        if layout.format != formats[0]:
            raise DataError(
                f"{source} has files of two formats: {tables[0].source} has {layouts[0]}, and "
                f"{table.source} has {layout}: use files of one format, or choose one with "
                "--format."
            )
    return formats[0]


def describe_choice(layouts: Sequence[Layout]) -> str:
    """Describe what is read of rows that have more than a text, and what is not; else ""."""
    unread = format_names(list(dict.fromkeys(name for layout in layouts for name in layout.unread)))
    names = ", ".join(dict.fromkeys(map(str, layouts)))
    rest = f" Not read: {unread}." if unread else ""
    if layouts[0].format == PREFERENCES:
        return f"Reading {names}: the answers to a prompt are compared, and the prompt is not learned.{rest}"
    if is_conversation(layouts[0].format):
        return (
            f"Reading conversations ({names}): only the answers are trained on.{rest} "
            "Use --text-column to train on plain text."
        )
    other = next((layout.other for layout in layouts if layout.other), "")
    return f"Reading column 'text', and not {unread}: --format {other} reads these." if other else ""


def _detect_by_names(table: Table) -> Layout | None:
    """Return the layout of conversations that the names of the columns tell, if there is one."""
    columns, texts = set(table.columns), set(table.text_columns)
    values = texts | columns.difference(table.nested_columns)  # also numbers
    if "messages" in columns:
        return Layout("messages", "messages")
    if {"prompt", "completion"} <= columns:
        return Layout("prompt and completion", "prompt", "completion")
    if _preferences(table):
        return None
    if "instruction" in texts and "output" in values:
        return Layout("Alpaca", "instruction", "output")
    if "instruction" in texts and "response" in values and columns.intersection(INPUTS):
        return Layout("Alpaca", "instruction", "response")
    return None


def _detect_by_values(table: Table, rows: list[Row]) -> Layout | None:
    """Return the layout of conversations that the columns tell without doubt, if there is one."""
    if _preferences(table):
        return None
    lists = _message_columns(table, rows)
    if "conversations" in _nested_columns(table, rows):
        return Layout("ShareGPT", "conversations")
    if len(lists) == 1 and lists[0] in _LISTS:
        return Layout(_format_of(rows, lists[0]), lists[0])
    pair = _find_columns(table, "prompt and completion", rows)
    return pair if pair is not None and _is_certain(table, pair, rows) else None


def _is_certain(table: Table, pair: Layout, rows: list[Row]) -> bool:
    """Return whether two columns are texts, and no other column has a part of the conversation."""
    if pair.column not in table.text_columns or are_codes(strings(rows, pair.column)):
        return False
    is_exact = pair.column in _PROMPTS and pair.answer in _ANSWERS
    if not is_exact and ("content" in table.columns or are_codes(strings(rows, pair.answer))):
        return False
    answers = [row.get(pair.answer) for row in rows]
    if not is_exact and not all(isinstance(answer, str | None) for answer in answers):
        return False
    if any(isinstance(answer, bool) or not isinstance(answer, str | int | float | None) for answer in answers):
        return False
    return not _with_unread(table, pair, rows).unread and not _has_unreadable(pair, rows)


def _has_unreadable(layout: Layout, rows: list[Row]) -> bool:
    """Return whether columns beside a conversation have values that refuse a row."""
    return any(decode_messages(row.get(name)) for row in rows for name in unreadable_columns(layout))


def _find_columns(table: Table, format: str, rows: list[Row]) -> Layout | None:
    """Return the columns that hold the parts of a format, or None if they are missing or ambiguous."""
    if format in ("messages", "ShareGPT"):
        names = [name for name in _LISTS if name in table.columns]
        if format == "ShareGPT" and "conversations" in names:
            return Layout(format, "conversations")
        if names[:1] == ["messages"] and format == "messages":
            return Layout(format, "messages")
        lists = _message_columns(table, rows)
        return Layout(format, lists[0]) if len(lists) == 1 else None
    if format == "Alpaca":
        answer = next((name for name in ("output", "response") if name in table.columns), "")
        return Layout(format, "instruction", answer) if answer and "instruction" in table.columns else None
    if {"prompt", "completion"} <= set(table.columns):
        return Layout(format, "prompt", "completion")
    prompts, answers = (
        [column for column in table.columns if fold_name(column) in names] for names in (_PROMPTS, _ANSWERS)
    )
    return Layout(format, prompts[0], answers[0]) if len(prompts) == len(answers) == 1 else None


def _message_columns(table: Table, rows: list[Row]) -> list[str]:
    """Return the columns whose first values are lists of messages."""
    found = []
    for name in _nested_columns(table, rows):
        values = [value for row in rows if (value := decode_messages(row.get(name)))]
        if values and all(isinstance(value, list) and chat.are_messages(value) for value in values):
            found.append(name)
    return found


def _format_of(rows: list[Row], column: str) -> str:
    first = next(value for row in rows if (value := decode_messages(row.get(column))))
    return "ShareGPT" if isinstance(first, list) and "from" in first[0] else "messages"


def _with_unread(table: Table, layout: Layout, rows: list[Row]) -> Layout:
    """Return a layout with the columns of text that it does not read, but for codes and metadata."""
    beside = {layout.column, layout.answer, layout.rejected, layout.label, *chat.PARTS, *ROW_WEIGHTS, *UNREADABLE}
    texts = {*table.text_columns, *_nested_columns(table, rows)} - beside
    unread = [
        name
        for name in table.columns
        if name in _SETTINGS
        or (name in texts and not chat.is_metadata(name) and not are_codes(strings(rows, name)))
    ]
    return replace(layout, unread=tuple(unread))


def _find_preferences(table: Table, config: TrainConfig) -> Layout:
    """Return the columns of preferences. Raises DataError if the objective needs others."""
    objective = f"--objective {config.objective}"
    needs = f"{_NEEDS_PAIRS}; or {_NEEDS_LABELS}" if config.objective == "kto" else _NEEDS_PAIRS
    if table.is_plain_text:
        raise DataError(f"{table.source} is plain text: {objective} needs the columns {needs}.")
    rows = list(itertools.islice(table.rows, PEEKED_ROWS))
    if pair := _preferences(table):
        names = {fold_name(column): column for column in reversed(table.columns)}
        prompt = next((names[name] for name in (*_PROMPTS, *_LISTS) if name in names), "")
        layout = Layout(PREFERENCES, prompt, pair[0], rejected=pair[1])
        unread = _with_unread(table, layout, rows).unread
        beside = tuple(f"{name}_" for name in pair)  # such as chosen_by, the model that gave the answer
        of_page = {"base"} if "chosen_by" in table.columns else set[str]()
        return replace(
            layout, unread=tuple(name for name in unread if not name.startswith(beside) and name not in of_page)
        )
    answer = _find_columns(table, FORMATS["prompt-completion"], rows) or _find_columns(table, "messages", rows)
    labels = [name for name in LABEL_COLUMNS if name in table.columns]
    has_values = [name for name in labels if any(row.get(name) not in (None, "") for row in rows)]
    label = next(iter([*has_values, *labels]), "")
    if answer is None or not label or config.objective != "kto":
        advice = ""
        if label and config.objective != "kto":
            advice = f" {label} says which answers are desired: --objective kto learns from that."
        columns = format_names(table.columns)
        raise DataError(f"{table.source}: {objective} needs {needs}: its columns are {columns}.{advice}")
    columns_of = (answer.column, answer.answer) if answer.answer else ("", answer.column)
    return _with_unread(table, Layout(PREFERENCES, *columns_of, label=label), rows)


def _refuse_preferences(table: Table) -> None:
    """Raise DataError if the columns are pairs of a better and a worse answer."""
    if names := _preferences(table):
        raise DataError(
            f"{table.source}: {' and '.join(names)} are preference data: give --objective dpo (or orpo, kto) "
            f"to learn to prefer {names[0]}. To learn the answers in {names[0]} alone, write "
            "them as messages, or as prompt and completion; to learn it as text, give "
            f"--text-column {names[0]}. Its columns are {format_names(table.columns)}."
        )


def _preferences(table: Table) -> tuple[str, ...]:
    """Return the columns of a better and a worse answer, if there are any."""
    return next((names for names in PAIR_COLUMNS if set(names) <= set(table.columns)), ())


def _refuse_labels(table: Table, config: TrainConfig, rows: list[Row]) -> None:
    """Raise DataError if a column says which answers are unwanted (KTO), and no filter names it."""
    filtered = [condition.partition("=")[0] for condition in config.where]
    for name in LABEL_COLUMNS:
        values = {str(row[name]) for row in rows if row.get(name) is not None}
        is_boolean = values and values <= {"True", "False", "true", "false"}
        if is_boolean and not any(is_same_name(name, other) for other in filtered):
            wanted = next((value for value in ("True", "true") if value in values), "True")
            raise DataError(
                f"{table.source}: '{name}' says which answers are wanted: --objective kto learns from "
                f"all of them, and --where {name}={wanted} keeps these."
            )


def _find_text_column(table: Table, rows: list[Row], *, asks_format: bool) -> str:
    """Return the column named content, else the only one that can hold the text."""
    if "content" in table.columns and "role" not in table.columns:
        return "content"
    question = f"{table.source}: which column is the text? Name one with --text-column: "
    question += describe_for_text(table.columns, table.text_columns, rows)
    if "content" in table.columns:
        raise DataError(f"{question} To read conversations, put the messages of each into one list, `messages`.")
    found = [_find_columns(table, label, rows) for label in _NEEDS]
    readable = [
        layout
        for layout in found
        if layout and not _has_objects(table, layout) and not _has_unreadable(layout, rows)
    ]
    readers = [f"--format {_option(layout)} reads {layout}" for layout in readable]
    if readers and asks_format:
        question += f" Or read conversations: {'; '.join(readers)}."
    if nested := _nested_columns(table, rows):
        raise DataError(
            f"{question} Lists, objects or bytes are in {format_names(nested)}; of such layouts "
            "these are read: messages; prompt and completion; conversations (ShareGPT); "
            "instruction and output as texts (Alpaca)."
        )
    codes = [name for name in table.text_columns if are_codes(strings(rows, name))]
    texts = [name for name in table.text_columns if name not in codes]
    if len(texts) == 1:
        return texts[0]
    for name in TEXT_COLUMNS:
        if any(is_same_name(name, text) for text in texts) and not readers:
            return table.find_column(name)
    if codes and not texts:
        example = strings(rows, codes[0])[0]
        question += f" There are only codes in {format_names(codes)}, such as {example[:60]}."
    if len(texts) > 1:
        question += " Or make a text of several with --template."
        answers = [name for name in texts if any(is_same_name(name, answer) for answer in _ANSWERS)]
        if len(answers) == 1 and not (readers and asks_format):
            asked = max(
                (name for name in texts if name not in answers), key=lambda name: _mean_length(rows, name)
            )
            if not any(mark in asked + answers[0] for mark in '{}.[]!:"$`\\'):
                template = f"Question: {{{asked}}}\\nAnswer: {{{answers[0]}}}"
                question = question.removesuffix("--template.")
                question += f'--template "{template}" --answer-column {shlex.quote(answers[0])}.'
    raise DataError(question)


def _mean_length(rows: list[Row], column: str) -> float:
    texts = strings(rows, column)
    return sum(map(len, texts)) / max(len(texts), 1)


def _option(layout: Layout) -> str:
    """Return the value of the setting `format` for a layout."""
    return next(name for name, label in FORMATS.items() if label == layout.format)


def _has_objects(table: Table, layout: Layout) -> bool:
    objects = {*table.nested_columns}.difference(table.text_columns)
    return bool(layout.answer) and not objects.isdisjoint({layout.column, layout.answer})


def _nested_columns(table: Table, rows: list[Row]) -> list[str]:
    """Return the columns of lists or objects, or of strings of such, as a csv file may have."""
    return [name for name in table.columns if name in table.nested_columns or is_nested(strings(rows, name))]
