"""Load a dataset: read its rows, clean them, drop duplicates, and split them.

The split needs no seed: the hash of the cleaned text, or of the row's group, decides whether a row
is held out. So a row is on the same side in every run and file, and a copy of a held-out row is
never trained on. All cleaned text is held in memory (the 25,000 IMDb reviews: 33 MB); `streaming`
avoids that.
"""

import hashlib
import heapq
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from ..config import HELD_OUT, TEXT_PREFERENCES, CleanMode, TrainConfig
from ..errors import DataError, EventHandler, InvalidRowError, Notice, ignore_events
from ..text import format_count, format_rows, format_share
from .chat import is_chat
from .held_out import choose_held_out, hold_out_blocks, order_held_out
from .labels import choose_labels
from .mixing import mix_lists
from .near_duplicates import find_copies
from .preferences import first_side, learned_texts
from .rows import RowCounts, Source, TextRow, iter_rows
from .sources import default_eval_split, describe_splits, eval_source, resolve_eval_dataset
from .splitting import content_hash, is_held_out
from .tokenization import TextUse

MAX_PREVIEWS = 50  # rows of which the text before cleaning is kept, for --preview
MAX_COPIES = 5  # rows left out as copies that are kept as examples
_RAW_ROWS = 500  # rows of a source among which these are
_UniqueRows = dict[bytes, TextRow]  # by the hash of their text


