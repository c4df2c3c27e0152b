"""Report on a dataset before training: counts, lengths, near duplicates, languages, personal data, trouble.

The counts are of all rows, as training counts them. The rest is of at most `SAMPLE_ROWS` rows,
those that `--max-rows` would take. All text in a report is an excerpt with its personal data
replaced."""

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..config import ModelOptions, TrainConfig
from ..data import labels, preferences, tokenization
from ..data.dataset import Dataset, load_dataset
from ..data.dropped import DroppedCopy, find_dropped
from ..data.near_duplicates import clusters
from ..errors import BaseModelError, DataError, EventHandler, HubError, Notice, Progress, ignore_events
from ..text import display_name, format_count
from .lengths import Lengths, describe_lengths, find_outliers
from .row_checks import EncodingTrouble, Language, PersonalData, check_texts
from .sample import Example, Excerpts, SampledRow, read_sample, readable, spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_ROWS = 50_000
_EXAMPLES = 5
_MEMBERS = 3  # rows of a cluster that are shown
_BATCH = 1_000


@dataclass(frozen=True)
class Invalid:
    """Rows that cannot be read for a reason, and the place of the first."""

    reason: str
    rows: int
    first: str


@dataclass(frozen=True)
class NearDuplicates:
    """Clusters of rows that are nearly copies of one another.

    `rows` are in clusters; `spare_rows` would go if each cluster kept one row.
    """

    clusters: int
    rows: int
    spare_rows: int
    largest: int
    examples: list[list[Example]]


@dataclass(frozen=True)
class Losses:
    """Loss of the base on rows, in nats per token, as held-out loss is measured."""

    base: str
    rows: int
    loss: float
    hardest: list[Example]
    easiest: list[Example]


@dataclass(frozen=True)
class DataReport:
    """Figures of a dataset.

    Attributes:
        counts: Rows read, and what became of them (`RowCounts`).
        sources: The same of each dataset, if there are several.
        contents: Usable rows of each label, by "labels"; pairs, or desired and undesired answers, and
            prompts, by "preferences".
        stops_training: Too many rows are invalid for `--max-invalid`.
        sampled_rows: Rows that all figures but the counts are of.
        is_sample: These are not all usable rows.
        personal_rows: Rows with personal data of any kind.
        long, short: Rows that are far longer or shorter than the others.
        dropped: Examples of rows that training leaves out as copies.
        hints: What is missing in the report and why, and what would stop training.
    """

    dataset: str
    source: str
    layout: str
    clean: str
    counts: dict[str, int]
    sources: dict[str, dict[str, int]]
    contents: dict[str, dict[str, int]]
    invalid: list[Invalid]
    stops_training: bool
    sampled_rows: int
    is_sample: bool
    lengths: Lengths
    long: list[Example]
    long_rows: int
    short: list[Example]
    short_rows: int
    near_duplicates: NearDuplicates
    languages: list[Language] | None
    personal_data: list[PersonalData]
    personal_rows: int
    encoding: list[EncodingTrouble]
    losses: Losses | None
    dropped: list[DroppedCopy]
    hints: list[str]

    def to_dict(self) -> dict[str, object]:
        """All figures for JSON."""
        return asdict(self)


