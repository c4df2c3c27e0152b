"""Load a dataset: read its rows, clean them, drop duplicates, and split them.

The split needs no seed: the hash of the cleaned text decides whether a row is held out. So a row is
on the same side in every run and file, and a copy of a held-out row is never trained on. All
cleaned text is held in memory (the 25,000 IMDb reviews: 33 MB); `streaming` avoids that.
"""

import contextlib
import hashlib
import heapq
import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field

import datasets

from ..config import HELD_OUT, CleanMode, TrainConfig
from ..errors import DataError, EventHandler, InvalidRowError, Notice, ignore_events
from ..text import format_counts, format_names
from . import chat, chat_template
from .cleaning import are_structured, clean_text
from .formats import common_format, describe_choice, detect_layout
from .readers import Table, parse_conditions
from .row_readers import Layout, text_reader
from .sources import default_eval_split, describe_splits, eval_source, open_source, resolve_eval_dataset
from .splitting import GOES_ON, MIN_TEXT_CHARS, content_hash, is_held_out, row_hash, split_text

MAX_PREVIEWS = 50  # rows of which the text before cleaning is kept
MAX_REASONS = 8  # reasons for invalid rows that a notice names
MIN_ROWS_TO_STOP = 100  # rows of a stream before too many invalid ones stop it
_SAMPLED_TEXTS = 200  # texts that determine how all are cleaned
_VALUES_LIMIT = 100_000  # rows that are searched for the values of a column


@dataclass
class RowCounts:
    """Number of rows read, and what became of them: `read` is the sum of all the others."""

    read: int = 0
    filtered: int = 0  # by `where`
    empty: int = 0
    invalid: int = 0  # cannot be read
    duplicates: int = 0
    not_drawn: int = 0  # by `max_rows`
    in_eval_dataset: int = 0  # copies of rows in `eval_dataset`
    train: int = 0
    held_out: int = 0

    def __str__(self) -> str:
        return format_counts(asdict(self))


@dataclass
class Dataset:
    """Cleaned rows without duplicates: `train` in source order, `held_out` in hash order.

    `places` holds file and row number of each conversation, as only the chat template of the base
    tells whether it can be read. `invalid` counts the rows of each reason that cannot be read, and
    has the place of the first. `clean` is how the texts were cleaned.
    `layout` names what of a row is read, such as `column 'body'`; `splits` the split files of a
    local folder, such as `train, measured: validation`, and is empty where there are none.
    `eval_dataset` and `eval_split` name what is measured, as in `TrainConfig`, with its default.
    """

    name: str
    source: str
    format: str = "text"  # or a layout of conversations, such as "messages"
    layout: str = ""
    clean: CleanMode = "full"
    splits: str = ""
    eval_dataset: str | None = None
    eval_split: str | None = None
    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    eval_hashes: frozenset[bytes] = frozenset()  # of the rows of `eval_dataset`
    counts: RowCounts = field(default_factory=RowCounts)
    previews: list[tuple[str, str]] = field(default_factory=list)  # before and after cleaning
    places: dict[str, str] = field(default_factory=dict)
    invalid: dict[str, tuple[int, str]] = field(default_factory=dict)

    def hash(self) -> str:
        return content_hash(self.train + self.held_out)

    def add_invalid(self, place: str, error: InvalidRowError) -> None:
        """Count a row that cannot be read."""
        self.counts.invalid += 1
        count, first = self.invalid.get(error.reason, (0, f"{place}, {error.detail}" if error.detail else place))
        self.invalid[error.reason] = count + 1, first

    def report_invalid(self, max_invalid: float, notify: EventHandler = ignore_events) -> None:
        """Report the invalid rows that were counted so far, if there are any.

        Raises:
            DataError: They are more than the fraction `max_invalid` of the rows that were read.
        """
        if not self.counts.invalid:
            return
        share = f"{self.counts.invalid:,} of {self.counts.read:,} rows"
        by_count = sorted(self.invalid.items(), key=lambda item: -item[1][0])
        reasons = "; ".join(
            f"{count:,} with {reason} (first: {first})" for reason, (count, first) in by_count[:MAX_REASONS]
        )
        if len(by_count) > MAX_REASONS:
            reasons += f"; {len(by_count) - MAX_REASONS} other reasons"
        if self.counts.invalid > max_invalid * self.counts.read:
            raise DataError(
                f"{self.source}: {share} cannot be read, and --max-invalid {max_invalid:g} allows no more than that "
                f"fraction of them: {reasons}. Correct or remove these rows, or read another column."
            )
        notify(Notice(f"Left out {share} that cannot be read: {reasons}."))

    def leave_out(self, errors: Mapping[str, InvalidRowError], max_invalid: float, notify: EventHandler) -> None:
        """Remove training and held-out rows that the chat template of the base cannot write.

        Raises:
            DataError: More than the fraction `max_invalid` of the rows is invalid now.
        """
        own = [text for text in self.places if text in errors]  # the others are of --eval-dataset
        in_train, eval_rows = set(self.train), len(self.held_out)
        for text in own:
            self.add_invalid(self.places[text], errors[text])
            if text in in_train:
                self.counts.train -= 1
            else:
                self.counts.held_out -= 1
        self.train = [text for text in self.train if text not in errors]
        self.held_out = [text for text in self.held_out if text not in errors]
        if own:
            self.report_invalid(max_invalid, notify)
        if foreign := [error for text, error in errors.items() if text not in self.places]:
            message = f"{len(foreign):,} of {eval_rows:,} rows of --eval-dataset cannot be read, such as one with {foreign[0]}"
            if len(foreign) > max_invalid * eval_rows:
                raise DataError(f"{message}: correct them, or raise --max-invalid.")
            notify(Notice(f"{message}: they are left out."))


