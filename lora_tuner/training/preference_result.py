"""Held-out figures of a run on preferences: accuracy and margin of base and adapter, with errors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from ..adapters.gains import HeldOutLoss, LossPair, paired_gain
from ..adapters.manifest import EvalResult
from ..adapters.preference_info import PairedFigure, PairsByLength, PreferenceInfo
from ..errors import DivergedError
from ..evaluation import held_out_loss
from .advice import lower_rate
from .loss_result import measure_pair
from .objectives import PreferenceObjective
from .reference import measure_reference
from .setup import TrainingSetup

Values = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]
Estimate = Callable[[Values], tuple[float, float | None]]  # mean and standard error
CLEAR_LOSS = 0.02  # share of the loss before by which that of chosen answers may rise without a warning


@dataclass(frozen=True)
class HeldOutSides:
    """Losses of both sides of held-out preferences: of pairs row by row, of KTO those of desired and
    of undesired answers."""

    chosen: HeldOutLoss
    rejected: HeldOutLoss


def measure_before(setup: TrainingSetup) -> HeldOutSides | None:
    """Measure held-out preferences on the reference, if that is what the run changes."""
    if setup.parent is None or setup.objective is None or setup.objective.name == "orpo":
        return None
    return HeldOutSides(measure_reference(setup, setup.held_out), measure_reference(setup, setup.rejected))


def measure_after(
    setup: TrainingSetup, reference: HeldOutSides | None, chosen: LossPair
) -> tuple[PreferenceInfo, EvalResult, HeldOutLoss]:
    """Measure the rejected answers after the last step, and compare.

    Args:
        reference: that of `measure_before`; None if it is the base.
        chosen: losses of `setup.held_out`.

    Returns:
        The figures, the change on the chosen answers from the reference to the adapter, and the
        adapter's loss on the rejected ones.

    Raises:
        DivergedError: that is not finite.
    """
    rejected = measure_pair(setup, setup.rejected, setup.notify)
    held_out_loss.check_base_loss(setup.base, rejected[0])
    if not math.isfinite(loss := rejected[1].loss):
        lower = lower_rate(setup.learning_rate, 10, setup.method)
        raise DivergedError(
            f"The held-out loss of the rejected answers is {loss}. Try a lower learning rate than "
            f"{setup.learning_rate:g}, such as {lower:g} (--learning-rate)."
        )
    base, adapter = (HeldOutSides(*sides) for sides in zip(chosen, rejected, strict=True))
    reference = reference or base
    info = compare_sides(setup, base, reference, adapter)
    return info, paired_gain(reference.chosen, adapter.chosen), adapter.rejected


def compare_sides(
    setup: TrainingSetup, base: HeldOutSides, reference: HeldOutSides, adapter: HeldOutSides
) -> PreferenceInfo:
    """Compute the figures of a manifest from the losses of base, reference and adapter."""
    objective = setup.objective
    assert objective is not None
    is_kto = objective.name == "kto"
    groups, estimate = _groups(setup), make_estimate(setup)
    before, after = (_differences(_mean_logps(sides), is_kto) for sides in (base, adapter))
    wins = _wins(before), _wins(after)
    rewards = None
    if objective.name != "orpo":
        sums = [
            np.array(start.nll) - np.array(end.nll)
            for start, end in ((reference.chosen, adapter.chosen), (reference.rejected, adapter.rejected))
        ]
        rewards = estimate(_wins(_differences((sums[0], sums[1]), is_kto)))
    prompts = len(np.unique(groups))
    pairs = 0 if is_kto else len(groups)
    lengths = np.array(base.chosen.predictions[:pairs]) - np.array(base.rejected.predictions[:pairs])
    return PreferenceInfo(
        objective=objective.name,
        beta=objective.beta,
        reference=None if objective.name == "orpo" else "parent" if setup.parent else "base",
        weights=objective.weights if is_kto else None,
        rows=len(setup.held_out),
        undesired=len(setup.rejected) if is_kto else None,
        groups=prompts if prompts < len(groups) else None,
        accuracy=_paired(wins[0], wins[1], estimate),
        margin=_paired(before, after, estimate),
        reward_accuracy=rewards[0] if rewards else None,
        reward_error=rewards[1] if rewards else None,
        shorter=_by_length(wins, groups, lengths < 0),
        longer=_by_length(wins, groups, lengths > 0),
    )


def preferred(objective: PreferenceObjective, sides: HeldOutSides) -> Values:
    """Return 1 for each held-out pair of which the chosen answer has the higher mean log-probability
    per token, 0 for others, 0.5 for ties: (pairs,); of KTO for each with each, (desired, undesired)."""
    return _wins(_differences(_mean_logps(sides), objective.name == "kto"))


def make_estimate(setup: TrainingSetup) -> Estimate:
    """Return the function that estimates the mean of a figure of held-out pairs, and its error."""
    groups = _groups(setup)
    if setup.objective is not None and setup.objective.name == "kto":
        return partial(two_sample_mean, groups=groups)
    return partial(grouped_mean, groups=groups)


def preference_advice(info: PreferenceInfo, result: EvalResult, rate: float) -> str | None:
    """Return what was wrong and what to try; None if the run went well.

    Args:
        result: loss of reference and adapter on the chosen answers.
        rate: the peak learning rate.
    """
    change, error = info.accuracy.change, info.accuracy.change_error or 0.0
    if -result.gain > max(2 * (result.standard_error or 0.0), CLEAR_LOSS * result.base_loss):
        return (
            "The chosen answers themselves have become less likely: their held-out loss is "
            f"{result.base_loss:.3f} -> {result.loss:.3f}. "
            f"Try a lower learning rate than {rate:g}, such as {rate / 3:.1g} (--learning-rate), fewer steps, a higher "
            "--beta, or --objective orpo."
        )
    if change <= 2 * error and info.accuracy.adapter < 1:
        return (
            f"The held-out preference accuracy has not risen beyond its error ({info.accuracy.format_change()}): try "
            f"more steps, or a higher learning rate than {rate:g}, such as {3 * rate:.1g} (--learning-rate)."
        )
    return None


def grouped_mean(values: Values, groups: Groups) -> tuple[float, float | None]:
    """Mean and its standard error over groups, whose values are not independent; None for one group."""
    mean = float(values.mean())
    sums = np.bincount(groups, values - mean)
    count = len(sums)
    if count < 2:
        return mean, None
    return mean, float(np.sqrt((sums**2).sum() * count / (count - 1)) / len(values))


def two_sample_mean(values: Values, groups: Groups) -> tuple[float, float | None]:
    """Mean of a comparison of each desired answer with each undesired one, (desired, undesired), and
    its standard error (DeLong et al., 1988; over groups Obuchowski, 1997).

    Args:
        groups: number of the group of each desired answer, and then of each undesired one.
    """
    mean, (desired, undesired) = float(values.mean()), values.shape
    numbers = groups[:desired], groups[desired:]
    counts = [len(np.unique(of_kind)) for of_kind in (*numbers, groups)]
    if min(counts) < 2:
        return mean, None
    parts = (values.mean(1) - mean) / desired, (values.mean(0) - mean) / undesired
    width = int(groups.max()) + 1
    one, other = (np.bincount(*of_kind, width) for of_kind in zip(numbers, parts, strict=True))
    variance = 0.0
    for products, count in zip((one**2, other**2, 2 * one * other), counts, strict=True):
        variance += float(products.sum()) * count / (count - 1)
    return mean, math.sqrt(max(variance, 0.0))


def _paired(base: Values, adapter: Values, estimate: Estimate) -> PairedFigure:
    (before, before_error), (after, error) = estimate(base), estimate(adapter)
    change, change_error = estimate(adapter - base)
    return PairedFigure(
        base=before, base_error=before_error, adapter=after, error=error, change=change, change_error=change_error
    )


def _by_length(wins: Sequence[Values], groups: Groups, chosen: npt.NDArray[np.bool_]) -> PairsByLength | None:
    """Accuracy on some of the pairs; None without one, and of KTO, which has no pairs."""
    if not chosen.any():
        return None
    _, own_groups = np.unique(groups[chosen], return_inverse=True)
    base, adapter = (values[chosen] for values in wins)
    accuracy = _paired(base, adapter, lambda values: grouped_mean(values, own_groups))
    return PairsByLength(pairs=int(chosen.sum()), accuracy=accuracy)


def _groups(setup: TrainingSetup) -> Groups:
    """Number of the group of each held-out pair, of KTO of each answer: its own, if rows are
    grouped, else its prompt."""
    rows, texts = setup.held_out, setup.measured_texts
    if setup.objective is not None and setup.objective.name == "kto":
        rows, texts = [*rows, *setup.rejected], [*texts, *setup.rejected_texts]
    if groups := setup.dataset.groups_of(texts):
        return np.unique(groups, return_inverse=True)[1]
    prompts: dict[bytes, int] = {}
    numbers = []
    for index, row in enumerate(rows):
        start = int((row >= 0).argmax())
        prompt = row[:start].tobytes() if start else str(index).encode()  # without a prompt each is its own
        numbers.append(prompts.setdefault(prompt, len(prompts)))
    return np.array(numbers)


def _mean_logps(sides: HeldOutSides) -> tuple[Values, Values]:
    """Mean log-probability per token of each answer, in nats."""
    chosen, rejected = (
        -np.array(side.nll) / np.array(side.predictions) for side in (sides.chosen, sides.rejected)
    )
    return chosen, rejected


def _differences(sides: tuple[Values, Values], is_kto: bool) -> Values:
    """Chosen less rejected: (pairs,), and of KTO of each with each, (desired, undesired)."""
    chosen, rejected = sides
    return chosen[:, None] - rejected if is_kto else chosen - rejected


def _wins(differences: Values) -> Values:
    """1 where the chosen answer is preferred, 0 where the other one is, 0.5 where none is."""
    return np.where(differences == 0, 0.5, differences > 0).astype(np.float64)
