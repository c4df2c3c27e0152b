"""Change of the loss on text of other kinds than the data: what an adapter has forgotten.

The texts are those of data/general_text.py, and of your own. Their loss is measured as that of
held-out rows, and its change is that of the adapter against the base, row by row: above zero is
worse. Price: two passes over about 29,000 tokens; those of the base are in the cache after the
first report, and of an interrupted one the kinds that were measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..adapters.gains import paired_gain
from ..adapters.manifest import EvalResult
from ..adapters.report import ForgettingFigures
from ..data.eval_sets import EvalSet
from ..data.general_text import general_texts
from ..errors import AdapterError, EventHandler, Notice, Progress
from ..evaluation import gain_matrix
from ..models.loading import LoadedBase
from ..text import describe_gain, display_name, format_gain, format_names, shorten
from .subject import ReportSubject

CLEAR, CLEAR_KIND = 2.0, 3.0  # standard errors of a change that counts; of one kind of several
_NAMED = 4  # texts in a sentence


@dataclass(frozen=True)
class ForgettingReport:
    """Change of the loss on each kind of text. `missing` has the reasons why some could not be measured."""

    figures: ForgettingFigures
    missing: dict[str, str]

    def table(self) -> list[tuple[str, ...]]:
        """A header, and a row for each kind of text, for all of them, and for each of your own."""
        figures = self.figures
        results = [*figures.kinds.items(), ("all of these", figures.general), *figures.guards.items()]
        rows: list[tuple[str, ...]] = [("text", "rows", "base", "adapter", "change of loss")]
        for name, result in results:
            losses = f"{result.base_loss:.3f}", f"{result.loss:.3f}"
            rows.append((name, f"{result.rows:,}", *losses, result.format_change()))
        return rows

    def to_dict(self) -> dict[str, object]:
        """All figures for JSON."""
        return self.figures.model_dump() | {"missing": self.missing}


def measure_forgetting(
    subject: ReportSubject, base: LoadedBase, guards: Sequence[EvalSet] = ()
) -> ForgettingReport:
    """Measure base and adapter on the general text, and on texts of your own.

    Args:
        base: the base of the adapter, as training has it (`gain_matrix.open_base`).
        guards: further texts, each a kind by its name.

    Raises:
        AdapterError: the context of the base is too short for any text.
    """
    kinds, adapter, options = general_texts(), subject.adapter, subject.options
    sets = [*kinds, *guards]
    total = 2 * sum(len(rows.texts) for rows in sets)
    notify = _as_one_part(options.notify, total)
    (pairs,) = gain_matrix.held_out_losses(base, {adapter.name: adapter}, sets, notify, options=options)
    options.notify(Progress("forgetting", total, total))
    general = gain_matrix.pooled_gain(pairs[: len(kinds)])
    if general is None:
        raise AdapterError(f"no text fits into the context of {base.files.name}")
    results = [paired_gain(*pair) if pair else None for pair in pairs]
    measured = {rows.name: result for rows, result in zip(kinds, results, strict=False) if result}
    own, missing = dict[str, EvalResult](), dict[str, str]()
    for rows, result in zip(guards, results[len(kinds) :], strict=True):
        name = _free_name(shorten(display_name(rows.name), 50), {*own, *missing})
        if result:
            own[name] = result
        else:
            missing[name] = rows.missing or "none of its rows can be measured on this base"
    sentences = describe_forgetting(general, measured, own)
    figures = ForgettingFigures(sentences=sentences, general=general, kinds=measured, guards=own)
    return ForgettingReport(figures, missing)


def describe_forgetting(
    general: EvalResult, kinds: Mapping[str, EvalResult], guards: Mapping[str, EvalResult]
) -> list[str]:
    """Say in sentences what the figures mean.

    A change over all kinds counts from 2 standard errors on, that of one of them from 3, as the
    largest of eight exceeds 2 by chance in a third of the cases.
    """
    amount = format_gain(abs(general.gain), general.standard_error)
    where = f"over {general.rows:,} rows of {len(kinds)} kinds the loss"
    size = f"{amount} nats per token ({describe_gain(general.gain)})"
    match _direction(general, CLEAR):
        case "worse":
            first = f"It has forgotten some general text: {where} rose by {size}."
        case "better":
            first = f"It has not forgotten general text: {where} fell by {size}."
        case _:
            first = f"No forgetting is measurable: {where} changed by {general.format_change()} nats per token."
    parts = []
    for direction in ("worse", "better"):
        changed = [name for name, result in kinds.items() if _direction(result, CLEAR_KIND) == direction]
        changed.sort(key=lambda name: -abs(kinds[name].gain))
        texts = [f"{name} ({kinds[name].format_change()})" for name in changed]
        parts += [f"{direction} on {format_names(texts, _NAMED)}"] if texts else []
    second = "; ".join(parts) or "no single kind changed measurably"
    sentences = [first, f"{second[0].upper()}{second[1:]}."]
    texts = []
    for name, result in guards.items():
        verdict = _direction(result, CLEAR) or "no measurable change"
        verdict = f" ({verdict})" if result.standard_error is not None else ""  # the figure says so
        texts.append(f"{name} {result.format_change()}{verdict}")
    return sentences + ([f"Your own text: {format_names(texts, _NAMED)}."] if texts else [])


def _direction(result: EvalResult, errors: float) -> str:
    """Return "worse" or "better" for a change of more than so many standard errors, else an empty text."""
    if result.standard_error is None or abs(result.gain) <= errors * result.standard_error:
        return ""
    return "worse" if result.gain < 0 else "better"


def _free_name(name: str, taken: set[str]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name} ({number})"
    return free


def _as_one_part(notify: EventHandler, total: int) -> EventHandler:
    """Report the progress of one measurement after the other as that of all rows."""
    before = 0

    def handle(event: Notice | Progress) -> None:
        nonlocal before
        if isinstance(event, Notice):
            notify(event)
            return
        notify(Progress("forgetting", before + event.done, total))
        if event.done == event.total:
            before += event.total

    return handle
