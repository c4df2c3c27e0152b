"""The test and the estimates by which texts of several sides are compared."""

import math

import numpy as np
import pytest

from lora_tuner.analysis.style import estimate_share
from lora_tuner.analysis.style_features import text_features
from lora_tuner.analysis.two_sample import Comparison

from .. import tiny_models

LEVEL, DRAWS = 0.05, 200


def binomial_limit(draws=DRAWS, level=LEVEL, doubt=1e-3):
    """The number of hits that chance exceeds with a probability of at most `doubt`."""
    tail = 1.0
    for hits in range(draws + 1):
        tail -= math.comb(draws, hits) * level**hits * (1 - level) ** (draws - hits)
        if tail <= doubt:
            return hits
    raise AssertionError


def compare(first, second, groups=()):
    """Test two arrays of features, or two dictionaries of these by aspect."""
    sides = [side if isinstance(side, dict) else {"one": side} for side in (first, second)]
    features = {name: np.vstack([side[name] for side in sides]) for name in sides[0]}
    comparison = Comparison(features, 2, groups)
    return comparison, comparison.test(comparison.contrast(0, 1))


@pytest.fixture
def random():
    return np.random.default_rng(5)


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr("lora_tuner.analysis.two_sample.EXCHANGES", 199)


def test_halves_of_held_out_text_are_alike(random):
    features = text_features([text.partition(": ")[2] for text in tiny_models.reviews(48)])
    alarms = 0
    for _ in range(DRAWS):
        order = random.permutation(48)
        first, second = (
            {name: values[half] for name, values in features.items()} for half in (order[:24], order[24:])
        )
        alarms += compare(first, second)[1].p_value <= LEVEL
    assert alarms <= binomial_limit()


def test_heavy_tails_and_few_rows_keep_level(random):
    alarms = sum(compare(*random.standard_cauchy((2, 8, 3)))[1].p_value <= LEVEL for _ in range(DRAWS))
    assert 0 < alarms <= binomial_limit()


def test_grouped_rows_need_their_groups(random):
    groups = np.repeat(range(10), 4)
    alarms = np.zeros(2)
    for _ in range(100):
        of_groups = random.normal(size=(2, 10, 1))[:, groups]  # an author on one side, not on the other
        sides = of_groups + 0.3 * random.normal(size=(2, 40, 1))
        alarms += [compare(*sides, groups=given)[1].p_value <= LEVEL for given in (groups, ())]
    assert alarms[0] <= binomial_limit(100) < alarms[1]


def test_p_value_counts_exchanges(random, monkeypatch):
    monkeypatch.setattr("lora_tuner.analysis.two_sample.EXCHANGES", 20_000)
    first, second = random.normal(size=(2, 7, 2))
    comparison, test = compare(first + 0.8, second)
    contrast = comparison.contrast(0, 1)[0]
    signs = np.array(np.meshgrid(*[[-1, 1]] * 7)).reshape(7, -1).T
    sums = ((signs @ contrast) * signs).sum(1)
    assert test.p_value == pytest.approx((sums >= contrast.sum() - 1e-9).mean(), abs=0.01)
    assert len(signs) == 128


def test_difference_in_one_aspect_is_seen(random):
    first, second = ({str(number): random.normal(size=(40, 6)) for number in range(7)} for _ in range(2))
    second["3"] = second["3"] + 0.6
    _, test = compare(first, second)
    assert test.p_value == test.aspects["3"] == 1 / 200
    assert min(p for name, p in test.aspects.items() if name != "3") > LEVEL


def test_energy_is_that_of_definition(random):
    first, second = random.normal(size=(2, 5, 3))
    comparison, _ = compare(first, second)
    scaled = np.vstack([first, second])
    scaled = (scaled - scaled.mean(0)) / scaled.std(0)

    def mean_distance(one, other):
        return np.mean(
            [np.linalg.norm(one[i] - other[j]) for i in range(len(one)) for j in range(len(other)) if i != j]
        )

    one, other = scaled[:5], scaled[5:]
    energy = 2 * mean_distance(one, other) - mean_distance(one, one) - mean_distance(other, other)
    contrast = comparison.contrast(0, 1)
    distances = np.linalg.norm(scaled[:, None] - scaled, axis=-1)
    means = distances.mean(0)
    spread = (distances - means - means[:, None] + means.mean()).std()
    assert comparison.energy(contrast) == pytest.approx(energy / spread)
    weights = np.array([[2.0, 0, 1, 1, 1]])  # row 0 twice: no pair of its two copies
    rows = [0, 0, 2, 3, 4]
    pairs = [(i, j) for i in rows for j in rows if i != j]
    expected = np.mean([contrast[0, i, j] for i, j in pairs])
    assert comparison.energy(contrast, weights) == pytest.approx(expected)


def test_energy_of_alike_sides_is_zero(random):
    energies = []
    for _ in range(100):
        comparison, _ = compare(*random.normal(size=(2, 12, 4)))
        energies.append(comparison.energy(comparison.contrast(0, 1))[0, 0])
    assert abs(np.mean(energies)) < 3 * np.std(energies) / 10


def test_share_of_way_is_covered(random, monkeypatch):
    monkeypatch.setattr("lora_tuner.analysis.two_sample.RESAMPLES", 199)
    shares, covered = [], 0
    for _ in range(50):
        sides = random.normal(size=(4, 48, 5))
        sides[1] += 0.4  # adapter, half of the way from the base
        sides[2] += 0.8
        comparison = Comparison({"one": sides.reshape(-1, 5)}, 4)
        weights = np.vstack([np.ones(48), comparison.resample()])
        energies = (comparison.energy(comparison.contrast(side, 0), weights)[:, 0] for side in (1, 2, 3))
        share, (low, high) = estimate_share(*energies)
        shares.append(share)
        covered += low <= 0.5 <= high
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
    assert 50 - covered <= binomial_limit(50)


def test_no_way_no_share(random):
    sides = random.normal(size=(4, 24, 5))
    comparison = Comparison({"one": sides.reshape(-1, 5)}, 4)
    weights = np.vstack([np.ones(24), comparison.resample()])
    energies = (comparison.energy(comparison.contrast(side, 0), weights)[:, 0] for side in (1, 2, 3))
    assert estimate_share(*energies) == (None, None)


def test_aspect_without_differences_is_left_out(random):
    first, second = ({"some": random.normal(size=(8, 2)), "none": np.zeros((8, 1))} for _ in range(2))
    comparison, test = compare(first, second)
    assert comparison.aspects == [*test.aspects] == ["some"]
