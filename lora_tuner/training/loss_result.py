"""Held-out loss of base and adapter: its curve, the result, and what is measured beside it.

Nothing is measured before it is needed. After the last step one pass reads each batch without and
with the adapter, in the order of the held-out set, and ends where the error of the gain is small
against it. Price: two forward passes over these rows.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace

from .. import distributed
from ..adapters.gains import HeldOutLoss, LossPair, paired_gain
from ..adapters.manifest import EvalResult
from ..data.general_text import general_texts
from ..data.tokenization import TokenIds
from ..errors import EventHandler, LoraTunerError, Notice, Progress, TrainingError, ignore_events
from ..evaluation import gain_matrix, held_out_loss
from ..evaluation.held_out_loss import Context
from ..inference import probes
from ..inference.probes import TokenGains
from . import profiling
from .label_result import measure_labels
from .live import LogEntry
from .setup import TrainingSetup

MIN_ROWS = 64  # or groups, before the first look at the error
GROWTH = 1.5  # times as many rows at the next look
HELD_OUT_LOSSES = {"eval_loss", "eval_subset_loss"}  # names in the log
ENOUGH = 0.05  # standard error as a share of the gain
_CANDIDATES, _CHECKED = 16, 2  # training rows, of which the shortest show that a base is sound


def check_base(setup: TrainingSetup) -> None:
    """Find a damaged base before the adapter is blamed for it.

    Price: a forward pass over two short training rows.

    Raises:
        BaseModelError: its loss is not finite.
    """
    rows = sorted(setup.sequences.rows[:_CANDIDATES], key=len)[:_CHECKED]
    with setup.model.disable_adapter():
        loss = held_out_loss.measure_loss(setup.base.model, setup.base, rows)
    held_out_loss.check_base_loss(setup.base, loss, "training loss")


def begin_curve(setup: TrainingSetup, log: list[LogEntry]) -> str:
    """Put the held-out loss of the base in front of a log, unless it is there.

    It is measured when the first one of the adapter is, to stand beside it. A run with a parent has
    none.

    Returns:
        What a notice says beside the loss of the adapter.
    """
    rows = f" on the subset of {len(setup.curve.rows)} rows" if setup.curve else ""
    if setup.parent or any(entry["step"] == 0 and HELD_OUT_LOSSES & entry.keys() for entry in log):
        return rows
    with setup.model.disable_adapter():
        loss = held_out_loss.measure_base_loss(setup.base, setup.curve_rows, _curve_notify(setup)).loss
    log.insert(0, {"step": 0, **setup.curve_metrics(loss)})
    return f"{rows} (base: {loss:.3f})"


def complete_curve(setup: TrainingSetup, log: list[LogEntry]) -> None:
    """Add an end of the curve that an older version, or a tracker that failed, has left out."""
    if setup.curve is None:
        return
    begin_curve(setup, log)
    last = [entry for entry in log if entry["step"] == setup.max_steps]
    if not any(HELD_OUT_LOSSES & entry.keys() for entry in last):
        loss = measure_adapter(setup).loss
        log.append({"step": setup.max_steps, **setup.curve_metrics(loss)})


def measure_adapter(setup: TrainingSetup) -> HeldOutLoss:
    """Measure the adapter while it trains, on all held-out rows or those of the curve."""
    return held_out_loss.measure_loss(setup.model, setup.base, setup.curve_rows, _curve_notify(setup))


def _curve_notify(setup: TrainingSetup) -> EventHandler:
    return ignore_events if setup.curve else setup.notify  # few rows need no progress bar


def measure_result(setup: TrainingSetup) -> LossPair:
    """Measure base and adapter on the held-out rows, or on as many as show the gain.

    The adapter's loss may not be finite. All processes measure the same rows.

    Raises:
        BaseModelError: that of the base is not.
    """
    rows, groups = setup.held_out, setup.dataset.groups_of(setup.measured_texts)
    known = held_out_loss.cached_base_loss(setup.base, rows, setup.notify)
    blocks = list[LossPair]()
    start = 0
    for end in _block_ends(setup):
        of_base = known.select(range(start, end)) if known else None
        blocks.append(_measure_block(setup, rows[start:end], start, of_base))
        base, adapter = (gain_matrix.concatenate(losses) for losses in zip(*blocks, strict=True))
        base, start = replace(base, groups=groups[:end]), end
        held_out_loss.check_base_loss(setup.base, base)
        if not math.isfinite(adapter.loss) or is_enough(paired_gain(base, adapter)):
            break
    if start < len(rows) and math.isfinite(adapter.loss):
        why = f"the standard error is below {ENOUGH:.0%} of the gain"
        if setup.parent and setup.parent_result:
            why = f"they are those of {setup.parent.name}"
        text = f"{start} of {len(rows):,} held-out rows were measured: {why}"
        setup.notify(Notice(f"{text} (--eval-rows {len(rows)} measures all)."))
    held_out_loss.measure_cached(setup.base, rows[:start], None, lambda: base)  # for `evaluate`
    return base, adapter


def _block_ends(setup: TrainingSetup) -> list[int]:
    """Return the numbers of rows at which the error is looked at. A child has those of its parent."""
    count, parent = len(setup.held_out), setup.parent_result
    if setup.measures_all_rows or parent is not None:
        return [count if parent is None or setup.measures_all_rows else min(parent.rows, count)]
    ends, end = list[int](), MIN_ROWS
    while end < count:
        ends.append(end)
        end = int(end * GROWTH)
    return [*ends, count]


def is_enough(result: EvalResult) -> bool:
    """Return whether the gain is known so well that no more rows are measured."""
    error = math.inf if result.standard_error is None else result.standard_error
    return (result.groups or result.rows) >= MIN_ROWS and error < ENOUGH * abs(result.gain)


def _measure_block(
    setup: TrainingSetup, rows: Sequence[TokenIds], start: int, of_base: HeldOutLoss | None
) -> LossPair:
    """`measure_pair`, with progress that goes on from the rows before."""

    def notify(event: Notice | Progress) -> None:
        if isinstance(event, Progress):
            done = min(event.done * distributed.world_size(), len(rows))
            event = replace(event, done=start + done, total=start + len(rows))
        setup.notify(event)

    return measure_pair(setup, rows, notify, of_base)


def measure_pair(
    setup: TrainingSetup,
    rows: Sequence[TokenIds],
    notify: EventHandler = ignore_events,
    of_base: HeldOutLoss | None = None,
) -> LossPair:
    """Measure base and adapter batch by batch, but the base only where the user's cache has it not.

    Args:
        of_base: loss of the base, if it is known.
    """
    model, base = setup.model, setup.base
    of_base = of_base or held_out_loss.cached_base_loss(base, rows, notify)
    if of_base is not None:
        return of_base, held_out_loss.measure_loss(model, base, rows, notify)
    before, after = _measure_both(setup, rows, notify)
    held_out_loss.measure_cached(base, rows, None, lambda: before)
    return before, after


def _measure_both(
    setup: TrainingSetup, rows: Sequence[TokenIds], notify: EventHandler = ignore_events
) -> list[HeldOutLoss]:
    contexts: list[Context] = [setup.model.disable_adapter, contextlib.nullcontext]
    return held_out_loss.measure_losses(setup.model, setup.base, rows, contexts, notify)


def measured_fields(setup: TrainingSetup, trained_tokens: int, held_out: LossPair) -> dict[str, object]:
    """Measure what the manifest holds of the trained adapter beside its held-out loss.

    Args:
        held_out: that of `measure_result`; what it has of each token is not measured again.
    """
    read = _token_gains(setup.held_out, held_out)
    general, general_read = _measure_general(setup, trained_tokens)
    fields = probes.measured_fields(
        setup.base,
        setup.measured_texts[: len(held_out[0].nll)],
        is_chat=setup.manifest.is_chat,
        template=setup.manifest.template,
        at_scale=probes.scales_of_trained(setup.model),
        read=[*read, *general_read],
    )
    labels = measure_labels(setup.model, setup.base, setup.config, setup.dataset, setup.notify)
    return fields | {"general": general, "labels": labels}


def _token_gains(rows: Sequence[TokenIds], losses: LossPair) -> list[TokenGains]:
    """Return each row of which all tokens are learned, with the gain of each but the first."""
    tokens = zip(rows, *(loss.tokens for loss in losses), strict=False)  # the cache has none
    return [(row, before - after) for row, before, after in tokens if (row >= 0).all()]


def _measure_general(setup: TrainingSetup, trained_tokens: int) -> tuple[EvalResult | None, list[TokenGains]]:
    """Measure base and adapter on a fixed part of the general text.

    Price: two passes over about 2,300 tokens.

    Returns:
        The result, with the gain of each token of its rows; None if this takes more than a small
        share of the run, or a row does not fit into the context of the base.
    """
    base, budget = setup.base, profiling.general_budget(setup, trained_tokens)
    texts = [text for kind in general_texts(subset=True) for text in kind.texts]
    if sum(len(text.split()) for text in texts) > budget:  # a word has at least one token
        return None, []
    try:
        rows = held_out_loss.encode_held_out(base, texts)
        lengths = [len(row) for row in rows]
        if not 0 < sum(lengths) <= budget or max(lengths) >= base.max_context:
            return None, []
        before, after = _measure_both(setup, rows)
        held_out_loss.check_base_loss(base, before, "loss on it")
        if not math.isfinite(after.loss):
            raise TrainingError(f"the adapter's loss on it is {after.loss}.")
        return paired_gain(before, after), _token_gains(rows, (before, after))
    except LoraTunerError as error:  # no reason to lose the run
        setup.notify(Notice(f"General text was not measured: {error}"))
        return None, []
