"""One file as rows, as it is written: csv, json, txt with the standard library, parquet with pyarrow.

Surprise: the readers of `datasets` turn "NA" into nothing, dates into times and 1.50 into 1.5. Here a value is the text that
stands in the file, and a file that is no text, has a name twice, or changes while it is read is refused. A file is
held in memory as a whole or, with `stream_file`, read a row at a time; whether that changes meanwhile nobody looks.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from ..config import TrainConfig
from ..errors import DataError


@dataclass
class Table:
    """The rows of one file or split. `texts` are the columns of text, `labels` the names of the numbers in a column."""

    source: str
    rows: Any  # of dicts, in which a column may be missing
    columns: list[str]
    text_columns: list[str]
    is_plain_text: bool = False  # a txt file: its text has no column name to ask for
    peeked: str = ""  # in which rows these are the columns, where not in all
    label_names: dict[str, list[str]] = field(default_factory=dict)


def from_datasets(source: str, data: Any) -> Table:
    texts = [name for name, kind in data.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    labels = {name: kind.names for name, kind in data.features.items() if getattr(kind, "names", None)}
    return Table(source, data, data.column_names, texts, label_names=labels)


def _read_bytes(path: Path) -> bytes:
    """All of a file, as it was at one moment."""
    if not path.is_file():  # a pipe would wait for its other end, and a device may have none
        raise ValueError("it is a link to nothing" if not path.exists() else "it is no file")
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        content = file.read()
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (len(content), after.st_mtime_ns):
        raise ValueError("it changed while it was read: try again when it is complete")
    return content


def read_file(path: Path, config: TrainConfig, rules: Counter[str]) -> Table:
    kind = path.suffix.lower()
    with _readable_errors(path):
        content = _read_bytes(path)
        if kind == ".parquet":
            return _parquet(path, content)
        if content.startswith(b"\x1f\x8b"):
            raise ValueError("it is compressed: unpack it first")
        if b"\0" in content:
            raise ValueError(f"byte {content.index(0)} is null, as in UTF-16 or a packed file: save it as UTF-8 text")
        text = content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        del content
        if kind == ".txt":
            return _txt(path, text, config.txt_rows, rules)
        return _json(path, text) if kind.startswith(".json") else _csv(path, text, _expected_delimiter(path))


@contextlib.contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    """What is wrong with a file, in a line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8 and try again.") from error
    except csv.Error as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    except (ValueError, TypeError, NotImplementedError, OSError, RecursionError) as error:  # Arrow's are among these
        why = getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".")
        raise DataError(f"{path} cannot be read: {why}.") from error


def _parquet(path: Path, content: bytes) -> Table:
    import pyarrow.parquet  # type: ignore[import-untyped]

    return from_datasets(str(path), datasets.Dataset(pyarrow.parquet.read_table(pyarrow.BufferReader(content))))


def _csv(path: Path, text: str, separator: str) -> Table:
    _check_delimiter(path, [*text.lstrip().split("\n", 2), "", ""], separator)
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    try:
        rows = [(lines.line_num, row) for row in lines if row]
    except csv.Error as error:
        raise ValueError(
            f"line {lines.line_num}: {error}; a field that begins with a quote must end with one"
        ) from error
    header = rows[0][1] if rows else []
    if len(set(header)) < len(header):
        raise ValueError(f"its header names a column twice: {', '.join(header)}")
    if uneven := [(line, len(row)) for line, row in rows if len(row) != len(header)]:
        line, length = uneven[0]
        raise ValueError(f"its header has {len(header)} fields, line {line} has {length}")
    return Table(str(path), [dict(zip(header, row, strict=True)) for _, row in rows[1:]], header, header)


def _check_delimiter(path: Path, lines: list[str], separator: str) -> None:
    first, second, *_ = lines
    if separator not in first and (found := [mark for mark in ",;\t|" if mark in first and mark in second]):
        raise ValueError(
            f"its fields are parted by {found[0]!r}, where {separator!r} is expected in a {path.suffix} file"
        )


def _json(path: Path, text: str) -> Table:
    """An array, or one value a line; each is an object, or a text alone."""
    if text.lstrip().startswith("["):
        values = _JSON_DECODER.decode(text)
    else:
        values = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                values += [_JSON_DECODER.decode(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error}; give an array, or an object a line") from error
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    rows = [{"text": value} if type(value) is str else value for value in values]
    if wrong := [number for number, row in enumerate(rows, 1) if not isinstance(row, dict)]:
        raise ValueError(f"row {wrong[0]} is neither an object nor a text")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    texts = [name for name in columns if any(type(row.get(name)) is str for row in rows)]
    return Table(str(path), rows, columns, texts)


class _NumberText(str):
    """A number as it is written: 1.50 stays 1.50, however large or long it is."""

    __slots__ = ()
    __repr__ = str.__str__  # in a list, no text


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which a name is given once: of several, Python would take the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice in an object")
    return found


_JSON_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_int=_NumberText, parse_float=_NumberText)


def _txt(path: Path, text: str, by: str, rules: Counter[str]) -> Table:
    rows = {"file": [text], "line": text.split("\n"), "paragraph": re.split(r"\n\s*\n", text.strip())}
    if by == "auto" and text.strip():
        by = "paragraph" if len(rows["paragraph"]) > 1 else "line"
        rules[
            "a blank line ends a row" if by == "paragraph" else "each line is a row, as no blank line parts them"
        ] += 1
    found = [{"text": row} for row in rows.get(by, []) if row.strip()]
    return Table(str(path), found, ["text"], ["text"], is_plain_text=True)


