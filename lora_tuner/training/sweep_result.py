"""Compare the trials of a sweep on the same held-out rows, recommend one, and say what more brings.

Of text they are compared by their loss; of preferences and labels by their accuracy, which is what
the adapter is for, and a mean over rows, so that two trials are paired row by row; a macro F1 is not.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ..adapters import plots
from ..adapters.adapter import RUN_FILE, Adapter
from ..adapters.gains import HeldOutLoss, LossPair, gain_covariance, paired_gain
from ..adapters.growth import GrowthPoint, fit_growth
from ..adapters.report import GrowthFigures
from ..adapters.summaries import Summary, Table, to_html
from ..config import ModelOptions, TrainConfig
from ..data.eval_sets import EvalSet
from ..errors import EventHandler, TrainingError
from ..evaluation import gain_matrix
from ..models import lora
from ..settings_files import resolve_settings
from ..text import format_bytes, format_duration, format_gain, format_number
from . import label_result, paths
from .preference_result import (
    Estimate,
    HeldOutSides,
    Values,
    grouped_mean,
    make_estimate,
    preferred,
)
from .setup import TrainingSetup


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    `loss` is None if it diverged, `learning_rate` and `beta` too if they were not given; `gap` is to
    the best, paired; of preferences and labels it is that of `accuracy`. `rows` are those trained on;
    rows and steps are None if it diverged, and in older results."""

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
    accuracy: float | None = None  # share of held-out preferences or labels; None of text
    macro_f1: float | None = None  # of labels
    beta: float | None = None  # of preferences


@dataclass(frozen=True)
class SweepResult:
    """All trials, and the recommended one, with the path of its adapter: the smallest whose gap is
    within one standard error. `id` is in the manifests of the adapters; `growth` says what doubling
    rows, steps or rank would bring, where three trials or more differ in one of them. `base_accuracy`
    is None of text."""

    name: str
    base_loss: float  #: held-out loss of the base
    trials: list[Trial]
    recommended: str  #: name of an adapter
    path: Path  #: its folder
    folder: Path  #: of the sweep, with sweep.json and sweep.png
    id: str = ""
    growth: GrowthFigures | None = None
    base_accuracy: float | None = None  #: of preferences or labels

    def summary(self) -> Summary:
        """A table of the trials, and sentences: on the base, on more data, on which to keep."""
        accuracy, best = "", "best"
        if self.base_accuracy is not None:
            accuracy, best = f", accuracy {self.base_accuracy:.3f}", "best accuracy"
        why = f"the smallest within a standard error of the {best}"
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
        """A row for each trial, with rank and rate or, if others differ, all that differs."""
        settings = {"rank": "rank", "learning_rate": "learning rate", "beta": "beta"}
        settings |= {"rows": "training rows", "steps": "steps"}
        trained = [trial for trial in self.trials if trial.loss is not None]
        differ = {name for name in settings if len({getattr(trial, name) for trial in trained}) > 1}
        shown = differ if differ & {"rows", "steps", "beta"} else {"rank", "learning_rate"}
        columns = {name: label for name, label in settings.items() if name in shown}
        of_accuracy = {} if self.base_accuracy is None else {"accuracy": "accuracy"}
        if any(trial.macro_f1 is not None for trial in self.trials):
            of_accuracy["macro_f1"] = "macro F1"
        rows = []
        for trial in self.trials:
            values = [getattr(trial, name) for name in columns]
            loss, gap = "diverged", ""
            if trial.loss is not None:
                loss, gap = f"{trial.loss:.3f}", format_gain(trial.gap, trial.standard_error)
            shares = [getattr(trial, name) for name in of_accuracy]
            rows.append(
                (
                    trial.name,
                    *("" if value is None else format_number(value) for value in values),
                    loss,
                    *("" if share is None else f"{share:.3f}" for share in shares),
                    gap,
                    format_bytes(trial.bytes),
                    format_duration(trial.seconds),
                )
            )
        header = (
            "adapter",
            *columns.values(),
            "held-out loss",
            *of_accuracy.values(),
            "gap to the best",
            "size",
            "training",
        )
        droppable = ["learning rate", "training"]
        if of_accuracy:
            droppable += ["held-out loss", "macro F1"]
        return Table(rows, header, droppable=droppable)

    def _repr_html_(self) -> str:
        return to_html(self.summary())

    def to_dict(self) -> dict[str, object]:
        """All figures for JSON."""
        growth = self.growth.model_dump() if self.growth else None
        return asdict(self) | {"path": str(self.path), "folder": str(self.folder), "growth": growth}


