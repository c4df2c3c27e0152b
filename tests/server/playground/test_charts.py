"""Charts: numbers become places, all text is escaped, and the downloads have the figures."""

import base64
import csv
import math
import re
import time
from io import StringIO
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from lora_tuner.server.playground import charts
from lora_tuner.server.playground.charts import Axis, Point, Series

from ...api_server import HOSTILE

AXES = {"title": "Loss", "x": "step", "y": "loss (nats per token)"}
METRICS = [{"step": step, "loss": 5.0 - step / 250} for step in range(1, 1001)]
METRICS += [{"step": step, "eval_loss": 4.5 - step / 1000} for step in range(0, 1001, 100)]


@pytest.fixture(autouse=True)
def _training_cache():
    """No adapter is trained here."""


def elements(chart, css_class):
    """Return the elements of a class in the picture on the page."""
    root = ElementTree.fromstring(re.search("<svg class=.*</svg>", chart, re.DOTALL)[0])
    return [found for found in root.iter() if css_class in found.get("class", "").split()]


def texts(chart):
    return [found.text for found in ElementTree.fromstring(chart).iter("text")]


def download(chart, kind):
    return base64.b64decode(re.search(f'download="curve.{kind}" href="[^"]*;base64,([^"]*)"', chart)[1]).decode()


def table(chart):
    return list(csv.reader(StringIO(download(chart, "csv"))))


@pytest.mark.parametrize(
    ("axis", "options", "expected"),
    [
        (Axis(0, 1000), {"count": 5}, [0, 200, 400, 600, 800, 1000]),
        (Axis(0, 3), {"count": 6, "whole": True}, [0, 1, 2, 3]),
        (Axis(3.51, 3.38), {"count": 8}, [3.38, 3.4, 3.42, 3.44, 3.46, 3.48, 3.5]),
        (Axis(-0.3, 0.3), {"count": 3}, [-0.2, 0, 0.2]),
        (Axis(0, 2e-5), {"count": 4}, [0, 5e-6, 1e-5, 1.5e-5, 2e-5]),
    ],
)
def test_ticks_are_round_numbers(axis, options, expected):
    assert axis.ticks(**options) == pytest.approx(expected)


def test_points_stand_at_their_figures():
    points = [Point(0, 2), Point(50, 4, 0.5), Point(100, 3)]
    chart = charts.line_chart([Series("a", points)], **AXES, x_range=(0, 200))
    up = Axis(4.5 + 0.15, 2 - 0.15)  # 6% of the span, with the error, is left above and below
    dots = [(float(dot.get("cx")[:-1]), float(dot.get("cy")[:-1])) for dot in elements(chart, "dot")]
    assert dots == [(point.x / 2, up.place(point.y)) for point in points]
    (path,) = (line for line in elements(chart, "line") if line.get("points"))
    assert path.get("points") == " ".join(f"{x:.2f},{y:.2f}" for x, y in dots)
    (bar,) = (line for line in elements(chart, "line") if line.get("y1"))
    assert [float(bar.get(name)[:-1]) for name in ("x1", "y1", "y2")] == [25, up.place(3.5), up.place(4.5)]
    assert {"0", "50", "100", "150", "200", "2.5", "4", "step", AXES["y"]} <= set(texts(chart))


def test_log_axis_spaces_ratios_equally():
    points = [Point(rank, 3 - rank / 100) for rank in (4, 8, 16, 4.2)]
    chart = charts.line_chart([Series("a", points)], **AXES, log_x=True)
    first, _, middle, last = (float(dot.get("cx")[:-1]) for dot in elements(chart, "dot"))
    assert middle - first == pytest.approx(last - middle, abs=0.02)
    assert {"4", "8", "16"} <= set(texts(chart))
    assert "4.2" not in texts(chart)  # it would cover the 4


def test_hover_names_each_figure():
    lines = [Series("a", [Point(1, 2.5, 0.25), Point(2, 2)]), Series("b", [Point(1, 3, None, "trial")])]
    chart = charts.line_chart(lines, **AXES)
    strips = elements(chart, "hit")
    assert [strip[0].text for strip in strips] == ["step 1\na: 2.5 ± 0.25\ntrial: 3", "step 2\na: 2"]
    assert [(strip.get("x"), strip.get("width")) for strip in strips] == [("0.0%", "50.0%"), ("50.0%", "50.0%")]


@pytest.mark.parametrize(("base", "text"), [(3.5, "base 3.5"), (9, "base 9 (above)"), (-9, "base -9 (below)")])
def test_reference_does_not_flatten_points(base, text):
    points = [Point(1, 3), Point(2, 3.4)]
    chart = charts.line_chart([Series("a", points)], **AXES, reference=("base", base))
    assert text in texts(chart)
    dots = [float(dot.get("cy")[:-1]) for dot in elements(chart, "dot")]
    assert dots[0] - dots[1] > 60
    assert 0 <= float(elements(chart, "reference")[0].get("y1")[:-1]) <= 100


def test_picture_is_described_in_words():
    chart = charts.line_chart([Series("a", [Point(1, 3), Point(2, 2.5)])], **AXES, reference=("base", 3.2))
    root = ElementTree.fromstring(chart)[0]
    assert (root.get("role"), root.get("aria-label")) == ("img", "Loss. a: 3 to 2.5; base: 3.2.")


