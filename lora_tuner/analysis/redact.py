"""Write a copy of a dataset in which personal data is replaced.

The copy has all rows, columns and their order, also rows that training leaves out: so training on
it is the same but for what was replaced. It is read back and compared before it is kept. It is not
complete: see `personal_data`.
"""

import contextlib
import csv
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .. import atomic_io
from ..config import TrainConfig
from ..data.documents import UnreadableRow
from ..data.formats import detect_layout, have_columns
from ..data.readers import Table, read_file
from ..data.rows import Source, iter_rows
from ..data.sources import open_source
from ..data.workbooks import NumberText, number_value
from ..errors import ConfigError, DataError, EventHandler, Progress, ignore_events
from ..text import format_names
from . import phones
from .personal_data import replace_personal_data

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
_BATCH = 1_000
_PARQUET_ROWS = 10_000  # that are converted at once
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLAIN_TEXT = {"plain text", "column 'text'"}


@dataclass
class RedactResult:
    """Copy of a dataset, and the replacements in it by kind; of keys also by kind of key.

    `unreadable` rows, such as damaged documents, are empty in the copy. `clean` is how the original
    is cleaned, if `--clean auto` would choose something else for the copy.
    """

    path: Path
    rows: int = 0
    unreadable: int = 0
    clean: str | None = None
    changed_rows: int = 0
    replaced: Counter[str] = field(default_factory=Counter)
    keys: Counter[str] = field(default_factory=Counter)

    @property
    def note(self) -> str:
        """Name what is still in the copy."""
        kinds = "names, addresses" if phones.finds_phones() else "names, addresses, phone numbers"
        return f"This is not complete: {kinds} and what is written in another form are still there."

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"path": str(self.path), "note": self.note}


def check_target(out: Path, config: TrainConfig, overwrite: bool) -> Path:
    """Return the path of the copy, with `.jsonl` if it has no extension.

    Raises:
        ConfigError: No copy can be written there.
    """
    path = out if out.suffix else out.with_name(out.name + ".jsonl")
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--redact {out}: choose a name that ends in {' '.join(FORMATS)}.")
    for name in config.dataset_names:
        source = Path(os.path.expanduser(name))
        if os.path.lexists(source) and atomic_io.contains(source, path):
            raise ConfigError(f"--redact {out} would lie in the data itself, {name}: choose another place.")
    if reason := atomic_io.why_no_file(path):
        raise ConfigError(f"--redact {out}: {reason}.")
    if os.path.lexists(path) and not overwrite:
        raise ConfigError(f"--redact {out}: {path} exists: choose another name, or use --overwrite.")
    return path


def redact(
    config: TrainConfig,
    path: Path,
    notify: EventHandler = ignore_events,
    *,
    region: str | None = None,
    overwrite: bool = False,
) -> RedactResult:
    """Write all rows of a dataset to `path`, with their personal data replaced.

    `where` and `max_rows` leave out no row here.

    Raises:
        ConfigError: `path` exists, and `overwrite` is False.
        DataError: The data cannot be read, or not be written in this file type.
    """
    tables, layout = _open_tables(config)
    copy = _Copy(RedactResult(path), region, notify)
    of_copy = config.model_copy(update={"delimiter": "auto", "encoding": "auto"})
    with atomic_io.temporary_folder(path.parent) as folder:
        work = folder / path.name
        try:
            _write(work, tables, copy)
        except (TypeError, ValueError) as error:
            raise _cannot_write(path, " ".join(str(error).split())) from error
        _compare(work, path, copy, of_copy, layout)
        copy.result.clean = _other_cleaning(work, config, of_copy)
        atomic_io.fsync_path(work)
        if os.path.lexists(path) and not overwrite:
            raise ConfigError(f"{path} exists: choose another name, or use --overwrite.")
        os.replace(work, path)
        atomic_io.fsync_path(path.parent)
    return copy.result


def _other_cleaning(work: Path, config: TrainConfig, of_copy: TrainConfig) -> str | None:
    """Return how the original is cleaned, if the copy is cleaned in another way.

    Args:
        of_copy: Settings that read the copy.
    """
    modes = {_chosen_cleaning(name, config) for name in config.dataset_names}
    mode = modes.pop()
    return mode if not modes and mode != _chosen_cleaning(str(work), of_copy) else None


def _chosen_cleaning(name: str, config: TrainConfig) -> str | None:
    source = Source(name)
    with contextlib.suppress(DataError):  # no row for `where`: training says so
        next(iter_rows(config, source), None)
    return source.clean


def _cannot_write(path: Path, reason: str) -> DataError:
    return DataError(f"The rows cannot be written as {path.suffix}: {reason}. Use --redact {path.stem}.jsonl.")


def _open_tables(config: TrainConfig) -> tuple[list[Table], str]:
    """Return the tables of all datasets, and their layout.

    Raises:
        DataError: Training reads them in several ways, so that one file cannot hold them.
    """
    tables: list[Table] = []
    for name in config.dataset_names:
        tables += open_source(name, config, ignore_events)[1]
    any_columns = have_columns(config)
    layouts = {str(detect_layout(table, config, any_columns)): table.source for table in tables}
    if len(layouts) > 1:
        (one, source), (other, other_source), *_ = layouts.items()
        raise DataError(
            f"--redact writes one file, but {source} is read as {one} and {other_source} as {other}: redact each alone."
        )
    return tables, next(iter(layouts))


