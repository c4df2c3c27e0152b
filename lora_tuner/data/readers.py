"""Read the rows of csv, tsv, json, jsonl, txt, parquet and code files; call the readers of other types.

Each file type has one reader, a generator of rows. With streaming the rows of a `Table` are read
anew on each pass, else the rows of a text file are held as a list; both give the same rows. Every
value is the text in the file: `datasets` would turn "NA" into None, dates into timestamps and 1.50
into 1.5. A file is refused if it is not UTF-8, names a column or a key twice, or changes during a
pass.
"""

import csv
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import datasets

from ..config import (
    CODE_EXTENSIONS,
    DATABASE_EXTENSIONS,
    DOCUMENT_EXTENSIONS,
    MAIL_EXTENSIONS,
    WORKBOOK_EXTENSIONS,
    data_extension,
)
from ..errors import DataError
from ..text import format_names
from .documents import count_unreadable, read_document_row
from .mail import COLUMNS as MAIL_COLUMNS
from .mail import read_mail
from .opening import CHANGED, check_size, open_file, text_lines, unpack
from .workbooks import NumberText, check_distinct, read_database, read_workbook

if TYPE_CHECKING:
    import pyarrow  # type: ignore[import-untyped]

Row = Mapping[str, object]
PEEKED_ROWS = 100  # rows that determine the columns of a stream
AUTO_LINES = 1000  # lines that determine how a txt file is split into rows
# Of a row, not of a file.
_ROW_KEYS = {"text", "content", "messages", "conversations", "prompt", "instruction"}
_TO_CLOSING_QUOTE = re.compile(r'(?:[^"]|"")*+"')  # from within a quoted field of a csv file


class NumberedRow(dict[str, object]):
    """A row of a text file, and the line in which it begins."""

    __slots__ = ("line",)
    line: int


@dataclass(frozen=True)
class LazyRows:
    """Rows that are read again, from the first, on each iteration."""

    read: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.read()


@dataclass(frozen=True)
class Table:
    """The rows of one file or dataset split, and its columns.

    `nested_columns` hold lists, objects or bytes. `label_names` maps a column of class labels to
    their names. `peeked` is set if the columns are those of the first `PEEKED_ROWS` rows.
    `row_rule` says how the rows of the file were found, where that is not obvious. `unread` counts
    parts of documents that are not read, such as attachments of mail.
    """

    source: str
    rows: Iterable[Row]  # a row may lack some of the columns
    columns: list[str]
    text_columns: list[str]
    nested_columns: list[str] = field(default_factory=list)
    is_plain_text: bool = False  # a txt or code file: --text-column does not apply
    is_code: bool = False  # a code file
    is_document: bool = False  # of documents or mail, which keep their paragraphs
    peeked: bool = False
    row_rule: str = ""
    label_names: dict[str, list[str]] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)

    def place(self, number: int, row: Row) -> str:
        """Return the file and the line of a row, or its number where lines do not tell it."""
        return f"{self.source} line {row.line}" if isinstance(row, NumberedRow) else f"{self.source} row {number}"

    def missing_column(self, column: str, purpose: str = "") -> DataError:
        scope = f" in its first {PEEKED_ROWS} rows" if self.peeked else ""
        return DataError(
            f"{self.source} has no column '{column}'{scope}{purpose}: its columns are {format_names(self.columns)}."
        )


def read_file(
    path: Path,
    *,
    txt_rows: str = "auto",
    streaming: bool = False,
    folder: Path | None = None,
    table_name: str | None = None,
) -> Table:
    """Return the rows of a file. Its type is told by the extension.

    Args:
        folder: The dataset, if that is a folder. A document in it that cannot be read is an
            `UnreadableRow`.
        table_name: Sheet of a workbook, or table of a database.

    Raises:
        DataError: The file cannot be read. For rows that are read later, the iteration raises it.
    """
    extension = data_extension(path)
    if extension == ".parquet":
        return _parquet_table(path)
    if extension in DOCUMENT_EXTENSIONS:
        return _document_table(path, folder, streaming)
    if extension in CODE_EXTENSIONS:
        table = table_from_rows(str(path), partial(_read_txt, path, "file"), streaming=streaming)
        return replace(table, is_plain_text=True, is_code=True)
    if extension == ".txt":
        row_rule = ""
        if txt_rows == "auto":
            txt_rows = _detect_txt_rows(path)
            row_rule = (
                "blank lines separate rows"
                if txt_rows == "paragraph"
                else f"one row per line, as the first {AUTO_LINES:,} lines have no blank line among them"
            )
            row_rule += ". Use --txt-rows to change this"
        table = table_from_rows(str(path), partial(_read_txt, path, txt_rows), streaming=streaming)
        return replace(table, is_plain_text=True, row_rule=row_rule)
    if extension in (".csv", ".tsv"):
        return table_from_rows(str(path), partial(_read_csv, path), streaming=streaming)
    rules: list[str] = []
    read: Callable[[], Iterator[Row]]
    if extension in WORKBOOK_EXTENSIONS:
        read = partial(read_workbook, path, table_name, rules)
    elif extension in DATABASE_EXTENSIONS:
        read = partial(read_database, path, table_name, rules)
    else:
        read = partial(_read_json, path, streaming, rules)
    table = table_from_rows(str(path), read, streaming=streaming)
    return replace(table, row_rule="".join(rules))


