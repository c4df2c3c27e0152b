"""Read the rows of json, jsonl and parquet files; call the readers of other types.

Each file type has one reader, a generator of rows. With streaming the rows of a `Table` are read
anew on each pass, else the rows of a text file are held as a list; both give the same rows. Every
value is the text in the file: `datasets` would turn "NA" into None, dates into timestamps and 1.50
into 1.5. A file is refused if its encoding is not known, if it names a column or a key twice, or changes during a
pass.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import datasets

from ..config import DELIMITER_NAMES
from ..errors import DataError
from ..text import (
    CODE_EXTENSIONS,
    DATABASE_EXTENSIONS,
    DOCUMENT_EXTENSIONS,
    MAIL_EXTENSIONS,
    MARKDOWN_EXTENSIONS,
    WORKBOOK_EXTENSIONS,
    data_extension,
    format_names,
)
from .columns import describe_for_text, match_column, similar_columns
from .delimited import NumberedRow, describe_delimiter, find_delimiter, find_txt_delimiter, read_delimited
from .documents import count_unreadable, read_document_row
from .encodings import find_encoding
from .mail import COLUMNS as MAIL_COLUMNS
from .mail import read_mail
from .opening import CHANGED, UTF8, UnreadableFileError, check_size, open_file, read_start, text_lines
from .txt_files import choose_txt_rows, read_txt
from .workbooks import NumberText, check_distinct, read_database, read_workbook

if TYPE_CHECKING:
    import pyarrow  # type: ignore[import-untyped]

Row = Mapping[str, object]
PEEKED_ROWS = 100  # rows that determine the columns of a stream
# Of a row, not of a file.
_ROW_KEYS = {"text", "content", "messages", "conversations", "prompt", "instruction"}


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
    matched: dict[str, str] = field(
        default_factory=dict
    )  # names that were asked for -> columns, where they differ

    def place(self, number: int, row: Row) -> str:
        """Return the file and the line of a row, or its number where lines do not tell it."""
        return f"{self.source} line {row.line}" if isinstance(row, NumberedRow) else f"{self.source} row {number}"

    def find_column(self, name: str, purpose: str = "") -> str:
        """Return the column of a name, which may differ by case or spaces alone.

        Raises:
            DataError: There is none, or there are several that differ so.
        """
        column = match_column(name, self.columns)
        if column is None:
            raise self.missing_column(name, purpose)
        if column != name:
            self.matched[name] = column
        return column

    def missing_column(self, column: str, purpose: str = "") -> DataError:
        scope = f" in its first {PEEKED_ROWS} rows" if self.peeked else ""
        if similar := similar_columns(column, self.columns):
            return DataError(
                f"{self.source} has no column '{column}'{scope}{purpose}; by case or spaces alone differ "
                f"{format_names([repr(name) for name in similar])}: name one of them exactly."
            )
        rows = [] if purpose else [*itertools.islice(self.rows, PEEKED_ROWS)]
        known = describe_for_text(self.columns, self.text_columns, rows)
        return DataError(f"{self.source} has no column '{column}'{scope}{purpose}: its columns are {known}")


def read_file(
    path: Path,
    *,
    txt_rows: str = "auto",
    streaming: bool = False,
    folder: Path | None = None,
    table_name: str | None = None,
    delimiter: str = "auto",
    encoding: str = "auto",
    is_document: bool = False,
) -> Table:
    """Return the rows of a file. Its type is told by the extension.

    Args:
        folder: The dataset, if that is a folder. A document in it that cannot be read is an
            `UnreadableRow`.
        table_name: Sheet of a workbook, or table of a database.
        delimiter, encoding: As in `TrainConfig`.
        is_document: A txt file is one row, as a document is.

    Raises:
        DataError: The file cannot be read. For rows that are read later, the iteration raises it.
    """
    extension = data_extension(path)
    if extension == ".parquet":
        return _parquet_table(path)
    if extension in DOCUMENT_EXTENSIONS or is_document:
        return _document_table(path, folder, streaming, encoding)
    rules: list[str] = []
    read: Callable[[], Iterator[Row]]
    if extension in WORKBOOK_EXTENSIONS:
        read = partial(read_workbook, path, table_name, rules)
    elif extension in DATABASE_EXTENSIONS:
        read = partial(read_database, path, table_name, rules)
    else:
        is_text = extension == ".txt" or extension in CODE_EXTENSIONS
        told: list[str] = []
        encoding = _find_encoding(path, encoding, folder, told)
        divided_at = _find_delimiter(path, txt_rows, delimiter, encoding, folder, rules)
        rules += told
        if divided_at is not None:
            read, is_text = partial(read_delimited, path, divided_at, encoding), False
        elif extension == ".txt":
            read = partial(read_txt, path, choose_txt_rows(path, txt_rows, encoding, rules), encoding)
        elif is_text:
            read = partial(read_txt, path, "file", encoding)
        else:
            read = partial(_read_json, path, streaming, rules, encoding)
        if is_text:
            table = table_from_rows(str(path), read, streaming=streaming)
            return replace(table, is_plain_text=True, is_code=extension != ".txt", row_rule=_join(rules))
    table = table_from_rows(str(path), read, streaming=streaming)
    return replace(table, row_rule=_join(rules))


def _join(rules: list[str]) -> str:
    return "; ".join(dict.fromkeys(rules))


def _find_encoding(path: Path, encoding: str, folder: Path | None, rules: list[str]) -> str:
    name, rule, example = find_encoding(path, encoding)
    if rule:
        shown = f", such as {example!r}" if example and folder is None else ""
        rules.append(f"{rule}{shown}. Use --encoding to change this")
    return name


def _find_delimiter(
    path: Path, txt_rows: str, delimiter: str, encoding: str, folder: Path | None, rules: list[str]
) -> str | None:
    """Return the delimiter of a csv or tsv file, or of a txt file that is a table; else None."""
    extension = data_extension(path)
    if extension in (".csv", ".tsv"):
        found = find_delimiter(path, delimiter, encoding)
        if delimiter == "auto" and found != {".csv": ",", ".tsv": "\t"}[extension]:
            rules.append(f"its fields are divided at {describe_delimiter(found)}")
        elif delimiter not in ("auto", "ending") and find_txt_delimiter(path, delimiter, encoding) is None:
            unused = describe_delimiter(found).removeprefix("a ")
            rules.append(f"each line is one field, as there is no {unused} in the first line")
        return found
    if extension != ".txt" or txt_rows != "auto":
        return None
    table_delimiter = find_txt_delimiter(path, delimiter, encoding)
    if table_delimiter is not None and delimiter == "auto":
        rules.append(
            f"a table with a header, divided at {describe_delimiter(table_delimiter)}. Use --txt-rows line to read "
            "each line as a row"
        )
    elif table_delimiter is None and delimiter not in ("auto", "ending"):
        wanted = describe_delimiter(DELIMITER_NAMES.get(delimiter, delimiter))
        if folder is None:
            raise DataError(
                f"{path} has no {wanted.removeprefix('a ')} in its first line: leave --delimiter out."
            )
        rules.append(f"text, as there is no {wanted.removeprefix('a ')} in the first line")
    return table_delimiter


def _document_table(path: Path, folder: Path | None, streaming: bool, encoding: str) -> Table:
    extension, unread, rules = data_extension(path), Counter[str](), list[str]()
    is_mail, name = (
        extension in MAIL_EXTENSIONS,
        path.name if folder is None else path.relative_to(folder).as_posix(),
    )
    if extension == ".txt":
        rules.append("one row per file, as of documents. Use --txt-rows to change this")
    if extension in (*MARKDOWN_EXTENSIONS, ".txt"):
        try:
            encoding = _find_encoding(path, encoding, folder, rules)
        except UnreadableFileError:
            if folder is None:
                raise
            encoding = UTF8  # reading it says more
    read = (
        partial(read_mail, path, name, unread)
        if is_mail
        else partial(read_document_row, path, name, unread, encoding)
    )
    if folder is not None:
        read = partial(count_unreadable, read)
    rows = LazyRows(read) if streaming else list(read())
    columns = MAIL_COLUMNS if is_mail else ["text", "file"]
    table = Table(str(path), rows, columns, columns, is_plain_text=not is_mail, is_document=True, unread=unread)
    return replace(table, row_rule=_join(rules))


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


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object. A duplicate key raises ValueError; Python would keep the last value."""
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        repeated = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"{repeated[:100]!r} is given twice in an object")
    return result


