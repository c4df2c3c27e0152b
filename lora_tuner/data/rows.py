"""Read the usable rows of one source: filtered, cleaned, counted, and hashed for the split."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import datasets

from ..config import CleanMode, TrainConfig, is_conversation
from ..errors import DataError, EventHandler, InvalidRowError, Notice, ignore_events
from ..text import format_counts, format_names, format_rows
from . import chat, chat_template, labels, preferences
from .cleaning import are_structured, clean_text, has_line_breaks
from .columns import match_column
from .documents import UnreadableRow
from .formats import common_format, describe_choice, detect_layout, have_columns
from .readers import Row, Table, parse_conditions
from .row_readers import PREFERENCES, Layout, text_reader, value_name
from .sources import open_source
from .splitting import group_hash, row_hash

MAX_REASONS = 8  # reasons for invalid rows that a notice names
MIN_ROWS_TO_STOP = 100  # rows of a stream before too many invalid ones stop it
_SAMPLED_TEXTS = 200  # texts that determine how all are cleaned
FILE_GROUP = "file"  # a `group_by` that every local file has
_VALUES_LIMIT = 100_000  # rows that are searched for the values of a column


class TextRow(NamedTuple):
    """A usable row: the hash of its text, the text, and that before cleaning, which may be dropped.

    `side` is the hash that decides its side of the split: that of its text, its group or, of a preference, its prompt.
    `source` is the number of its dataset among those of the run. A document is read as one row.
    """

    digest: bytes
    text: str
    raw: str
    side: bytes
    source: int = 0
    is_document: bool = False


@dataclass
class RowCounts:
    """Number of rows read, and what became of them: `read` is the sum of all the others."""

    read: int = 0
    filtered: int = 0  # by `where`
    empty: int = 0
    invalid: int = 0  # cannot be read
    unpaired: int = 0  # one answer alone, where pairs are learned from
    duplicates: int = 0
    not_drawn: int = 0  # by `max_rows`
    in_eval_dataset: int = 0  # copies of rows in `eval_dataset`
    near_duplicates: int = 0  # of held-out rows or of those in `eval_dataset`
    train: int = 0
    held_out: int = 0

    def __str__(self) -> str:
        return format_counts(asdict(self))


@dataclass
class Source:
    """One of the datasets of a run: what is read of it, what became of its rows, and those to train on.

    `description` says where the rows come from, `layout` what of a row is read, such as `column
    'body'`, `clean` how texts are cleaned, None if documents, as they are, lie beside others: all
    are set when the rows are read. `places` holds file and row number of each conversation, as only
    the chat template of the base tells whether it can be read. `invalid` counts the rows of each
    reason that cannot be read, and has the place of the first.
    """

    name: str
    number: int = 0
    weight: float | None = None  # share of the training sequences
    description: str = ""
    format: str = "text"  # or a layout of conversations, such as "messages"
    layout: str = ""
    template: str = ""  # of texts and their labels
    clean: CleanMode | None = "full"
    counts: RowCounts = field(default_factory=RowCounts)
    train: list[str] = field(default_factory=list)
    previews: list[tuple[str, str]] = field(default_factory=list)  # training rows before and after cleaning
    places: dict[str, str] = field(default_factory=dict)
    invalid: dict[str, tuple[int, str]] = field(default_factory=dict)
    copies: list[tuple[str, str, str]] = field(default_factory=list)  # first dropped ones: text, place, text kept
    at: tuple[Table, int, Row] | None = None  # of the row that was read last, with its number
    ungrouped: int = 0  # rows without a value to group by: each is a group of its own

    @property
    def place(self) -> str:
        """Place of the row that was read last."""
        return self.at[0].place(*self.at[1:]) if self.at else ""

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
                f"{self.description}: {share} cannot be read, and --max-invalid {max_invalid:g} "
                f"allows no more than that fraction of them: {reasons}. Correct or remove these "
                "rows, or read another column."
            )
        notify(Notice(f"Left out {share} that cannot be read: {reasons}."))


def iter_rows(
    config: TrainConfig, source: Source, notify: EventHandler = ignore_events, skip: int = 0
) -> Iterator[TextRow]:
    """Yield each usable row of a source.

    Args:
        source: Its description, format and counts are set.
        skip: Rows at the beginning that are neither returned nor counted.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()  # it warns about cached datasets while offline
    source.description, tables = open_source(source.name, config, notify)
    counts = source.counts
    any_columns = have_columns(config)
    if config.text_column is not None and not any_columns:
        raise DataError(f"{source.description} is plain text without columns: leave --text-column out.")
    layouts = [detect_layout(table, config, any_columns) for table in tables]
    source.format = common_format(source.description, tables, layouts)
    source.layout = ", ".join(dict.fromkeys(map(str, layouts)))
    source.template = next((each.template.to_text() for each in layouts if each.template and each.has_labels), "")
    if choice := describe_choice(layouts):
        notify(Notice(choice))
    mode = _choose_clean(tables, layouts, source, config, notify) if config.clean == "auto" else config.clean
    modes: list[CleanMode] = [
        "none" if config.clean == "auto" and table.is_document else mode for table in tables
    ]
    source.clean = modes[0] if len({*modes}) == 1 else None
    conditions_of = [parse_conditions(table, config.where) for table in tables]
    groups_of = [_group_reader(table, source.name, config, any_columns) for table in tables]
    for name, column in dict(pair for table in tables for pair in table.matched.items()).items():
        notify(
            Notice(
                f"{source.description}: '{name}' is read as its column '{column}', as only case or spaces differ."
            )
        )
    for table, layout, mode, conditions, group_of in zip(
        tables, layouts, modes, conditions_of, groups_of, strict=True
    ):
        read_text = text_reader(table, layout, config, mode)
        # Of what is kept as written, the cleaned text decides the side: no row changes it with the cleaning.
        is_verbatim = mode == "none" and not is_conversation(layout.format)
        read_canonical = text_reader(table, layout, config, "full")
        for number, row in enumerate(table.rows, 1):
            if skip > 0:
                skip -= 1
                continue
            counts.read += 1
            source.at = table, number, row
            try:
                if isinstance(row, UnreadableRow):
                    raise InvalidRowError(row.reason)
                if any(str(row.get(name)) not in values for name, values in conditions):
                    counts.filtered += 1
                    continue
                raw, text = read_text(row)
            except InvalidRowError as error:
                source.add_invalid(table.place(number, row), error)
                if config.streaming and counts.read >= MIN_ROWS_TO_STOP:
                    source.report_invalid(config.max_invalid)
                continue
            if not text:
                counts.empty += 1
                continue
            if config.sides_per_row == 2 and not preferences.is_pair(text):
                counts.unpaired += 1
                continue
            group = group_of(row) if group_of else ""
            source.ungrouped += group_of is not None and not group
            texts = preferences.unpair(text) if config.objective == "kto" else [text]
            counts.read += len(texts) - 1  # the second answer of a pair is a row of its own
            for text in texts:
                if chat.is_chat(text):
                    source.places[text] = table.place(number, row)
                canonical = text
                if is_verbatim:
                    with contextlib.suppress(InvalidRowError):
                        canonical = read_canonical(row)[1] or text
                side = digest = row_hash(canonical, config.split_salt)
                if config.label_column is not None:  # a text with another label is on the same side
                    side = row_hash(labels.split_label(canonical)[0], config.split_salt)
                if group:
                    side = group_hash(group, config.split_salt)
                elif preferences.is_preference(text):
                    side = preferences.side_hash(text, config.split_salt)
                yield TextRow(digest, text, raw, side, source.number, table.is_document)
    if counts.unpaired:
        notify(
            Notice(
                f"Left out {format_rows(counts.unpaired)} of {source.description} with one answer alone: "
                f"--objective {config.objective} learns from two; kto learns from these too."
            )
        )
    if config.where and counts.filtered == counts.read:
        raise DataError(
            f"{source.description}: no row has {_format_conditions(config.where)}; "
            f"{_describe_values(tables, config.where)}."
        )


