"""Render a data report as one HTML page: it needs no network, no script, and no other file.

A content security policy in the page forbids everything but its own style sheet. Every string is
escaped, and characters that cannot be seen are shown by their number.
"""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

import jinja2

from ..text import count_name, format_rows, format_share, format_share_of
from .data_report import DataReport
from .lengths import describe_span
from .personal_data import KIND_LABELS
from .text_checks import reveal

PAGE_MARK = '<meta name="generator" content="lora_tuner data">'  # tells a page that may be replaced
_TEMPLATE, _STYLE = "data_page.html.jinja", "page.css"
_WIDTH, _HEIGHT, _TOP = 720, 220, 26  # of the histogram, in its own units
_LABELS = 8  # below the bars
# What became of rows, in the order of the bar; further ones follow in the order of RowCounts.
_FATES = ("train", "held_out")
# Of fates to look at; the others are grey.
_COLORS = {"train": 0, "held_out": 1, "duplicates": 3, "invalid": 4, "near_duplicates": 5, "empty": 7}


@dataclass(frozen=True)
class _Rectangle:
    x: float
    y: float
    width: float
    height: float
    title: str
    label: str = ""


@dataclass(frozen=True)
class _Fate:
    """Rows of one fate, as a part of a bar from 0 to 100."""

    name: str
    rows: int
    color: int  # class of the style sheet
    x: float
    width: float


def render_page(report: DataReport) -> str:
    """Return the page of a report."""
    bars, limit = _draw_histogram(report)
    return render_template(
        _TEMPLATE,
        PAGE_MARK,
        report=report,
        fates=_fates(report.counts),
        labels=KIND_LABELS,
        bars=bars,
        limit=limit,
        width=_WIDTH,
        height=_HEIGHT,
    )


def render_template(template: str, mark: str, **values: object) -> str:
    """Return a page that the layout `page.html.jinja` and its style sheet complete.

    Args:
        mark: a line in its head, which `is_page` looks for.
    """
    folder = Path(__file__).parent
    style = (folder / _STYLE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "number": "{:,}".format,
        "share": format_share,
        "of": format_share_of,
        "rows": format_rows,
    }
    style_hash = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template(template).render(mark=mark, style=style, style_hash=style_hash, **values)


def is_page(path: Path, mark: str = PAGE_MARK) -> bool:
    """Return whether a file is a page with this mark, which may be replaced."""
    with path.open("rb") as file:
        return mark.encode() in file.read(2_000)


def _finalize(value: object) -> object:
    """Show the characters of a text that cannot be seen; the page's own parts are kept."""
    return reveal(value) if type(value) is str else value


def _fates(counts: dict[str, int]) -> list[_Fate]:
    """Return what became of the rows, most wanted first."""
    order = [*_FATES, *(name for name in counts if name not in (*_FATES, "read"))]
    fates: list[_Fate] = []
    x, total = 0.0, max(counts["read"], 1)
    for name in order:
        if rows := counts[name]:
            width = 100 * rows / total
            fates.append(_Fate(count_name(name), rows, _COLORS.get(name, 2), round(x, 3), round(width, 3)))
            x += width
    return fates


def _draw_histogram(report: DataReport) -> tuple[list[_Rectangle], float | None]:
    """Return the bars, and the place of `--max-length` if it is among them."""
    lengths = report.lengths
    histogram = lengths.histogram
    most = max(bar.rows for bar in histogram)
    step = _WIDTH / len(histogram)
    every = -(-len(histogram) // _LABELS)
    bars = []
    for index, bar in enumerate(histogram):
        height = (_HEIGHT - _TOP) * bar.rows / most
        height = max(height, 1.5) if bar.rows else 0.0
        title = f"{describe_span(bar.start, bar.end)} {lengths.unit}: {format_rows(bar.rows)}"
        label = f"{bar.start:,}" if index % every == 0 else ""
        bars.append(
            _Rectangle(
                round(index * step + 1, 2),
                round(_HEIGHT - height, 2),
                round(step - 2, 2),
                round(height, 2),
                title,
                label,
            )
        )
    width = (histogram[0].end or 0) - histogram[0].start
    place = (lengths.max_length - histogram[0].start) / width * step
    has_limit = lengths.tokenizer is not None and 0 <= place < _WIDTH
    return bars, round(place, 2) if has_limit else None
