"""Choose training rows and unseen rows that differ by chance alone, if no single row is known.

A hash decides which rows are held out, so the two kinds are exchangeable, whatever the texts are.
What would break that is undone by rules that do not look at the side of a row:

- The rows of a group or a document are on one side together: they are one unit, with as large a
  share of its rows on either side.
- A run of less than an epoch sees a row of several chunks more often than one of a single chunk,
  and rows of one length together, as they are packed: then rows of a single chunk are compared,
  and exchanged with rows of about their length.
- Training leaves out near duplicates of held-out rows: rows with a near duplicate are not compared.
- Datasets may have other shares in training: rows are exchanged within a dataset.

Other data to measure on, and blocks of a text, are not chosen by a hash: `unequal` says so.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..config import HELD_OUT, HELD_OUT_MAX_TOKENS, TrainConfig
from ..data import chat, tokenization
from ..data.held_out import measured_rows
from ..data.near_duplicates import NearDuplicates
from ..data.preferences import learned_texts
from ..data.rows import Source, iter_rows
from ..data.splitting import is_held_out, row_hash, split_document
from ..errors import DataError, EventHandler, Progress
from ..text import display_name
from .subject import ReportSubject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TRAINING_ROWS, MAX_UNSEEN_ROWS, MAX_UNIT_ROWS = 128, 256, 16
_MAX_ENCODED = 1_024  # training rows whose length is looked at
_LENGTHS = 5  # classes of rows by their length, if a run has seen a part of an epoch
_BATCH = 10_000  # rows that are compared at once, to find near duplicates


@dataclass(frozen=True)
class ComparedRow:
    """A row as it is measured, such as a part of a document.

    `unit` is the same for all rows of a group or document; units are exchanged within a `stratum`,
    such as a dataset. `place` says where in the data the row stands. `copies` counts the rows of
    other units that nearly copy it.
    """

    text: str
    unit: str
    stratum: int
    place: str
    is_train: bool
    copies: int = 0


@dataclass(frozen=True)
class ComparedRows:
    """Training rows and unseen rows; both are in an order of chance, units together.

    `unequal` is the reason why they may differ even if no row is known; None if chance alone
    decides. `seen_tokens` is the number of tokens of a row that count.
    """

    rows: list[ComparedRow]
    unequal: str | None
    seen_tokens: int


class _Part(NamedTuple):
    """A row as it is measured: the whole row or document that it is of, the hash of its unit, and
    the number of its dataset and of its class of lengths."""

    text: str
    whole: str
    digest: bytes
    unit: bytes
    dataset: int
    place: str
    length: int = 0

    @property
    def stratum(self) -> int:
        return self.dataset * _LENGTHS + self.length


_Sides = tuple[list[_Part], list[_Part]]  # of training, and unseen


def choose_rows(subject: ReportSubject, tokenizer: "PreTrainedTokenizerBase") -> ComparedRows:
    """Choose up to 128 rows that the run has seen, and up to 256 held-out ones.

    Price: the data is read once more, for the places and groups of its rows, and for near duplicates.

    Raises:
        DataError: the rows of either kind are unknown, or too few.
    """
    config, held_out, notify = subject.config, subject.held_out, subject.options.notify
    missing = held_out.missing or subject.train_missing
    if missing or config is None:
        raise DataError(f"{missing or 'its training rows are unknown'}.")
    parts = _read_parts(config, subject.adapter.name, notify)
    trained = {*subject.train_texts}
    training = [part for part in parts if part.whole in trained]
    others = {part.text: part for part in reversed(parts) if part.whole not in trained}
    unequal = _why_unequal(subject, {part.whole for part in training}, {*others})
    groups = held_out.groups or range(len(held_out.texts))
    unseen = [
        others.get(text) or _Part(text, text, row_hash(text, ""), b"%d" % group, 0, "")
        for text, group in zip(held_out.texts, groups, strict=True)
    ]
    if not training:
        training = _parts_of_text(subject.train_texts, display_name(config.dataset_names[0]))
    is_part = _has_seen_a_part(subject)
    if is_part:
        training, unseen = (_single_chunks(side, config, tokenizer) for side in (training, unseen))
        training, unseen = _set_lengths(training, unseen, 1 if held_out.groups else _LENGTHS)
    if held_out.groups and not unequal:
        training, unseen = _equal_rates(training, unseen, parts)
    training, unseen = _first_units(training, unseen)
    if min(len(training), len(unseen)) < 2:
        seen = " that it has seen as a whole" if is_part else ""
        raise DataError(f"it takes two training rows{seen} and two held-out ones to compare them.")
    copies = Counter[str]() if unequal else _count_copies([*training, *unseen], parts, notify)
    rows = [
        ComparedRow(
            text=part.text,
            unit=part.unit.hex(),
            stratum=part.stratum,
            place=part.place,
            is_train=is_train,
            copies=copies[part.whole],
        )
        for side, is_train in ((training, True), (unseen, False))
        for part in side
    ]
    if not unequal and min(_count_units(rows, is_train=side) for side in (True, False)) < 2:
        unequal = "nearly all rows have near duplicates, or are of one group"
    is_cut = any(_is_truncated(text, config) for text in subject.train_texts)
    seen_tokens = min(HELD_OUT_MAX_TOKENS, config.max_length) if is_cut else HELD_OUT_MAX_TOKENS
    return ComparedRows(rows, unequal, seen_tokens)


def _read_parts(config: TrainConfig, adapter: str, notify: EventHandler) -> list[_Part]:
    """Read all different rows of the data, documents in the parts that would be measured."""
    stage, parts, seen = f"rows of the data of {adapter}", list[_Part](), set[bytes]()
    names = config.dataset_names
    for number, name in enumerate(names):
        notify(Progress(stage, number, len(names)))
        source = Source(name, number)
        for row in iter_rows(config, source):
            if row.digest in seen:
                continue
            seen.add(row.digest)
            assert source.at is not None
            file = source.at[0].source
            place = display_name(file) + source.place.removeprefix(file)
            for text in learned_texts([row.text]):
                for part in measured_rows(row._replace(text=text), config.split_salt):
                    parts.append(_Part(part.text, text, part.digest, part.side, number, place))
    notify(Progress(stage, len(names), len(names)))
    return parts


def _why_unequal(subject: ReportSubject, training: set[str], unseen: set[str]) -> str | None:
    """Return the reason why no hash has decided which rows are held out; None if one has.

    Args:
        training: rows of the data that were trained on; `unseen` those that were not, in parts.
    """
    data = subject.adapter.manifest.data if subject.adapter.manifest else None
    if data is not None and data.eval_dataset not in (None, HELD_OUT):
        return f"the unseen rows are of {display_name(str(data.eval_dataset))}, which is other data"
    if training >= {*subject.train_texts} and unseen >= {*subject.held_out.texts}:
        return None
    return "the unseen rows are blocks of a text whose rest it was trained on"


def _parts_of_text(texts: Sequence[str], place: str) -> list[_Part]:
    """Divide texts of which blocks were held out as these are."""
    return [
        _Part(part, text, row_hash(part, ""), row_hash(text, ""), 0, place)
        for text in texts
        for part in split_document(text)
    ]


def _has_seen_a_part(subject: ReportSubject) -> bool:
    """Return whether the run may have seen some chunks of a row and not others."""
    config, manifest = subject.config, subject.adapter.manifest
    if config is None or manifest is None or manifest.run is None or manifest.data is None:
        return True
    run = manifest.run
    per_step = (config.batch_size or 1) * config.gradient_accumulation * run.processes
    has_weights = any(weight is not None for _, weight in config.weighted_datasets)
    leaves_rows = len(subject.train_texts) < manifest.data.counts.get("train", 0)
    return run.kept_step * per_step < run.sequences or (has_weights and leaves_rows)


def _is_truncated(text: str, config: TrainConfig) -> bool:
    """Return whether training cuts such a row at its maximum length, and drops the rest."""
    is_cut = config.long_rows == "truncate" or config.learns_preferences
    return is_cut or (config.long_rows == "auto" and chat.is_chat(text))


def _single_chunks(
    parts: Sequence[_Part], config: TrainConfig, tokenizer: "PreTrainedTokenizerBase"
) -> list[_Part]:
    """Return parts of rows that are a single row of training, with its tokens as their length.

    Of very many rows some are looked at, by chance.
    """
    some = sorted(parts, key=lambda part: _draw("length", part.digest))[:_MAX_ENCODED]
    most, wholes = config.max_length, [part.whole for part in some]
    encoded = tokenization.encode_texts(tokenizer, wholes, max_tokens=most + 1, invalid={})
    return [
        part._replace(length=min(len(row), most))
        for part, row in zip(some, encoded, strict=True)
        if len(row) <= most or _is_truncated(part.whole, config)
    ]


def _set_lengths(training: Sequence[_Part], unseen: Sequence[_Part], classes: int) -> _Sides:
    """Replace lengths in tokens by classes with about as many rows of both sides together."""
    tokens = [part.length for part in (*training, *unseen)]
    edges = np.quantile(tokens or [0], np.arange(1, classes) / classes)

    def classified(side: Sequence[_Part]) -> list[_Part]:
        return [part._replace(length=int(np.searchsorted(edges, part.length))) for part in side]

    return classified(training), classified(unseen)


def _equal_rates(training: Sequence[_Part], unseen: Sequence[_Part], parts: Sequence[_Part]) -> _Sides:
    """Leave out rows by chance until units have the same share of their rows on both sides.

    Of held-out groups the first rows by hash are measured; of others a run may have seen a part.
    """
    all_rows = Counter((part.dataset, is_held_out(part.unit)) for part in parts)
    chosen = Counter((part.dataset, False) for part in training)
    chosen.update((part.dataset, True) for part in unseen)
    rates = {key: count / max(all_rows[key], 1) for key, count in chosen.items()}

    def thin(side: Sequence[_Part], *, held_out: bool) -> list[_Part]:
        kept = []
        for part in side:
            other_rate = rates.get((part.dataset, not held_out), 0.0)
            if _number(part.digest) < other_rate / rates[part.dataset, held_out]:
                kept.append(part)
        return kept

    return thin(training, held_out=False), thin(unseen, held_out=True)


def _first_units(training: Sequence[_Part], unseen: Sequence[_Part]) -> _Sides:
    """Choose units of both sides by chance, of training as many in each stratum as unseen ones say.

    The numbers follow from the unseen rows alone: else large units would be chosen more often.
    """
    units = _by_unit(unseen)
    rows_per_unit = sum(map(len, units.values())) / max(len(units), 1) or 1.0
    left = Counter[int]()
    for stratum, count in Counter(stratum for stratum, _ in units).items():
        left[stratum] = max(round(MAX_TRAINING_ROWS / rows_per_unit * count / len(units)), 1)
    chosen: list[_Part] = []
    for (stratum, _), rows in _by_unit(training).items():
        if left[stratum]:
            left[stratum] -= 1
            chosen += rows
    most = max(int(MAX_UNSEEN_ROWS / rows_per_unit), 1)
    return chosen, [part for rows in [*units.values()][:most] for part in rows]


def _by_unit(parts: Sequence[_Part]) -> dict[tuple[int, bytes], list[_Part]]:
    """Group parts by stratum and unit, in an order of chance; of a large unit some of its parts."""
    ordered = sorted(parts, key=lambda part: _draw("row", part.digest))
    ordered.sort(key=lambda part: _draw("unit", part.unit))
    units: dict[tuple[int, bytes], list[_Part]] = {}
    for part in ordered:
        rows = units.setdefault((part.stratum, part.unit), [])
        if len(rows) < MAX_UNIT_ROWS:
            rows.append(part)
    return units


def _draw(purpose: str, digest: bytes) -> bytes:
    """Return random bytes that a digest decides, others for each purpose."""
    return hashlib.sha256(purpose.encode() + digest).digest()


def _number(digest: bytes) -> float:
    """Return a random number from 0 to 1 that a digest decides."""
    return int.from_bytes(_draw("rate", digest)[:8]) / 2**64


def _count_copies(chosen: Sequence[_Part], parts: Sequence[_Part], notify: EventHandler) -> Counter[str]:
    """Count for each chosen row, as a whole, those of other units that nearly copy it."""
    units = {part.whole: part.unit for part in parts}
    compared = list(dict.fromkeys(part.whole for part in chosen))
    index, copies, texts = NearDuplicates(compared), Counter[str](), list(units)
    for first in range(0, len(texts), _BATCH):
        batch = texts[first : first + _BATCH]
        for text, matches in zip(batch, index.find_all(batch), strict=True):
            copied = [compared[match] for match in matches]
            copies.update(other for other in copied if units[other] != units[text])
        notify(Progress("near duplicates of compared rows", first + len(batch), len(texts)))
    return copies


def _count_units(rows: Sequence[ComparedRow], *, is_train: bool) -> int:
    """Count the units of a side that have a row without near duplicates."""
    return len({row.unit for row in rows if row.is_train is is_train and not row.copies})
