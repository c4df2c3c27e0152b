"""Read the rows of one sheet of an Excel workbook, or of one table of an SQLite database.

Values are texts as the file has them. Of a formula the value that was saved is read: nothing is
computed, and no view, trigger or extension of a database runs. A database is only read.
"""

import contextlib
import datetime
import json
import sqlite3
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from ..text import format_names
from .markup import needs_extra
from .opening import MAX_DOCUMENT, Container, check_type, open_file

if TYPE_CHECKING:
    from openpyxl.cell import Cell, MergedCell
    from openpyxl.worksheet.worksheet import Worksheet

_LAST_ROW = 1_048_576  # of a sheet
_HOT_JOURNAL = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"
_Row = dict[str, object]


class NumberText(str):
    """A number, date or truth value as it is written: 1.50 stays 1.50. A column of these is no text."""

    __slots__ = ()
    __repr__ = str.__str__  # without quotes inside a list


def number_value(text: NumberText) -> object:
    """Return a number or truth value as JSON has it; a date or an infinity as a plain text."""
    try:
        return json.loads(text)
    except ValueError:
        return str(text)


def column_letters(index: int) -> str:
    """Return the name of a column that has none in the header, as Excel shows it."""
    letters, rest = "", index + 1
    while rest:
        rest, letter = divmod(rest - 1, 26)
        letters = chr(ord("A") + letter) + letters
    return letters


def check_distinct(columns: list[str]) -> None:
    """Raise ValueError if two columns have one name."""
    counts = Counter(columns)
    if doubled := [name for name in columns if counts[name] > 1]:
        raise ValueError(f"its header names a column twice: {format_names(doubled)}")


def _choose(
    kind: str, names: list[str], has_rows: Callable[[str], bool], name: str | None, rules: list[str]
) -> str | None:
    """Return the named sheet or table, else the only one with rows; None if none has any.

    Args:
        rules: Gets a line that says so if others are not read.
    """
    if name is not None and name not in names:
        raise ValueError(f"it has no {kind} '{name}': choose one with --table: {format_names(names)}")
    filled = [other for other in names if has_rows(other)] if name is None else [name]
    if len(filled) > 1:
        raise ValueError(f"it has several {kind}s with rows: choose one with --table: {format_names(filled)}")
    if filled and name is None and len(names) > 1:
        rules.append(f"the rows are those of the {kind} '{filled[0]}', the only one with rows")
    return filled[0] if filled else None


# Excel


def read_workbook(path: Path, table: str | None, rules: list[str]) -> Iterator[_Row]:
    """Yield the rows of a sheet. Its first row that is not empty has the names of the columns."""
    try:
        import openpyxl
    except ImportError as error:
        raise needs_extra("xlsx", "openpyxl") from error
    warnings.filterwarnings("ignore", module="openpyxl")  # about formats that are not read
    with open_file(path) as file, open(file.fileno(), "rb", closefd=False) as buffer:
        container = Container(file)
        for part in container.names():
            for _ in container.read_chunks(part):  # openpyxl has no limits of its own
                pass
        try:
            book = openpyxl.load_workbook(buffer, read_only=True, data_only=True, keep_links=False)
            sheets = {sheet.title: sheet for sheet in book.worksheets}
            chosen = _choose(
                "sheet", list(sheets), lambda name: any(True for _ in _sheet_rows(sheets[name])), table, rules
            )
            if chosen is not None:
                yield from _sheet_rows(sheets[chosen])
        except (ValueError, OSError, RecursionError):
            raise
        except Exception as error:  # openpyxl raises errors of many types for damaged files
            raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error


