"""Report on what an adapter has learned: style, memorization, forgetting, and what more data would bring.

One base at a time is in memory: the one that generates writes all texts, then that of training
measures losses. Texts and losses are kept in the user's cache, so that a report that was
interrupted goes on where it stopped.
"""

import gc
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, TypeVarTuple

from .. import atomic_io
from ..adapters.adapter import CARD_FILE, Adapter, check_weights_hash
from ..adapters.growth import find_growth
from ..adapters.library import Library
from ..adapters.manifest import utc_timestamp
from ..adapters.report import (
    REPORT_FILE,
    TITLES,
    AdapterReport,
    GrowthFigures,
    update_card,
)
from ..config import ModelOptions
from ..data.eval_sets import EvalSet
from ..errors import (
    AdapterError,
    EventHandler,
    LoraTunerError,
    Notice,
    ignore_events,
    os_error_message,
)
from ..evaluation import gain_matrix
from ..inference.generator import Generator
from ..models import lora
from ..text import display_name, format_count, format_duration, format_gain
from . import forgetting, memorization, style
from .forgetting import ForgettingReport
from .memorization import MemorizationReport
from .report_time import Pace, estimate_seconds, measure_pace, seconds_per_measured_token
from .sample import Excerpts
from .style import StyleReport
from .subject import load_subject

NO_SWEEP = "it is no trial of a sweep over rows, steps or rank; `train --max-rows 250,500,1000,2000` trains one"
LEARNS_LABELS = "it tells labels, and has not learned the texts; `adapters show` says how well"
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
Texts = dict[str, list[tuple[str, dict[str, str]]]]  # heading -> place, and texts by name


@dataclass(frozen=True)
class Report:
    """The parts of a report; None for one that was skipped, or that could not be measured.

    `missing` has the reasons why parts could not be measured, `weights` the sha256 of the weights.
    """

    adapter: str
    base: str
    weights: str
    style: StyleReport | None = None
    memorization: MemorizationReport | None = None
    forgetting: ForgettingReport | None = None
    growth: GrowthFigures | None = None
    missing: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def figures(self) -> AdapterReport:
        """The figures, as they are kept with the adapter."""
        return AdapterReport(
            created=utc_timestamp(),
            weights=self.weights,
            style=self.style and self.style.figures,
            memorization=self.memorization and self.memorization.figures,
            forgetting=self.forgetting and self.forgetting.figures,
            growth=self.growth,
        )

    def to_dict(self) -> dict[str, object]:
        """All figures and texts for JSON."""
        return {
            "adapter": self.adapter,
            "base": self.base,
            "weights": self.weights,
            "style": self.style and self.style.to_dict(),
            "memorization": self.memorization and self.memorization.to_dict(),
            "forgetting": self.forgetting and self.forgetting.to_dict(),
            "growth": self.growth and self.growth.model_dump(),
            "missing": self.missing,
            "seconds": round(self.seconds, 1),
        }


