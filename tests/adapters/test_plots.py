import io
import json
import re
import warnings

import numpy as np
import pytest
from PIL import Image

from lora_tuner import EvalSet, GainMatrix
from lora_tuner.adapters import plots
from lora_tuner.adapters.manifest import EvalResult
from lora_tuner.adapters.plots import plot_loss, plot_sweep  # the session leaves them empty elsewhere
from lora_tuner.adapters.report import Doubling, GrowthFigures
from lora_tuner.errors import AdapterError

from .. import adapter_files

HISTORY = [
    {"step": 1, "loss": 4.0, "learning_rate": 1e-3},
    {"step": 2, "loss": 3.5, "learning_rate": 5e-4},
    {"step": 2, "eval_loss": 3.625},
    {"step": 3, "loss": 3.25, "learning_rate": 0.0},
]


def test_write_metrics_as_jsonl(tmp_path):
    plots.write_metrics(HISTORY, tmp_path / "metrics.jsonl")
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.startswith('{"step": 1, "loss": 4.0, "learning_rate": 0.001}\n')
    assert text.endswith("}\n")
    assert [json.loads(line) for line in text.splitlines()] == HISTORY


def test_write_empty_metrics(tmp_path):
    plots.write_metrics([], tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def plot(tmp_path, history=HISTORY, manifest=None):
    path = tmp_path / "loss.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_loss(history, manifest or adapter_files.manifest(), path)
    return pixels_of(path)


def pixels_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return np.asarray(image.convert("RGB")).astype(int)


def share(pixels, color):
    """Share of the pixels with about this color."""
    return (np.abs(pixels - color).max(axis=-1) < 40).mean()


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def test_loss_plot_has_both_curves(tmp_path):
    pixels = plot(tmp_path)
    assert pixels.shape == (480, 840, 3)
    assert share(pixels, BLUE) > 0.0003
    assert share(pixels, ORANGE) > 0.0003


def test_loss_plot_without_held_out_loss(tmp_path):
    pixels = plot(tmp_path, [HISTORY[0], HISTORY[1]], adapter_files.manifest(result=None))
    assert share(pixels, BLUE) > 0.0003
    assert share(pixels, ORANGE) == 0


def test_loss_plot_without_steps(tmp_path):
    pixels = plot(tmp_path, [], adapter_files.manifest(result=None))
    assert share(pixels, BLUE) == share(pixels, ORANGE) == 0


def test_preference_plot_has_two_axes(tmp_path, monkeypatch):
    """The loss of pairs is on another scale than that of text."""
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *of, **how: (figures.append(self), savefig(self, *of, **how))
    )
    pixels = plot(tmp_path, manifest=adapter_files.manifest(preference=adapter_files.PREFERENCE))
    assert [axes.get_ylabel() for axes in figures[0].axes] == [
        "loss of dpo per pair",
        "held-out loss per token of the chosen answers",
    ]
    assert share(pixels, BLUE) > 0.0003
    assert share(pixels, ORANGE) > 0.0003
    assert len(figures[0].axes[1].get_legend().get_texts()) == 3


@pytest.fixture
def lines(monkeypatch):
    """Points of each line drawn, by its label."""
    from matplotlib.axes import Axes

    lines, draw = {}, Axes.plot

    def record(self, x, y, *rest, label, **style):
        lines[label] = list(zip(x, y, strict=True))
        return draw(self, x, y, *rest, label=label, **style)

    monkeypatch.setattr(Axes, "plot", record)
    return lines


def test_smoothed_losses_begin_at_first():
    losses = [7 * 0.99**step for step in range(120)]
    smoothed = plots.smooth_losses(losses)
    weights = [0.9 ** (119 - step) for step in range(120)]
    assert smoothed[0] == losses[0]
    assert smoothed[-1] == pytest.approx(np.average(losses, weights=weights))
    assert plots.smooth_losses([2.5] * 30) == pytest.approx([2.5] * 30)
    assert plots.smooth_losses([]) == []


@pytest.mark.parametrize("steps", [1, 2, 12, 40])
def test_smoothed_losses_follow_short_run(steps):
    losses = [7 * 0.1 ** (step / steps) for step in range(steps)]
    recent = losses[-1 - round(steps / 5) :]
    assert losses[-1] - 1e-9 <= plots.smooth_losses(losses)[-1] <= recent[0]


