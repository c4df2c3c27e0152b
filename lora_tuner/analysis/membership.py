"""Membership inference with a real null distribution: tests of training rows against unseen rows.

Which row is unseen was decided by a hash. So if an adapter knows no single row, all divisions of
the units (rows, or groups of rows) into training and unseen ones were equally likely, and no other
assumption is needed: a permutation test is exact (Phipson and Smyth, Permutation p-values should
never be zero, 2010). A unit alone is tested by its rank among the unseen ones; these p-values are
positively dependent, so the procedure of Benjamini and Hochberg holds, also with an estimate of the
share of nulls (Bates et al., Testing for outliers with conformal p-values, 2023).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .compared_rows import ComparedRow

PERMUTATIONS, SEED = 9_999, 0
LEVEL = 0.05  # of a false alarm by any test of a report; and of false ones among the named units
TESTS = 2  # of a report
_NULL_P = 0.5  # p-values above it count as those of nulls


@dataclass(frozen=True)
class RowLoss:
    """Loss of base and adapter on a row, in nats, and its predicted tokens."""

    base: float
    adapter: float
    tokens: int


@dataclass(frozen=True)
class KnownRows:
    """P-values of both measures being as much larger on training rows as they are by chance.

    None where there are too few rows for a test. `rows` are the numbers of the training rows that
    are known better than unseen rows explain, best known first: none unless a test rejects.
    """

    verbatim_p: float | None = None
    excess_p: float | None = None
    rows: tuple[int, ...] = ()

    @property
    def is_alarm(self) -> bool:
        return is_significant(self.verbatim_p) or is_significant(self.excess_p)


def find_known_rows(
    rows: Sequence[ComparedRow], verbatim: Sequence[bool | None], losses: Sequence[RowLoss | None]
) -> KnownRows:
    """Test rows that chance alone has divided into training rows and unseen ones.

    Rows with near duplicates are left out.

    Args:
        verbatim: whether each row is continued verbatim; None for one that was not continued.
        losses: of each row; None for one that was not measured.
    """
    units = {unit: number for number, unit in enumerate(dict.fromkeys(row.unit for row in rows))}
    continued: dict[int, tuple[float, float]] = {}  # amount and size of each row
    gains: dict[int, tuple[float, float]] = {}
    for number, (is_verbatim, loss) in enumerate(zip(verbatim, losses, strict=True)):
        if is_verbatim is not None:
            continued[number] = float(is_verbatim), 1.0
        if loss is not None:
            gains[number] = loss.base - loss.adapter, float(loss.tokens)

    def sum_units(values: Mapping[int, tuple[float, float]]) -> Units:
        numbers = [number for number in values if not rows[number].copies]
        columns = [
            (units[rows[number].unit], rows[number].is_train, rows[number].stratum, *values[number])
            for number in numbers
        ]
        table = np.array(columns, dtype=np.float64).reshape(-1, 5)
        unit, is_train, stratum = table[:, :3].T.astype(np.int64)
        return sum_by_unit(unit, is_train > 0, stratum, table[:, 3], table[:, 4])

    unit_gains = sum_units(gains)
    known = KnownRows(permutation_test(sum_units(continued)), permutation_test(unit_gains))
    if not known.is_alarm:
        return known
    ranks = {number: rank for rank, number in enumerate(find_outliers(unit_gains))}
    known_rows = [
        number
        for number in gains
        if rows[number].is_train and not rows[number].copies and units[rows[number].unit] in ranks
    ]
    known_rows.sort(key=lambda number: ranks[units[rows[number].unit]])
    return replace(known, rows=tuple(known_rows))


@dataclass(frozen=True)
class Units:
    """Sums over the rows of each unit; all arrays have one value for each unit.

    A measure is a ratio of sums: `amounts` over `sizes`. Units are exchanged within their `strata`.
    """

    numbers: NDArray[np.int64]
    is_train: NDArray[np.bool_]
    strata: NDArray[np.int64]
    amounts: NDArray[np.float64]
    sizes: NDArray[np.float64]


def sum_by_unit(
    units: NDArray[np.int64],
    is_train: NDArray[np.bool_],
    strata: NDArray[np.int64],
    amounts: NDArray[np.float64],
    sizes: NDArray[np.float64],
) -> Units:
    """Sum the rows of each unit. All arguments have one value for each row, sizes above zero.

    Args:
        units: number of the unit; all of its rows are on one side.
        strata: of the rows; units with rows of other strata are exchanged with their like.
    """
    numbers, first, of_row = np.unique(units, return_index=True, return_inverse=True)
    of_unit = [tuple(np.unique(strata[of_row == unit]).tolist()) for unit in range(len(numbers))]
    known = {each: number for number, each in enumerate(sorted(set(of_unit)))}
    return Units(
        numbers,
        is_train[first],
        np.array([known[each] for each in of_unit], dtype=np.int64),
        np.bincount(of_row, amounts, len(numbers)).astype(np.float64),
        np.bincount(of_row, sizes, len(numbers)).astype(np.float64),
    )


def permutation_test(units: Units) -> float | None:
    """Return the p-value of the measure being as much larger on training units as it is, by chance.

    None for so few units that no measure would be significant.
    """
    divisions = 1
    for stratum in np.unique(units.strata):
        sides = units.is_train[units.strata == stratum]
        divisions *= math.comb(len(sides), int(sides.sum()))
    if not is_significant(1 / divisions):
        return None
    draws = np.random.default_rng(SEED)
    in_training = np.tile(units.is_train, (1 + PERMUTATIONS, 1))  # the first one is real
    for stratum in np.unique(units.strata):
        columns = np.flatnonzero(units.strata == stratum)
        in_training[1:, columns] = draws.permuted(in_training[1:, columns], axis=1)
    amounts, sizes = (in_training.astype(np.float64) @ sums for sums in (units.amounts, units.sizes))
    excess = amounts / sizes - (units.amounts.sum() - amounts) / (units.sizes.sum() - sizes)
    rounding = 1e-9 * float(np.abs(excess).max())
    return float((1 + np.sum(excess[1:] >= excess[0] - rounding)) / (1 + PERMUTATIONS))


def is_significant(p: float | None) -> bool:
    """Return whether one of the two tests of a report rejects: at 5% for both together (Bonferroni)."""
    return p is not None and p <= LEVEL / TESTS


def find_outliers(units: Units) -> list[int]:
    """Return the training units with a larger measure than unseen units explain, largest first.

    Of these at most 5% are expected to be false. Few can be found among many unless unseen units
    are many too: three of a hundred that exceed two hundred unseen ones may do so by chance.
    """
    scores = units.amounts / units.sizes
    p_values = np.ones(len(scores))
    for stratum in np.unique(units.strata):
        own = units.strata == stratum
        unseen = np.sort(scores[own & ~units.is_train])
        larger = len(unseen) - np.searchsorted(unseen, scores[own], side="left")
        p_values[own] = (1 + larger) / (1 + len(unseen))
    tested = np.flatnonzero(units.is_train)
    p_values = p_values[tested]
    share_of_nulls = min(1.0, (1 + np.sum(p_values > _NULL_P)) / (len(tested) * (1 - _NULL_P)))
    ranks = np.arange(1, len(tested) + 1)
    passed = np.flatnonzero(np.sort(p_values) <= LEVEL * ranks / (len(tested) * share_of_nulls))
    if not len(passed):
        return []
    found = tested[p_values <= np.sort(p_values)[passed[-1]]]
    return [int(number) for number in units.numbers[found[np.argsort(-scores[found], kind="stable")]]]