def test_hostile_names_are_escaped():
    name = f"{HOSTILE}\x00\ud800"
    line = Series(name, [Point(1, 2, None, name)])
    axes = dict.fromkeys(("title", "x", "y"), name)
    chart = charts.line_chart([line, line], **axes, reference=(name, 2), file="curve")
    assert isinstance(chart, Markup)
    for picture in (chart, download(chart, "svg")):
        root = ElementTree.fromstring(picture)
        tags = {found.tag.rpartition("}")[2] for found in root.iter()}
        allowed = {"figure", "p", "a", "svg", "title", "style", "rect", "text", "line", "polyline", "circle"}
        assert tags <= allowed
        assert not any(name.startswith("on") for found in root.iter() for name in found.attrib)
    assert HOSTILE[:20] in elements(chart, "hit")[0][0].text


def test_csv_equals_figures():
    points = [Point(2, 1 / 3, 0.1, "=cmd|'/c calc'"), Point(1, math.nan), Point(3, math.inf)]
    chart = charts.line_chart([Series('quoted "a", b', points)], **AXES, file="curve")
    header, *rows = table(chart)
    assert header == ["series", "name", "step", "loss (nats per token)", "standard error"]
    assert rows == [
        ['quoted "a", b', "'=cmd|'/c calc'", "2", str(1 / 3), "0.1"],
        ['quoted "a", b', "", "1", "nan", ""],
        ['quoted "a", b', "", "3", "inf", ""],
    ]


def test_values_that_cannot_be_drawn():
    points = [Point(1, 2), Point(2, math.nan), Point(3, -math.inf), Point(0, 1), Point(4, 1e300), Point(5, 3)]
    chart = charts.line_chart([Series("a", points)], **AXES, log_x=True)
    assert len(elements(chart, "dot")) == 2
    assert "4 points left out: not finite, or not above zero on a log axis." in chart
    assert "nan" not in chart
    assert "inf" not in chart.replace("finite", "")
    for line in ([], [Point(1, math.nan)]):
        empty = charts.line_chart([Series("a", line)], **AXES)
        assert "Loss: nothing to draw yet." in empty
        assert ("1 point left out: not finite." in empty) == bool(line)


@pytest.mark.parametrize("y", [0.0, 3.0, 1e-13, -1e14])
def test_single_point_is_drawn(y):
    chart = charts.line_chart([Series("a", [Point(1, y)])], **AXES)
    (dot,) = elements(chart, "dot")
    assert (dot.get("cx"), dot.get("cy")) == ("50.0%", "50.0%")


def test_downloaded_picture_needs_no_page():
    picture = download(charts.loss_chart(METRICS, 1200, file="curve"), "svg")
    root = ElementTree.fromstring(picture)
    assert (root.get("width"), root[0].text) == ("720", "Loss by training step")
    assert "var(" not in picture
    assert "stroke: #2563eb" in picture
    assert picture.count("http") == 1  # the name of SVG


def test_loss_chart_draws_all_curves():
    metrics = [*METRICS, {"step": 500, "eval_subset_loss": 4.1, "eval_subset_rows": 64.0}]
    chart = charts.loss_chart(metrics, 1200, base_loss=4.5)
    names = ["training, smoothed", "held out, all rows", "held out, a subset of 64 rows", "training, each step"]
    assert [text for text in texts(chart) if text in names] == names
    assert "base 4.5" in texts(chart)
    assert len(elements(chart, "dot")) == 11 + 1
    curve = next(line for line in elements(chart, "faint") if line.get("points"))
    places = [float(pair.split(",")[0]) for pair in curve.get("points").split()]
    assert places[0] == round(100 / 1200, 2)
    assert places[-1] == round(100_000 / 1200, 2)


def test_losses_of_preferences_have_own_charts():
    metrics = [*METRICS, {"step": 500, "eval_subset_loss": 4.1, "eval_subset_rows": 64.0}]
    shown = charts.loss_chart(metrics, 1200, base_loss=4.5, objective="dpo", file="curve")
    training, text = str(shown).split("</figure>")[:2]
    assert "loss of dpo per pair" in training
    assert "training, smoothed" in training
    assert "held out" not in training
    assert "loss (nats per token)" in text
    assert "Held-out loss of the chosen answers" in text
    assert "base 4.5" in text
    assert "training, smoothed" not in text
    assert "curve-held-out.svg" in text
    assert "loss of kto per answer" in charts.loss_chart(metrics, objective="kto")


def test_thinned_curve_keeps_ends_and_peaks():
    losses = [3.0 + (step % 7) / 100 for step in range(1000)]
    losses[0], losses[500], losses[701], losses[-1] = 3.3, 9.0, 1.0, 3.2
    points = [Point(step, loss) for step, loss in enumerate(losses)]
    kept = charts._thin_out(points, 300)
    assert 200 < len(kept) <= 300
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert {points[500], points[701]} <= set(kept)
    assert kept == sorted(kept)
    assert charts._thin_out(points[:300], 300) == points[:300]
    assert len(table(charts.loss_chart(METRICS, file="curve"))) == 1 + 2 * 1000 + 11


def test_redrawing_costs_few_milliseconds():
    charts.loss_chart(METRICS, 1000)
    seconds = []
    for _ in range(10):
        start = time.thread_time()
        charts.loss_chart(METRICS, 1000)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.015  # 4 ms on a machine of 2025
