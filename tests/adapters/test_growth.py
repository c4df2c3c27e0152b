"""Growth with rows, steps and rank: the intervals of a doubling cover what comes, and the words fit the figures."""

import math

import numpy as np
import pytest

from lora_tuner.adapters import growth
from lora_tuner.adapters.growth import GrowthPoint, fit_growth, predict_doubling
from lora_tuner.adapters.library import Library
from lora_tuner.adapters.report import Doubling

from .. import adapter_files

SIZES = [100, 200, 400, 800]
CURVES, SLOPE = 300, 0.04


def covered(curves, covariance, *, seed=0):
    """Share of the curves whose last gain is in the 80% interval, from noisy gains before it; mean width."""
    draw = np.random.default_rng(seed)
    inside, widths = [], []
    for curve in curves:
        errors = draw.multivariate_normal(np.zeros(len(curve) - 1), covariance)
        noise = draw.normal(0, growth.RUN_NOISE * max(curve), len(curve))
        gains = curve + noise
        sizes = [100 * 2**number for number in range(len(curve) - 1)]
        gain, error = predict_doubling(sizes, gains[:-1] + errors, covariance)
        inside.append(abs(gains[-1] - gains[-2] - gain) <= growth.INTERVAL * error)
        widths.append(2 * growth.INTERVAL * error)
    return np.mean(inside), np.mean(widths)


def paired(trials):
    """Covariance of gains on the same rows: a large error that they share, and a small one of each."""
    return 0.02**2 * np.ones((trials, trials)) + 0.002**2 * np.eye(trials)


@pytest.mark.parametrize("trials", [3, 4, 5])
def test_interval_covers_curves_of_its_process(trials):
    """Within 99.9% bounds of a binomial for 80% of 300. The size of the slopes is not known beforehand."""
    draw, curves = np.random.default_rng(trials), []
    for _ in range(CURVES):
        slope, slopes = SLOPE, []
        for _ in range(trials):
            slopes.append(slope)
            usual = np.sqrt(np.mean(np.square(slopes)))
            slope = growth.KEPT * slope + growth.CHANGE * usual * draw.normal()
        curves.append(0.2 + np.cumsum([0.0, *slopes]))
    share, _ = covered(curves, paired(trials))
    assert 0.72 <= share <= 0.88


def test_interval_covers_power_laws():
    """Curves with an asymptote, and by the logarithm; as wide as their slopes, not as their gains."""
    draw, curves = np.random.default_rng(1), []
    at = np.arange(5)
    for number in range(CURVES):
        height, rate = draw.uniform(0.05, 0.3), draw.uniform(0.1, 0.9)
        curves.append(height * (1.2 - 2.0 ** (-rate * at) if number % 3 else 0.3 + 0.15 * at))
    share, width = covered(curves, paired(4))
    assert share >= 0.72
    assert width < 0.06


def test_paired_errors_give_narrow_intervals():
    gains = [0.20, 0.23, 0.25]
    gain, error = predict_doubling([100, 200, 400], gains, 0.02**2 * np.ones((3, 3)))
    assert (gain, error) == pytest.approx(predict_doubling([100, 200, 400], gains, np.zeros((3, 3))))
    assert 0 < gain < 0.025
    _, unpaired = predict_doubling([100, 200, 400], gains, 0.02**2 * np.eye(3))
    assert unpaired > error
    wide = predict_doubling([100, 400, 1600], gains, np.zeros((3, 3)))[0]
    assert wide < gain  # the same gains over twice as many doublings
    assert predict_doubling([1, 2, 4], [0.1, 0.1, 0.1], np.zeros((3, 3)))[1] > 0


def grid(gain_of, rows=(100, 200, 400), steps=(10, 20, 40), rank=(8,)):
    points = [
        GrowthPoint(*values, gain_of(*values))
        for values in ((n, s, r) for n in rows for s in steps for r in rank)
    ]
    return fit_growth(points, (1e-8 * np.eye(len(points))).tolist())


def test_limit_is_named():
    figures = grid(lambda rows, steps, rank: 0.1 * math.log2(steps / 5))
    assert [(doubling.quantity, doubling.values) for doubling in figures.doublings] == [
        ("rows", [100, 200, 400]),
        ("steps", [10, 20, 40]),
    ]
    assert figures.sentences[0].startswith("Twice the rows (400 to 800): ")
    assert figures.sentences[-1] == "Steps limit you, not text."
    assert (
        grid(lambda rows, steps, rank: 0.1 * math.log2(rows / 50)).sentences[-1] == "Text limits you, not steps."
    )
    both = grid(lambda rows, steps, rank: 0.1 * math.log2(rows * steps / 250))
    assert both.sentences[-1] == "More text and more steps would help."
    assert grid(lambda rows, steps, rank: 0.1 * math.log2(rank), (9,), (9,), (2, 4, 8)).sentences == [
        figures.sentences[1].replace("steps (40 to 80)", "rank (8 to 16)"),
        "A higher rank would help.",
    ]
    flat = grid(lambda rows, steps, rank: 0.1 + 1e-3 * (rows == 200), steps=(10,))
    assert flat.sentences[-1] == "Nothing shows that more text would help."
    worse = grid(lambda rows, steps, rank: -0.1 * math.log2(steps / 5), rows=(9,))
    assert worse.sentences[-1] == "More steps would do harm."


def test_equal_epochs_are_one_quantity():
    points = [GrowthPoint(rows, math.ceil(rows / 9), 8, 0.1 * math.log2(rows / 10)) for rows in (20, 41, 79)]
    figures = fit_growth(points, np.zeros((3, 3)).tolist())
    assert [doubling.quantity for doubling in figures.doublings] == ["rows and steps"]
    assert figures.sentences[0].startswith("Twice the rows (79 to 158) with as many more steps: +")
    assert figures.sentences[-1] == "More text with more steps would help."


def test_few_or_other_trials_give_no_figures():
    assert fit_growth([], []) is None
    assert grid(lambda *_: 0.1, rows=(1, 2), steps=(1, 2)) is None
    # Of trials that differ in their learning rate alone the best one counts.
    points = [GrowthPoint(rows, 10, 8, gain) for rows in (100, 200) for gain in (0.1, 0.2)]
    assert fit_growth(points, np.zeros((4, 4)).tolist()) is None
    points += [GrowthPoint(400, 10, 8, 0.2)]
    assert fit_growth(points, np.zeros((5, 5)).tolist()).doublings[0].gains == [0.2, 0.2, 0.2]


def test_adapter_of_no_sweep_has_no_growth(tmp_path):
    adapter_files.write(tmp_path / "adapters" / "imdb", facts=adapter_files.manifest())
    library = Library(tmp_path / "adapters")
    assert growth.find_growth(library.get("imdb"), library) is None


def test_figures_are_finite():
    with pytest.raises(ValueError, match="finite"):
        Doubling(
            quantity="rows", values=[1, 2, 4], gains=[0, 0, 0], gain=0, standard_error=0, low=0, high=math.inf
        )