def _group_reader(
    table: Table, source: str, config: TrainConfig, any_columns: bool
) -> Callable[[Row], str] | None:
    """Return a function from a row to its group, "" if it has no value; None without `group_by`."""
    wanted = config.group_by
    if wanted is None:
        return None
    is_file = wanted == FILE_GROUP and wanted not in table.columns
    if match_column(wanted, table.columns) and not is_file:
        column = table.find_column(wanted)
        names = table.label_names.get(column, [])
        return lambda row: value_name(row.get(column), names)
    if is_file and os.path.lexists(table.source):
        folder = os.path.expanduser(source)
        name = os.path.relpath(table.source, folder) if os.path.isdir(folder) else os.path.basename(table.source)
        return lambda row: name
    if table.is_plain_text and any_columns:
        return lambda row: ""
    raise table.missing_column(wanted, " to group rows by")


def _choose_clean(
    tables: list[Table], layouts: list[Layout], source: Source, config: TrainConfig, notify: EventHandler
) -> CleanMode:
    """Return the cleaning that suits the layout and the first rows; documents are kept as they are."""
    if is_conversation(source.format):
        return "none" if source.format in ("prompt and completion", PREFERENCES) else "lines"
    if all(table.is_code or table.is_document for table in tables):
        return "none"
    count = max(1, _SAMPLED_TEXTS // sum(not table.is_document for table in tables))
    samples: dict[str, list[str]] = {}  # of each column of a template, else of the texts
    for table, layout in zip(tables, layouts, strict=True):
        if table.is_document:
            continue
        columns = layout.template.columns if layout.template else [""]
        for column in columns:
            part = Layout("text", column) if layout.template else layout
            samples.setdefault(column, []).extend(_first_texts(table, part, config, count))
    texts = list(itertools.chain(*samples.values()))
    if sum(map(chat_template.looks_rendered, texts)) > len(texts) / 2:
        kind = "are conversations that a chat template has rendered"
    elif any(map(are_structured, samples.values())):
        kind = "look like program code, settings or Markdown"
    else:
        if any(2 * sum(map(has_line_breaks, column)) > len(column) for column in samples.values()):
            notify(
                Notice(
                    f"Most rows of {source.description} have line breaks, which become spaces (--clean full). "
                    "--clean lines keeps them, as in poems."
                )
            )
        return "full"
    notify(
        Notice(
            f"The texts of {source.description} {kind}, so they are kept as written "
            "(--clean none). With --clean full each becomes one line without tags."
        )
    )
    return "none"


def _first_texts(table: Table, layout: Layout, config: TrainConfig, count: int) -> Iterator[str]:
    """Yield texts before cleaning, from the first rows of a table that `config` selects."""
    read_text, conditions = text_reader(table, layout, config, "full"), parse_conditions(table, config.where)
    for row in itertools.islice(table.rows, count):
        if all(str(row.get(name)) in values for name, values in conditions):
            with contextlib.suppress(InvalidRowError):
                yield read_text(row)[0]


def _format_conditions(where: list[str]) -> str:
    """Join conditions as they are read: one of those of each column."""
    by_column: dict[str, list[str]] = {}
    for condition in where:
        by_column.setdefault(condition.partition("=")[0], []).append(condition)
    return " and ".join(" or ".join(conditions) for conditions in by_column.values())


def _describe_values(tables: list[Table], where: list[str]) -> str:
    """List some values of the columns of `where`, from the first rows."""
    texts = []
    for name in dict.fromkeys(condition.partition("=")[0] for condition in where):
        cells = (row.get(table.find_column(name)) for table in tables for row in table.rows)
        values = sorted({clean_text(str(cell))[:40] for cell in itertools.islice(cells, _VALUES_LIMIT)})
        texts.append(f"{name} has {format_names(values, 8)}")
    return "; ".join(texts)