def _sheet_rows(sheet: "Worksheet") -> Iterator[_Row]:
    sheet.reset_dimensions()  # type: ignore[attr-defined]  # other programs write wrong ones
    header: list[str] = []
    for number, cells in enumerate(sheet.iter_rows(), 1):
        if number > _LAST_ROW:
            raise ValueError(f"it has a row beyond {_LAST_ROW:,}, the last one of a sheet")
        values = [_cell_text(cell) for cell in cells]
        if not any(values):
            continue
        if not header:
            header = [value or column_letters(index) for index, value in enumerate(values)]
            check_distinct(header)
            continue
        header += [column_letters(index) for index in range(len(header), len(values))]
        values += [""] * (len(header) - len(values))
        yield dict(zip(header, values, strict=True))


def _cell_text(cell: "Cell | MergedCell") -> str:
    from openpyxl.styles.numbers import is_datetime
    from openpyxl.utils.escape import unescape

    value = cell.value
    if value is None:
        return ""
    if isinstance(value, str):
        return unescape(value) if "_x" in value else value
    if isinstance(value, bool):
        return NumberText(str(value).lower())
    if isinstance(value, float):
        return NumberText(str(int(value)) if value.is_integer() else repr(value))
    if isinstance(value, datetime.datetime) and is_datetime(cell.number_format) == "date":
        value = value.date()
    if isinstance(value, datetime.date | datetime.time):
        return NumberText(value.isoformat())
    return NumberText(value)


# SQLite


def read_database(path: Path, table: str | None, rules: list[str]) -> Iterator[_Row]:
    """Yield the rows of a table, in its own order. Nothing is written, neither the database nor files beside it."""
    with open_file(path) as file:
        start = file.read(16)
        if not start:
            return
        if not start.startswith(b"SQLite format 3\0"):
            check_type(start)
            raise ValueError("it is no SQLite database, or an encrypted one")
        _check_complete(path)
        uri = f"file:{quote(str(path.resolve()))}?mode=ro&immutable=1"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            connection.text_factory = _decode
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_DOCUMENT)
            connection.execute("PRAGMA trusted_schema = OFF")
            kinds = dict(connection.execute("SELECT name, type FROM pragma_table_list WHERE schema = 'main'"))
            names = [name for name, kind in kinds.items() if kind == "table" and not name.startswith("sqlite_")]
            if kinds.get(table) in ("view", "virtual"):
                raise ValueError(
                    f"'{table}' is a {kinds[table]} table, which the database would have to "
                    f"compute: choose a table with --table: {format_names(sorted(names))}"
                )

            def select(name: str, columns: str = "*") -> sqlite3.Cursor:
                return connection.execute(f'SELECT {columns} FROM "{name.replace(chr(34), chr(34) * 2)}"')

            chosen = _choose(
                "table", sorted(names), lambda name: select(name, "1").fetchone() is not None, table, rules
            )
            if chosen is not None:
                cursor = select(chosen)
                columns = [column for column, *_ in cursor.description]
                for values in cursor:
                    yield dict(zip(columns, map(_value_text, values), strict=True))


def _check_complete(path: Path) -> None:
    """Raise ValueError if changes of a database lie in a file beside it."""
    for ending, advice in (
        ("-wal", "close the program that has it open, or run `PRAGMA wal_checkpoint(TRUNCATE)` in sqlite3"),
        ("-journal", "open it with sqlite3 once, which takes back what was not finished"),
    ):
        beside = path.with_name(path.name + ending)
        if not beside.is_file():
            continue
        with beside.open("rb") as file:
            start = file.read(8)
        if start and (ending == "-wal" or start == _HOT_JOURNAL):
            raise ValueError(f"changes of it are in {beside.name} beside it: {advice}")


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("a text in it is not UTF-8") from error


def _value_text(value: object) -> object:
    """Return a number in the way of SQLite, with 15 digits; bytes and NULL stay."""
    if isinstance(value, float):
        digits, mark, exponent = f"{value:.15g}".partition("e")
        if value - value == 0 and "." not in digits:
            digits += ".0"
        return NumberText(digits.replace("inf", "Inf") + mark + exponent)
    return NumberText(value) if isinstance(value, int) else value