class LazyRows:
    """Rows that are read as they are gone through, from the first one each time."""

    def __init__(self, read: Callable[[], Iterator[dict[str, Any]]]) -> None:
        self.read = read

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.read()


_PEEKED_ROWS = 100  # rows that tell the columns of a stream


def lazy_table(source: str, read: Callable[[], Iterator[dict[str, Any]]], *, plain: bool = False) -> Table:
    """A table of rows that are read when they are needed; its columns are those of the first ones."""
    first = list(itertools.islice(read(), _PEEKED_ROWS))
    columns = list(dict.fromkeys(name for row in first for name in row))
    texts = [name for name in columns if any(type(row.get(name)) is str for row in first)]
    return Table(
        source, LazyRows(read), columns, texts, is_plain_text=plain, peeked=f" in its first {_PEEKED_ROWS} rows"
    )


def stream_file(path: Path, config: TrainConfig) -> Table:
    """`read_file`, of a file larger than memory."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        import pyarrow.parquet

        with _readable_errors(path):
            schema = pyarrow.parquet.ParquetFile(path).schema_arrow
            table = from_datasets(str(path), datasets.Dataset(schema.empty_table()))
        table.rows = LazyRows(lambda: _parquet_rows(path))
        return table
    if kind == ".txt":
        return lazy_table(str(path), lambda: _txt_rows(path, config.txt_rows), plain=True)
    return lazy_table(str(path), lambda: _json_rows(path) if kind.startswith(".json") else _csv_rows(path))


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text, each with its end."""
    if not path.is_file():  # a pipe can be read once, and a stream more often
        raise ValueError("it is a link to nothing" if not path.exists() else "it is no file")
    number = 0
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise ValueError(
                        f"line {number} holds a null, as UTF-16 and packed files do: save it as UTF-8 text"
                    )
                yield line
        except UnicodeDecodeError as error:  # its place is counted from the last piece that was read
            raise ValueError(f"behind line {number} it is not UTF-8: save it as UTF-8 and try again") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with _readable_errors(path), pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(1000):
            yield from batch.to_pylist()


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    with _readable_errors(path):
        first = list(itertools.islice((line for line in _lines(path) if line.strip()), 2))
        _check_delimiter(path, [*first, "", ""], _expected_delimiter(path))
        lines = csv.reader(_lines(path), delimiter=_expected_delimiter(path), strict=True)
        header = next((row for row in lines if row), [])
        if len(set(header)) < len(header):
            raise ValueError(f"its header names a column twice: {', '.join(header)}")
        for row in lines:
            if row and len(row) != len(header):
                raise ValueError(f"its header has {len(header)} fields, line {lines.line_num} has {len(row)}")
            if row:
                yield dict(zip(header, row, strict=True))


def _expected_delimiter(path: Path) -> str:
    return "," if path.suffix.lower() == ".csv" else "\t"


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with _readable_errors(path):
        if path.is_file():
            with path.open("rb") as file:  # all of an array may stand in one line
                if file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                    raise ValueError("it is an array, which streaming cannot read: give an object a line")
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            try:
                value = _JSON_DECODER.decode(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}; give an object a line") from error
            if type(value) is not str and not isinstance(value, dict):
                raise ValueError(f"line {number} is neither an object nor a text")
            yield {"text": value} if isinstance(value, str) else value


def _txt_rows(path: Path, by: str) -> Iterator[dict[str, Any]]:
    """Each line, or all up to a blank one; where that is left open, a blank one among the first thousand decides."""
    with _readable_errors(path):
        lines = _lines(path)
        if by == "auto":
            first = list(itertools.islice(lines, 1000))
            filled = [bool(line.strip()) for line in first]
            last = len(filled) - filled[::-1].index(True) if any(filled) else 0
            inner = filled[filled.index(True) : last] if any(filled) else []
            by, lines = "line" if all(inner) else "paragraph", itertools.chain(first, lines)
        parts: list[str] = []
        for line in itertools.chain(lines, [""]):
            if line.strip():
                parts.append(line)
            if parts and (by == "line" or not line.strip()):
                yield {"text": "".join(parts)}
                parts = []


def find_text_column(table: Table, wanted: str | None) -> str:
    columns = ", ".join(table.columns)
    if wanted is not None and not table.is_plain_text:
        if wanted not in table.columns:
            raise DataError(f"{table.source} has no column '{wanted}'{table.peeked}: its columns are {columns}.")
        return wanted
    if "text" in table.columns:
        return "text"
    if len(table.text_columns) == 1:
        return table.text_columns[0]
    raise DataError(f"{table.source}: which column is the text? Name one with --text-column: {columns}.")


def parse_conditions(table: Table, where: list[str]) -> list[tuple[str, set[str]]]:
    """(column, accepted values as text) of each condition; a class label is accepted by number and by name."""
    found = []
    for condition in where:
        column, _, value = condition.partition("=")
        if column not in table.columns:
            raise DataError(
                f"{table.source} has no column '{column}'{table.peeked} to choose rows by: its columns are "
                f"{', '.join(table.columns)}."
            )
        names = table.label_names.get(column, [])
        found.append((column, {value, str(names.index(value))} if value in names else {value}))
    return found