def make_report(
    config: TrainConfig,
    notify: EventHandler = ignore_events,
    *,
    region: str | None = None,
    loss_rows: int = 0,
    sample_rows: int = SAMPLE_ROWS,
) -> DataReport:
    """Read a dataset as training does, and report on it.

    Price: the data is read twice; 25,000 reviews take about a minute on two cores.

    Args:
        region: Also find national phone numbers of this region.
        loss_rows: Measure the loss of the base on so many rows.
        sample_rows: Limit of the rows that all but the counts are of.

    Raises:
        DataError: The data cannot be read, or too few rows are left to train on.
    """
    lenient = config.model_copy(update={"max_invalid": 1.0})
    hints: list[str] = []
    excerpts = Excerpts(region)
    dataset = _load(lenient, excerpts, hints, notify)
    rows, is_sample = read_sample(lenient, sample_rows)
    lengths, lengths_of_rows = _measure_lengths(config, rows, excerpts, hints, notify)
    long, short = find_outliers(lengths_of_rows)
    texts = check_texts(rows, dataset.clean or "none", excerpts, hints, notify)
    counts, several = asdict(dataset.counts), len(dataset.sources) > 1
    if loss_rows and lengths.tokenizer is None:
        hints.append("The loss is not measured, as the base cannot read these rows.")

    def examples(positions: Sequence[int]) -> list[Example]:
        return [
            excerpts.example(rows[position], f"{lengths_of_rows[position]:,} {lengths.unit}")
            for position in positions[:_EXAMPLES]
        ]

    return DataReport(
        dataset=display_name(dataset.name),
        source=display_name(dataset.description),
        layout=dataset.layout,
        clean=dataset.clean or "auto",
        counts=counts,
        sources={display_name(source.name): asdict(source.counts) for source in dataset.sources}
        if several
        else {},
        contents=_count_contents(config, dataset, excerpts),
        invalid=_invalid_reasons(dataset, excerpts),
        stops_training=any(
            source.counts.invalid > config.max_invalid * source.counts.read for source in dataset.sources
        ),
        sampled_rows=len(rows),
        is_sample=is_sample,
        lengths=lengths,
        long=examples(long),
        long_rows=len(long),
        short=examples(short),
        short_rows=len(short),
        near_duplicates=_find_near_duplicates(rows, excerpts, notify),
        languages=texts.languages,
        personal_data=texts.personal_data,
        personal_rows=texts.personal_rows,
        encoding=texts.encoding,
        losses=_measure_losses(config, rows, loss_rows, excerpts, notify)
        if loss_rows and lengths.tokenizer
        else None,
        dropped=_find_dropped(lenient, dataset, excerpts),
        hints=hints,
    )


def _find_dropped(config: TrainConfig, dataset: Dataset, excerpts: Excerpts) -> list[DroppedCopy]:
    dropped, _ = find_dropped(config.model_copy(update={"clean": dataset.clean or config.clean}), dataset)

    def shown(place: str) -> str:
        for source in dataset.sources:
            place = _without_folder(place, source.name)
        return excerpts.mask(place)

    return [
        DroppedCopy(
            excerpts.excerpt(copy.text),
            shown(copy.place),
            excerpts.excerpt(copy.kept_text),
            shown(copy.kept_place),
            copy.is_near,
        )
        for copy in dropped
    ]


def _load(config: TrainConfig, excerpts: Excerpts, hints: list[str], notify: EventHandler) -> Dataset:
    """Load the rows as training does; with their near duplicates, if training stops without these."""
    try:
        return load_dataset(config, notify)
    except DataError as error:
        if config.near_duplicates == "keep":
            raise
        dataset = load_dataset(config.model_copy(update={"near_duplicates": "keep"}))
        hints.append(excerpts.mask(f"Training would stop: {error}"))
        return dataset


def _count_contents(config: TrainConfig, dataset: Dataset, excerpts: Excerpts) -> dict[str, dict[str, int]]:
    """Count labels, or what there is of preferences, in the rows to train on and those held out."""
    rows = [*dataset.train, *dataset.held_out_rows]
    if config.label_column is not None:
        counts = labels.count_labels(rows)
        names = [*dataset.labels] or sorted(counts)
        return {"labels": {excerpts.mask(name): counts[name] for name in names}}
    if not config.learns_preferences:
        return {}
    answers = Counter(name for row in rows for name in preferences.answer_texts(row))
    answers["pairs"] = answers.pop("chosen", 0)
    answers["prompts"] = len({preferences.prompt_of(row) for row in rows} - {""})
    shown = ("pairs", "desired", "undesired", "prompts")
    return {"preferences": {name: answers[name] for name in shown if answers[name]}}


def _invalid_reasons(dataset: Dataset, excerpts: Excerpts) -> list[Invalid]:
    reasons = [
        Invalid(excerpts.mask(reason), count, excerpts.mask(_without_folder(first, source.name)))
        for source in dataset.sources
        for reason, (count, first) in source.invalid.items()
    ]
    return sorted(reasons, key=lambda invalid: -invalid.rows)


def _without_folder(place: str, source: str) -> str:
    """Return a place in a file without the local folder that the dataset lies in."""
    folder = os.path.dirname(os.path.expanduser(source))
    return place.removeprefix(folder + os.sep) if folder else place


# Lengths