_JSON_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_int=NumberText, parse_float=NumberText)


def _read_json(path: Path, streaming: bool, rules: list[str], encoding: str) -> Iterator[Row]:
    """Yield the objects and strings of a JSON array, of the one list in an object, or of the lines.

    Args:
        rules: Gets a line that says so if the rows are those of a list in an object.
    """
    with open_file(path) as file:
        start = next(iter(read_start(file, encoding, 4096).lstrip()), "")
        rows: list[object] | None = None
        if start == "[" and streaming:
            raise ValueError("it is a JSON array, which cannot be streamed: write one object per line")
        if start == "[":
            rows = _JSON_DECODER.decode("".join(text_lines(file, encoding)))
        elif (
            start == "{"
            and data_extension(path) == ".json"
            and (one := _decode_object(text_lines(file, encoding)))
        ):
            rows = _rows_of_object(one, rules)
        if rows is not None and streaming:
            raise ValueError("it is one JSON object, which cannot be streamed: write one object per line")
        unit = "line" if rows is None else "row"
        for number, value in _json_values(text_lines(file, encoding)) if rows is None else enumerate(rows, 1):
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


def parse_conditions(table: Table, where: list[str]) -> list[tuple[str, set[str]]]:
    """Return the accepted values of each column in the conditions; class labels by number or name."""
    parsed: dict[str, set[str]] = {}
    for condition in where:
        column, _, value = condition.partition("=")
        column = table.find_column(column, " to choose rows by")
        names = table.label_names.get(column, [])
        accepted = {value, str(names.index(value))} if value in names else {value}
        parsed.setdefault(column, set()).update(accepted)
    return [*parsed.items()]