def load_dataset(config: TrainConfig, notify: EventHandler = ignore_events) -> Dataset:
    """Load, clean, deduplicate, sample and split the rows that `config` selects.

    With streaming only the first rows: `config.shuffle_buffer` for training and `config.eval_rows`
    held out.

    Raises:
        DataError: The data is invalid, or too few rows are left.
        HubError: The dataset is neither cached nor can it be downloaded.
    """
    config = resolve_eval_dataset(config, notify)
    dataset = Dataset(
        config.dataset,
        "",
        splits=describe_splits(config),
        eval_dataset=config.eval_dataset,
        eval_split=config.eval_split,
    )
    counts = dataset.counts
    rows = _read_unique(config, dataset, notify, first_only=config.streaming)
    if config.max_rows is not None and config.max_rows < len(rows):
        # By a hash of the hash: the digests alone would select held-out rows first.
        sample = set(heapq.nsmallest(config.max_rows, rows, key=lambda digest: hashlib.sha256(digest).digest()))
        counts.not_drawn = len(rows) - len(sample)
        rows = {digest: row for digest, row in rows.items() if digest in sample}
    eval_config = config.model_copy(update={"clean": dataset.clean})
    eval_rows = load_eval_dataset(eval_config, notify) if config.other_eval_dataset else {}
    dataset.eval_hashes = frozenset(eval_rows)
    held_out_hashes = _choose_held_out(list(rows), eval_rows, config, notify)
    held_out = {}
    for digest, (text, before) in rows.items():
        if digest in held_out_hashes:
            held_out[digest] = text
        elif digest in eval_rows:
            counts.in_eval_dataset += 1
        else:
            dataset.train.append(text)
            if before is not None and len(dataset.previews) < MAX_PREVIEWS:
                dataset.previews.append((before, text))
    counts.train, counts.held_out = len(dataset.train), len(held_out)
    dataset.report_invalid(config.max_invalid, notify)
    dataset.held_out = [text for _, text in sorted((eval_rows or held_out).items())]
    if counts.train + counts.held_out == 1 and not eval_rows and not config.streaming:
        _hold_out_blocks(dataset, config.split_salt, notify)
    if not dataset.train or not dataset.held_out:
        copies = f", {counts.in_eval_dataset} in --eval-dataset" if counts.in_eval_dataset else ""
        advice = "" if eval_rows else ", or give rows to measure on with --eval-dataset"
        raise DataError(
            f"{dataset.source}: {len(rows)} usable rows of {counts.read} ({counts.empty} empty, {counts.duplicates} "
            f"duplicates{copies}) leave {counts.train} to train on and {counts.held_out} held out: "
            f"at least one of each is needed, so add rows{advice}."
        )
    return dataset


