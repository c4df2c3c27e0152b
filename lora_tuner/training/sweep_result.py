"""Compare the trials of a sweep on the same held-out rows, recommend one, and say what more would bring."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .. import evaluation
from ..adapters import plots
from ..adapters.adapter import RUN_FILE, Adapter
from ..adapters.growth import GrowthPoint, fit_growth
from ..adapters.report import GrowthFigures
from ..adapters.summaries import Summary, Table, to_html
from ..config import ModelOptions, TrainConfig
from ..errors import EventHandler, TrainingError
from ..evaluation import HeldOutLoss
from ..models import lora
from ..settings_files import resolve_settings
from ..text import format_bytes, format_duration, format_gain, format_number
from . import paths
from .setup import TrainingSetup


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    `loss` is None if it diverged, `learning_rate` too if it was not given; `gap` is to the best,
    paired; of preferences it is that of `accuracy`, and not paired. `rows` are those trained on; rows
    and steps are None if it diverged, and in older results."""

    name: str
    rank: int
    learning_rate: float | None
    loss: float | None = None
    bytes: int = 0
    seconds: float = 0.0
    gap: float = 0.0
    standard_error: float | None = 0.0  # None for a single held-out row, group or document
    rows: int | None = None
    steps: int | None = None
    accuracy: float | None = None  # share of held-out preferences; None of text


@dataclass(frozen=True)
class SweepResult:
    """All trials, and the recommended one, with the path of its adapter: the smallest whose gap is
    within one standard error. `id` is in the manifests of the adapters; `growth` says what doubling
    rows, steps or rank would bring, where three trials or more differ in one of them."""

    name: str
    base_loss: float  #: held-out loss of the base
    trials: list[Trial]
    recommended: str  #: name of an adapter
    path: Path  #: its folder
    folder: Path  #: of the sweep, with sweep.json and sweep.png
    id: str = ""
    growth: GrowthFigures | None = None
    base_accuracy: float | None = None  #: of preferences

    def summary(self) -> Summary:
        """A table of the trials, and sentences: on the base, on more data, on which to keep."""
        accuracy = "" if self.base_accuracy is None else f", preference accuracy {self.base_accuracy:.3f}"
        why = "the smallest within a standard error of the best"
        if any(trial.standard_error is None for trial in self.trials):
            why = (
                "the best; one held-out row, group or document gives no standard error, "
                "so a smaller one may be as good"
            )
        return [
            self._table(),
            f"base: held-out loss {self.base_loss:.3f}{accuracy}",
            *(self.growth.sentences if self.growth else ()),
            f"recommended: {self.recommended}, {why}",
        ]

    def _table(self) -> Table:
        """A row for each trial, with rank and rate or, if rows or steps differ, all that differs."""
        settings = {"rank": "rank", "learning_rate": "learning rate", "rows": "training rows", "steps": "steps"}
        trained = [trial for trial in self.trials if trial.loss is not None]
        differ = {name for name in settings if len({getattr(trial, name) for trial in trained}) > 1}
        shown = differ if differ & {"rows", "steps"} else {"rank", "learning_rate"}
        columns = {name: label for name, label in settings.items() if name in shown}
        rows = []
        for trial in self.trials:
            values = [getattr(trial, name) for name in columns]
            loss, gap = "diverged", ""
            if trial.loss is not None:
                loss, gap = f"{trial.loss:.3f}", format_gain(trial.gap, trial.standard_error)
            accuracy = "" if trial.accuracy is None else f"{trial.accuracy:.3f}"
            rows.append(
                (
                    trial.name,
                    *("" if value is None else format_number(value) for value in values),
                    loss,
                    *([] if self.base_accuracy is None else [accuracy]),
                    gap,
                    format_bytes(trial.bytes),
                    format_duration(trial.seconds),
                )
            )
        by_accuracy = [] if self.base_accuracy is None else ["accuracy"]
        header = (
            "adapter",
            *columns.values(),
            "held-out loss",
            *by_accuracy,
            "gap to the best",
            "size",
            "training",
        )
        return Table(rows, header, droppable=("learning rate", "training"))

    def _repr_html_(self) -> str:
        return to_html(self.summary())

    def to_dict(self) -> dict[str, object]:
        """All figures for JSON."""
        growth = self.growth.model_dump() if self.growth else None
        return asdict(self) | {"path": str(self.path), "folder": str(self.folder), "growth": growth}