def _document_table(path: Path, folder: Path | None, streaming: bool) -> Table:
    is_mail, unread = data_extension(path) in MAIL_EXTENSIONS, Counter[str]()
    name = path.name if folder is None else path.relative_to(folder).as_posix()
    read = partial(read_mail if is_mail else read_document_row, path, name, unread)
    if folder is not None:
        read = partial(count_unreadable, read)
    rows = LazyRows(read) if streaming else list(read())
    columns = MAIL_COLUMNS if is_mail else ["text", "file"]
    return Table(str(path), rows, columns, columns, is_plain_text=not is_mail, is_document=True, unread=unread)


def table_from_rows(source: str, read: Callable[[], Iterator[Row]], *, streaming: bool) -> Table:
    """Return a table of the rows that `read` yields; streaming reads them again on each pass."""
    rows = list(itertools.islice(read(), PEEKED_ROWS if streaming else None))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text_columns = [name for name in columns if any(type(row.get(name)) is str for row in rows)]
    nested = [name for name in columns if any(isinstance(row.get(name), list | dict | bytes) for row in rows)]
    table_rows: Iterable[Row] = LazyRows(read) if streaming else rows
    return Table(source, table_rows, columns, text_columns, nested, peeked=streaming)


def table_from_dataset(source: str, data: datasets.Dataset | datasets.IterableDataset) -> Table:
    text_columns, nested, label_names = [], [], {}
    for name, kind in data.features.items():
        if isinstance(kind, datasets.ClassLabel):
            label_names[name] = kind.names
        elif not isinstance(kind, datasets.Value) or "binary" in kind.dtype:
            nested.append(name)
        elif "string" in kind.dtype:
            text_columns.append(name)
    return Table(source, data, data.column_names, text_columns, nested, label_names=label_names)


def _parquet_table(path: Path) -> Table:
    import pyarrow.parquet  # type: ignore[import-untyped]

    with open_file(path) as file, open(file.fileno(), "rb", closefd=False) as buffer:
        metadata = pyarrow.parquet.read_metadata(buffer)
        schema, groups = metadata.schema.to_arrow_schema(), range(metadata.num_row_groups)
        check_distinct(schema.names)
        check_size(
            sum(metadata.row_group(group).total_byte_size for group in groups), os.fstat(file.fileno()).st_size
        )
        unknown = [name for name in schema.names if not _is_known_type(schema, name)]
        known = pyarrow.schema([field for field in schema if field.name not in unknown], schema.metadata)
        table = table_from_dataset(str(path), datasets.Dataset(known.empty_table()))
    return replace(
        table,
        rows=LazyRows(partial(_read_parquet, path, schema)),
        columns=schema.names,
        nested_columns=[*table.nested_columns, *unknown],
    )


def _is_known_type(schema: "pyarrow.Schema", name: str) -> bool:
    """Return whether `datasets` has a type for a column; it has none for maps."""
    try:
        datasets.features.features.generate_from_arrow_type(schema.field(name).type)
    except ValueError:
        return False
    return True


def _read_parquet(path: Path, schema: object) -> Iterator[Row]:
    import pyarrow.parquet

    with open_file(path) as file, open(file.fileno(), "rb", closefd=False) as buffer:
        parquet = pyarrow.parquet.ParquetFile(buffer)
        if parquet.schema_arrow != schema:
            raise ValueError(CHANGED)
        for batch in parquet.iter_batches(1000):
            yield from batch.to_pylist()