def _choose_held_out(
    hashes: list[bytes], eval_rows: Collection[bytes], config: TrainConfig, notify: EventHandler
) -> set[bytes]:
    """Return the hashes of the rows that are held out.

    If the hash leaves one side without a row, the nearest row changes sides. A stream does not do
    that: its other rows are unknown.
    """
    held_out = {digest for digest in hashes if is_held_out(digest)}
    usable = sorted(digest for digest in hashes if digest not in eval_rows)
    if config.streaming or len(usable) < (1 if eval_rows else 2):
        return held_out
    if held_out.issuperset(usable):
        notify(Notice("The hash of every row holds it out, so the one with the highest hash is trained on."))
        return held_out - {usable[-1]}
    if not held_out and not eval_rows:
        notify(
            Notice(
                f"The hash holds out none of {len(usable)} rows, so the one with the lowest hash is held out. More rows, or "
                "--eval-dataset, give a better measure."
            )
        )
        return {usable[0]}
    return held_out


def _hold_out_blocks(dataset: Dataset, salt: str, notify: EventHandler) -> None:
    """Hold out blocks of the only text, if it is long enough."""
    (text,) = dataset.train + dataset.held_out
    if chat.is_chat(text) or len(text) < MIN_TEXT_CHARS:
        return
    dataset.train, held_out = split_text(text)
    dataset.held_out = sorted(held_out, key=lambda row: row_hash(row, salt))
    dataset.previews = [(row.removesuffix(GOES_ON), row) for row in dataset.train]
    dataset.counts.train, dataset.counts.held_out = 1, 0
    notify(
        Notice(
            f"{dataset.source} is one text, so blocks of it, a fifth in all, are held out as {len(held_out)} rows, and the "
            "text beside them is not used. --eval-dataset measures on other text."
        )
    )


def load_eval_dataset(config: TrainConfig, notify: EventHandler = ignore_events) -> dict[bytes, str]:
    """Load all rows of `config.eval_dataset`, cleaned and without duplicates.

    Returns:
        The text of each hash, in the order of the hashes.
    """
    name = str(config.eval_dataset)
    if name == HELD_OUT:
        raise DataError(
            f"--eval-dataset {HELD_OUT} means rows of the training data: only train can hold them out."
        )
    split = config.eval_split or default_eval_split(config)
    dataset = Dataset(name, "")
    # What is said about the dataset itself is not said again.
    source_notify = ignore_events if name == config.dataset else notify
    rows = _read_unique(eval_source(config, split), dataset, source_notify)
    dataset.report_invalid(config.max_invalid, notify)
    if not rows:
        raise DataError(f"{dataset.source} has no usable row to evaluate on.")
    source = f"{dataset.source} ({split})" if split else dataset.source
    notify(Notice(f"Evaluation on {source}: {len(rows):,} usable rows of {dataset.counts.read:,}."))
    return {digest: text for digest, (text, _) in sorted(rows.items())}


def _read_unique(
    config: TrainConfig, dataset: Dataset, notify: EventHandler, *, first_only: bool = False
) -> dict[bytes, tuple[str, str | None]]:
    """Return text and, for the first rows, text before cleaning of each hash.

    Args:
        first_only: Stop after the rows of one shuffle buffer, and the held-out rows to evaluate on.
    """
    rows: dict[bytes, tuple[str, str | None]] = {}
    held_out = 0
    for digest, text, raw in iter_rows(config, dataset, notify):
        if digest in rows:
            dataset.counts.duplicates += 1
            continue
        rows[digest] = (text, raw if len(rows) < MAX_PREVIEWS * 10 else None)
        held_out += is_held_out(digest)
        enough_held_out = config.other_eval_dataset or held_out >= config.eval_rows
        if first_only and enough_held_out and len(rows) - held_out >= config.shuffle_buffer:
            break
    return rows