def measure_trials(
    name: str,
    sweep: str,
    folder: Path,
    trials: list[TrainConfig],
    adapters: dict[str, Adapter],
    setup: TrainingSetup | None,
    notify: EventHandler,
) -> SweepResult:
    """Compare the trials on the same held-out rows, each paired with the best.

    Args:
        sweep: the id of the sweep.
        setup: that of the last trial, or None when all trials had finished before.
    """
    first_adapter = next(iter(adapters.values()))
    first = resolve_settings(TrainConfig, {}, first_adapter.path / RUN_FILE)
    if setup is not None:
        setup.remove_lora()
        base, rows = setup.base, setup.eval_set(name)
    else:
        options = ModelOptions(
            device=first.device, dtype=first.dtype, load_in=first.load_in, threads=first.threads, notify=notify
        )
        base, rows = evaluation.open_base(first_adapter, options), evaluation.cached_rows(first_adapter)
        for adapter in adapters.values():
            lora.check_base(adapter, base, options)
    losses = evaluation.held_out_losses(base, adapters, [rows], notify)
    held_out = {}
    for trial_name, (pair,) in zip(adapters, losses, strict=True):
        if pair is None:
            raise TrainingError(f"{name}: {rows.missing}, so the trials cannot be compared.")
        base_held_out, held_out[trial_name] = pair
    best = min(held_out.values(), key=lambda loss: loss.loss)
    results = []
    for trial in trials:
        trial_name = str(trial.name)
        if trial_name not in adapters:
            rate = trial.learning_rate
            results.append(Trial(trial_name, trial.rank, rate if isinstance(rate, float) else None))
        else:
            adapter, loss = adapters[trial_name], held_out[trial_name]
            assert adapter.manifest is not None
            assert adapter.manifest.run is not None
            assert adapter.manifest.data is not None
            config = resolve_settings(TrainConfig, {}, adapter.path / RUN_FILE)
            gap = evaluation.paired_gain(loss, best)
            results.append(
                Trial(
                    name=trial_name,
                    rank=config.rank,
                    learning_rate=float(config.learning_rate or 0),
                    loss=loss.loss,
                    bytes=adapter.bytes,
                    seconds=adapter.manifest.run.seconds,
                    gap=gap.gain,
                    standard_error=gap.standard_error,
                    rows=adapter.manifest.data.counts["train"],
                    steps=adapter.manifest.run.steps,
                )
            )
    infos = [adapter.manifest.preference for adapter in adapters.values() if adapter.manifest]
    base_accuracy = infos[0].accuracy.base if infos[0] else None
    if base_accuracy is not None:
        results = _compare_accuracy(results, adapters)
    good = [trial for trial in results if trial.loss is not None and trial.gap <= (trial.standard_error or 0.0)]
    smallest = min(good, key=lambda trial: (trial.bytes, -(trial.accuracy or 0.0), trial.loss))
    path = adapters[smallest.name].path
    growth = _fit_growth(results, base_held_out, held_out) if base_accuracy is None else None
    return SweepResult(
        name, base_held_out.loss, results, smallest.name, path, folder, sweep, growth, base_accuracy
    )


def _compare_accuracy(trials: list[Trial], adapters: dict[str, Adapter]) -> list[Trial]:
    """Return the trials with their preference accuracy, and the gap to the best one."""
    figures = {
        name: adapter.manifest.preference.accuracy
        for name, adapter in adapters.items()
        if adapter.manifest and adapter.manifest.preference
    }
    best = max(figures.values(), key=lambda figure: figure.adapter)
    compared = []
    for trial in trials:
        if (figure := figures.get(trial.name)) is None:
            compared.append(trial)
            continue
        error = None
        if figure.error is not None and best.error is not None:
            error = 0.0 if figure is best else math.hypot(figure.error, best.error)
        gap = best.adapter - figure.adapter
        compared.append(replace(trial, accuracy=figure.adapter, gap=gap, standard_error=error))
    return compared


def _fit_growth(trials: list[Trial], base: HeldOutLoss, held_out: dict[str, HeldOutLoss]) -> GrowthFigures | None:
    """Estimate what a doubling would bring; None where too few trials differ, or no errors are known."""
    points, losses = [], []
    for trial in trials:
        if trial.loss is not None and trial.rows and trial.steps:
            points.append(GrowthPoint(trial.rows, trial.steps, trial.rank, base.loss - trial.loss))
            losses.append(held_out[trial.name])
    covariance = evaluation.gain_covariance(base, losses)
    return fit_growth(points, covariance) if covariance else None


def write_result(result: SweepResult, folder: Path) -> None:
    """Write the table as JSON, and the picture."""
    text = json.dumps(result.to_dict(), indent=2) + "\n"
    (folder / paths.SWEEP_RESULT_FILE).write_text(text, encoding="utf-8")
    points = []
    for trial in result.trials:
        if trial.loss is not None:
            figure = trial.loss if trial.accuracy is None else 1 - trial.accuracy
            points.append(plots.SweepPoint(trial.name, trial.bytes, trial.seconds, figure, trial.standard_error))
    path = folder / paths.SWEEP_PLOT_FILE
    if result.base_accuracy is None:
        plots.plot_sweep(points, result.base_loss, result.recommended, path, result.growth)
    else:
        label = "share of held-out preferences missed"
        plots.plot_sweep(points, 1 - result.base_accuracy, result.recommended, path, None, label)