def make_report(
    adapter: Adapter,
    options: ModelOptions = ModelOptions(),
    *,
    skip: Collection[str] = (),
    guards: Sequence[EvalSet] = (),
) -> Report:
    """Measure what an adapter has learned. Nothing is written but the user's cache.

    Price: minutes, which `options.notify` is told before they begin.

    Args:
        skip: parts to leave out, by their names in `TITLES`.
        guards: further rows on which forgetting is measured, each a kind of its own.

    Raises:
        LoraTunerError: the adapter has no manifest, is damaged, or has another base.
    """
    if adapter.manifest is None:
        raise AdapterError(f"{adapter.name} has no manifest: write one with `adapters adopt`.")
    check_weights_hash(adapter)
    start, parts = time.monotonic(), _Parts(skip)
    subject, texts, continuations = load_subject(adapter, None, options), None, None
    if adapter.manifest.labels is not None:
        parts.leave_out(("style", "memorization"), LEARNS_LABELS)
    elif subject.held_out.missing:
        parts.leave_out(("style", "memorization"), subject.held_out.missing)
    if has_texts := parts.has("style", "memorization"):
        generator = Generator(adapter.path, options=options, adapters_dir=adapter.path.parent)
        parts.tell_time(estimate_seconds(adapter, measure_pace(generator), guards), options.notify)
        subject = load_subject(adapter, generator, options)
        texts = parts.measure("style", style.write_texts, subject, generator)
        continuations = parts.measure("memorization", memorization.continue_rows, subject, generator)
        del generator
        gc.collect()  # before there is another base
    of_style: StyleReport | None = None
    of_memorization: MemorizationReport | None = None
    of_forgetting: ForgettingReport | None = None
    if parts.has("style", "memorization", "forgetting"):
        base = gain_matrix.open_base_of([adapter], options)
        lora.check_base(adapter, base, options)
        if not has_texts:
            pace = Pace(0.0, seconds_per_measured_token(base))
            parts.tell_time(estimate_seconds(adapter, pace, guards), options.notify)
        if texts is not None:
            of_style = parts.measure("style", style.measure_style, subject, texts, base)
            of_style = of_style and mask_examples(of_style)
        if continuations is not None:
            of_memorization = parts.measure(
                "memorization", memorization.measure_memorization, subject, continuations, base
            )
        of_forgetting = parts.measure("forgetting", forgetting.measure_forgetting, subject, base, guards)
    growth = parts.measure("growth", _find_growth, adapter)
    seconds = time.monotonic() - start
    base_name = display_name(adapter.base)
    return Report(
        adapter.name,
        base_name,
        adapter.sha256,
        of_style,
        of_memorization,
        of_forgetting,
        growth,
        parts.missing,
        seconds,
    )


class _Parts:
    """The parts that were asked for, and the reasons why some cannot be measured."""

    def __init__(self, skip: Collection[str]) -> None:
        self.wanted = TITLES.keys() - {*skip}
        self.missing: dict[str, str] = {}

    def has(self, *names: str) -> bool:
        """Return whether one of these is still to be measured."""
        return any(name in self.wanted and name not in self.missing for name in names)

    def leave_out(self, names: Sequence[str], reason: str) -> None:
        """Note the reason why parts cannot be measured."""
        self.missing |= {name: reason.rstrip(".") for name in names if self.has(name)}

    def tell_time(self, seconds: Mapping[str, float], notify: EventHandler) -> None:
        """Say how long the parts will take, before they begin."""
        wanted = {TITLES[name].lower(): spent for name, spent in seconds.items() if self.has(name)}
        each = ", ".join(f"{name} {format_duration(spent)}" for name, spent in wanted.items())
        total = format_duration(sum(wanted.values()))
        kept = "less where texts and losses are in the cache. Ctrl-C keeps what is finished."
        notify(Notice(f"This takes about {total}: {each}; {kept}"))

    def measure(self, name: str, function: Callable[[*Ts], T], *args: *Ts) -> T | None:
        """Call a function of a part; None if the part was not asked for, or cannot be measured."""
        if not self.has(name):
            return None
        try:
            return function(*args)
        except LoraTunerError as error:
            self.leave_out((name,), str(error))
            return None


@dataclass(frozen=True)
class Section:
    """A part as terminal and page show it.

    `tables` have a head as their first row, `texts` are excerpts of rows, with their place, by
    heading: each has a name and a text, of which personal data is replaced. `missing` is the reason
    why the part could not be measured.
    """

    name: str
    title: str
    sentences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    texts: Texts = field(default_factory=dict)
    missing: str | None = None


def sections(report: Report) -> list[Section]:
    """Return the parts of a report that were asked for, in order."""
    figures = dict(report.figures.parts())
    found = []
    for name, title in TITLES.items():
        if name in report.missing:
            found.append(Section(name, title, missing=report.missing[name]))
        elif name in figures:
            notes, tables, texts = _CONTENTS[name](report)
            found.append(Section(name, title, [*figures[name].sentences], notes, tables, texts))
    return found


