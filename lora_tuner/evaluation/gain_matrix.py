"""Gain of each adapter over the base on each set of held-out rows."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

from ..adapters import plots, summaries
from ..adapters.adapter import RUN_FILE, Adapter
from ..adapters.gains import HeldOutLoss, LossPair, paired_gain
from ..adapters.library import check_distinct_names
from ..adapters.manifest import EvalResult
from ..config import HELD_OUT_MAX_TOKENS, ModelOptions
from ..data import eval_sets, tokenization
from ..data.eval_sets import EvalSet
from ..data.tokenization import TokenIds
from ..errors import AdapterError, EventHandler, Notice, ignore_events
from ..inference.multi_lora import MultiLora
from ..models import loading, lora, memory, packing_checks
from ..models.loading import LoadedBase
from ..models.tokenizer import load_adapter_tokenizer
from . import held_out_loss
from .held_out_loss import Context, ModelAccess, direct_access


@dataclass(frozen=True)
class GainMatrix:
    """Gain of each adapter over the base on each set of rows.

    `cells[adapter][set]` is None where rows are missing. A negative gain on the rows of another
    adapter means that this one has forgotten such text.
    """

    base: str  #: name of the base
    adapters: list[str]  #: names of the adapters
    sets: list[EvalSet]
    cells: list[list[EvalResult | None]]  #: a row for each adapter

    def to_dict(self) -> dict[str, object]:
        """All results for JSON, without the texts of the rows."""
        return {
            "base": self.base,
            "sets": [{"name": rows.name, "rows": len(rows.texts), "missing": rows.missing} for rows in self.sets],
            "adapters": [
                {"name": name, "results": [cell and cell.to_dict() for cell in cells]}
                for name, cells in zip(self.adapters, self.cells, strict=True)
            ],
        }

    def summary(self) -> summaries.Summary:
        """Tables of losses and of gains, and the reasons why sets have no column."""
        columns = [f"{rows.name}\n{rows.format_rows()}" for rows in self.sets]
        missing = [f"{rows.name} has no column: {rows.missing}." for rows in self.sets if rows.missing]
        return [*summaries.gain_tables(self.base, self.adapters, columns, self.cells), *missing]

    def plot(self, to: Path | IO[bytes]) -> None:
        """Write a heat map of the gains as a PNG file."""
        plots.plot_gains(self.base, self.adapters, [rows.name for rows in self.sets], self.cells, to)

    def _repr_html_(self) -> str:
        return summaries.to_html(self.summary())


def evaluate(
    adapters: Sequence[Adapter],
    sets: Sequence[EvalSet] | None = None,
    *,
    eval_rows: int | None = None,
    options: ModelOptions = ModelOptions(),
) -> GainMatrix:
    """Evaluate every adapter on every set of rows.

    Price: one pass over the rows for each cell, and one for the base. Results are kept in the
    user's cache.

    Examples:
        >>> evaluate(Library().get_all(["noir", "verse"]), eval_rows=5).adapters
        ['noir', 'verse']

    Args:
        sets: by default, for each adapter, the rows that it was evaluated on when it was trained.
        eval_rows: use only the first rows of each set.

    Raises:
        AdapterError: the adapters do not share one base, or there are no rows.
    """
    sets = _select_sets(adapters, sets, eval_rows, options.notify)
    return evaluate_on(open_base_of(adapters, options), adapters, sets, options=options)


def open_base_of(adapters: Sequence[Adapter], options: ModelOptions) -> LoadedBase:
    """Load the base of several adapters to measure them, quantized as for training if one was trained so."""
    runs = [adapter.manifest.run for adapter in adapters if adapter.manifest]
    as_trained = any(run is not None and run.load_in == options.load_in for run in runs)
    return open_base(adapters[0], options, training=as_trained)


def open_base(adapter: Adapter, options: ModelOptions, *, training: bool = True) -> LoadedBase:
    """Load the base of an adapter to measure it, in the dtype and with the fast paths of training.

    Args:
        training: quantized as for training, not as for generation.
    """
    files = loading.base_for_adapter(adapter, options)
    dtype = memory.training_dtype(files, loading.choose_device(options.device), options)
    base = loading.load_base(files, replace(options, dtype=dtype), training=training)
    if training or base.load_in == "full":  # weights quantized for generation give no gradients to check with
        packing_checks.enable_fast_paths(base)
    return base


def evaluate_on(
    base: LoadedBase,
    adapters: Sequence[Adapter],
    sets: Sequence[EvalSet] | None = None,
    *,
    eval_rows: int | None = None,
    options: ModelOptions = ModelOptions(),
    access: ModelAccess = direct_access,
) -> GainMatrix:
    """`evaluate` on a base in memory.

    `access` lets something else use the base between batches.
    """
    sets = _select_sets(adapters, sets, eval_rows, options.notify)
    for adapter in adapters:
        lora.check_base(adapter, base, options)
    notify_eval_rows(adapters, options.notify)
    named_adapters = {adapter.name: adapter for adapter in adapters}
    cells = []
    for pairs in held_out_losses(base, named_adapters, sets, options.notify, access, options):
        cells.append([paired_gain(*pair) if pair else None for pair in pairs])
    return GainMatrix(base.files.name, list(named_adapters), sets, cells)


def held_out_losses(
    base: LoadedBase,
    adapters: Mapping[str, Adapter],
    sets: Sequence[EvalSet],
    notify: EventHandler = ignore_events,
    access: ModelAccess = direct_access,
    options: ModelOptions = ModelOptions(),
    max_tokens: int = HELD_OUT_MAX_TOKENS,
) -> list[list[LossPair | None]]:
    """Measure the base and each adapter on each set of rows.

    Args:
        adapters: display name -> adapter.
        options: `force` ignores a tokenizer that is not the base's.
        max_tokens: of a row; fewer than those of a held-out loss where training cuts rows shorter.

    Returns:
        Loss of the base and of the adapter: `losses[adapter][set]`, None where there are no rows.

    Raises:
        AdapterError: an adapter is damaged or replaced meanwhile, or its loss is not finite.
    """
    encode = partial(_encode_and_measure, sets=sets, notify=notify, access=access, max_tokens=max_tokens)
    base_rows = None
    multi_lora = MultiLora(base)
    losses: list[list[LossPair | None]] = []
    for number, (name, adapter) in enumerate(adapters.items(), 1):
        key = held_out_loss.weights_key(adapter)
        loaded = multi_lora.load(adapter)
        adapter_context = partial(multi_lora.apply_hooks, multi_lora.hooks([loaded]))
        if held_out_loss.weights_key(adapter) != key:
            raise AdapterError(f"{name} was replaced while it was loaded: evaluate it again.")
        tokenizer = load_adapter_tokenizer(adapter, base, replace(options, notify=notify))
        # The base is measured on the adapter's rows, so that losses can be paired.
        if tokenizer is not None:
            base_hooks = multi_lora.hooks([multi_lora.untrained(loaded)])
            encoded_sets, base_losses = encode(
                replace(base, tokenizer=tokenizer),
                vocab_size=loaded.vocab_size,
                context=partial(multi_lora.apply_hooks, base_hooks),
            )
        else:
            encoded_sets, base_losses = base_rows = base_rows or encode(base)
        pairs: list[LossPair | None] = []
        for rows, encoded, base_loss in zip(sets, encoded_sets, base_losses, strict=True):
            if base_loss is None:
                pairs.append(None)
                continue
            adapter_loss = held_out_loss.measure_cached(
                base,
                encoded,
                key,
                partial(
                    held_out_loss.measure_loss,
                    base.model,
                    base,
                    encoded,
                    notify,
                    stage=f"{name} on {rows.name} (adapter {number} of {len(adapters)})",
                    context=adapter_context,
                    access=access,
                ),
                notify,
            )
            if not math.isfinite(adapter_loss.loss):
                raise AdapterError(
                    f"{name} has a held-out loss of {adapter_loss.loss} on {rows.name}: its "
                    "weights are too large for this base. Train it with a lower --learning-rate, "
                    "or leave it out."
                )
            pairs.append((base_loss, replace(adapter_loss, groups=base_loss.groups)))
        losses.append(pairs)
    return losses


def _encode_and_measure(
    base: LoadedBase,
    sets: Sequence[EvalSet],
    notify: EventHandler,
    access: ModelAccess,
    max_tokens: int,
    vocab_size: int = 0,
    context: Context = contextlib.nullcontext,
) -> tuple[list[list[TokenIds]], list[HeldOutLoss | None]]:
    """The rows of each set as tokens, and the loss of the base on them; None without rows.

    Args:
        vocab_size: token ids of an adapter that has others than the base.
        context: entered around each forward pass: gives the base untrained rows for these.
    """
    encoded_sets, groups = [], []
    for rows in sets:
        invalid: tokenization.InvalidRows = {}
        encoded = access(
            partial(held_out_loss.encode_measured, base, rows.texts, invalid, vocab_size, max_tokens)
        )
        encoded_sets.append([*encoded.values()])
        groups.append([rows.groups[row] for row in encoded] if rows.groups else [])
        if invalid:
            reason = next(iter(invalid.values()))
            notify(
                Notice(
                    f"Left out {len(invalid):,} of {len(rows.texts):,} rows of {rows.name}, such as one with {reason}."
                )
            )
    losses = [
        replace(held_out_loss.measure_base_loss(base, encoded, notify, access, context), groups=numbers)
        if encoded
        else None
        for encoded, numbers in zip(encoded_sets, groups, strict=True)
    ]
    return encoded_sets, losses


def pooled_gain(losses: Sequence[LossPair | None]) -> EvalResult | None:
    """`paired_gain` on the rows of several sets; None without rows.

    Args:
        losses: loss of base and adapter on each set.
    """
    pairs = [pair for pair in losses if pair]
    if not pairs:
        return None
    base_losses, adapter_losses = zip(*pairs, strict=True)
    return paired_gain(concatenate(base_losses), concatenate(adapter_losses))


def concatenate(losses: Sequence[HeldOutLoss]) -> HeldOutLoss:
    """The loss of the rows of several sets, of which each has groups of its own."""
    return HeldOutLoss(
        [value for loss in losses for value in loss.nll],
        [count for loss in losses for count in loss.predictions],
        eval_sets.join_groups([(loss.groups, len(loss.nll)) for loss in losses]),
        [values for loss in losses for values in loss.tokens] if all(loss.tokens for loss in losses) else [],
    )


def cached_rows(adapter: Adapter, notify: EventHandler = ignore_events, *, all_rows: bool = True) -> EvalSet:
    """Rows from the user's cache that were held out to evaluate an adapter on when it was trained.

    Args:
        all_rows: if unset, only those that its result is of, where fewer were enough.
    """
    data = adapter.manifest.data if adapter.manifest else None
    if data is None:
        return EvalSet(adapter.name, [], "it was trained by another tool, so its held-out rows are unknown")
    if data.held_out_hash is None:
        return EvalSet(adapter.name, [], "it was made from adapters whose held-out rows were missing")
    rows = eval_sets.read_rows(adapter.name, data.held_out_hash, adapter.path / RUN_FILE, notify)
    result = adapter.manifest.result if adapter.manifest else None
    return rows if all_rows or result is None or result.of_rows is None else rows.first_rows(result.rows)


def notify_eval_rows(adapters: Sequence[Adapter], notify: EventHandler) -> None:
    """Warn about rows that are held out for one adapter and maybe not for another."""
    datasets = [adapter.manifest.data for adapter in adapters if adapter.manifest and adapter.manifest.data]
    for name in dict.fromkeys(data.eval_dataset for data in datasets if data.eval_dataset):
        notify(eval_sets.eval_dataset_notice(name))
    differences = ["--split-salt"] if len({data.split_salt for data in datasets}) > 1 else []
    groups = {(data.name, data.group_by) for data in datasets}
    if len(groups) > len({name for name, _ in groups}):
        differences.append("--group-by")
    for name in differences:
        notify(
            Notice(f"The adapters differ in {name}, so one may have been trained on rows that another holds out.")
        )


def _select_sets(
    adapters: Sequence[Adapter], sets: Sequence[EvalSet] | None, eval_rows: int | None, notify: EventHandler
) -> list[EvalSet]:
    """The sets to evaluate on. Raises AdapterError where none has rows."""
    check_distinct_names(adapters)
    if sets is None:
        sets = [cached_rows(adapter, notify, all_rows=eval_rows is not None) for adapter in adapters]
    selected = eval_sets.select_rows(sets, eval_rows)
    if all(rows.missing for rows in selected):
        reasons = "; ".join(f"{rows.name}: {rows.missing}" for rows in selected)
        raise AdapterError(f"There are no rows to evaluate on. {reasons}. Name other data with --eval-dataset.")
    return selected