@dataclass
class Dataset:
    """Cleaned rows without duplicates: those to train on in each source, in its order, and `held_out_rows`.

    `held_out_rows` is in the order of the hashes; of several sources with weights, mixed by these, so
    that its first rows have the shares of the training rows.
    `splits` names the split files of a local folder, such as `train, measured: validation`, and is
    empty where there are none. `eval_dataset`, `eval_split` and `group_by` are as in `TrainConfig`,
    with their defaults. `held_out_sources` and `held_out_groups` have the source and
    the group of each text in `held_out`, where there are several sources or groups. `compared` has
    documents as a whole; of a stream, the rows that are measured.
    """

    sources: list[Source]
    splits: str = ""
    eval_dataset: str | None = None
    eval_split: str | None = None
    group_by: str | None = None
    held_out_rows: list[str] = field(default_factory=list)
    eval_hashes: frozenset[bytes] = frozenset()  # of rows and groups of `eval_dataset`
    compared: list[TextRow] = field(default_factory=list)  # with training rows, to find near duplicates
    near_duplicates: list[tuple[str, str]] = field(
        default_factory=list
    )  # first dropped ones, each with its held-out row
    held_out_sources: dict[str, int] = field(default_factory=dict)
    held_out_groups: dict[str, bytes] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)  # with the training rows of each, if labels are learned

    @property
    def train(self) -> list[str]:
        return [text for source in self.sources for text in source.train]

    @property
    def held_out(self) -> list[str]:
        """Held-out rows whose loss is measured; of preferences the chosen or desired sides."""
        return learned_texts(self.held_out_rows)

    @property
    def previews(self) -> list[tuple[str, str]]:
        """First training rows before and after cleaning, of several sources in turn."""
        return mix_lists([source.previews for source in self.sources], [1.0] * len(self.sources))

    @property
    def counts(self) -> RowCounts:
        """Counts of all sources together."""
        counts = [asdict(source.counts) for source in self.sources]
        return RowCounts(**{name: sum(each[name] for each in counts) for name in counts[0]})

    @property
    def weights(self) -> list[float]:
        """Weight of each source; empty without weights."""
        return [source.weight for source in self.sources if source.weight is not None]

    @property
    def name(self) -> str:
        return self._join("name")

    @property
    def description(self) -> str:
        return self._join("description")

    @property
    def format(self) -> str:
        return self._join("format")

    @property
    def layout(self) -> str:
        return self._join("layout")

    @property
    def clean(self) -> CleanMode | None:
        """Cleaning of the texts; None if the sources differ."""
        modes = {source.clean for source in self.sources}
        return modes.pop() if len(modes) == 1 else None

    def groups_of(self, texts: Sequence[str]) -> list[int]:
        """Return the number of the group of each held-out row; empty without groups."""
        numbers: dict[bytes, int] = {}
        groups = self.held_out_groups
        return [numbers.setdefault(groups[text], len(numbers)) for text in texts] if groups else []

    @property
    def label_template(self) -> str:
        """Template of texts and their labels; "" without labels."""
        return self.sources[0].template

    def _join(self, attribute: str) -> str:
        return " + ".join(dict.fromkeys(str(getattr(source, attribute)) for source in self.sources))

    def hash(self) -> str:
        return content_hash(self.train + self.held_out_rows)

    def set_held_out(self, rows: list[list[TextRow]], config: TrainConfig, notify: EventHandler) -> list[TextRow]:
        """Set the held-out rows, with their sources and groups, and return them in their order.

        Args:
            rows: Of each source, or those of the evaluation dataset alone.
        """
        ordered = order_held_out(rows, self.weights, config.split_salt, notify)
        self.held_out_rows = [row.text for row in ordered]
        texts = {row.text: first_side(row.text) for row in ordered}
        if len(rows) > 1:
            self.held_out_sources = {texts[row.text]: row.source for row in ordered}
        prompts = [row.side for row in ordered if config.learns_preferences and learned_texts([row.text])]
        has_parts = len(ordered) > sum(map(len, rows)) or len({*prompts}) < len(prompts)
        if config.group_by is not None or has_parts:
            self.held_out_groups = {texts[row.text]: row.side for row in ordered}
        return ordered

    def leave_out_copies(self, config: TrainConfig, notify: EventHandler) -> None:
        """Remove training rows that nearly copy one of the compared rows, if `config` says so."""
        copies = find_copies(self.train, [row.text for row in self.compared], config, notify)
        if config.near_duplicates == "keep":
            return
        self.near_duplicates = [*itertools.islice(copies.items(), MAX_COPIES)]
        for source in self.sources:
            source.previews = [preview for preview in source.previews if preview[1] not in copies]
            source.train = [text for text in source.train if text not in copies]
            # A text of which blocks are held out is one row, however many parts are left.
            left = min(source.counts.train, len(source.train))
            source.counts.near_duplicates, source.counts.train = source.counts.train - left, left

    def leave_out(self, errors: Mapping[str, InvalidRowError], max_invalid: float, notify: EventHandler) -> None:
        """Remove training and held-out rows that the chat template of the base cannot write.

        Raises:
            DataError: More than the fraction `max_invalid` of the rows of a source is invalid now.
        """
        eval_rows = len(self.held_out_rows)
        own_held_out = set(self.held_out_rows) if self.eval_dataset in (None, HELD_OUT) else set[str]()
        self.held_out_rows = [text for text in self.held_out_rows if text not in errors]
        foreign = dict(errors)  # those of --eval-dataset
        for source in self.sources:
            in_train = set(source.train)
            used = in_train | own_held_out
            invalid = [text for text in source.places if text in used and text in foreign]
            for text in invalid:
                del foreign[text]
                source.add_invalid(source.places[text], errors[text])
                if text in in_train:
                    source.counts.train -= 1
                else:
                    source.counts.held_out -= 1
            source.train = [text for text in source.train if text not in errors]
            if invalid:
                source.report_invalid(max_invalid, notify)
        if foreign:
            reason = next(iter(foreign.values()))
            message = f"{len(foreign):,} of {eval_rows:,} rows of --eval-dataset cannot be read, such as one with {reason}"
            if len(foreign) > max_invalid * eval_rows:
                raise DataError(f"{message}: correct them, or raise --max-invalid.")
            notify(Notice(f"{message}: they are left out."))


