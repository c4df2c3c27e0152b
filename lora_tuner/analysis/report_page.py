"""Render a report on an adapter as one HTML page, as `data_page` renders one on a dataset."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ..adapters.report import StyleFigures
from ..text import format_gain
from .data_page import is_page, render_template
from .report import Report, sections

PAGE_MARK = '<meta name="generator" content="lora_tuner report">'
_TEMPLATE = "report_page.html.jinja"
_WIDTH, _ROW, _TOP = (
    720,
    28,
    24,
)  # of a chart, in its own units: its width, the height of a row and of the scale
_LEFT, _RIGHT = 190, 560  # of the scale: labels stand in front of it, and figures behind

is_report_page = partial(is_page, mark=PAGE_MARK)


@dataclass(frozen=True)
class Interval:
    """A value with its interval, in a row of a chart; `text` says it in figures."""

    label: str
    value: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class _Row:
    label: str
    y: float
    x: float
    left: float
    right: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Intervals on one scale. `marks` are places on it with their names."""

    title: str
    rows: list[_Row]
    marks: list[tuple[float, str]]
    height: float


def render_page(report: Report) -> str:
    """Return the page of a report."""
    return render_template(
        _TEMPLATE,
        PAGE_MARK,
        report=report,
        sections=sections(report),
        charts=_charts(report),
        facts=_facts(report),
        width=_WIDTH,
        left=_LEFT,
        right=_RIGHT,
    )


@dataclass(frozen=True)
class Fact:
    """A figure at the top of the page, of the part that it links to."""

    part: str
    value: str
    text: str
    is_warning: bool = False


def _facts(report: Report) -> list[Fact]:
    facts = []
    if report.style:
        figures = report.style.figures
        share = "?" if figures.share is None else f"{round(100 * figures.share)}%"
        facts.append(Fact("style", share, "of the way from the base to your style"))
    if report.memorization:
        count = report.memorization.figures.memorized
        facts.append(Fact("memorization", f"{count:,}", f"memorized row{'s' * (count != 1)}", bool(count)))
    if report.forgetting:
        general = report.forgetting.figures.general
        is_worse = general.standard_error is not None and -general.gain > 2 * general.standard_error
        facts.append(Fact("forgetting", general.format_change(), "change of loss on general text", is_worse))
    if report.growth:
        best = max(report.growth.doublings, key=lambda doubling: doubling.gain)
        facts.append(Fact("growth", f"{best.gain:+.3f}", f"gain by twice the {best.quantity}"))
    return facts


def _charts(report: Report) -> dict[str, Chart]:
    """Return a chart for each part that has intervals, by its name."""
    charts = {}
    if report.style and (intervals := _style_intervals(report.style.figures)):
        charts["style"] = draw_chart(
            "Share of the way from the base to you", intervals, {0.0: "base", 1.0: "you"}
        )
    if report.forgetting:
        of_texts = report.forgetting.figures
        results = {**of_texts.kinds, "all of these": of_texts.general, **of_texts.guards}
        intervals = [
            Interval(
                name,
                -result.gain,
                -result.gain - error,
                -result.gain + error,
                result.format_change(),
            )
            for name, result in results.items()
            for error in [2 * (result.standard_error or 0.0)]
        ]
        charts["forgetting"] = draw_chart("Change of loss by kind of text", intervals, {0.0: "as the base"})
    if report.growth:
        intervals = [
            Interval(
                f"twice the {doubling.quantity}",
                doubling.gain,
                doubling.low,
                doubling.high,
                format_gain(doubling.gain, doubling.standard_error, "+.3f"),
            )
            for doubling in report.growth.doublings
        ]
        charts["growth"] = draw_chart("Further gain by a doubling", intervals, {0.0: "no more gain"})
    return charts


def _style_intervals(figures: StyleFigures) -> list[Interval]:
    """Return the shares of the way that are known: of all aspects together, and of each."""
    named = {"all aspects": figures} | {aspect.name: aspect for aspect in figures.aspects}
    intervals = []
    for name, each in named.items():
        if each.share is not None and each.interval is not None:
            low, high = each.interval
            text = f"{round(100 * each.share)}% ({round(100 * low)} to {round(100 * high)})"
            intervals.append(Interval(name, each.share, low, high, text))
    return intervals


def draw_chart(title: str, intervals: Sequence[Interval], marks: Mapping[float, str]) -> Chart:
    """Place intervals, and the names of some values, on a scale that holds all of them."""
    ends = [end for interval in intervals for end in (interval.low, interval.high)] + [*marks]
    first, last = min(ends), max(ends)

    def place(value: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * (value - first) / ((last - first) or 1.0), 1)

    rows = [
        _Row(
            interval.label,
            _TOP + _ROW * (number + 0.5),
            place(interval.value),
            place(interval.low),
            place(interval.high),
            interval.text,
        )
        for number, interval in enumerate(intervals)
    ]
    names = [(place(value), name) for value, name in marks.items()]
    return Chart(title, rows, names, _TOP + _ROW * len(intervals) + 4)
