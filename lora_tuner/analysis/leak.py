"""Show how much of a gain comes from held-out rows that have a near duplicate among the training rows.

For adapters of before `near_duplicates`, or trained with `keep`. The training rows are read again
from the dataset that run.yaml names, and compared as training would (data/near_duplicates.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..adapters.adapter import RUN_FILE, Adapter
from ..adapters.gains import gain_on, paired_gain
from ..adapters.manifest import EvalResult
from ..config import ModelOptions, TrainConfig
from ..data import eval_sets
from ..data.dataset import Dataset, eval_hashes, load_eval_dataset
from ..data.eval_sets import EvalSet
from ..data.held_out import measured_rows
from ..data.near_duplicates import NearDuplicates
from ..data.preferences import first_side
from ..data.rows import Source, iter_rows
from ..data.splitting import is_held_out
from ..errors import DataError, EventHandler, LoraTunerError, Notice, Progress
from ..evaluation import gain_matrix, held_out_loss
from ..models import lora
from ..models.loading import LoadedBase
from ..models.tokenizer import load_adapter_tokenizer
from .subject import config_of_run, load_dataset_of_run

_STREAM_BATCH = 10_000  # rows of a stream that are compared at once


@dataclass(frozen=True)
class Leak:
    """Gain of an adapter on its held-out rows, and on those with and without a near duplicate in training.

    A part is None without rows. `training_rows` were compared, and `copies` of them nearly copy a
    measured row. `share` is the part of the gain that comes from rows with a copy; None if there is
    no gain. `missing` is the reason for no figures.
    """

    adapter: str
    missing: str | None = None
    training_rows: int = 0
    copies: int = 0
    all_rows: EvalResult | None = None
    with_copy: EvalResult | None = None
    without_copy: EvalResult | None = None
    share: float | None = None

    def to_dict(self) -> dict[str, object]:
        """All figures for JSON."""
        parts = {"all": self.all_rows, "with_copy": self.with_copy, "without_copy": self.without_copy}
        return {
            "name": self.adapter,
            "missing": self.missing,
            "training_rows": self.training_rows,
            "copies": self.copies,
            **{name: result and result.model_dump() for name, result in parts.items()},
            "share": self.share,
        }


def measure_leak(
    adapters: Sequence[Adapter], *, eval_rows: int | None = None, options: ModelOptions = ModelOptions()
) -> list[Leak]:
    """Measure each adapter on the rows that it was evaluated on when it was trained.

    Price: the data is read again; the losses are in the cache, if they are those of training.

    Args:
        eval_rows: use only the first rows of each set.

    Raises:
        AdapterError: the adapters do not share one base.
    """
    base: LoadedBase | None = None
    leaks = []
    for adapter in adapters:
        rows = gain_matrix.cached_rows(adapter, options.notify, all_rows=eval_rows is not None)
        (rows,) = eval_sets.select_rows([rows], eval_rows)
        try:
            if rows.missing:
                raise DataError(rows.missing)
            leak, copied = _compare(adapter, rows, options.notify)
        except LoraTunerError as error:
            leaks.append(Leak(adapter.name, missing=str(error).rstrip(".")))
            continue
        base = base or gain_matrix.open_base_of(adapters, options)
        lora.check_base(adapter, base, options)
        leaks.append(_measure(base, adapter, rows, leak, copied, options))
    return leaks


def _compare(adapter: Adapter, rows: EvalSet, notify: EventHandler) -> tuple[Leak, set[str]]:
    """Return the counts of training rows, and the measured rows that have a near duplicate among them."""
    config = config_of_run(adapter)
    if config.streaming and config.near_duplicates == "drop":
        raise DataError("near duplicates of its measured rows were left out of the stream in training")
    notify(Progress(f"training rows of {adapter.name}", 0, 1))
    measured = {*rows.texts}
    if config.streaming:
        compared, batches = {text: {text} for text in rows.texts}, _stream_batches(adapter, config)
    else:
        dataset = load_dataset_of_run(config, measured)
        if not dataset.compared:
            raise DataError("its measured rows are blocks of texts, which are compared with nothing")
        compared, batches = _measured_rows(dataset, measured, config.split_salt), iter([dataset.train])
    index, rows_of = NearDuplicates([*compared]), [*compared.values()]
    training_rows = copies = 0
    copied: set[str] = set()
    for texts in batches:
        matches = [set[str]().union(*(rows_of[number] for number in found)) for found in index.find_all(texts)]
        training_rows += len(texts)
        copies += sum(map(bool, matches))
        copied.update(*matches)
    notify(Progress(f"training rows of {adapter.name}", 1, 1))
    if adapter.manifest and adapter.manifest.parents:
        parents = ", ".join(parent.name for parent in adapter.manifest.parents)
        notify(Notice(f"{adapter.name} continues from {parents}, whose training rows are not compared."))
    return Leak(adapter.name, training_rows=training_rows, copies=copies), copied


def _measured_rows(dataset: Dataset, measured: set[str], salt: str) -> dict[str, set[str]]:
    """Return for each row that training compares, such as a document, the measured rows in it."""
    return {
        row.text: {first_side(part.text) for part in measured_rows(row, salt)} & measured
        for row in dataset.compared
    }


def _stream_batches(adapter: Adapter, config: TrainConfig) -> Iterator[list[str]]:
    """Yield the training rows of a stream, no more than were read of it."""
    assert adapter.manifest is not None
    assert adapter.manifest.data is not None
    data = adapter.manifest.data
    read = [source.counts.get("read", 0) for source in data.sources] or [data.counts.get("read", 0)]
    if len(read) != len(config.dataset_names):
        raise DataError(f"its {RUN_FILE} and its manifest name different datasets")
    excluded = eval_hashes(load_eval_dataset(config)) if config.other_eval_dataset else frozenset[bytes]()
    for number, name in enumerate(config.dataset_names):
        texts: list[str] = []
        source = Source(name, number)
        for row in iter_rows(config, source):
            if source.counts.read > read[number]:
                break
            if not is_held_out(row.side) and excluded.isdisjoint((row.digest, row.side)):
                texts.append(row.text)
            if len(texts) == _STREAM_BATCH:
                yield texts
                texts = []
        yield texts


def _measure(
    base: LoadedBase, adapter: Adapter, rows: EvalSet, leak: Leak, copied: set[str], options: ModelOptions
) -> Leak:
    tokenizer = load_adapter_tokenizer(adapter, base, options)
    encoded = held_out_loss.encode_measured(
        base if tokenizer is None else replace(base, tokenizer=tokenizer), rows.texts, {}
    )
    rows = rows.select([*encoded])
    ((pair,),) = gain_matrix.held_out_losses(
        base, {adapter.name: adapter}, [rows], options.notify, options=options
    )
    if pair is None:
        return replace(leak, missing="none of its held-out rows has anything to predict")
    with_copy = [number for number, text in enumerate(rows.texts) if text in copied]
    without_copy = [number for number, text in enumerate(rows.texts) if text not in copied]
    all_rows, leaked = paired_gain(*pair), gain_on(with_copy, *pair)
    share: float | None = None
    if all_rows.gain > 0:
        share = leaked.gain * leaked.tokens / (all_rows.gain * all_rows.tokens) if leaked else 0.0
    unleaked = gain_on(without_copy, *pair)
    return replace(leak, all_rows=all_rows, with_copy=leaked, without_copy=unleaked, share=share)