def _measure_lengths(
    config: TrainConfig, rows: Sequence[SampledRow], excerpts: Excerpts, hints: list[str], notify: EventHandler
) -> tuple[Lengths, list[int]]:
    """Return the lengths of the rows in tokens of the base; in words, if it cannot be had."""
    from ..models import resolve
    from ..models.tokenizer import load_tokenizer

    try:
        files = resolve.find_base(config.base, config.revision, notify)
        tokenizer = load_tokenizer(files)
    except (HubError, BaseModelError) as error:
        if config.base is not None:
            raise
        return _count_words(config, rows, hints, f"no tokenizer can be read. {error}")
    try:
        use = _tokenize(tokenizer, rows, config, excerpts, hints, notify)
    except DataError as error:  # the base has no chat template
        return _count_words(config, rows, hints, str(error))
    lengths = describe_lengths(
        use.row_tokens,
        config.max_length,
        tokenizer=files.name,
        truncated_rows=use.truncated_rows,
        used_share=use.share,
    )
    return lengths, use.row_tokens


def _count_words(
    config: TrainConfig, rows: Sequence[SampledRow], hints: list[str], reason: str
) -> tuple[Lengths, list[int]]:
    hints.append(f"Lengths are in words: {reason}")
    words = [len(readable(row.text).split()) for row in rows]
    return describe_lengths(words, config.max_length, tokenizer=None), words


def _tokenize(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[SampledRow],
    config: TrainConfig,
    excerpts: Excerpts,
    hints: list[str],
    notify: EventHandler,
) -> tokenization.TextUse:
    total = tokenization.TextUse()
    invalid: tokenization.InvalidRows = {}
    for begin in range(0, len(rows), _BATCH):
        texts = [row.text for row in rows[begin : begin + _BATCH]]
        if config.learns_preferences:
            _, use, _ = preferences.encode_rows(tokenizer, texts, config.max_length, invalid)
            sides = [iter(use.row_tokens)] * config.sides_per_row
            use.row_tokens = list(map(max, zip(*sides, strict=True)))
            use.truncated_rows = sum(length > config.max_length for length in use.row_tokens)
        else:
            _, use = tokenization.encode_rows(tokenizer, texts, config.max_length, config.long_rows, invalid)
        total += use
        notify(Progress("counting tokens", min(begin + _BATCH, len(rows)), len(rows)))
    if config.sides_per_row == 2:
        hints.append("The length of a pair is that of its longer answer, with the prompt.")
    if invalid:
        reason = next(iter(invalid.values()))
        hints.append(
            f"The chat template of the base cannot write {format_count(len(invalid), 'conversation')}, "
            f"such as one with {excerpts.mask(str(reason))}: training leaves them out, and they "
            "count as 0 tokens here."
        )
    return total


# Near duplicates


def _find_near_duplicates(rows: Sequence[SampledRow], excerpts: Excerpts, notify: EventHandler) -> NearDuplicates:
    notify(Progress("near duplicates", 0, 1))
    found = clusters([row.text for row in rows])
    notify(Progress("near duplicates", 1, 1))
    return NearDuplicates(
        clusters=len(found),
        rows=sum(map(len, found)),
        spare_rows=sum(map(len, found)) - len(found),
        largest=len(found[0]) if found else 0,
        examples=[
            [excerpts.example(rows[position]) for position in cluster[:_MEMBERS]] for cluster in found[:_EXAMPLES]
        ],
    )


# Loss


def _measure_losses(
    config: TrainConfig, rows: Sequence[SampledRow], limit: int, excerpts: Excerpts, notify: EventHandler
) -> Losses | None:
    """Measure the base on rows as on held-out rows; None if none of them has anything to predict."""
    from ..evaluation import held_out_loss
    from ..models import loading, packing_checks

    options = ModelOptions(
        base=config.base,
        revision=config.revision,
        device=config.device,
        dtype=config.dtype,
        load_in=config.load_in,
        notify=notify,
    )
    base = loading.open_base(None, options, training=True)
    packing_checks.enable_fast_paths(base)
    rows = spread(rows, limit)
    encoded = held_out_loss.encode_measured(base, [preferences.first_side(row.text) for row in rows], {})
    if not encoded:
        notify(Notice("No row has anything to predict, so no loss is measured."))
        return None
    measured = [rows[index] for index in encoded]
    result = held_out_loss.measure_base_loss(base, [*encoded.values()], notify)
    losses = [nll / tokens for nll, tokens in zip(result.nll, result.predictions, strict=True)]
    order = sorted(range(len(losses)), key=losses.__getitem__)

    def examples(positions: Sequence[int]) -> list[Example]:
        return [
            excerpts.example(
                measured[position],
                f"{losses[position]:.3f} ({format_count(result.predictions[position], 'token')})",
            )
            for position in positions
        ]

    count = min(_EXAMPLES, math.ceil(len(order) / 2))
    return Losses(
        base.files.name, len(losses), result.loss, examples(order[::-1][:count]), examples(order[:count])
    )
