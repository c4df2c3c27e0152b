"""Line charts as SVG, made on the server: hover by `<title>`, colours by CSS, downloads as data URLs.

Of the SVG chart libraries in Python none has error bars, text on hover and dark mode without a
script: pygal loads its tooltips from another host, leather and ziaplot have none.
"""

import base64
import csv
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from ...adapters.plots import AverageLoss
from ...text import escape_control, format_count, shorten

PLOT_HEIGHT, LINE_HEIGHT, FILE_WIDTH = 260, 18, 720  # pixels
TOP, RIGHT, BOTTOM, LEFT = 30, 20, 44, 52  # pixels around the plot, without the legend
MAX_POINTS, MAX_STRIPS, MAX_DOTS = 300, 100, 40  # drawn of a line, with text on hover, with dots
LARGEST = 1e15  # larger values are not drawn, as those that are not finite
_FOLDER = Path(__file__).parent


class Point(NamedTuple):
    """One figure. `error` is its standard error; `name`, on hover, stands for that of its series."""

    x: float
    y: float
    error: float | None = None
    name: str = ""


@dataclass(frozen=True)
class Series:
    """A line of the chart. A faint one has no dots."""

    name: str
    points: Sequence[Point]
    faint: bool = False


@dataclass(frozen=True)
class Axis:
    """An axis that begins and ends at these values; that of y begins with the highest, at the top."""

    begin: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return the place of a value, in percent of the axis."""
        begin, end = self.begin, self.end
        if self.log:
            begin, end, value = math.log10(begin), math.log10(end), math.log10(value)
        return round((value - begin) / (end - begin) * 100, 2)

    def ticks(self, count: int, whole: bool = False) -> list[float]:
        """Return about `count` round numbers on the axis, rising; `whole`: no fractions."""
        low, high = sorted((self.begin, self.end))
        least = (high - low) / count
        power = 10.0 ** math.floor(math.log10(least))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * 0.999)
        step = max(step, 1.0) if whole else step
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x: str,
    y: str,
    reference: tuple[str, float] | None = None,
    log_x: bool = False,
    x_range: Sequence[float] = (),
    file: str = "",
) -> Markup:
    """Draw series of points, as wide as the page leaves room for.

    Price: 4 ms of one core for 3 series of 1,000 points.

    Args:
        title: read to those who do not see the chart, with the first and last figures.
        x, y: titles of the axes, with units.
        reference: name and value of a horizontal line, such as the loss of the base.
        log_x: logarithmic x axis, with its numbers at the points.
        x_range: values that the x axis covers beside those of the points.
        file: name of the downloads, without extension; there are none without it.
    """
    series = [line for line in series if line.points]
    lines = [_drawable(line, log_x) for line in series]
    points = [point for line in lines for point in line.points]
    note = Markup("")
    if left_out := sum(len(line.points) for line in series) - len(points):
        why = "not finite, or not above zero on a log axis" if log_x else "not finite"
        note = Markup('<p class="note">{} left out: {}.</p>').format(format_count(left_out, "point"), why)
    if not points:
        return Markup('<p class="note">{}: nothing to draw yet.</p>{}').format(title, note)
    across = _x_axis([*x_range, *(point.x for point in points)], log_x)
    up = _y_axis(points, reference[1] if reference else None)
    plot = template("chart.svg.jinja").render(
        x=x,
        y=y,
        line_height=LINE_HEIGHT,
        columns=_columns(across, [point.x for point in points]),
        rows=[(up.place(value), f"{value:,.10g}") for value in up.ticks(8)],
        reference=reference and _reference(up, *reference),
        lines=[_line(number, line, across, up) for number, line in enumerate(lines)],
        strips=_strips(lines, across, x),
    )
    top = TOP + LINE_HEIGHT * len(lines) * (len(lines) > 1)
    height = top + PLOT_HEIGHT + BOTTOM
    picture = Markup(
        '<svg class="chart" role="img" aria-label="{}" width="100%" height="{}" '
        'style="box-sizing: border-box; padding: {}px {}px {}px {}px">{}</svg>'
    ).format(_describe(title, lines, reference), height, top, RIGHT, BOTTOM, LEFT, Markup(plot))
    links = Markup("")
    if file:
        saved = Markup('<svg x="{}" y="{}" width="{}" height="{}" overflow="visible">{}</svg>').format(
            LEFT, top, FILE_WIDTH - LEFT - RIGHT, PLOT_HEIGHT, Markup(plot)
        )
        table = [[line.name, p.name, p.x, p.y, p.error] for line in series for p in line.points]
        header = ["series", "name", x, y, "standard error"]
        links = downloads(file, svg_file(title, saved, FILE_WIDTH, height), [header, *table])
    return Markup('<figure class="chart-figure">{}{}{}</figure>').format(picture, note, links)


def loss_chart(
    metrics: Iterable[Mapping[str, float]],
    total_steps: int | None = None,
    base_loss: float | None = None,
    file: str = "",
    objective: str = "sft",
) -> Markup:
    """Draw the losses of a run by step, while it runs or after.

    Of preferences there are two charts, as the loss in training has another unit than that of text.

    Args:
        metrics: entries of metrics.jsonl.
        total_steps: those of the whole run, which the x axis covers.
        base_loss: held-out loss of the base.
        file: name of the downloads, without extension; there are none without it.
        objective: the setting of the run.
    """
    entries = list(metrics)
    training, held_out, subset = (
        [Point(entry["step"], entry[key]) for entry in entries if key in entry]
        for key in ("loss", "eval_loss", "eval_subset_loss")
    )
    average = AverageLoss(total_steps or len(training))
    smoothed = [Point(p.x, average.update(p.y)) for p in training if math.isfinite(p.y)]
    rows = next((entry["eval_subset_rows"] for entry in entries if "eval_subset_rows" in entry), 0)
    of_training = [
        Series("training, smoothed", smoothed),
        Series("training, each step", training, faint=True),
    ]
    of_text = [
        Series("held out, all rows" if subset else "held out", held_out),
        Series(f"held out, a subset of {rows:.0f} rows", subset),
    ]
    draw = partial(line_chart, x="step", x_range=(0, total_steps or 0))
    reference = None if base_loss is None else ("base", base_loss)
    draw_text = partial(draw, y="loss (nats per token)", reference=reference)
    title = "Loss by training step"
    if objective == "sft":
        return draw_text([of_training[0], *of_text, of_training[1]], title=title, file=file)
    unit = f"loss of {objective} per {'answer' if objective == 'kto' else 'pair'}"
    return draw(of_training, title=title, y=unit, file=file) + draw_text(
        of_text, title="Held-out loss of the chosen answers", file=file and f"{file}-held-out"
    )


def svg_file(title: str, inside: Markup, width: int, height: int) -> Markup:
    """Make a picture file: colours stand in place of the variables, which only the page has."""
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" class="chart" width="{}" height="{}"><title>{}</title>'
        '<style>{}</style><rect width="100%" height="100%" fill="#ffffff"/>{}</svg>'
    ).format(width, height, escape_control(title), _file_style(), inside)


def downloads(name: str, svg: Markup, table: Iterable[Sequence[object]]) -> Markup:
    """Make links that save a picture as SVG and its figures as CSV, without a request to the server."""
    text = StringIO()
    csv.writer(text).writerows([_csv_cell(value) for value in row] for row in table)
    files = (("svg", "image/svg+xml", str(svg)), ("csv", "text/csv", text.getvalue()))
    links = Markup(" ").join(
        Markup('<a download="{}.{}" href="data:{};base64,{}">Download as {}</a>').format(
            name, kind, media, base64.b64encode(content.encode(errors="replace")).decode(), kind.upper()
        )
        for kind, media, content in files
    )
    return Markup('<p class="downloads">{}</p>').format(links)


def _csv_cell(value: object) -> object:
    """Keep a spreadsheet from reading a name as a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


