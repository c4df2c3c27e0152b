"""The loss curve as numbers (metrics.jsonl), and plots of runs, gains, spectra and sweeps."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from ..config import MAX_COUNT
from ..errors import AdapterError
from ..text import display_name, format_gain
from .manifest import EvalResult, Manifest

MAX_METRICS_BYTES = 50_000_000


def write_metrics(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write one JSON object per line, as logged: `step` with `loss` or `eval_loss`."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read steps and losses of a metrics file. Raises AdapterError if they cannot be plotted."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_METRICS_BYTES:  # a pipe would block
            raise ValueError("the file is missing or too large")
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        history = [
            {key: float(entry[key]) for key in ("step", "loss", "eval_loss") if key in entry} for entry in entries
        ]
        if not all(
            "step" in entry and all(0 <= value <= MAX_COUNT for value in entry.values()) for entry in history
        ):
            raise ValueError("a step or a loss is not a valid number")
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise AdapterError(f"{path} has no loss curve: {error}.") from error
    return history


def plot_loss(history: Sequence[Mapping[str, float]], manifest: Manifest, to: Path | IO[bytes]) -> None:
    """Plot training loss per step, smoothed loss and held-out loss."""
    from matplotlib.figure import Figure

    assert manifest.data is not None
    assert manifest.run is not None
    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.subplots()
    steps = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if steps:
        numbers, losses = zip(*steps, strict=True)
        axes.plot(numbers, losses, color="0.75", linewidth=1, label="training, each step")
        smoothed = itertools.accumulate(losses, lambda average, loss: average + 0.1 * (loss - average))
        axes.plot(numbers, list(smoothed), color="tab:blue", label="training, smoothed")
    held_out = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    if manifest.result:
        held_out = {0: manifest.result.base_loss} | held_out | {manifest.run.kept_step: manifest.result.loss}
    if held_out:
        axes.plot(*zip(*sorted(held_out.items()), strict=True), "o-", color="tab:orange", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    title = f"{display_name(manifest.data.name)[:60]} on {display_name(manifest.base.name)[:60]}"
    axes.set_title(title, parse_math=False)  # a "$" in a file name is not a formula
    if steps or held_out:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, metadata={"Software": None})


def plot_gains(
    base: str,
    adapters: Sequence[str],
    sets: Sequence[str],
    cells: Sequence[Sequence[EvalResult | None]],
    path: Path,
) -> None:
    """Plot a gain matrix as a heat map: blue is better than the base, red worse, grey not
    evaluated.

    Args:
        base: name of the base model.
        adapters: names of the rows.
        sets: names of the columns, the held-out sets.
        cells: `cells[row][column]`.
        path: the PNG file to write.
    """
    import numpy as np
    from matplotlib.figure import Figure

    gains = np.array([[np.nan if cell is None else cell.gain for cell in row] for row in cells])
    limit = float(np.nanmax(np.abs(gains))) if np.isfinite(gains).any() else 0.0
    title = f"Gain over {display_name(base)} (nats per token)"
    columns = [display_name(name) for name in sets]
    label_inches = 0.1 * max(map(len, [*adapters, *columns]))
    width = 2.2 + label_inches + max(1.1 * len(sets), 0.08 * len(title))
    height = 1.8 + label_inches + 0.6 * len(adapters)
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(gains, cmap="RdBu", vmin=-limit or -1.0, vmax=limit or 1.0, aspect="auto")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            text = "missing"
            if cell is not None:
                text = format_gain(cell.gain, cell.standard_error, "+.3f").replace(" ", "\n", 1)
            color = "white" if cell is not None and abs(cell.gain) > 0.6 * limit else "black"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", parse_math=False)
    axes.set_yticks(range(len(adapters)), adapters, parse_math=False)
    axes.set(xlabel="held-out set", ylabel="adapter", facecolor="0.85")
    axes.set_title(title, parse_math=False, fontsize=10)
    figure.colorbar(image)
    figure.savefig(path, format="png", metadata={"Software": None})


def plot_spectra(spectra: Mapping[str, Sequence[float]], ranks: Mapping[str, int], to: Path | IO[bytes]) -> None:
    """Plot the squared singular values of each layer's update as shares of their sum.

    Args:
        spectra: layer -> squared singular values, largest first.
        ranks: layer -> rank it was truncated to, marked by a dot; empty for none.
        to: the PNG file to write.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.subplots()
    kinds = sorted({module.rpartition(".")[2] for module in spectra})
    colors = {kind: colormaps["tab10"](number % 10) for number, kind in enumerate(kinds)}
    labelled: set[str] = set()
    for module, squares in spectra.items():
        kind, total = module.rpartition(".")[2], sum(squares)
        shares = [square / total for square in squares]
        label = None if kind in labelled else kind
        axes.plot(range(1, len(shares) + 1), shares, color=colors[kind], label=label, linewidth=0.7, alpha=0.6)
        if module in ranks:
            axes.plot(ranks[module], shares[ranks[module] - 1], "o", markersize=2.5, color=colors[kind])
        labelled.add(kind)
    axes.set(xlabel="singular value", ylabel="share of the layer's energy", yscale="log")
    axes.set_title("Singular values of the LoRA updates" + (" (dots: rank kept)" if ranks else ""))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, metadata={"Software": None})


def plot_sweep(
    trials: Sequence[tuple[str, int, float, float]], base_loss: float, recommended: str, to: Path | IO[bytes]
) -> None:
    """Plot held-out loss against size and against training time, with the recommended adapter
    highlighted.

    Args:
        trials: (name, bytes, seconds, held-out loss) of each adapter.
        base_loss: held-out loss of the base.
        recommended: name of the adapter to keep.
        to: the PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    size_axes, time_axes = figure.subplots(1, 2, sharey=True)
    for name, size, seconds, loss in trials:
        for axes, x in ((size_axes, size / 1e6), (time_axes, seconds)):
            axes.plot(x, loss, "o", color="tab:orange" if name == recommended else "tab:blue")
            axes.annotate(name, (x, loss), xytext=(4, 4), textcoords="offset points", fontsize=8)
    for axes, label in ((size_axes, "size (MB)"), (time_axes, "training time (s)")):
        axes.set(xlabel=label, xmargin=0.15, ymargin=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    size_axes.set(ylabel="held-out loss (nats per token)")
    figure.suptitle(f"Base: {base_loss:.4f}. Recommended: {recommended}", fontsize=10, parse_math=False)
    figure.savefig(to, format="png", metadata={"Software": None})