def load_dataset(config: TrainConfig, notify: EventHandler = ignore_events) -> Dataset:
    """Load, clean, deduplicate, sample and split the rows that `config` selects.

    With streaming only the first rows of each source: `config.shuffle_buffer` for training and
    `config.eval_rows_limit` held out.

    Raises:
        DataError: The data is invalid, or too few rows are left.
        HubError: The dataset is neither cached nor can it be downloaded.
    """
    config = resolve_eval_dataset(config, notify)
    dataset = Dataset(
        [Source(name, number, weight) for number, (name, weight) in enumerate(config.weighted_datasets)],
        splits=describe_splits(config),
        eval_dataset=config.eval_dataset,
        eval_split=config.eval_split,
        group_by=config.group_by,
    )
    sources = dataset.sources
    rows: _UniqueRows = {}
    for source in sources:
        _read_unique(config, source, rows, notify, first_only=config.streaming)
        if source.ungrouped:
            notify(
                Notice(
                    f"{format_rows(source.ungrouped)} of {source.description} without {config.group_by}: each is a "
                    "group of its own."
                )
            )
    sample = _sample(rows, config.eval_max_rows or config.max_rows)
    trained_sample = _sample(sample, config.max_rows)
    if len(sample) < len(rows):
        for digest, row in rows.items():
            sources[row.source].counts.not_drawn += digest not in sample
        rows = {digest: row for digest, row in rows.items() if digest in sample}
    eval_config = config.model_copy(update={"clean": dataset.clean or config.clean})
    eval_rows = load_eval_dataset(eval_config, notify) if config.other_eval_dataset else {}
    dataset.eval_hashes = eval_hashes(eval_rows)
    usable, sides = len(rows), {row.side for row in rows.values()} if config.group_by else set()
    held_out = hold_out_blocks(sources, rows, config, notify)
    has_blocks = [*map(bool, held_out)]
    held_out_sides = choose_held_out([row.side for row in rows.values()], dataset.eval_hashes, config, notify)
    for digest, row in rows.items():
        if row.side in held_out_sides:
            held_out[row.source].append(row)
        elif digest in dataset.eval_hashes or row.side in dataset.eval_hashes:
            sources[row.source].counts.in_eval_dataset += 1
        elif digest not in trained_sample:
            sources[row.source].counts.not_drawn += 1
        else:
            source = sources[row.source]
            source.train.append(row.text)
            if row.raw and len(source.previews) < MAX_PREVIEWS:
                source.previews.append((row.raw, row.text))
    rows.clear()  # near duplicates take as much memory
    for source, source_rows in zip(sources, held_out, strict=True):
        if not source.counts.train:  # else blocks of it are held out
            source.counts.train, source.counts.held_out = len(source.train), len(source_rows)
        source.report_invalid(config.max_invalid, notify)
    measured = [[*eval_rows.values()]] if config.other_eval_dataset else held_out
    ordered = dataset.set_held_out(measured, config, notify)
    # Documents are compared as a whole, but in a stream: a passage is no copy. Blocks, which repeat the text
    # around them, are not compared.
    whole = [rows for rows, are_blocks in zip(held_out, has_blocks, strict=True) if not are_blocks]
    dataset.compared = [*itertools.chain(eval_rows.values(), *whole)]
    if config.streaming:
        dataset.compared = ordered[: config.eval_rows_limit]
    dataset.leave_out_copies(config, notify)
    for source in sources:
        if config.learns_preferences and not any(is_chat(first_side(row)) for row in source.train):
            source.format = TEXT_PREFERENCES
    counts = dataset.counts
    if idle := [source for source in sources if not source.train and dataset.train]:
        raise DataError(
            f"{idle[0].description} has no row to train on ({idle[0].counts}): add rows, or leave "
            "this dataset out."
        )
    if not dataset.train or not dataset.held_out_rows:
        copies = f", {counts.in_eval_dataset} in --eval-dataset" if counts.in_eval_dataset else ""
        groups = f" in {format_count(len(sides), 'group')}" if config.group_by else ""
        advice = "" if eval_rows else ", or give rows to measure on with --eval-dataset"
        if counts.unpaired:
            copies += f", {counts.unpaired} with one answer alone"
            advice += ", or learn from these too with --objective kto"
        if counts.near_duplicates:
            copies += f", {format_count(counts.near_duplicates, 'near duplicate')} of held-out rows"
            advice += ", or keep near duplicates with --near-duplicates keep"
        raise DataError(
            f"{dataset.description}: {format_count(usable, 'usable row')}{groups} of {counts.read} ({counts.empty} "
            f"empty, {format_count(counts.duplicates, 'duplicate')}{copies}), that is {counts.train} to train on and "
            f"{counts.held_out} held out: at least one of each is needed, so add "
            f"{'groups' if groups else 'rows'}{advice}."
        )
    if config.label_column is not None:
        dataset.labels = choose_labels(config, dataset.description, dataset.train, dataset.held_out, notify)
    return dataset


