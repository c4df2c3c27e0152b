"""Compare two samples of texts by their energy distance (Székely & Rizzo, 2013): a test, and
intervals.

The energy distance is a maximum mean discrepancy whose kernel is the distance itself (Sejdinovic et
al., Annals of Statistics 41, 2013), so it has no bandwidth to choose. Text i of all sides continues
the same opening, or has the same length: the test exchanges the two texts of a pair and nothing
else, so it is exact for any number of pairs. All estimates leave out pairs of texts of one opening
or group, so they have no bias: 0 is expected where both sides are written alike, however few or
short the texts are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
EXCHANGES, RESAMPLES, SEED = 1999, 1999, 0
_TIE = 1e-9  # equal statistics may differ by rounding


@dataclass(frozen=True)
class ExchangeTest:
    """p-values of a test of two samples.

    `p_value` is that of the largest difference, in one aspect or in all together; those of the
    `aspects` are corrected for the number of aspects.
    """

    p_value: float
    aspects: dict[str, float]


class Comparison:
    """Distances between the texts of several sides.

    Args:
        features: aspect -> features of shape (sides * rows, features), side by side.
        sides: number of sides.
        groups: group of each row; rows of one group are not independent. Empty: each row is one.
    """

    def __init__(self, features: Mapping[str, Array], sides: int, groups: Sequence[int] = ()) -> None:
        scaled = {name: _distances(values) for name, values in features.items()}
        self.aspects = [name for name, distances in scaled.items() if distances is not None]
        distances = np.stack([each for each in scaled.values() if each is not None])
        rows = distances.shape[-1] // sides
        # (aspects, sides, rows, sides, rows)
        self.distances = distances.reshape(len(self.aspects), sides, rows, sides, rows)
        self.groups = np.unique(groups if len(groups) else range(rows), return_inverse=True)[1]
        self.is_independent = (self.groups[:, None] != self.groups).astype(np.float64)

    def contrast(self, first: int, second: int) -> Array:
        """Return what each pair of rows adds to the energy distance of two sides: (aspects, rows,
        rows)."""
        between = self.distances[:, first, :, second]
        between = between + between.transpose(0, 2, 1)
        within = self.distances[:, first, :, first] + self.distances[:, second, :, second]
        contrast: Array = (between - within) * self.is_independent
        return contrast

    def energy(self, contrast: Array, weights: Array | None = None) -> Array:
        """Estimate the energy distance without bias, in units of the spread of distances.

        Args:
            weights: of the rows in each resample, (resamples, rows); by default one with all alike.

        Returns:
            (resamples, aspects).
        """
        weights = np.ones((1, len(self.groups))) if weights is None else weights
        sums = np.stack([((weights @ each) * weights).sum(1) for each in contrast], axis=1)
        totals = ((weights @ self.is_independent) * weights).sum(1)
        energy: Array = sums / np.maximum(totals, 1.0)[:, None]
        return energy

    def test(self, contrast: Array) -> ExchangeTest:
        """Test if two sides are written alike, by exchanging the texts of each row or of each group
        at random.

        Statistics are compared in units of their spread over the exchanges. Their largest counts
        (Westfall & Young, 1993), so a difference in one aspect is seen among others without any.
        """
        random = np.random.default_rng(SEED)
        signs = random.choice([-1.0, 1.0], (EXCHANGES, self.groups.max() + 1))[:, self.groups]
        signs = np.vstack([np.ones(len(self.groups)), signs])
        sums = [((signs @ each) * signs).sum(1) for each in contrast]
        scores = _standardize(np.stack(sums, axis=1))
        scores = np.hstack([scores, _standardize(scores.mean(1, keepdims=True))])
        largest = scores.max(1)
        by_score = (largest[:, None] >= scores[0] - _TIE).mean(0)
        p_values = dict(zip(self.aspects, by_score.tolist(), strict=False))
        return ExchangeTest(float(by_score.min()), p_values)

    def resample(self) -> Array:
        """Return the weights of the rows in bootstrap samples of rows or groups: (resamples,
        rows)."""
        random, count = np.random.default_rng(SEED), int(self.groups.max()) + 1
        weights = random.multinomial(count, np.full(count, 1 / count), RESAMPLES)
        return weights[:, self.groups].astype(np.float64)

    def witness(self, first: int, second: int) -> Array:
        """Return how much nearer each text of a side is to texts of its own side than to those of
        the second one, on average over the aspects: (rows,)."""
        totals = np.maximum(self.is_independent.sum(1), 1.0)
        own = self.distances[:, first, :, first].mean(0)
        other = self.distances[:, first, :, second].mean(0)
        witness: Array = ((other - own) * self.is_independent).sum(1) / totals
        return witness


def _distances(values: Array) -> Array | None:
    """Euclidean distances between standardized rows; None where all rows are alike.

    They are scaled by the spread that is left without row and column means. The energy distances of
    two alike sides vary in proportion to it, so that aspects of few features, which vary most, do
    not drown the others in a mean.
    """
    values = _standardize(values[:, values.std(0) > _TIE])
    squares = (values**2).sum(1)
    distances: Array = np.sqrt(np.maximum(squares[:, None] + squares - 2 * values @ values.T, 0.0))
    np.fill_diagonal(distances, 0.0)
    means = distances.mean(0)
    spread = (distances - means - means[:, None] + means.mean()).std()
    return distances / spread if spread > _TIE else None


def _standardize(values: Array) -> Array:
    spread = values.std(0)
    standardized: Array = (values - values.mean(0)) / np.where(spread > 0, spread, 1.0)
    return standardized
