"""Tests of training rows against unseen rows."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from lora_tuner.analysis import membership
from lora_tuner.analysis.compared_rows import ComparedRow
from lora_tuner.analysis.membership import RowLoss, Units, find_known_rows, find_outliers, sum_by_unit


def binomial_bound(draws, level, doubt=0.001):
    """The largest number of successes that is not rarer than `doubt`."""
    tail = 1.0
    for count in range(draws + 1):
        tail -= math.comb(draws, count) * level**count * (1 - level) ** (draws - count)
        if tail < doubt:
            return count
    return draws


def rows_of(units, *, training, strata=None):
    """Rows with the names of their units, of which some are of training."""
    return [
        ComparedRow(f"row {number}", unit, stratum, "rows.csv", unit in training)
        for number, (unit, stratum) in enumerate(zip(units, strata or [0] * len(units), strict=True))
    ]


def losses_of(gains, tokens=100):
    return [RowLoss(3.0 * tokens, (3.0 - gain) * tokens, tokens) for gain in gains]


def test_false_alarms_are_within_level(monkeypatch):
    """In 200 draws: rows with heavy tails, and groups whose rows are alike."""
    monkeypatch.setattr(membership, "PERMUTATIONS", 199)
    draws = np.random.default_rng(5)
    alarms = named = 0
    for _ in range(200):
        units = [f"unit {number}" for number in range(30) for _ in range(draws.integers(1, 6))]
        values = {unit: draws.standard_t(2) for unit in units}
        gains = [values[unit] + 0.1 * draws.normal() for unit in units]
        training = {f"unit {number}" for number in draws.permutation(30)[:15]}
        are_verbatim = [bool(values[unit] > 1) for unit in units]
        known = find_known_rows(rows_of(units, training=training), are_verbatim, losses_of(gains))
        alarms += known.is_alarm
        named += bool(known.rows)
    assert alarms <= binomial_bound(200, membership.LEVEL)
    assert named <= alarms


def test_grouped_rows_need_units(monkeypatch):
    """If rows of a group were exchanged one by one, groups that are alike would be taken for memory."""
    monkeypatch.setattr(membership, "PERMUTATIONS", 199)
    draws, alarms = np.random.default_rng(6), 0
    for _ in range(50):
        values = draws.normal(size=16)
        training = {f"row {number}" for number in range(128) if number % 16 < 8}
        rows = rows_of([f"row {number}" for number in range(128)], training=training)
        gains = [values[number % 16] for number in range(128)]
        alarms += find_known_rows(rows, [None] * 128, losses_of(gains)).is_alarm
    assert alarms > binomial_bound(50, membership.LEVEL)


def test_p_value_is_exact():
    """Against all divisions, of rows of different lengths."""
    draws = np.random.default_rng(1)
    amounts, sizes = draws.normal(size=9), draws.uniform(1, 5, size=9)
    is_train = np.arange(9) < 5
    units = sum_by_unit(np.arange(9), is_train, np.zeros(9, int), amounts, sizes)

    def excess(chosen):
        inside = np.isin(np.arange(9), chosen)
        return amounts[inside].sum() / sizes[inside].sum() - amounts[~inside].sum() / sizes[~inside].sum()

    divisions = [excess(chosen) for chosen in itertools.combinations(range(9), 5)]
    exact = np.mean([other >= excess(range(5)) - 1e-12 for other in divisions])
    assert membership.permutation_test(units) == pytest.approx(exact, abs=4 * math.sqrt(0.25 / 9_999))


def test_datasets_are_compared_alone():
    """Training has more rows of a dataset with a larger gain."""
    strata = [0] * 60 + [1] * 60
    numbers = range(120)
    training = {f"unit {number}" for number in numbers if number < 50 or number >= 110}
    gains = [(number < 60) + 0.1 * ((number * 37) % 11) for number in numbers]
    rows = rows_of([f"unit {number}" for number in numbers], training=training, strata=strata)
    known = find_known_rows(rows, [None] * 120, losses_of(gains))
    assert known.excess_p > 0.05
    together = [dataclasses.replace(row, stratum=0) for row in rows]
    assert find_known_rows(together, [None] * 120, losses_of(gains)).excess_p < 0.001


def test_memorized_rows_are_named():
    """12 of 40 training rows stand out of 200 unseen ones; one with near duplicates is not compared."""
    draws = np.random.default_rng(2)
    units = [f"unit {number}" for number in range(240)]
    rows = rows_of(units, training={*units[:40]})
    rows[0] = dataclasses.replace(rows[0], copies=1)
    gains = [3.0 - number / 100 if number < 13 else draws.normal(0.3, 0.1) for number in range(240)]
    known = find_known_rows(rows, [number < 13 for number in range(240)], losses_of(gains))
    assert known.verbatim_p <= 0.001
    assert known.excess_p <= 0.001
    assert {*range(1, 13)} <= {*known.rows}
    assert known.rows[:12] == tuple(range(1, 13))
    assert len(known.rows) <= 14


def test_few_unseen_rows_name_rows():
    units = [f"unit {number}" for number in range(25)]
    gains = [2.0 if number < 20 else 0.1 for number in range(25)]
    rows = rows_of(units, training={*units[:20]})
    known = find_known_rows(rows, [None] * 25, losses_of(gains))
    assert known.excess_p <= 0.001
    assert len(known.rows) == 20
    few = [row for number, row in enumerate(rows) if number in (0, 1, 2, 20, 21)]
    assert find_known_rows(few, [None] * 5, losses_of([2.0] * 3 + [0.1] * 2)) == membership.KnownRows()


@pytest.mark.parametrize(("training", "unseen"), [(20, 5), (40, 40), (10, 100)])
def test_named_rows_are_seldom_false(training, unseen):
    """Of rows that nobody has learned, and with half of them learned; in 1,000 draws each."""
    draws, count = np.random.default_rng(3), training + unseen
    is_train, learned = np.arange(count) < training, np.arange(count) < training // 2
    false_shares = []
    for shift in (0.0, 9.0):
        shares = []
        for _ in range(1_000):
            scores = draws.normal(size=count) + shift * learned
            units = Units(np.arange(count), is_train, np.zeros(count, int), scores, np.ones(count))
            found = find_outliers(units)
            false = sum(shift == 0 or not learned[number] for number in found)
            shares.append(false / max(len(found), 1))
        false_shares.append(np.mean(shares))
    assert max(false_shares) <= membership.LEVEL + 4 * math.sqrt(membership.LEVEL / 1_000)
