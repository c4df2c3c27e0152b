"""Read the rows of csv and tsv files, and of txt files that are tables; find out their delimiter.

The first lines tell the delimiter, not the name of the file: programs of many countries write `;`
into a .csv, as their decimal mark is a comma. Where the first lines can be read in several ways, or
in none, that is an error: a table that is divided at the wrong character still looks like one.
"""

import contextlib
import csv
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..config import DELIMITER_NAMES
from ..text import data_extension, format_names, shorten
from .encodings import guess_encodings
from .opening import UnreadableFileError, open_file, text_lines
from .workbooks import check_distinct, column_letters

DELIMITERS = (",", ";", "\t", "|")  # that are recognized
_SAMPLED_LINES, _SAMPLED_CHARS = 1_000, 2_000_000  # of a file, which tell its delimiter
_TO_CLOSING_QUOTE = re.compile(r'(?:[^"]|"")*+"')  # from within a quoted field
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # first line of some files from Excel
_NAME = re.compile(
    r"[^\W\d_][\w./()#&%$-]*(?: [\w./()#&%$-]+){0,4}"
)  # of a column, in a table without another sign of one
_TITLE_LINES = 5  # that may stand above a header
_MAX_NAME, _LONGER = 60, 2  # characters of a name; texts below it are longer by this factor


class NumberedRow(dict[str, object]):
    """A row of a text file, and the line in which it begins."""

    __slots__ = ("line",)
    line: int


@dataclass(frozen=True)
class _Reading:
    """First lines of a file, divided at a delimiter: header, rows, and those of as many fields."""

    delimiter: str
    header: list[str]
    rows: int
    agreeing: int
    is_valid: bool  # as to its quotes
    misfit: int  # first line with other fields; 0 for none

    @property
    def is_table(self) -> bool:
        return len(self.header) > 1

    @property
    def fits(self) -> bool:
        """All rows have as many fields as the header."""
        return self.is_valid and 0 < self.rows == self.agreeing

    @property
    def is_prose(self) -> bool:
        """The header looks like one name with a comma or the like in it, which a space follows."""
        return all(name[:1].isspace() for name in self.header[1:])

    def __str__(self) -> str:
        names = format_names([repr(shorten(name, 40)) for name in self.header], 4)
        misfit = f", but not in line {self.misfit}" if self.misfit else ""
        return f"{describe_delimiter(self.delimiter)} gives the columns {names}{misfit}"


def describe_delimiter(delimiter: str) -> str:
    """Return a delimiter as a message has it."""
    name = next((name for name, character in DELIMITER_NAMES.items() if character == delimiter), None)
    return f"a {name}" if name else repr(delimiter)


def find_delimiter(path: Path, delimiter: str, encoding: str) -> str:
    """Return the delimiter of a csv or tsv file; `delimiter` and `encoding` are as in `TrainConfig`.

    Raises:
        DataError: The first lines do not tell it.
    """
    usual = "\t" if data_extension(path) == ".tsv" else ","
    if delimiter == "ending":
        return usual
    if delimiter != "auto":
        return DELIMITER_NAMES.get(delimiter, delimiter)
    with open_file(path) as file:
        lines, is_cut = _sample(text_lines(file, encoding))
        return _separator(lines) or _choose(lines, is_cut, usual)


