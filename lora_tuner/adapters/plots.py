"""The training curve as numbers (metrics.jsonl) and the pictures of an adapter, a sweep and a gain matrix."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..config import MAX_COUNT
from ..errors import AdapterError
from ..text import display_name
from .manifest import EvalResult, Manifest

MAX_METRICS_BYTES = 50_000_000  # bytes of a curve


def write_metrics(history: Sequence[dict[str, Any]], path: Path) -> None:
    """One JSON object a line, as the trainer logged them: `step` with `loss`, or with `eval_loss`."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The steps and losses of what `write_metrics` wrote. Raises AdapterError for what nobody could draw, whosever it is."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_METRICS_BYTES:  # a pipe would never end
            raise ValueError("it is missing, or too large to be one")
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = [{key: float(entry[key]) for key in ("step", "loss", "eval_loss") if key in entry} for entry in entries]
        if not all("step" in entry and all(0 <= value <= MAX_COUNT for value in entry.values()) for entry in found):
            raise ValueError("a step or a loss is no number that can be drawn")
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise AdapterError(f"{path} holds no curve: {error}.") from error
    return found


def plot_loss(history: Sequence[dict[str, Any]], manifest: Manifest, to: Path | IO[bytes]) -> None:
    """Training loss over steps, each step and smoothed, with the held-out losses."""
    from matplotlib.figure import Figure

    assert manifest.data is not None
    assert manifest.run is not None
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if steps:
        axes.plot(*zip(*steps, strict=True), color="0.75", linewidth=1, label="training, each step")
        smooth, average = [], steps[0][1]
        for step, loss in steps:
            average += 0.1 * (loss - average)
            smooth.append((step, average))
        axes.plot(*zip(*smooth, strict=True), color="tab:blue", label="training, smoothed")
    held_out = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    if manifest.result:
        held_out = {0: manifest.result.base_loss} | held_out | {manifest.run.kept_step: manifest.result.loss}
    if held_out:
        axes.plot(*zip(*sorted(held_out.items()), strict=True), "o-", color="tab:orange", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    # A "$" in a file's name is no formula.
    axes.set_title(
        f"{display_name(manifest.data.name)[:60]} on {display_name(manifest.base.name)[:60]}", parse_math=False
    )
    if steps or held_out:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, metadata={"Software": None})


def plot_gains(
    base: str, adapters: Sequence[str], sets: Sequence[str], cells: Sequence[Sequence[EvalResult | None]], path: Path
) -> None:
    """Draw the gain matrix `cells[adapter][set]` as a heat map: blue is better than the base, red worse, grey has no rows."""
    import numpy as np
    from matplotlib.figure import Figure

    gains = np.array([[np.nan if cell is None else cell.gain for cell in line] for line in cells])
    most = float(np.nanmax(np.abs(gains))) if np.isfinite(gains).any() else 0.0
    title = f"Gain over {display_name(base)} (nats per token)"
    longest = 0.1 * max(map(len, [*adapters, *map(display_name, sets)]))  # inches, about
    size = 2.2 + longest + max(1.1 * len(sets), 0.08 * len(title)), 1.8 + longest + 0.6 * len(adapters)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.85")
    image = axes.imshow(gains, cmap="RdBu", vmin=-most or -1.0, vmax=most or 1.0, aspect="auto")
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            text = "missing" if cell is None else f"{cell.gain:+.3f}\n± {cell.standard_error:.3f}"
            strong = cell is not None and abs(cell.gain) > 0.6 * most
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if strong else "black")
    axes.set_xticks(
        range(len(sets)),
        [display_name(name) for name in sets],
        rotation=30,
        ha="right",
        parse_math=False,
    )
    axes.set_yticks(range(len(adapters)), adapters, parse_math=False)
    axes.set(xlabel="measured on the held-out rows of", ylabel="adapter")
    axes.set_title(title, parse_math=False, fontsize=10)
    figure.colorbar(image)
    figure.savefig(path, format="png", metadata={"Software": None})


def plot_spectra(spectra: Mapping[str, Any], ranks: Mapping[str, int], to: Path | IO[bytes]) -> None:
    """The squared singular values of each layer's update, as shares of their sum, largest first; a kind of layer a colour, and
    a dot where the layer was cut, if it was. `spectra` holds (rank,) of each layer."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    kinds = sorted({module.rpartition(".")[2] for module in spectra})
    colours = {kind: colormaps["tab10"](number % 10) for number, kind in enumerate(kinds)}
    named: set[str] = set()
    for module, squares in spectra.items():
        kind, shares = module.rpartition(".")[2], (squares / squares.sum()).tolist()
        label = None if kind in named else kind
        axes.plot(range(1, len(shares) + 1), shares, color=colours[kind], label=label, linewidth=0.7, alpha=0.6)
        if module in ranks:
            axes.plot(ranks[module], shares[ranks[module] - 1], "o", markersize=2.5, color=colours[kind])
        named.add(kind)
    axes.set(xlabel="singular value", ylabel="share of the layer's energy", yscale="log")
    axes.set_title("Spectra of the updates" + ("; a dot is where a layer is cut" if ranks else ""))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, metadata={"Software": None})


def plot_sweep(
    rungs: Sequence[tuple[str, int, float, float]], base_loss: float, keep: str, to: Path | IO[bytes]
) -> None:
    """Held-out loss of adapters over their bytes, and over the seconds that they took; the one to keep stands out. `rungs` are
    (name, bytes, seconds, loss)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, place, label in ((panels[0], 1, "megabytes"), (panels[1], 2, "seconds of training")):
        for rung in rungs:
            across = float(rung[place]) / (1e6 if place == 1 else 1)
            axes.plot(across, rung[3], "o", color="tab:orange" if rung[0] == keep else "tab:blue")
            axes.annotate(rung[0], (across, rung[3]), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.margins(x=0.15, y=0.15)
        axes.set(xlabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="held-out loss (nats per token)")
    figure.suptitle(f"The base has {base_loss:.4f}; keep {keep}", fontsize=10, parse_math=False)
    figure.savefig(to, format="png", metadata={"Software": None})