_Contents = tuple[list[str], dict[str, list[list[str]]], Texts]  # notes, tables, texts


def _style_contents(report: Report) -> _Contents:
    assert report.style is not None
    texts: Texts = {}
    for example in report.style.examples:
        named = {"opening": example.prompt, "adapter": example.adapter, "you": example.you}
        texts.setdefault(example.kind.capitalize(), []).append((f"held-out row {example.row:,}", named))
    return report.style.notes, report.style.tables, texts


def _memorization_contents(report: Report) -> _Contents:
    assert report.memorization is not None
    texts: Texts = {}
    for passage in report.memorization.passages:
        size = f"{format_count(passage.tokens, 'token')}, {format_count(passage.characters, 'character')}"
        size += f", in {format_count(passage.in_rows, 'training row')}"
        texts.setdefault("Longest passages that are continued as in a training row", []).append(
            (f"{passage.place} · {size}", {"": passage.text})
        )
    for row in report.memorization.memorized:
        texts.setdefault("Memorized rows", []).append((f"{row.place} · gain {row.gain:.3f}", {"": row.text}))
    return [], {"Training rows and unseen rows": [*map(list, report.memorization.table)]}, texts


def _forgetting_contents(report: Report) -> _Contents:
    assert report.forgetting is not None
    notes = [f"{name} is not measured: {reason}." for name, reason in report.forgetting.missing.items()]
    return notes, {"Loss by kind of text": [*map(list, report.forgetting.table())]}, {}


def _growth_contents(report: Report) -> _Contents:
    assert report.growth is not None
    rows = [["", "gains of the trials", "twice the last", "80% interval"]]
    for doubling in report.growth.doublings:
        trials = zip(doubling.values, doubling.gains, strict=True)
        rows.append(
            [
                doubling.quantity,
                ", ".join(f"{value:,}: {gain:.3f}" for value, gain in trials),
                format_gain(doubling.gain, doubling.standard_error, "+.3f"),
                f"{doubling.low:+.3f} to {doubling.high:+.3f}",
            ]
        )
    of = "Accuracy above that of the base" if report.growth.figure == "accuracy" else "Gain"
    return [], {f"{of} by size": rows}, {}


_CONTENTS = {
    "style": _style_contents,
    "memorization": _memorization_contents,
    "forgetting": _forgetting_contents,
    "growth": _growth_contents,
}


def mask_examples(report: StyleReport) -> StyleReport:
    """Replace personal data in the examples."""
    mask = Excerpts().mask
    examples = [
        replace(
            example,
            prompt=mask(example.prompt),
            adapter=mask(example.adapter),
            you=mask(example.you),
        )
        for example in report.examples
    ]
    return replace(report, examples=examples)


def _find_growth(adapter: Adapter) -> GrowthFigures:
    figures = find_growth(adapter, Library(adapter.path.parent))
    if figures is None:
        raise AdapterError(NO_SWEEP)
    return figures


def keep_report(adapter: Adapter, report: Report, notify: EventHandler = ignore_events) -> None:
    """Write the figures into the folder of the adapter, and what they say into its model card.

    Parts that are not in this report are kept from an earlier one on the same weights. A folder that
    cannot be written is told.
    """
    figures = report.figures
    try:
        earlier = adapter.report
    except AdapterError:  # a damaged one is replaced
        earlier = None
    if earlier is not None:
        figures = earlier.model_copy(update={"created": figures.created, **dict(figures.parts())})
    card = adapter.path / CARD_FILE
    try:
        atomic_io.atomic_write_text(adapter.path / REPORT_FILE, figures.to_json())
        if card.is_file() and not card.is_symlink():
            text = card.read_bytes().decode("utf-8", "surrogateescape")
            with atomic_io.atomic_file(card) as work:
                work.write_bytes(update_card(text, figures).encode("utf-8", "surrogateescape"))
    except OSError as error:
        notify(Notice(f"The report is not kept with the adapter. {os_error_message(error)}"))
