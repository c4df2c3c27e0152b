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

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}  # as they are typed in a shell
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_NO_NAME = re.compile(r"\d*|.*[.\[\]!:].*", re.DOTALL)  # positions, attributes, indices, formats


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

    def answer_span(self, values: Mapping[str, str]) -> tuple[int, int]:
        """Return start and end of the answer, in characters of the filled template."""
        columns = [column for _, column in self.pieces]
        before = RowTemplate(self.pieces[: columns.index(self.answer)]).fill(values)
        return len(before), len(before) + len(values[self.answer])


def parse_template(table: Table, text: str, answer: str | None) -> RowTemplate:
    r"""Return the template for the columns of a table. \n and \t in it are a line break and a tab.

    Raises:
        DataError: It is no template, or names a column that there is not.
    """
    columns = f"the columns of {table.source} are {format_names(table.columns)}"
    text = re.sub(r"\\[nt\\]", lambda match: _ESCAPES[match[0]], text)
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