@dataclass(frozen=True)
class _Outcomes:
    """Results on the same held-out preferences or labels: 1 if right, 0 if not, or between.

    `estimate` returns the mean over them and its standard error.
    """

    base: Values
    adapters: dict[str, Values]
    estimate: Estimate

    def gain_covariance(self, names: Sequence[str]) -> list[list[float]] | None:
        """Covariance of the gains of adapters, (adapters, adapters); None for one row or group."""
        gains = [self.adapters[name] - self.base for name in names]
        if self.estimate(self.base)[1] is None:
            return None

        def variance(values: Values) -> float:
            return (self.estimate(values)[1] or 0.0) ** 2

        variances = [*map(variance, gains)]
        return [
            [(variances[i] + variances[j] - variance(gains[i] - gains[j])) / 2 for j in range(len(gains))]
            for i in range(len(gains))
        ]


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
        base, rows = gain_matrix.open_base(first_adapter, options), gain_matrix.cached_rows(first_adapter)
        for adapter in adapters.values():
            lora.check_base(adapter, base, options)
    sets = [rows]
    if setup is not None and setup.objective is not None:
        sets.append(EvalSet(f"{name}, not chosen", setup.rejected_texts))
    of_adapters = gain_matrix.held_out_losses(base, adapters, sets, notify)
    losses = dict(zip(adapters, of_adapters, strict=True))
    held_out = {}
    for trial_name, pairs in losses.items():
        if pairs[0] is None:
            raise TrainingError(f"{name}: {rows.missing}, so the trials cannot be compared.")
        base_held_out, held_out[trial_name] = pairs[0]
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
            gap = paired_gain(loss, best)
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
                    beta=config.beta,
                )
            )
    outcomes = _outcomes(setup, adapters, losses) if setup is not None else None
    base_accuracy = None
    if outcomes is not None:
        base_accuracy, _ = outcomes.estimate(outcomes.base)
        results = _compare_accuracy(results, adapters, outcomes)
    good = [trial for trial in results if trial.loss is not None and trial.gap <= (trial.standard_error or 0.0)]
    smallest = min(good, key=lambda trial: (trial.bytes, -(trial.accuracy or 0.0), trial.loss))
    path = adapters[smallest.name].path
    growth = _fit_growth(results, base_held_out, held_out, outcomes)
    return SweepResult(
        name, base_held_out.loss, results, smallest.name, path, folder, sweep, growth, base_accuracy
    )


def _outcomes(
    setup: TrainingSetup,
    adapters: Mapping[str, Adapter],
    losses: Mapping[str, Sequence[LossPair | None]],
) -> _Outcomes | None:
    """Return the results on preferences or labels; None of text, or where they were not measured."""
    right: dict[str, Values] = {}
    if setup.objective is not None:
        for name, (chosen, rejected) in losses.items():
            if chosen is None or rejected is None:
                return None
            sides = map(HeldOutSides, chosen, rejected)
            base, right[name] = (preferred(setup.objective, each) for each in sides)
        return _Outcomes(base, right, make_estimate(setup))
    for name, adapter in adapters.items():
        labels = adapter.manifest.labels if adapter.manifest else None
        figures = (labels.base, labels.figures) if labels else (None, None)
        rights = [np.array([*each.right], np.float64) for each in figures if each and each.right]
        if len(rights) < 2:
            return None
        base, right[name] = rights
    measured, _ = label_result.choose_rows(setup.dataset.held_out, setup.config.eval_rows_limit)
    groups = np.array(setup.dataset.groups_of(measured) or range(len(measured)))
    return _Outcomes(base, right, lambda values: grouped_mean(values, groups))


def _compare_accuracy(
    trials: Sequence[Trial], adapters: Mapping[str, Adapter], outcomes: _Outcomes
) -> list[Trial]:
    """Return the trials with their accuracy, and the paired gap to the best one."""
    means = {name: outcomes.estimate(values)[0] for name, values in outcomes.adapters.items()}
    best = max(means, key=means.__getitem__)
    compared = []
    for trial in trials:
        if trial.name in means:
            _, error = outcomes.estimate(outcomes.adapters[best] - outcomes.adapters[trial.name])
            manifest = adapters[trial.name].manifest
            figures = manifest.labels.figures if manifest and manifest.labels else None
            trial = replace(
                trial,
                accuracy=means[trial.name],
                gap=means[best] - means[trial.name],
                standard_error=error,
                macro_f1=figures.macro_f1 if figures else None,
            )
        compared.append(trial)
    return compared


def _fit_growth(
    trials: Sequence[Trial],
    base: HeldOutLoss,
    held_out: Mapping[str, HeldOutLoss],
    outcomes: _Outcomes | None,
) -> GrowthFigures | None:
    """Estimate what a doubling would bring; None where too few trials differ, or no errors are known."""
    points, names = [], []
    base_accuracy = outcomes.estimate(outcomes.base)[0] if outcomes else 0.0
    for trial in trials:
        if trial.loss is not None and trial.rows and trial.steps:
            gain = base.loss - trial.loss if trial.accuracy is None else trial.accuracy - base_accuracy
            points.append(GrowthPoint(trial.rows, trial.steps, trial.rank, gain))
            names.append(trial.name)
    if outcomes is not None:
        covariance = outcomes.gain_covariance(names)
        return fit_growth(points, covariance, "accuracy") if covariance else None
    covariance = gain_covariance(base, [held_out[name] for name in names])
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
        label = "held-out error (1 - accuracy)"
        base_error = 1 - result.base_accuracy
        plots.plot_sweep(points, base_error, result.recommended, path, result.growth, label)
