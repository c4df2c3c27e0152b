"""Estimate of the gain that twice the rows, steps or rank would add, from the trials of a sweep.

The slope of the gain, in nats per doubling, is a random process: from one doubling to the next it
keeps a share of itself, as learning curves flatten, and changes at random. Seen are the gains of the
trials: with the error of the held-out rows, which is paired, and with the noise of training. All are
normal, so the slope of the next doubling is a regression (Kalman's; Rasmussen and Williams, 2006,
chapter 2). No curve with an asymptote is fitted: three to five trials do not tell it.

The constants fit 48 doublings of real runs; benchmarks/doublings.py measures how often the intervals cover.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError

from ..config import TrainConfig
from ..errors import ConfigError
from ..settings_files import resolve_settings
from ..text import format_gain
from .adapter import RUN_FILE, Adapter
from .library import Library
from .manifest import Manifest
from .report import Doubling, Figure, GrowthFigures, Quantity

KEPT = 0.8  # share of its slope that a gain keeps from one doubling to the next, on average
CHANGE = 0.15  # standard deviation of the slope's change, as a share of its usual size
RUN_NOISE = 0.005  # standard deviation of the gain by training alone, as a share of the largest gain
INTERVAL = 1.35  # standard errors that cover 80%; more than 1.28, as the usual size of a slope is an estimate
FIRST = 3.0  # standard deviation of the first slope, as a share of its usual size: nearly free
LEAST_SLOPE = 1e-4  # nats per doubling: an error of 0 would be a claim
FEWEST_TRIALS = 3
SAME_EPOCHS = 0.25  # difference in the logarithm of steps per row that counts as the same number of epochs
MAX_SWEEP_BYTES = 10_000_000
_NOUNS = {"rows": "text", "steps": "steps", "rank": "rank", "rows and steps": "text and steps"}
_LIMITS = {
    "rows": "text limits you",
    "steps": "steps limit you",
    "rank": "rank limits you",
    "rows and steps": "text and steps limit you",
}
_MORE = {
    "rows": "more text",
    "steps": "more steps",
    "rank": "a higher rank",
    "rows and steps": "more text with more steps",
}
Covariance = Sequence[Sequence[float]]


@dataclass(frozen=True)
class GrowthPoint:
    """A trial: its training rows, steps and rank, and its held-out gain, of loss or accuracy."""

    rows: int
    steps: int
    rank: int
    gain: float


# Quantity -> whether two trials differ in it alone.
_SAME_BUT: dict[Quantity, Callable[[GrowthPoint, GrowthPoint], bool]] = {
    "rows": lambda one, other: (one.steps, one.rank) == (other.steps, other.rank),
    "steps": lambda one, other: (one.rows, one.rank) == (other.rows, other.rank),
    "rank": lambda one, other: (one.rows, one.steps) == (other.rows, other.steps),
    "rows and steps": lambda one, other: (
        one.rank == other.rank and abs(math.log(one.steps * other.rows / (one.rows * other.steps))) < SAME_EPOCHS
    ),
}


def predict_doubling(
    values: Sequence[float], gains: Sequence[float], covariance: Covariance
) -> tuple[float, float]:
    """Return what a trial with twice the last value gains more than the last trial, and its standard error.

    Args:
        values: rows, steps or rank of each trial, ascending.
        gains: in nats per token.
        covariance: (trials, trials), of the gains by the choice of the held-out rows.
    """
    observed = np.diff(np.asarray(gains, dtype=float))
    widths = np.append(np.diff(np.log2(np.asarray(values, dtype=float))), 1.0)  # of the intervals, in doublings
    usual = max(float(np.sqrt(np.mean((observed / widths[:-1]) ** 2))), LEAST_SLOPE)
    slopes = _slope_covariance(widths) * usual**2
    between = np.diff(np.eye(len(widths) + 1), axis=0)  # (intervals, trials): their difference
    noise = RUN_NOISE * float(np.max(np.abs(gains)))
    increments = widths[:, None] * slopes * widths + noise**2 * between @ between.T
    seen = between[:-1, :-1]
    known = increments[:-1, :-1] + seen @ np.asarray(covariance, dtype=float) @ seen.T
    weights = np.linalg.solve(known, increments[:-1, -1])
    variance = float(increments[-1, -1] - weights @ increments[:-1, -1])
    return float(weights @ observed), math.sqrt(max(variance, 0.0))


def _slope_covariance(widths: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the covariance of the slopes in neighbouring intervals, for slopes of usual size 1."""
    distances = (widths[1:] + widths[:-1]) / 2  # between the middles of the intervals
    loadings = np.eye(len(widths))  # of each slope on the first one and on the changes
    for index, distance in enumerate(distances, 1):
        loadings[index] += KEPT**distance * loadings[index - 1]
    scales = np.append(FIRST, CHANGE * np.sqrt(distances))
    return np.asarray((loadings * scales**2) @ loadings.T)


def fit_growth(
    points: Sequence[GrowthPoint], covariance: Covariance, figure: Figure = "loss"
) -> GrowthFigures | None:
    """Estimate what a doubling of rows, steps or rank would bring, for each that has three values or more.

    Of a grid the trials with the most of everything else are taken; of trials that differ in nothing
    here, such as in the learning rate alone, the best one.

    Args:
        covariance: (points, points), of their gains by the choice of the held-out rows.
        figure: that whose gains they are.
    """
    matrix = np.asarray(covariance, dtype=float)
    doublings: list[Doubling] = []
    for quantity, is_same in _SAME_BUT.items():
        attribute = quantity.partition(" ")[0]
        if quantity == "rows and steps" and {"rows", "steps"} & {doubling.quantity for doubling in doublings}:
            continue
        chosen = _choose_series(points, attribute, is_same)
        if len(chosen) < FEWEST_TRIALS:
            continue
        values, gains = [getattr(points[i], attribute) for i in chosen], [points[i].gain for i in chosen]
        gain, error = predict_doubling(values, gains, matrix[np.ix_(chosen, chosen)].tolist())
        doublings.append(
            Doubling(
                quantity=quantity,
                values=values,
                gains=gains,
                gain=gain,
                standard_error=error,
                low=gain - INTERVAL * error,
                high=gain + INTERVAL * error,
            )
        )
    if not doublings:
        return None
    sentences = [describe_doubling(doubling, figure) for doubling in doublings]
    sentences.append(_conclude(doublings))
    return GrowthFigures(sentences=sentences, figure=figure, doublings=doublings)