def _sample(digests: Collection[bytes], size: int | None) -> Collection[bytes]:
    """Return the sample of this size; None takes all. A smaller one is a part of a larger one."""
    if size is None or size >= len(digests):
        return digests
    # By a hash of the hash: the digests alone would select held-out rows first.
    return set(heapq.nsmallest(size, digests, key=lambda digest: hashlib.sha256(digest).digest()))


def describe_data(dataset: Dataset, requested: TrainConfig, use: TextUse | None = None) -> list[str]:
    """Describe, in a line for each dataset, what is read, and how much of it is trained on."""
    lines, total = [], sum(dataset.weights)
    for source in dataset.sources:
        name = f"Data {source.name}" if len(dataset.sources) > 1 else "Data"
        weight = f", {format_share(source.weight / total)} of the sequences" if source.weight else ""
        stream = "first rows of the stream: " if requested.streaming else ""
        lines.append(
            f"{name}: {source.layout} (--clean {source.clean or 'auto'}){weight}; {stream}{source.counts}"
        )
    parts = [lines.pop()]
    if use is not None:
        shares = f"{format_share(use.share)} of the training text is used"
        if use.answer_share is not None:
            shares = f"{format_share(use.share)} of the tokens and {format_share(use.answer_share)} of the answers are used"
        if use.truncated_rows and dataset.labels:
            shares += f", as the middle of {format_rows(use.truncated_rows)} over --max-length is left out"
        elif use.truncated_rows:
            unit = "answer" if requested.learns_preferences else "row"
            shares += f", as --max-length truncates {format_count(use.truncated_rows, unit)}"
        parts.append(shares)
    if dataset.splits:
        parts.append(f"splits: {dataset.splits}")
    if dataset.group_by is not None:
        parts.append(f"held out by {dataset.group_by}")
    return [f"{line}." for line in [*lines, "; ".join(parts)]]


def load_eval_dataset(config: TrainConfig, notify: EventHandler = ignore_events) -> dict[bytes, TextRow]:
    """Load all rows of `config.eval_dataset`, cleaned and without duplicates.

    Returns:
        The row of each hash, in the order of the hashes.
    """
    name = str(config.eval_dataset)
    if name == HELD_OUT:
        raise DataError(
            f"--eval-dataset {HELD_OUT} means rows of the training data: only train can hold them out."
        )
    split = config.eval_split or default_eval_split(config)
    source, rows = Source(name), _UniqueRows()
    # What is said about the dataset itself is not said again.
    source_notify = ignore_events if name == config.dataset else notify
    _read_unique(eval_source(config, split), source, rows, source_notify)
    source.report_invalid(config.max_invalid, notify)
    if not rows:
        raise DataError(f"{source.description} has no usable row to evaluate on.")
    description = f"{source.description} ({split})" if split else source.description
    notify(
        Notice(f"Evaluation on {description}: {format_count(len(rows), 'usable row')} of {source.counts.read:,}.")
    )
    return dict(sorted(rows.items()))


def eval_hashes(rows: Mapping[bytes, TextRow]) -> frozenset[bytes]:
    """Return the hashes of the rows and groups of an evaluation dataset, which are not trained on."""
    return frozenset(rows).union(row.side for row in rows.values())


def _read_unique(
    config: TrainConfig,
    source: Source,
    rows: _UniqueRows,
    notify: EventHandler,
    *,
    first_only: bool = False,
) -> None:
    """Add the rows of a source that are not there yet.

    Args:
        first_only: Stop after the rows of one shuffle buffer, and the held-out rows to evaluate on.
    """
    train = held_out = 0
    for row in iter_rows(config, source, notify):
        if row.digest in rows:
            source.counts.duplicates += 1
            if len(source.copies) < MAX_COPIES:
                source.copies.append((row.text, source.place, rows[row.digest].text))
            continue
        rows[row.digest] = row if source.counts.read <= _RAW_ROWS else row._replace(raw="")
        if first_only:
            held_out += is_held_out(row.side)
            train += not is_held_out(row.side)
            enough_held_out = config.other_eval_dataset or held_out >= config.eval_rows_limit
            if enough_held_out and train >= config.shuffle_buffer:
                break