class _Copy:
    """Rows of a copy while it is written: the replacements, and a hash of each row."""

    def __init__(self, result: RedactResult, region: str | None, notify: EventHandler) -> None:
        self.result, self.region, self.notify = result, region, notify
        self.hashes: list[int] = []

    def rows(self, tables: list[Table], columns: list[str]) -> Iterator[dict[str, object]]:
        """Yield the redacted rows; a column that a row lacks is None."""
        for table in tables:
            for row in table.rows:
                before = self.result.replaced.total()
                redacted = {name: self._redact(row.get(name), name) for name in columns}
                self.result.rows += 1
                self.result.unreadable += isinstance(row, UnreadableRow)
                self.result.changed_rows += self.result.replaced.total() > before
                self.hashes.append(_row_hash(redacted, columns))
                if self.result.rows % _BATCH == 0:
                    self.notify(Progress("writing the copy", self.result.rows, self.result.rows + _BATCH))
                yield redacted
        self.notify(Progress("writing the copy", self.result.rows, self.result.rows))

    def _redact(self, value: object, name: str) -> object:
        """Replace personal data in a value, and in all texts and names inside it; a number is a text too."""
        if isinstance(value, Mapping):
            redacted: dict[str, object] = {}
            for key, item in value.items():
                new = str(self._redact(str(key), ""))
                while new in redacted:  # two names that are replaced alike
                    new += "'"
                redacted[new] = self._redact(item, str(key))
            return redacted
        if isinstance(value, list):
            return [self._redact(item, name) for item in value]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return value
        text, findings = replace_personal_data(str(value), self.region, name)
        self.result.replaced.update(found.kind for found in findings)
        self.result.keys.update(found.detail for found in findings if found.detail)
        return text if findings else value


def _row_hash(row: Mapping[str, object], columns: list[str]) -> int:
    return hash(tuple(_comparable(row.get(name)) for name in columns))


def _comparable(value: object) -> Hashable:
    """Return a value as every file type gives it back: a number as its text, nothing as no text."""
    if isinstance(value, Mapping):
        return tuple((name, _comparable(item)) for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return tuple(map(_comparable, value))
    return "" if value is None else str(value)


def _write(work: Path, tables: list[Table], copy: _Copy) -> None:
    extension = work.suffix.lower()
    columns = list(dict.fromkeys(name for table in tables for name in table.columns))
    rows = copy.rows(tables, columns)
    if extension == ".parquet":
        _write_parquet(work, rows)
        return
    with work.open("w", encoding="utf-8", newline="") as file:
        if extension in (".csv", ".tsv"):
            writer = csv.writer(file, delimiter="," if extension == ".csv" else "\t", lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(map(_cells, rows))
        elif extension == ".txt":
            if columns != ["text"]:
                raise ValueError(f"it holds texts alone, and the columns are {format_names(columns)}")
            has_lines = any("\n" in str(row.get("text")) for table in tables for row in table.rows)
            file.writelines(f"{row['text']}\n{chr(10) * has_lines}" for row in rows)
        else:
            file.writelines(f"{_json(_present(row))}\n" for row in rows)


def _present(row: Mapping[str, object]) -> dict[str, object]:
    """Return a row without what it lacks, unless that is all."""
    return {name: value for name, value in row.items() if value is not None} or dict(row)


def _cells(row: Mapping[str, object]) -> list[str]:
    for name, value in row.items():
        if isinstance(value, list | dict | bytes):
            raise ValueError(f"column '{name}' holds a {type(value).__name__}")
    return ["" if value is None else str(value) for value in row.values()]


def _json(value: object) -> str:
    """Return a value as JSON, a number as it was written."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_json(str(name))}: {_json(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_json, value)) + "]"
    if isinstance(value, bytes):
        raise ValueError("a value is binary")
    if isinstance(value, NumberText) and not isinstance(number_value(value), str):
        return str(value)
    if isinstance(value, str):  # a lone surrogate is escaped
        return json.dumps(value, ensure_ascii=bool(_SURROGATE.search(value)))
    return json.dumps(value, default=str)


def _write_parquet(work: Path, rows: Iterator[dict[str, object]]) -> None:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    parts = []
    while batch := list(itertools.islice(rows, _PARQUET_ROWS)):
        parts.append(pyarrow.Table.from_pylist([_plain_row(row) for row in batch]))
    pyarrow.parquet.write_table(pyarrow.concat_tables(parts, promote_options="permissive"), work)


def _plain_row(row: Mapping[str, object]) -> dict[str, object]:
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: object) -> object:
    """Return a number that is kept as it was written as a number."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return number_value(value) if isinstance(value, NumberText) else value


def _compare(work: Path, path: Path, copy: _Copy, config: TrainConfig, layout: str) -> None:
    """Raise DataError unless a written copy is read as the same rows, in the same way."""
    try:
        table = read_file(work)
        hashes = [_row_hash(row, table.columns) for row in table.rows]
    except DataError as error:
        raise _cannot_write(path, str(error).replace(str(work), "the copy").rstrip(".")) from error
    if len(hashes) != len(copy.hashes):
        raise _cannot_write(path, f"of {len(copy.hashes):,} rows {len(hashes):,} would be read")
    if hashes != copy.hashes:
        number = next(
            number for number, pair in enumerate(zip(hashes, copy.hashes, strict=True), 1) if pair[0] != pair[1]
        )
        raise _cannot_write(path, f"row {number:,} would be read as another one")
    try:
        read_as = str(detect_layout(table, config, have_columns(config)))
    except DataError as error:
        raise _cannot_write(path, f"training would not know what to read in it ({error})") from error
    if read_as != layout and not {read_as, layout} <= _PLAIN_TEXT:
        raise _cannot_write(path, f"training would read {read_as} in it, not {layout}")