def _choose_series(
    points: Sequence[GrowthPoint], attribute: str, is_same: Callable[[GrowthPoint, GrowthPoint], bool]
) -> list[int]:
    """Return the trials that differ in one quantity, by their indices, ascending; empty if there are too few."""
    order = sorted(
        range(len(points)), key=lambda i: (points[i].rows, points[i].steps, points[i].rank), reverse=True
    )
    for corner in order:
        best: dict[int, int] = {}
        for index, point in enumerate(points):
            value = getattr(point, attribute)
            if is_same(point, points[corner]) and (value not in best or point.gain > points[best[value]].gain):
                best[value] = index
        if len(best) >= FEWEST_TRIALS:
            return [best[value] for value in sorted(best)]
    return []


def describe_doubling(doubling: Doubling, figure: Figure = "loss") -> str:
    """Say in a sentence what a doubling would bring."""
    last, noun = doubling.values[-1], doubling.quantity.partition(" ")[0]
    gain = format_gain(doubling.gain, doubling.standard_error, "+.3f")
    steps = " with as many more steps" if doubling.quantity == "rows and steps" else ""
    of = "accuracy " if figure == "accuracy" else ""
    return (
        f"Twice the {noun} ({last:,} to {2 * last:,}){steps}: {of}{gain} (80% interval {doubling.low:+.3f} to "
        f"{doubling.high:+.3f})."
    )


def _conclude(doublings: Sequence[Doubling]) -> str:
    """Say which of the quantities limits the gain, or would help, as far as the intervals tell it."""
    best = max(doublings, key=lambda doubling: doubling.gain)
    others = [doubling for doubling in doublings if doubling is not best]
    if best.high < 0:
        text = f"{_name_more(doublings, 'or')} would do harm"
    elif best.low <= 0:
        text = f"nothing shows that {_name_more(doublings, 'or')} would help"
    elif others and all(_is_clearly_less(other, best) for other in others):
        text = f"{_LIMITS[best.quantity]}, not {' or '.join(_NOUNS[other.quantity] for other in others)}"
    else:
        text = f"{_name_more([doubling for doubling in doublings if doubling.low > 0], 'and')} would help"
    return f"{text[0].upper()}{text[1:]}."


def _name_more(doublings: Sequence[Doubling], link: str) -> str:
    return f" {link} ".join(_MORE[doubling.quantity] for doubling in doublings)


def _is_clearly_less(one: Doubling, other: Doubling) -> bool:
    """Return whether the 80% interval of the difference is above 0, for independent errors."""
    return other.gain - one.gain > INTERVAL * math.hypot(one.standard_error, other.standard_error)


class _SweepFile(BaseModel):
    """The part of `sweep.json` that is read here."""

    id: str = ""
    growth: GrowthFigures | None = None


def find_growth(adapter: Adapter, library: Library) -> GrowthFigures | None:
    """Return the figures of the sweep that an adapter is a trial of; None if it is of none, or of too few trials.

    They are those of the sweep's result in the folder of runs. Without it the gains in the manifests
    are fitted; these have no paired errors, so the intervals are wider.
    """
    run = adapter.manifest.run if adapter.manifest else None
    if run is None or run.sweep is None:
        return None
    with contextlib.suppress(ConfigError):
        config = resolve_settings(TrainConfig, {}, adapter.path / RUN_FILE)
        for file in _read_results(config.runs_dir):
            if file.id == run.sweep:
                return file.growth
    points, variances, is_accuracy = list[GrowthPoint](), list[float](), False
    for _, trial in library.entries():
        if not isinstance(trial, Adapter) or trial.manifest is None or trial.manifest.run is None:
            continue
        manifest, own_run = trial.manifest, trial.manifest.run
        if own_run.sweep != run.sweep or manifest.data is None:
            continue
        gain, error = _measured_gain(manifest)
        if gain is not None and error is not None:
            rows = manifest.data.counts.get("train") or 1
            points.append(GrowthPoint(rows, own_run.steps, trial.rank, gain))
            variances.append(error**2)
            is_accuracy = manifest.preference is not None or manifest.labels is not None
    return fit_growth(points, np.diag(variances).tolist(), "accuracy" if is_accuracy else "loss")


def _measured_gain(manifest: Manifest) -> tuple[float | None, float | None]:
    """Return the gain of an adapter and its error: of preferences and labels in accuracy."""
    if manifest.preference is not None:
        return manifest.preference.accuracy.change, manifest.preference.accuracy.change_error
    if manifest.labels is not None:
        return manifest.labels.accuracy_change() or (None, None)
    result = manifest.result
    return (result.gain, result.standard_error) if result else (None, None)


def _read_results(runs_dir: Path) -> Iterable[_SweepFile]:
    """Yield the results of sweeps; damaged ones are left out."""
    for file in runs_dir.glob("*.sweep/sweep.json"):
        with contextlib.suppress(OSError, ValidationError):
            if file.stat().st_size <= MAX_SWEEP_BYTES:
                yield _SweepFile.model_validate_json(file.read_bytes())
