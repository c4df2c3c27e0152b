"""Make a text out of the columns of a row, such as "Question: {question}\\nAnswer: {answer}"."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import DataError
from ..text import format_names
from . import chat
from .columns import match_column
from .readers import Table
from .splitting import GOES_ON

Template = tuple[str, str | None]  # as it was given for the training, and the column of the answer
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}  # as they are typed in a shell
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_NO_NAME = re.compile(r"\d*|.*[.\[\]!:].*", re.DOTALL)  # positions, attributes, indices, formats


def fill_question(template: str, answer: str | None, question: str) -> str | None:
    """Return a template up to where the answer begins, with a question as its only other column.

    Args:
        template: the template, as it was given for the training.
        answer: the column of the answer; None: the last one, whose text begins with the question if
            there is no other.
        question: what is asked; returned as it stands if it begins as the template does.

    Returns None where several columns stand before the answer.
    """
    template = unescape(template)
    columns = [match for match in _PIECE.finditer(template) if match[1]]
    ends = [match for match in columns if match[1] == answer] or columns[-1:]
    if not ends:
        return None
    before = template[: ends[0].start()]
    asked = [match for match in columns if match.end() <= ends[0].start()]
    start = _double_braces(template[: columns[0].start()])
    if len({match[1] for match in asked}) > 1:
        return None
    if start and question.startswith(start.rstrip()):
        return question
    if not asked:
        return _double_braces(before) + question
    filled = _PIECE.sub(lambda match: question if match[1] else match[0][0], before)
    return filled.rstrip(" ")  # the space belongs to the first token of the answer


@dataclass(frozen=True)
class RowTemplate:
    """A template with the columns of a table. `pieces` are texts, and names of columns.

    Attributes:
        answer: Column of which alone the text is learned; empty: all of the text is.
    """

    pieces: tuple[tuple[str, str], ...]  # of which one is empty: text, column
    answer: str = ""

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for _, column in self.pieces if column))

    def fill(self, values: Mapping[str, str]) -> str:
        return "".join(text or values[column] for text, column in self.pieces if text or column)

    def to_text(self) -> str:
        """Return the template as `read_template` takes it."""
        return "".join(
            text.replace("\\", r"\\").replace("{", "{{").replace("}", "}}") or f"{{{column}}}"
            for text, column in self.pieces
        )

    def answer_span(self, values: Mapping[str, str]) -> tuple[int, int]:
        """Return start and end of the answer, in characters of the filled template."""
        columns = [column for _, column in self.pieces]
        before = RowTemplate(self.pieces[: columns.index(self.answer)]).fill(values)
        return len(before), len(before) + len(values[self.answer])


def fill_questions(prompt: str, templates: Mapping[str, Template | None]) -> dict[str | None, str]:
    """Return a prompt as each adapter is asked it, and the base under None.

    It is filled into the template that an adapter has learned, unless this has several open columns.
    The base is asked as the adapters are, if these are asked alike.
    """
    questions: dict[str | None, str] = {}
    for name, template in templates.items():
        filled = fill_question(*template, prompt) if template else None
        questions[name] = prompt if filled is None else filled
    texts = {*questions.values()}
    return {None: texts.pop() if len(texts) == 1 else prompt} | questions


def find_question(template: str, answer: str | None, prompt: str) -> str:
    """Return the question that `fill_question` makes this prompt of; without one the prompt itself."""
    start, mark, end = (fill_question(template, answer, "\0") or "").partition("\0")
    end = end.rstrip()
    is_filled = mark and "\0" not in end and prompt.startswith(start) and prompt.endswith(end)
    return prompt[len(start) : len(prompt) - len(end)].strip() if is_filled else prompt


def question_form(template: str, answer: str | None) -> str:
    """Return a template up to the answer as it is typed, with ... for its columns."""
    template = unescape(template)
    columns = [match for match in _PIECE.finditer(template) if match[1]]
    ends = [match for match in columns if match[1] == answer] or columns[-1:]
    before = template[: ends[0].start()] if ends else template
    return _PIECE.sub(lambda match: "..." if match[1] else match[0][0], before).rstrip(" ")


def read_template(text: str, answer: str) -> RowTemplate:
    """Return a template that was recorded, such as that of `RowTemplate.to_text`."""
    text, end = unescape(text), 0
    pieces: list[tuple[str, str]] = []
    for match in _PIECE.finditer(text):
        column = match[1] or ""
        pieces += [(text[end : match.start()], ""), ("" if column else _double_braces(match[0]), column)]
        end = match.end()
    pieces.append((text[end:], ""))
    return RowTemplate(tuple(piece for piece in pieces if any(piece)), answer)


def parse_template(table: Table, text: str, answer: str | None) -> RowTemplate:
    r"""Return the template for the columns of a table. \n and \t in it are a line break and a tab.

    Raises:
        DataError: It is no template, or names a column that there is not.
    """
    columns = f"the columns of {table.source} are {format_names(table.columns)}"
    text = unescape(text)
    if chat.CHAT_MARK in text or GOES_ON in text:
        raise DataError("--template has a control character: remove it.")
    pieces: list[tuple[str, str]] = []
    end = 0
    for match in _PIECE.finditer(text):
        pieces.append((text[end : match.start()], ""))
        end = match.end()
        if match[0] in ("{{", "}}"):
            pieces.append((match[0][0], ""))
        elif match[0] in ("{", "}"):
            raise DataError(
                f"--template has a single {match[0]} at character {match.start() + 1}: write it "
                f"twice to have one in the text, or {{column}} for a column; {columns}."
            )
        elif match[1] and match_column(match[1], table.columns):
            pieces.append(("", table.find_column(match[1])))
        elif _NO_NAME.fullmatch(match[1]):
            raise DataError(
                f"--template has {match[0]}: in braces stands the name of a column, and nothing else; {columns}."
            )
        else:
            raise table.missing_column(match[1], ", which --template names")
    pieces.append((text[end:], ""))
    if answer is not None:
        answer = table.find_column(answer, ", which --answer-column names")
    template = RowTemplate(tuple(piece for piece in pieces if any(piece)), answer or "")
    if not template.columns:
        raise DataError(f"--template names no column, as in {{{table.columns[0]}}}: {columns}.")
    count = [column for _, column in template.pieces].count(answer or "")
    if answer is not None and count != 1:
        place = "is not in" if not count else "is more than once in"
        raise DataError(
            f"--answer-column {answer} {place} --template: write {{{answer}}} once where the answer stands; {columns}."
        )
    return template


def unescape(text: str) -> str:
    r"""Return a text that was typed in one line, with the line breaks and tabs for its \n and \t."""
    return re.sub(r"\\[nt\\]", lambda match: _ESCAPES[match[0]], text)


def _double_braces(text: str) -> str:
    return text.replace("{{", "{").replace("}}", "}")
