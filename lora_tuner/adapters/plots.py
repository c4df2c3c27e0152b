"""The loss curve as numbers (metrics.jsonl), and plots of runs, gains, spectra and sweeps."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from ..config import MAX_COUNT
from ..errors import AdapterError
from ..text import display_name, format_gain, shorten
from .manifest import EvalResult, Manifest
from .report import Doubling, GrowthFigures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

MAX_METRICS_BYTES = 50_000_000
_METRICS = ("step", "loss", "eval_loss", "eval_subset_loss", "eval_subset_rows")  # what the plot shows
_SWEEP_LABELS = ("size (MB)", "training time (s)")
_NUMBERED_LABELS = 20  # with more, a confusion matrix has no numbers
SMOOTHED_SHARE, MAX_SMOOTHED_STEPS = 0.1, 10  # of the run, in an average of the training loss


def write_metrics(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write one JSON object per line, as logged: `step` with the training loss (`loss`), the held-out
    loss (`eval_loss`), or that on a subset of the held-out rows (`eval_subset_loss`).
    """
    path.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read steps and losses of a metrics file. Raises AdapterError if they cannot be plotted."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_METRICS_BYTES:  # a pipe would block
            raise ValueError("the file is missing or too large")
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        history = [{key: float(entry[key]) for key in _METRICS if key in entry} for entry in entries]
        if not all(
            "step" in entry and all(0 <= value <= MAX_COUNT for value in entry.values()) for entry in history
        ):
            raise ValueError("a step or a loss is not a valid number")
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise AdapterError(f"{path} has no loss curve: {error}.") from error
    return history


class AverageLoss:
    """Exponential moving average of the losses of a run so far.

    It covers about a tenth of the run, so that it does not lag behind a short one. It is corrected
    for its start, as Adam's moments are (Kingma and Ba, 2015, arXiv:1412.6980), so that the first
    loss weighs no more than others.
    """

    def __init__(self, steps: int, losses: Iterable[float] = ()) -> None:
        self.share = 1 / max(1.0, min(MAX_SMOOTHED_STEPS, SMOOTHED_SHARE * steps))  # of the newest loss
        self.sum = self.weight = 0.0
        for loss in losses:
            self.update(loss)

    def update(self, loss: float) -> float:
        """Return the average with one more loss."""
        self.sum += self.share * (loss - self.sum)
        self.weight += self.share * (1 - self.weight)
        return self.sum / self.weight


def smooth_losses(losses: Sequence[float]) -> list[float]:
    """Return the moving average of the losses of a run at each step."""
    average = AverageLoss(len(losses))
    return [average.update(loss) for loss in losses]


def plot_loss(history: Sequence[Mapping[str, float]], manifest: Manifest, to: Path | IO[bytes]) -> None:
    """Plot training loss per step, smoothed loss and held-out loss.

    A curve on a subset of the held-out rows stands beside the loss on all of them.
    """
    from matplotlib.figure import Figure

    assert manifest.data is not None
    assert manifest.run is not None
    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.subplots()
    steps = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if steps:
        numbers, losses = zip(*steps, strict=True)
        axes.plot(numbers, losses, color="0.75", linewidth=1, label="training, each step")
        axes.plot(numbers, smooth_losses(losses), color="tab:blue", label="training, smoothed")
    axes.set(xlabel="step", ylabel="loss per token")
    if manifest.preference:  # its loss has another scale than that of text
        objective = manifest.preference.objective
        axes.set(ylabel=f"loss of {objective} per {'answer' if objective == 'kto' else 'pair'}")
        axes = axes.twinx()
        axes.set(ylabel="held-out loss per token of the chosen answers")
    held_out = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    if manifest.result:
        held_out = {0: manifest.result.base_loss} | held_out | {manifest.run.kept_step: manifest.result.loss}
    subset = [entry for entry in history if {"eval_subset_loss", "eval_subset_rows"} <= entry.keys()]
    if subset:
        label = f"held out, a subset of {subset[0]['eval_subset_rows']:.0f} rows"
        points = [(entry["step"], entry["eval_subset_loss"]) for entry in subset]
        axes.plot(*zip(*points, strict=True), "o-", color="tab:orange", label=label)
    if held_out:
        style, label = ("D", f"held out, {_held_out_rows(manifest)} rows") if subset else ("o-", "held out")
        color = "tab:red" if subset else "tab:orange"
        axes.plot(*zip(*sorted(held_out.items()), strict=True), style, color=color, label=label)
    title = f"{display_name(manifest.data.name)[:60]} on {display_name(manifest.base.name)[:60]}"
    axes.set_title(title, parse_math=False)  # a "$" in a file name is not a formula
    if steps or held_out or subset:
        axes.legend(handles=[line for part in figure.axes for line in part.get_lines()], frameon=False)
    for part in figure.axes:
        part.spines[["top"] if manifest.preference else ["top", "right"]].set_visible(False)
    figure.savefig(to, metadata={"Software": None})


