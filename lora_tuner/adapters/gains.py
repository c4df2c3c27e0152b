"""Held-out loss of rows, and the gain of an adapter over its base on them, with its error."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .manifest import EvalResult


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss of each row.

    `nll` is the summed negative log-likelihood in nats, `predictions` the number of predicted
    tokens, `groups` the number of the group of each row; empty if each row is one. `tokens` has the
    part of each token but the first, 0 for one that is not predicted; empty if it was cached.
    """

    nll: list[float]
    predictions: list[int]
    groups: list[int] = field(default_factory=list)
    tokens: list[npt.NDArray[np.float64]] = field(default_factory=list, compare=False, repr=False)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per predicted token, in nats."""
        return math.fsum(self.nll) / sum(self.predictions)

    def select(self, rows: Sequence[int]) -> "HeldOutLoss":
        """The loss of some of the rows."""
        nll, predictions = [self.nll[row] for row in rows], [self.predictions[row] for row in rows]
        return HeldOutLoss(nll, predictions, [self.groups[row] for row in rows] if self.groups else [])


LossPair = tuple[HeldOutLoss, HeldOutLoss]  # of the base, and of the adapter


def paired_gain(base: HeldOutLoss, adapter: HeldOutLoss) -> EvalResult:
    """Fall in loss from base to adapter, with its paired standard error, both in nats per token.

    The gain is a ratio of sums, Σ(difference) / Σ(predictions); its error is that of a ratio
    estimator over rows (Cochran, Sampling Techniques, 1977, section 6.3), or over the groups of
    `base`, whose rows are not independent. With one of them the error is unknown: None.
    """
    gain, residuals = _residuals(base, adapter)
    total, count = sum(base.predictions), len(residuals)
    squares = math.fsum(residual**2 for residual in residuals)
    return EvalResult(
        base_loss=base.loss,
        loss=adapter.loss,
        gain=gain,
        standard_error=math.sqrt(squares * count / (count - 1)) / total if count > 1 else None,
        rows=len(base.nll),
        tokens=total,
        groups=count if base.groups else None,
    )


def gain_covariance(base: HeldOutLoss, adapters: Sequence[HeldOutLoss]) -> list[list[float]] | None:
    """Covariance of the gains of several adapters on the same rows, as `paired_gain` has their variances.

    Returns:
        (adapters, adapters), in squared nats per token; None for one row or group.
    """
    residuals = [_residuals(base, adapter)[1] for adapter in adapters]
    count = len(residuals[0])
    if count < 2:
        return None
    scale = count / (count - 1) / sum(base.predictions) ** 2
    return [[scale * math.fsum(map(operator.mul, one, other)) for other in residuals] for one in residuals]


def _residuals(base: HeldOutLoss, adapter: HeldOutLoss) -> tuple[float, list[float]]:
    """Return the gain, and how much more than it each row, or each group, has gained in nats."""
    differences = [before - after for before, after in zip(base.nll, adapter.nll, strict=True)]
    gain = math.fsum(differences) / sum(base.predictions)
    by_group: dict[int, list[float]] = {}
    groups = base.groups or range(len(differences))
    for group, difference, tokens in zip(groups, differences, base.predictions, strict=True):
        by_group.setdefault(group, []).append(difference - gain * tokens)
    return gain, [math.fsum(residuals) for residuals in by_group.values()]


def gain_on(rows: Sequence[int], base: HeldOutLoss, adapter: HeldOutLoss) -> EvalResult | None:
    """`paired_gain` on some of the rows; None without rows."""
    return paired_gain(base.select(rows), adapter.select(rows)) if rows else None
