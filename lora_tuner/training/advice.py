"""Advice on the length of a run, and at its end on learning rate and length, from its losses.

Batches differ, so a loss counts as rising only if its trend is far beyond what their noise
explains."""

import itertools
import math
from collections.abc import Mapping, Sequence

from ..adapters.manifest import EvalResult
from ..config import METHODS, MethodName, TrainConfig
from ..text import format_count, format_gain

MANY_PASSES = 4  # over the training rows, in one run
MIN_STEPS = 10  # of a curve that has a trend
MIN_T = 4.0  # slope / its standard error: by chance in fewer than 1 of 300 curves of 10 steps
MIN_TREND = 0.02  # change of the loss, relative to its mean
STILL = 0.002  # spread of the changes of held-out losses, relative to the loss: nothing has moved


def describe_length(requested: TrainConfig, max_steps: int, steps_per_epoch: int | None) -> str:
    """Say how many steps a run takes, and when these are more passes over the rows than it needs.

    Args:
        requested: the settings as given: who gives epochs or patience knows.
        steps_per_epoch: None for a stream.
    """
    text = f"The run takes {format_count(max_steps, 'step')}"
    text += f"; one epoch is {steps_per_epoch:,}." if steps_per_epoch else "."
    return " ".join(filter(None, [text, passes_advice(requested, max_steps, steps_per_epoch)]))


def passes_advice(requested: TrainConfig, max_steps: int, steps_per_epoch: int | None) -> str | None:
    """Return how a run of more passes over its rows than it needs ends earlier. Arguments are those of
    `describe_length`."""
    passes = max_steps / steps_per_epoch if steps_per_epoch else 0
    if passes <= MANY_PASSES or requested.epochs is not None or requested.patience is not None:
        return None
    return (
        f"{passes:.0f} passes over the same rows may learn them by heart: --epochs {MANY_PASSES - 1} ends "
        f"earlier, --eval-every {steps_per_epoch} --patience 2 keeps the best step."
    )


def rate_advice(
    entries: Sequence[Mapping[str, float]],
    result: EvalResult,
    rate: float,
    method: MethodName,
    steps_per_epoch: int | None,
    parent_loss: float | None = None,
) -> str | None:
    """Return what was wrong and which learning rate to try; None if the run went well.

    A gain counts as nothing up to two standard errors. Its rows then tell whether the rate was too
    low or too high: their losses have hardly changed, or in different directions.

    Args:
        entries: log entries: of steps, with `loss` and `tokens`; of the held-out curve, with
            `eval_loss` or `eval_subset_loss`.
        rate: the peak learning rate.
        steps_per_epoch: None for a stream.
        parent_loss: held-out loss of the adapter that the run continues, on the same rows.
    """
    lower, much_lower = lower_rate(rate, 3, method), lower_rate(rate, 10, method)
    gain = format_gain(result.gain, result.standard_error)
    points = _held_out_points(entries, result)
    rows = next((e["eval_subset_rows"] for e in entries if "eval_subset_rows" in e), result.rows)
    entries = [entry for entry in entries if "loss" in entry]
    if rise := _find_rise(entries):
        return (
            f"The training loss rose by {rise:.3f}: the learning rate {rate:g} is "
            f"too high. Try --learning-rate {much_lower:g}."
        )
    error = result.standard_error or 0.0
    worse = f"The adapter is worse than its base: held-out loss {result.base_loss:.3f} -> {result.loss:.3f}."
    is_worse = result.gain < -2 * error
    passes = len(entries) / steps_per_epoch if steps_per_epoch else 0
    # A loss beyond that of the base is no noise of a minimum.
    noise = 0.0 if is_worse and passes > MANY_PASSES else 2 * error * math.sqrt(result.rows / rows)
    if best := _passed_minimum(points, noise):
        return (
            f"{worse if is_worse else 'The run was too long.'} The held-out curve was lowest at step "
            f"{best}, and then the rows were learned by heart: take --max-steps {best}, or --eval-every {best} "
            "--patience 2 to keep the best step."
        )
    if is_worse and passes > MANY_PASSES:
        return (
            f"{worse} After {passes:.0f} passes over the same rows these are learned by heart: take --epochs 1, or "
            f"--eval-every {steps_per_epoch} --patience 2 to keep the best step. If that is worse too: --learning-rate "
            f"{much_lower:g}."
        )
    if is_worse:
        return (
            f"{worse} Try a lower learning rate than {rate:g}, such as {much_lower:g} "
            "(--learning-rate), or fewer steps."
        )
    if parent_loss is not None and result.loss > parent_loss + 2 * error:
        return (
            f"The adapter is worse than the one it continues: held-out loss {parent_loss:.3f} -> {result.loss:.3f}. "
            f"Try --learning-rate {lower:g}, or keep that one."
        )
    if result.gain > 2 * error:
        return None
    nothing = f"The gain {gain} is within its error of nothing"
    change, t = _trend(entries)
    spread = max(error * math.sqrt(result.groups or result.rows), abs(result.gain))
    if spread < STILL * result.base_loss:
        return (
            f"{nothing}, as the loss hardly moved: the learning rate {rate:g} is too low. Try "
            f"--learning-rate {higher_rate(rate, method):g}."
        )
    if change < 0 and t < -MIN_T:
        repeated = steps_per_epoch is not None and len(entries) > steps_per_epoch
        if not repeated:
            return (
                f"{nothing}, although the training loss fell: {result.format_rows()} may be too "
                "few to measure it (--eval-rows), or other text. Else try --learning-rate "
                f"{lower:g}."
            )
        return (
            f"{nothing}, although the training loss fell: the rows are learned by heart. Try "
            f"--learning-rate {lower:g}, or fewer steps."
        )
    return f"{nothing}, while losses of rows moved up and down: the learning rate may be too high. Try --learning-rate {lower:g}."