@cache
def _file_style() -> Markup:
    style = (_FOLDER / "charts.css").read_text(encoding="utf-8")
    return Markup(re.sub(r"var\(--[\w-]+, (#\w+)\)", r"\1", style))


@cache
def template(name: str) -> jinja2.Template:
    """Return a template of this folder, which escapes all text."""

    def clean(value: object) -> object:  # XML allows no control characters
        return escape_control(value) if type(value) is str else value  # not of Markup, which is escaped

    loader = jinja2.FileSystemLoader(_FOLDER)
    return jinja2.Environment(autoescape=True, finalize=clean, loader=loader).get_template(name)


def _drawable(line: Series, log_x: bool) -> Series:
    points = [
        point
        for point in line.points
        if abs(point.x) < LARGEST and abs(point.y) < LARGEST and abs(point.error or 0.0) < LARGEST  # NaN is not
        if not log_x or point.x > 0
    ]
    return Series(shorten(line.name, 44), sorted(points, key=lambda point: point.x), line.faint)


def _x_axis(values: Sequence[float], log: bool) -> Axis:
    low, high = min(values), max(values)
    if log:
        margin = max(high / low, 2.0) ** 0.05
        return Axis(low / margin, high * margin, log=True)
    return Axis(low, high) if high > low else Axis(low - 1, high + 1)