def find_txt_delimiter(path: Path, delimiter: str, encoding: str) -> str | None:
    """Return the delimiter of a txt file that is a table, else None.

    It is one if its first lines have equally many fields, and the first of them names of columns.
    """
    if delimiter == "ending" or not path.is_file():
        return None
    stat = path.stat()
    return _find_txt_delimiter(path, delimiter, encoding, (stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=10_000)
def _find_txt_delimiter(path: Path, delimiter: str, encoding: str, _state: tuple[int, int]) -> str | None:
    sample = _sample_in(path, guess_encodings(path) if encoding == "auto" else [encoding])
    if sample is None:
        return None
    lines, is_cut = sample
    if delimiter != "auto":
        reading = _read_sample(lines, DELIMITER_NAMES.get(delimiter, delimiter), is_cut)
        return reading.delimiter if reading.is_table else None
    if separator := _separator(lines):
        return separator
    readings = [_read_sample(lines, candidate, is_cut) for candidate in DELIMITERS]
    tables = [
        reading.delimiter
        for reading in readings
        if reading.is_table and reading.fits and reading.rows > 1 and _has_names(lines, reading)
    ]
    return tables[0] if len(tables) == 1 else None


def _sample_in(path: Path, encodings: Sequence[str]) -> tuple[list[str], bool] | None:
    """Return the first lines of a file in the first encoding that they are in, if they are in one."""
    for encoding in encodings:
        with contextlib.suppress(UnreadableFileError), open_file(path) as file:  # reading it says more
            return _sample(text_lines(file, encoding))
    return None


def _has_names(lines: list[str], reading: _Reading) -> bool:
    """Return whether the first line has names of columns, and is not a row as the others are.

    It has short words, and what is below one of them is far longer, or numbers.
    """
    header = reading.header
    if len({*header}) < len(header) or not all(
        len(name) <= _MAX_NAME and _NAME.fullmatch(name) for name in header
    ):
        return False
    rows = [fields for fields in csv.reader(lines, delimiter=reading.delimiter) if len(fields) == len(header)][1:]
    for name, *values in zip(header, *rows, strict=True):
        are_numbers = all(value.replace(",", "").replace(".", "").strip(" -").isdigit() for value in values)
        if are_numbers or sum(map(len, values)) > _LONGER * len(name) * len(values):
            return True
    return False


def _sample(lines: Iterator[str]) -> tuple[list[str], bool]:
    """Return the first lines, and whether there are more."""
    sample, size = list[str](), 0
    for line in lines:
        if len(sample) == _SAMPLED_LINES or size > _SAMPLED_CHARS:
            return sample, True
        sample.append(line)
        size += len(line)
    return sample, False


def _separator(lines: list[str]) -> str | None:
    match = _SEPARATOR_LINE.fullmatch(lines[0]) if lines else None
    return match[1] if match else None


def _read_sample(lines: list[str], delimiter: str, is_cut: bool) -> _Reading:
    csv.field_size_limit(2**31 - 1)
    header, rows, agreeing, is_valid, misfit, start = list[str](), 0, 0, True, 0, 1
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            if header and fields:
                rows += 1
                agreeing += len(fields) == len(header)
                misfit = misfit or start * (len(fields) != len(header))
            header, start = header or fields, reader.line_num + 1
    except csv.Error as error:
        is_valid = is_cut and "unexpected end" in str(error)
        misfit = misfit or start * (not is_valid)
    return _Reading(delimiter, header, rows, agreeing, is_valid, misfit)


def _choose(lines: list[str], is_cut: bool, usual: str) -> str:
    """Return the delimiter of a file by its first lines.

    One at which all rows have as many fields as the header is it, if it is the only one. Else one
    at which most have: reading the file names the others. A header without any is that of one
    column. Raises ValueError if none of this is so.
    """
    readings = [_read_sample(lines, candidate, is_cut) for candidate in DELIMITERS]
    tables = [reading for reading in readings if reading.is_table]
    if not tables:
        _refuse_lines_above(lines, is_cut)
    by_ending = next(reading for reading in readings if reading.delimiter == usual)
    chosen = [reading for reading in tables if reading.fits]
    if not chosen and not by_ending.is_table:
        chosen = [reading for reading in tables if 2 * reading.agreeing > reading.rows]
        if not chosen and by_ending.fits and all(reading.is_prose for reading in tables):
            return usual
    chosen = chosen or [by_ending] * by_ending.is_table
    if not tables or not any(reading.rows for reading in readings):
        return usual
    if len(chosen) == 1 and (chosen[0] is by_ending or not chosen[0].is_prose):
        return chosen[0].delimiter
    raise ValueError(
        f"its first lines do not tell its delimiter ({'; '.join(map(str, tables))}): name it with --delimiter, "
        "such as --delimiter ';' or --delimiter tab; one that is nowhere in the file makes each line one field"
    )


def _refuse_lines_above(lines: list[str], is_cut: bool) -> None:
    """Raise ValueError if a table begins below the first line with text, as in some exports."""
    filled = [number for number, line in enumerate(lines) if line.strip()]
    for start in filled[1 : _TITLE_LINES + 1]:
        below = lines[start:]
        for reading in (_read_sample(below, candidate, is_cut) for candidate in DELIMITERS):
            if reading.is_table and reading.fits and reading.rows > 1 and _has_names(below, reading):
                raise ValueError(
                    f"its first lines do not tell its delimiter (from line {start + 1} on {reading}, not in line "
                    f"{filled[0] + 1}): delete the lines above the header, or name it with --delimiter"
                )


def read_delimited(path: Path, delimiter: str, encoding: str) -> Iterator[NumberedRow]:
    """Yield the rows of a file, whose first row names the columns."""
    csv.field_size_limit(2**31 - 1)
    with open_file(path) as file:
        lines = text_lines(file, encoding)
        first = next(lines, "")
        skipped = int(_SEPARATOR_LINE.fullmatch(first) is not None)
        reader = csv.reader(
            lines if skipped else itertools.chain([first], lines), delimiter=delimiter, strict=True
        )
        start = 1 + skipped  # line in which the row begins
        try:
            header: list[str] = []
            for fields in reader:
                if header and fields and len(fields) != len(header):
                    raise ValueError(
                        _describe_misfit(header, fields, start, reader.line_num + skipped, delimiter)
                    )
                if header and fields:
                    row = NumberedRow(zip(header, fields, strict=True))
                    row.line = start
                    yield row
                elif fields:
                    fields = [name or column_letters(index) for index, name in enumerate(fields)]
                    check_distinct(fields)
                header, start = header or fields, reader.line_num + skipped + 1
        except csv.Error as error:
            line = _find_open_quote(text_lines(file, encoding), start, delimiter)
            reason = str(error).replace("'\t'", "a tab")
            raise ValueError(
                f"line {line}: {reason}; a field that begins with a quote must end with one"
            ) from error


def _describe_misfit(header: list[str], fields: list[str], start: int, end: int, delimiter: str) -> str:
    text = f"its header has {len(header)} fields, line {start} has {len(fields)}"
    if end > start:
        text += f", with a quote that ends in line {end}"
    shown = describe_delimiter(delimiter)
    if len(header) > 1:
        return f"{text}: correct that line; a field with {shown} in it needs quotes"
    unused = "tab" if delimiter != "\t" else "'^'"
    return (
        f"{text}, divided at {shown}: delete lines above the header, name another --delimiter, or read each line as one "
        f"field: --delimiter {unused}"
    )


def _find_open_quote(lines: Iterator[str], start: int, delimiter: str) -> int:
    """Return the line of the last quote that opens a field, in the invalid row that begins in line `start`."""
    opening = re.compile(f'(?:^|{re.escape(delimiter)})"')
    opened, is_open = start, False
    for number, line in enumerate(itertools.islice(lines, start - 1, None), start):
        position = 0
        while True:
            if not is_open:
                match = opening.search(line, position)
                if match is None:
                    break
                opened, position = number, match.end()
            closing = _TO_CLOSING_QUOTE.match(line, position)
            is_open = closing is None
            if closing is None:
                break
            position = closing.end()
            if line[position : position + 1] not in ("", "\n", delimiter):
                return opened
    return opened