def _read_csv(path: Path) -> Iterator[Row]:
    delimiter = "," if data_extension(path) == ".csv" else "\t"
    csv.field_size_limit(2**31 - 1)
    with open_file(path) as file:
        lines, ahead = itertools.tee(text_lines(file))
        first_lines = list(itertools.islice(filter(str.strip, ahead), 2))
        del ahead  # else tee would hold every line
        if len(first_lines) == 2 and delimiter not in first_lines[0]:
            for other in ",;\t|":
                if all(other in line for line in first_lines):
                    raise ValueError(
                        f"its delimiter is {other!r}, and a {data_extension(path)} file needs {delimiter!r}"
                    )
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        start = 1  # line in which the row begins
        try:
            header: list[str] = []
            for fields in reader:
                if header and fields and len(fields) != len(header):
                    end = f", with a quote that ends in line {reader.line_num}" if reader.line_num > start else ""
                    raise ValueError(f"its header has {len(header)} fields, line {start} has {len(fields)}{end}")
                if header and fields:
                    row = NumberedRow(zip(header, fields, strict=True))
                    row.line = start
                    yield row
                else:
                    check_distinct(fields)
                header, start = header or fields, reader.line_num + 1
        except csv.Error as error:
            line = _find_open_quote(text_lines(file), start, delimiter)
            reason = str(error).replace("'\t'", "a tab")
            raise ValueError(
                f"line {line}: {reason}; a field that begins with a quote must end with one"
            ) from error


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


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object. A duplicate key raises ValueError; Python would keep the last value."""
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        repeated = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"{repeated[:100]!r} is given twice in an object")
    return result


_JSON_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_int=NumberText, parse_float=NumberText)


def _read_json(path: Path, streaming: bool, rules: list[str]) -> Iterator[Row]:
    """Yield the objects and strings of a JSON array, of the one list in an object, or of the lines.

    Args:
        rules: Gets a line that says so if the rows are those of a list in an object.
    """
    with open_file(path) as file:
        start = (unpack(file).read(4096) or b"").removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        rows: list[object] | None = None
        if start == b"[" and streaming:
            raise ValueError("it is a JSON array, which cannot be streamed: write one object per line")
        if start == b"[":
            rows = _JSON_DECODER.decode("".join(text_lines(file)))
        elif start == b"{" and data_extension(path) == ".json" and (one := _decode_object(text_lines(file))):
            rows = _rows_of_object(one, rules)
        if rows is not None and streaming:
            raise ValueError("it is one JSON object, which cannot be streamed: write one object per line")
        unit = "line" if rows is None else "row"
        for number, value in _json_values(text_lines(file)) if rows is None else enumerate(rows, 1):
            if type(value) is str:
                yield {"text": value}
            elif isinstance(value, dict):
                row = NumberedRow(value) if rows is None else value
                if isinstance(row, NumberedRow):
                    row.line = number
                yield row
            else:
                raise ValueError(f"{unit} {number} is neither a JSON object nor a string")


def _decode_object(lines: Iterator[str]) -> dict[str, object] | None:
    """Return the JSON object that the lines are together, or None if each line is a value of its own."""
    first = next(filter(str.strip, lines))
    try:
        value = _JSON_DECODER.decode(first.strip())
    except ValueError:
        value = _JSON_DECODER.decode(first + "".join(lines))
    return None if any(map(str.strip, lines)) else cast("dict[str, object]", value)


def _rows_of_object(value: dict[str, object], rules: list[str]) -> list[object]:
    """Return the rows in a JSON object: those of its only list of objects or of texts, else itself."""
    lists = {name: rows for name, rows in value.items() if isinstance(rows, list) and rows}
    for kind in (dict, str):
        names = [name for name, rows in lists.items() if all(isinstance(row, kind) for row in rows)]
        if not names or _ROW_KEYS & value.keys():
            continue
        if len(names) > 1:
            raise ValueError(f"it is one JSON object with the lists {format_names(names)}: write a file for each")
        rules.append(f"the rows are those of the list '{names[0]}' in its JSON object")
        return lists[names[0]]
    if not any(type(field) is str for field in value.values()) and not _ROW_KEYS & lists.keys():
        raise ValueError("it is one JSON object without a list of rows: write an array, or one object per line")
    return [value]


def _json_values(lines: Iterator[str]) -> Iterator[tuple[int, object]]:
    """Yield line number and value of each line that is not blank."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, _JSON_DECODER.decode(line.removesuffix("\n"))
            except (ValueError, RecursionError) as error:
                reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
                raise ValueError(f"line {number} is not a JSON object: {reason}") from error


def _detect_txt_rows(path: Path) -> str:
    """Return "paragraph" if a blank line separates text in the first `AUTO_LINES`, else "line"."""
    with open_file(path) as file:
        text = "".join(itertools.islice(text_lines(file), AUTO_LINES))
    return "paragraph" if re.search(r"\n\s*\n", text.strip()) else "line"


def _read_txt(path: Path, txt_rows: str) -> Iterator[Row]:
    with open_file(path) as file:
        texts: Iterable[str] = text_lines(file)
        if txt_rows == "paragraph":
            texts = ("".join(lines) for is_blank, lines in itertools.groupby(texts, str.isspace) if not is_blank)
        elif txt_rows == "file":
            texts = ["".join(texts)]
        for text in texts:
            if text.strip():
                yield {"text": text if txt_rows == "file" else text.removesuffix("\n")}


def parse_conditions(table: Table, where: list[str]) -> list[tuple[str, set[str]]]:
    """Return the accepted values of each column in the conditions; class labels by number or name."""
    parsed: dict[str, set[str]] = {}
    for condition in where:
        column, _, value = condition.partition("=")
        if column not in table.columns:
            raise table.missing_column(column, " to choose rows by")
        names = table.label_names.get(column, [])
        accepted = {value, str(names.index(value))} if value in names else {value}
        parsed.setdefault(column, set()).update(accepted)
    return [*parsed.items()]