def _y_axis(points: Sequence[Point], reference: float | None) -> Axis:
    """Cover all points with their errors, and a reference that is not far from them."""
    low = min(point.y - (point.error or 0.0) for point in points)
    high = max(point.y + (point.error or 0.0) for point in points)
    span = max(high - low, 1e-6 * max(abs(low), abs(high)), 1e-12)
    if reference is not None and low - 2 * span < reference < high + 2 * span:
        low, high = min(low, reference), max(high, reference)
    margin = 0.06 * max(high - low, span)
    return Axis(high + margin, low - margin)


def _columns(across: Axis, values: Sequence[float]) -> list[tuple[float, str]]:
    """Return places and texts of the numbers on the x axis."""
    ticks = across.ticks(6, whole=all(float(value).is_integer() for value in values))
    if across.log:
        ticks = []
        for value in sorted(set(values)):
            if not ticks or across.place(value) - across.place(ticks[-1]) >= 12:  # they would overlap
                ticks.append(value)
    return [(across.place(value), f"{value:,.10g}") for value in ticks]


def _reference(up: Axis, name: str, value: float) -> dict[str, object]:
    """Place the line; one that is out of the picture is named at its edge."""
    place = up.place(value)
    outside = " (above)" if place < 0 else " (below)" if place > 100 else ""
    return {"place": min(max(place, 0), 100), "text": f"{name} {value:.4g}{outside}"}


def _line(number: int, line: Series, across: Axis, up: Axis) -> dict[str, object]:
    points = _thin_out(line.points, MAX_POINTS)
    dots = [(across.place(point.x), up.place(point.y)) for point in points]
    bars = [
        (x, up.place(point.y - point.error), up.place(point.y + point.error))
        for (x, _), point in zip(dots, points, strict=True)
        if point.error
    ]
    return {
        "name": line.name,
        "style": "faint" if line.faint else f"s{number % 5}",
        "path": " ".join(f"{x:.2f},{y:.2f}" for x, y in dots),
        "bars": bars,
        "dots": dots if len(dots) == 1 or (len(dots) <= MAX_DOTS and not line.faint) else [],
    }


def _thin_out(points: Sequence[Point], most: int) -> list[Point]:
    """Keep the ends, and of each stretch between them the lowest and the highest point."""
    if len(points) <= most:
        return list(points)
    inside, stretches = points[1:-1], most // 2 - 1
    kept = set()
    for number in range(stretches):
        start, end = (len(inside) * edge // stretches for edge in (number, number + 1))
        for choose in (min, max):
            kept.add(choose(inside[start:end], key=lambda point: point.y))
    return [points[0], *sorted(kept), points[-1]]


def _strips(lines: Sequence[Series], across: Axis, x: str) -> list[tuple[float, float, str]]:
    """Divide the plot into a strip for each x, whose text has the figures of all lines there."""
    curves = [line.points for line in lines if not line.faint]
    texts = {
        value: [f"{x} {value:g}"]
        for value in sorted({point.x for points in curves for point in _thin_out(points, MAX_STRIPS)})
    }
    for line in lines:
        for point in line.points:
            if point.x in texts:
                error = "" if point.error is None else f" ± {point.error:.2g}"
                texts[point.x].append(f"{point.name or line.name}: {point.y:.4g}{error}")
    middles = [(left + right) / 2 for left, right in itertools.pairwise(map(across.place, texts))]
    edges = itertools.pairwise([0.0, *middles, 100.0])
    return [
        (round(left, 2), round(right - left, 2), "\n".join(text))
        for (left, right), text in zip(edges, texts.values(), strict=True)
    ]


def _describe(title: str, lines: Sequence[Series], reference: tuple[str, float] | None) -> str:
    """Say in words what the chart shows."""
    texts = [
        f"{line.name}: {line.points[0].y:.4g}" + (f" to {line.points[-1].y:.4g}" if len(line.points) > 1 else "")
        for line in lines
        if line.points
    ]
    texts += [f"{reference[0]}: {reference[1]:.4g}"] if reference else []
    return escape_control(f"{title}. {'; '.join(texts)}.")