def _held_out_rows(manifest: Manifest) -> str:
    """Say of how many held-out rows the result is."""
    result = manifest.result
    return f"{result.rows} of {result.of_rows:,}" if result and result.of_rows else "all"


def plot_gains(
    base: str,
    adapters: Sequence[str],
    sets: Sequence[str],
    cells: Sequence[Sequence[EvalResult | None]],
    to: Path | IO[bytes],
) -> None:
    """Plot a gain matrix as a heat map: blue is better than the base, red worse, grey not
    evaluated.

    Args:
        base: name of the base model.
        adapters: names of the rows.
        sets: names of the columns, the held-out sets.
        cells: `cells[row][column]`.
        to: the PNG file to write.
    """
    import numpy as np
    from matplotlib.figure import Figure

    gains = np.array([[np.nan if cell is None else cell.gain for cell in row] for row in cells])
    limit = float(np.nanmax(np.abs(gains))) if np.isfinite(gains).any() else 0.0
    title = f"Gain over {display_name(base)} (loss per token)\nbelow zero: worse than the base"
    columns = [display_name(name) for name in sets]
    label_inches = 0.1 * max(map(len, [*adapters, *columns]))
    width = 2.2 + label_inches + max(1.1 * len(sets), 0.08 * max(map(len, title.split("\n"))))
    height = 1.8 + label_inches + 0.6 * len(adapters)
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(gains, cmap="RdBu", vmin=-limit or -1.0, vmax=limit or 1.0, aspect="auto")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            text = "missing"
            if cell is not None:
                text = format_gain(cell.gain, cell.standard_error, "+.2f").replace(" ", "\n", 1)
            color = "white" if cell is not None and abs(cell.gain) > 0.6 * limit else "black"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", parse_math=False)
    axes.set_yticks(range(len(adapters)), adapters, parse_math=False)
    axes.set(xlabel="held-out set", ylabel="adapter", facecolor="0.85")
    axes.set_title(title, parse_math=False, fontsize=10)
    figure.colorbar(image)
    figure.savefig(to, format="png", metadata={"Software": None})