def iter_rows(
    config: TrainConfig, dataset: Dataset, notify: EventHandler = ignore_events, skip: int = 0
) -> Iterator[tuple[bytes, str, str]]:
    """Yield hash, text, and text before cleaning of each usable row.

    Args:
        dataset: Its source, format and counts are set.
        skip: Rows at the beginning that are neither returned nor counted.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()  # it warns about cached datasets while offline
    dataset.source, tables = open_source(config, notify)
    counts = dataset.counts
    layouts = [detect_layout(table, config) for table in tables]
    dataset.format = common_format(dataset.source, tables, layouts)
    dataset.layout = ", ".join(dict.fromkeys(map(str, layouts)))
    if choice := describe_choice(layouts):
        notify(Notice(choice))
    dataset.clean = (
        _choose_clean(tables, layouts, dataset, config, notify) if config.clean == "auto" else config.clean
    )
    config = config.model_copy(update={"clean": dataset.clean})
    for table, layout in zip(tables, layouts, strict=True):
        read_text = text_reader(table, layout, config)
        conditions = parse_conditions(table, config.where)
        for number, row in enumerate(table.rows, 1):
            if skip > 0:
                skip -= 1
                continue
            counts.read += 1
            if any(str(row.get(name)) not in values for name, values in conditions):
                counts.filtered += 1
                continue
            place = table.place(number, row)
            try:
                raw, text = read_text(row)
            except InvalidRowError as error:
                dataset.add_invalid(place, error)
                if config.streaming and counts.read >= MIN_ROWS_TO_STOP:
                    dataset.report_invalid(config.max_invalid)
                continue
            if chat.is_chat(text):
                dataset.places[text] = place
            if text:
                is_verbatim = dataset.format == "text" and config.clean == "none"
                canonical = (clean_text(raw) or text) if is_verbatim else text
                yield row_hash(canonical, config.split_salt), text, raw
            else:
                counts.empty += 1
    if config.where and counts.filtered == counts.read:
        raise DataError(
            f"{dataset.source}: no row has {' and '.join(config.where)}; {_describe_values(tables, config.where)}."
        )


def _choose_clean(
    tables: list[Table], layouts: list[Layout], dataset: Dataset, config: TrainConfig, notify: EventHandler
) -> CleanMode:
    """Return the cleaning that suits the layout and the first rows."""
    if dataset.format not in ("text", "prompt and completion"):
        return "lines"
    if dataset.format != "text" or all(table.is_code for table in tables):
        return "none"
    count = max(1, _SAMPLED_TEXTS // len(tables))
    texts = [
        text
        for table, layout in zip(tables, layouts, strict=True)
        for text in _first_texts(table, layout, config, count)
    ]
    if sum(map(chat_template.looks_rendered, texts)) > len(texts) / 2:
        kind = "are conversations that a chat template has rendered"
    elif are_structured(texts):
        kind = "look like program code, settings or Markdown"
    else:
        return "full"
    notify(
        Notice(
            f"The texts of {dataset.source} {kind}, so they are kept as written "
            "(--clean none). With --clean full each becomes one line without tags."
        )
    )
    return "none"


def _first_texts(table: Table, layout: Layout, config: TrainConfig, count: int) -> Iterator[str]:
    """Yield texts before cleaning, from the first rows of a table that `config` selects."""
    read_text, conditions = text_reader(table, layout, config), parse_conditions(table, config.where)
    for row in itertools.islice(table.rows, count):
        if all(str(row.get(name)) in values for name, values in conditions):
            with contextlib.suppress(InvalidRowError):
                yield read_text(row)[0]


def _describe_values(tables: list[Table], where: list[str]) -> str:
    """List some values of the columns of `where`, from the first rows."""
    texts = []
    for column in dict.fromkeys(condition.partition("=")[0] for condition in where):
        rows = itertools.islice(itertools.chain.from_iterable(table.rows for table in tables), _VALUES_LIMIT)
        values = sorted({clean_text(str(row.get(column)))[:40] for row in rows})
        texts.append(f"{column} has {format_names(values, 8)}")
    return "; ".join(texts)