def test_loss_plot_names_subset(tmp_path, lines):
    points = [(0, 3.9), (1, 3.8), (3, 3.7)]
    curve = [{"step": step, "eval_subset_loss": loss, "eval_subset_rows": 8} for step, loss in points]
    plot(tmp_path, [*HISTORY[:2], *curve])
    assert lines["held out, a subset of 8 rows"] == points
    assert lines["held out, all rows"] == [(0, 3.75), (30, 3.5)]


def test_loss_plot_values(tmp_path, lines):
    plot(tmp_path)
    assert lines["held out"] == [(0, 3.75), (2, 3.625), (30, 3.5)]  # base, evaluation, the step that was kept
    assert lines["training, each step"] == [(1, 4.0), (2, 3.5), (3, 3.25)]
    assert lines["training, smoothed"] == lines["training, each step"]  # three steps need no smoothing


@pytest.mark.parametrize("name", ["$a$.csv", "a_$b.csv", r"$\frac$.csv", "{x}^2.csv"])
def test_loss_plot_title_is_plain_text(tmp_path, name):
    facts = adapter_files.manifest().data.model_copy(update={"name": name})
    plot(tmp_path, manifest=adapter_files.manifest(data=facts.model_dump()))


def test_loss_plot_is_reproducible(tmp_path):
    plot(tmp_path)
    first = (tmp_path / "loss.png").read_bytes()
    plot(tmp_path)
    assert (tmp_path / "loss.png").read_bytes() == first


def result(gain):
    return EvalResult(base_loss=4, loss=4 - gain, gain=gain, standard_error=0.01, rows=8, tokens=90)


def gains(*lines, adapters=None, sets=None, base="distilgpt2"):
    """A gain matrix; None is a cell without rows."""
    return GainMatrix(
        base,
        adapters or [f"adapter{number}" for number in range(len(lines))],
        [EvalSet(name, ["a row"]) for name in sets or [f"set{number}" for number in range(len(lines[0]))]],
        [[None if gain is None else result(gain) for gain in line] for line in lines],
    )


def draw(matrix, path):
    plots.plot_gains(matrix.base, matrix.adapters, [rows.name for rows in matrix.sets], matrix.cells, path)


def plot_gains(tmp_path, matrix, name="gains.png"):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(matrix, tmp_path / name)
    return pixels_of(tmp_path / name)


# Ends and middle of the color scale, and the background
GAIN, LOSS, ZERO, MISSING = (5, 48, 97), (103, 0, 31), (246, 247, 247), (217, 217, 217)


def center_of(pixels, color):
    """Center (x, y) of all pixels with this color."""
    positions = np.argwhere((np.abs(pixels - color) < 3).all(axis=-1))
    assert len(positions) > 0.05 * pixels[..., 0].size
    y, x = positions.mean(axis=0)
    return x, y


def test_gain_plot_colors(tmp_path):
    pixels = plot_gains(tmp_path, gains([0.5, None], [-0.5, 0.0]))
    gain, loss, zero, missing = (center_of(pixels, color) for color in (GAIN, LOSS, ZERO, MISSING))
    # A row per adapter, a column per held-out set; the color bar shifts the centers a little.
    assert gain[0] == pytest.approx(loss[0], abs=30)
    assert zero[0] == pytest.approx(missing[0], abs=30)
    assert gain[1] == pytest.approx(missing[1], abs=30)
    assert loss[1] == pytest.approx(zero[1], abs=30)
    assert missing[0] - gain[0] > 100
    assert loss[1] - gain[1] > 100


@pytest.mark.parametrize("matrix", [gains([0.0]), gains([0.0, None]), gains([1e-12, 1.0])])
def test_zero_gain_is_neutral(tmp_path, matrix):
    center_of(plot_gains(tmp_path, matrix), ZERO)