def plot_labels(manifest: Manifest, to: Path | IO[bytes]) -> None:
    """Plot which labels held-out rows have and which they are given, by the base and by the adapter.

    A colour is the share of the rows with a label. Nothing is plotted without figures.
    """
    from matplotlib.figure import Figure

    labels = manifest.labels
    if labels is None or labels.figures is None:
        return
    names = [shorten(name, 20) for name in labels.names]
    tables = {"adapter": labels.figures} | ({"base": labels.base} if labels.base else {})
    size = max(2.2, min(0.4 * len(names), 12.0)) + 0.08 * max(map(len, names))
    figure = Figure(figsize=(1.6 + (size + 0.6) * len(tables), size + 1.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, (title, figures) in zip(panels, tables.items(), strict=True):
        shares = [[count / max(sum(row), 1) for count in row] for row in figures.confusion]
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for y, row in enumerate(figures.confusion if len(names) <= _NUMBERED_LABELS else []):
            for x, count in enumerate(row):
                color = "white" if shares[y][x] > 0.6 else "black"
                axes.text(x, y, f"{count:,}", ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.set(xlabel="label given", ylabel="label of the row")
        axes.set_title(f"{title}: {figures.accuracy:.1%} right", parse_math=False, fontsize=10)
    figure.colorbar(image, ax=list(panels), label="share of the rows with a label")
    figure.savefig(to, format="png", metadata={"Software": None})


def plot_spectra(spectra: Mapping[str, Sequence[float]], ranks: Mapping[str, int], to: Path | IO[bytes]) -> None:
    """Plot the squared singular values of the layers' updates as shares of each layer's sum: for
    each kind of layer the median as a line and the quartiles as a band.

    Args:
        spectra: layer -> squared singular values, largest first.
        ranks: layer -> rank it was truncated to; its median is marked by a dot. Empty for none.
        to: the PNG file to write.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for number, (kind, layers) in enumerate(_layers_by_kind(spectra).items()):
        color = colormaps["tab10"](number % 10)
        shares = np.zeros((len(layers), max(len(spectra[layer]) for layer in layers)))
        for row, layer in enumerate(layers):  # a layer of lower rank has no energy beyond it
            shares[row, : len(spectra[layer])] = np.array(spectra[layer]) / sum(spectra[layer])
        lower, median, upper = np.quantile(shares, [0.25, 0.5, 0.75], axis=0)
        x = np.arange(1, shares.shape[1] + 1)
        label = f"{kind} ({len(layers)} layer{'s' * (len(layers) != 1)}"
        if kept := [ranks[layer] for layer in layers if layer in ranks]:
            # Of an even number of layers the lower middle: an energy lies at a whole rank alone.
            middle = sorted(kept)[(len(kept) - 1) // 2]
            axes.plot(middle, median[middle - 1], "o", markersize=5, color=color)
            label += f", rank {_format_span(kept)}"
        axes.fill_between(x, lower, upper, alpha=0.15, linewidth=0, color=color)
        line = "-" if number < 10 else "--"
        axes.plot(x, median, line, linewidth=1.5, label=f"{label})", color=color)
    axes.set(xlabel="singular value", ylabel="share of the layer's energy", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    title = "Singular values of the LoRA updates: median and quartiles of each kind of layer"
    axes.set_title(title + ("\ndot: median of the ranks kept" if ranks else ""), fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, format="png", metadata={"Software": None})


def _layers_by_kind(layers: Iterable[str]) -> dict[str, list[str]]:
    """Group layers by the last part of their names, such as `q_proj`."""
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kinds.setdefault(layer.rpartition(".")[2], []).append(layer)
    return dict(sorted(kinds.items()))


def _format_span(numbers: Collection[int]) -> str:
    smallest, largest = min(numbers), max(numbers)
    return f"{smallest}" if smallest == largest else f"{smallest} to {largest}"


class SweepPoint(NamedTuple):
    """One trial of a sweep. `standard_error` is that of the gap to the best trial, paired by rows;
    None if it is unknown."""

    name: str
    bytes: int
    seconds: float
    loss: float
    standard_error: float | None


def plot_sweep(
    points: Sequence[SweepPoint],
    base_loss: float,
    recommended: str,
    to: Path | IO[bytes],
    growth: GrowthFigures | None = None,
    figure_name: str = "held-out loss per token",
) -> None:
    """Plot held-out loss against size and against training time, with the base as a line and the
    recommended adapter highlighted; and against rows, steps or rank, where it is known what twice as
    much would bring, which is drawn with its 80% interval.

    Args:
        points: one of each adapter.
        base_loss: held-out loss of the base.
        recommended: name of the adapter to keep.
        to: the PNG file to write.
        figure_name: what is plotted in place of the held-out loss; lower is better.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
    highest = max(point.loss + (point.standard_error or 0.0) for point in points)
    lowest = min(point.loss - (point.standard_error or 0.0) for point in points)
    # A base far from all points has a strip of its own, so that their differences can be seen.
    far = base_loss - highest > highest - lowest
    doublings = growth.doublings if growth else []
    figure.set_figwidth(10 + 4 * len(doublings))
    panels = len(_SWEEP_LABELS) + len(doublings)
    rows = figure.subplots(
        1 + far, panels, sharex="col", sharey="row", squeeze=False, height_ratios=[1, 6] if far else [1]
    )
    for doubling, axes in zip(doublings, rows[-1][len(_SWEEP_LABELS) :], strict=True):
        _plot_doubling(axes, doubling, base_loss)
    for base_axes, axes in zip(rows[0], rows[-1], strict=True):
        base_axes.axhline(base_loss, color="0.5", linestyle="--", label=f"base {base_loss:.3f}")
        axes.spines[["top", "right"]].set_visible(False)
        if far:
            base_axes.spines[["top", "right", "bottom"]].set_visible(False)
            base_axes.tick_params(bottom=False)
            base_axes.set_yticks([base_loss], [f"{base_loss:.3f}"])
    labels: list[list[Annotation]] = []
    for axes, label in zip(rows[-1], _SWEEP_LABELS, strict=False):
        axes.set(xlabel=label, xmargin=0.05, ymargin=0.12)
        labels.append([])
        for point in sorted(points, key=lambda point: point.loss):
            x = point.bytes / 1e6 if label == _SWEEP_LABELS[0] else point.seconds
            color = "tab:orange" if point.name == recommended else "tab:blue"
            axes.errorbar(x, point.loss, yerr=point.standard_error or 0.0, fmt="o", capsize=4, color=color)
            text = f"{shorten(point.name, 24)} {point.loss:.3f}"
            labels[-1].append(
                axes.annotate(
                    text, (x, point.loss), (6, 3), textcoords="offset points", fontsize=8, parse_math=False
                )
            )
        left, right = axes.get_xlim()
        axes.set_xlim(right=right + 0.35 * (right - left))  # room for the last label
    rows[-1][0].set(ylabel=figure_name)
    rows[0][0].legend(frameon=False, fontsize=8)
    title = f"Recommended: {recommended} (orange). Bars: standard error of the gap to the best"
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.draw_without_rendering()  # which gives the labels their places
    for panel in labels:
        _part_labels(panel)
    figure.savefig(to, format="png", metadata={"Software": None})


def _plot_doubling(axes: "Axes", doubling: Doubling, base_loss: float) -> None:
    """Plot the loss of the trials that differ in one quantity, and what twice as much is expected to reach."""
    losses = [base_loss - gain for gain in doubling.gains]
    axes.plot(doubling.values, losses, "o-", color="tab:blue")
    last, twice = doubling.values[-1], 2 * doubling.values[-1]
    expected = losses[-1] - doubling.gain
    bar = [[doubling.high - doubling.gain], [doubling.gain - doubling.low]]  # a larger gain is a lower loss
    axes.plot([last, twice], [losses[-1], expected], ":", color="tab:blue")
    axes.errorbar(
        twice, expected, yerr=bar, fmt="o", mfc="white", capsize=4, color="tab:blue", label="expected, 80%"
    )
    ticks = [*doubling.values, twice]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    label = "training rows" if doubling.quantity == "rows" else doubling.quantity
    axes.set(xlabel=label, xmargin=0.1)
    axes.legend(frameon=False, fontsize=8)


def _part_labels(labels: Sequence["Annotation"]) -> None:
    """Move labels, which come from the lowest to the highest point, up until none covers another."""
    boxes: list[Bbox] = []
    for label in labels:
        while any(box.overlaps(label.get_window_extent()) for box in boxes):
            x, y = label.xyann
            label.xyann = (x, y + 2)
        boxes.append(label.get_window_extent())