def _held_out_points(entries: Sequence[Mapping[str, float]], result: EvalResult) -> list[tuple[int, float]]:
    """Steps and losses of the held-out curve, from the base to the end, on a subset or on all rows."""
    subset = [(int(e["step"]), e["eval_subset_loss"]) for e in entries if "eval_subset_loss" in e]
    if subset:
        return sorted(subset)
    points = [(int(e["step"]), e["eval_loss"]) for e in entries if "eval_loss" in e]
    # The loss of the result is that of the best step, where patience kept it.
    return [(0, result.base_loss), *points, (points[-1][0], result.loss)] if points else []


def _passed_minimum(points: Sequence[tuple[int, float]], noise: float) -> int | None:
    """Return the step of the lowest held-out loss, if more than half of what it gained was lost again,
    and more than the noise of the points."""
    if not points:
        return None
    best, lowest = min(points, key=lambda point: point[1])
    (first, start), (_, end) = points[0], points[-1]
    return best if best > first and end - lowest > max((start - lowest) / 2, noise) else None


def lower_rate(rate: float, factor: float, method: MethodName) -> float:
    """Return a lower rate to try: at most that of the method, where a rate is far above it."""
    return min(float(f"{rate / factor:.1g}"), METHODS[method].learning_rate)


def higher_rate(rate: float, method: MethodName) -> float:
    """Return a higher rate to try: ten times as high, but beyond that of the method three times."""
    tenfold = min(10 * rate, METHODS[method].learning_rate)
    return float(f"{max(3 * rate, tenfold):.1g}")


def _find_rise(entries: Sequence[Mapping[str, float]]) -> float | None:
    """Return how far the loss rose in all steps or in their second half; None if it did not."""
    for part in (entries, entries[len(entries) // 2 :]):
        change, t = _trend(part)
        mean = math.fsum(entry["loss"] for entry in part) / max(len(part), 1)
        if t > MIN_T and change > MIN_TREND * mean:
            return change
    return None


def _trend(entries: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Return the change of the loss over the steps on a line through it, and slope / standard error.

    Steps weigh by their tokens. As the curve is no line and neighbours may be alike, the error is
    widened by the correlation of neighbouring residuals. (0, 0) for too few steps.
    """
    count = len(entries)
    if count < MIN_STEPS:
        return 0.0, 0.0
    losses, weights = [entry["loss"] for entry in entries], [max(entry["tokens"], 1.0) for entry in entries]
    total = math.fsum(weights)
    middle = math.fsum(weight * step for step, weight in enumerate(weights)) / total
    mean = math.fsum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / total
    steps = [step - middle for step in range(count)]
    squares = math.fsum(weight * step**2 for weight, step in zip(weights, steps, strict=True))
    slope = (
        math.fsum(w * step * (loss - mean) for w, step, loss in zip(weights, steps, losses, strict=True))
        / squares
    )
    residuals = [
        math.sqrt(weight) * (loss - mean - slope * step)
        for weight, step, loss in zip(weights, steps, losses, strict=True)
    ]
    variance = math.fsum(residual**2 for residual in residuals)
    if not variance:
        return slope * (count - 1), math.copysign(math.inf, slope) if slope else 0.0
    neighbours = math.fsum(one * other for one, other in itertools.pairwise(residuals))
    correlation = min(max(neighbours / variance, 0.0), 0.95)
    error = math.sqrt(variance / (count - 2) / squares * (1 + correlation) / (1 - correlation))
    return slope * (count - 1), slope / error