def test_gain_plot_cell_texts(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    texts, write = {}, Axes.text

    def record(self, x, y, text, **style):
        texts[y, x] = text
        return write(self, x, y, text, **style)

    monkeypatch.setattr(Axes, "text", record)
    plot_gains(tmp_path, gains([0.5, None], [-0.25, 0.0]))
    assert texts == {
        (0, 0): "+0.50\n± 0.01",
        (0, 1): "missing",
        (1, 0): "-0.25\n± 0.01",
        (1, 1): "+0.00\n± 0.01",
    }


@pytest.mark.parametrize(
    "matrix",
    [
        gains([0.1]),
        gains([-0.1]),
        gains([None]),
        gains([None, None], [None, None]),
        gains([0.0, 0.0], [0.0, 0.0]),
        gains([1e-9, 1e9]),
        gains([0.1], sets=["$_{$"], base="$^{$"),
        gains([0.1, 0.2], sets=["$a_b{c", r"\frac{$"], adapters=["a_b"], base="/models/my_$base$"),
        gains([0.1], [0.2], adapters=["a_b-1", "A" * 12]),
        pytest.param(gains(*[[0.01 * i * j for i in range(12)] for j in range(12)]), marks=pytest.mark.slow),
    ],
    ids=["one", "loss", "missing", "all-missing", "zero", "far", "formula", "names", "column", "many"],
)
def test_gain_plot_of_any_matrix(tmp_path, matrix):
    height, width, _ = plot_gains(tmp_path, matrix).shape
    assert width >= 120 * (2.2 + 1.1 * len(matrix.sets))
    assert height >= 120 * (1.8 + 0.6 * len(matrix.adapters))


def test_gain_plot_is_reproducible(tmp_path):
    for name in ("a.png", "b.png"):
        plot_gains(tmp_path, gains([0.5, None], [-0.5, 0.25]), name)
    plot_gains(tmp_path, gains([0.5, None], [-0.5, 0.24]), "c.png")
    first, second, other = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert first == second != other


def test_gain_plot_hides_local_paths(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    shown = []
    monkeypatch.setattr(Axes, "set_xticks", lambda self, ticks, labels, **_: shown.append(labels))
    monkeypatch.setattr(Axes, "set_title", lambda self, title, **_: shown.append(title))
    plot_gains(tmp_path, gains([0.1], sets=[str(tmp_path / "films.csv")], base=str(tmp_path / "mine")))
    assert shown == [["films.csv"], "Gain over mine (loss per token)\nbelow zero: worse than the base"]


@pytest.fixture
def saved(monkeypatch):
    """Collect the figures that are saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (save(self, *a, **k), figures.append(self)))
    return figures


def test_spectrum_plot_shows_median_and_quartiles(saved):
    """210 layers of seven kinds are seven lines and seven bands."""
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    spectra = {f"layers.{layer}.{kind}": [31.0 + layer, 31.0 - layer] for layer in range(30) for kind in kinds}
    plots.plot_spectra(spectra, {}, io.BytesIO())
    axes = saved[0].axes[0]
    labels = [f"{kind} (30 layers)" for kind in sorted(kinds)]
    assert [line.get_label() for line in axes.lines] == labels
    assert [text.get_text() for text in axes.get_legend().get_texts()] == labels
    assert len(axes.collections) == 7
    shares = (31 + np.arange(30)) / 62
    assert axes.lines[0].get_ydata() == pytest.approx([np.median(shares), 1 - np.median(shares)])
    lower, upper = (np.quantile(shares, share) for share in (0.25, 0.75))
    band = axes.collections[0].get_paths()[0].vertices
    assert {*band[band[:, 0] == 1, 1].round(6)} == {lower.round(6), upper.round(6)}


def test_spectrum_plot_marks_truncation(saved):
    spectra = {"h.0.c_attn": [4.0, 1.0, 0.0], "h.1.c_attn": [3.0, 1.0, 1.0], "h.0.c_fc": [2.0]}
    plots.plot_spectra(spectra, {"h.0.c_attn": 1, "h.1.c_attn": 3, "h.0.c_fc": 1}, io.BytesIO())
    axes = saved[0].axes[0]
    dots = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"]
    assert dots == [[[1, pytest.approx(0.7)]], [[1, 1]]]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["c_attn (2 layers, rank 1 to 3)", "c_fc (1 layer, rank 1)"]


def test_spectrum_plot_of_unequal_ranks(saved):
    """A layer of a lower rank has no energy in the singular values that others have beyond it."""
    plots.plot_spectra({"0.q": [3.0, 1.0], "1.q": [5.0], "2.q": [3.0, 1.0]}, {}, io.BytesIO())
    assert saved[0].axes[0].lines[0].get_ydata() == pytest.approx([0.75, 0.25])


POINTS = [
    plots.SweepPoint("r$2$", 1_000_000, 20.0, 3.5, 0.02),
    plots.SweepPoint("r4", 2_000_000, 21.0, 3.49, 0.0),
    plots.SweepPoint("r8", 2_000_000, 21.0, 3.49, None),
]


@pytest.mark.parametrize(("base", "panels"), [(3.85, 4), (3.5, 2), (3.4, 2)], ids=["far", "near", "below"])
def test_sweep_plot_shows_base_errors_labels(saved, base, panels):
    """A base far above all trials has a strip of its own, so that their bars can be seen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_sweep(POINTS, base, "r4", io.BytesIO())
    axes = saved[0].axes
    assert len(axes) == panels
    lines = [line for line in axes[0].lines if line.get_label() == f"base {base:.3f}"]
    assert [*lines[0].get_ydata()] == [base, base]
    assert axes[0].get_ylim()[0] < base < axes[0].get_ylim()[1]
    trials = axes[-1]
    bars = [bar.get_segments()[0][:, 1] for bar in trials.collections]
    assert np.array(bars) == pytest.approx(np.array([[3.49, 3.49], [3.49, 3.49], [3.48, 3.52]]))
    assert [text.get_text() for text in trials.texts] == ["r4 3.490", "r8 3.490", "r$2$ 3.500"]
    boxes = [text.get_window_extent() for text in trials.texts]
    assert not any(boxes[one].overlaps(boxes[other]) for one, other in ((0, 1), (0, 2), (1, 2)))


def test_sweep_plot_shows_doubling(saved):
    """The trials by their rows, and what twice as many are expected to reach, with the interval."""
    facts = {"quantity": "rows", "values": [20, 40, 80], "gains": [0.1, 0.2, 0.25]}
    doubling = Doubling(**facts, gain=0.03, standard_error=0.01, low=0.02, high=0.05)
    growth = GrowthFigures(sentences=["Twice the rows."], doublings=[doubling])
    plot_sweep(POINTS, 3.6, "r4", io.BytesIO(), growth)
    *_, axes = saved[0].axes
    assert (axes.get_xlabel(), axes.get_xscale()) == ("training rows", "log")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["20", "40", "80", "160"]
    assert axes.lines[0].get_ydata() == pytest.approx([3.5, 3.4, 3.35])
    bar = axes.collections[0].get_segments()[0]
    assert bar.tolist() == [pytest.approx([160, 3.30]), pytest.approx([160, 3.33])]


def test_sweep_plot_of_single_trial(saved):
    plot_sweep(POINTS[2:], 3.49, "r8", io.BytesIO())
    assert len(saved[0].axes) == 2


@pytest.mark.parametrize("name", ["reviews", "$_{$", "a" * 64])
def test_gain_plot_fits_long_names(tmp_path, saved, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(gains([0.1], adapters=[name], sets=[name]), tmp_path / "x.png")
    box, (width, height) = saved[0].get_tightbbox(), saved[0].get_size_inches()
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= width
    assert box.y1 <= height


def test_metrics_round_trip(tmp_path):
    history = [*HISTORY, {"step": 3, "eval_subset_loss": 3.2, "eval_subset_rows": 8}]
    plots.write_metrics(history, tmp_path / "metrics.jsonl")
    found = plots.read_metrics(tmp_path / "metrics.jsonl")
    assert found == [{key: it[key] for key in it if key != "learning_rate"} for it in history]
    assert (plot(tmp_path, found) == plot(tmp_path, history)).all()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "7",
        '"step"',
        "{",
        "{}",
        '{"step": "x"}',
        '{"step": [1]}',
        '{"step": -1}',
        '{"step": 1e300}',
        f'{{"step": 1{"0" * 400}}}',
        '{"step": 1, "loss": NaN}',
        "[" * 100_000,
        None,
    ],
)
def test_read_invalid_metrics_fails(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(AdapterError, match=re.escape(f"{path} has no loss curve: ")):
        plots.read_metrics(path)


@pytest.mark.parametrize("count", [2, 40])
def test_labels_are_plotted_with_numbers(tmp_path, count):
    names = [f"$label {number}$" for number in range(count)]
    confusion = [[5 if row == column else 1 for column in range(count)] for row in range(count)]
    figures = {"accuracy": 0.8, "interval": (0.7, 0.9), "macro_f1": 0.8, "calibration_error": 0.1}
    figures |= {"confusion": confusion}
    facts = {"names": names, "counts": [1] * count, "figures": figures}
    manifest = adapter_files.manifest(labels=adapter_files.labels(**facts, base=figures))
    plots.plot_labels(manifest, tmp_path / "labels.png")
    pixels = pixels_of(tmp_path / "labels.png")
    assert pixels.shape[1] > 400
    assert share(pixels, (8, 48, 107)) > 0.001, "the darkest blue"
    plots.plot_labels(adapter_files.manifest(), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
